"""Which prediction, made before any trial, tells good plans from bad ones; no training anywhere.

(a) Rank correlation of predictors with the measured rise of the loss: of single layers replaced, and of joint plans at
four shares of the MACs, half of them random, half knapsack plans of disturbed predictions. (b) Accuracy, before and
after batch norm is re-estimated, of the plans that a knapsack over each prediction picks.

On the ResNet-20 of --shared (test images: the network knows the training ones; nothing is chosen by them here), or on
digits where that is not there.

python benchmarks/predictors.py [--quick] [--json FILE] [--space default] [--images 2000] [--plans 64] [--cache DIR]
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import arguments, cifar, finish
from predictor_kinds import SUMS, Floats, Learned, Vector, smallest_largest, spearman
from torch import Tensor, nn
from torch.nn import functional
from whitening import statistics

from autorank.demo import MODEL, prepare_weights
from autorank.errortable import Table, candidate_errors, interpolated
from autorank.fitcache import FitCache
from autorank.fitestimate import families
from autorank.lossrise import measured_increases
from autorank.plan import apply
from autorank.profiling import profile
from autorank.progress import open_reporter
from autorank.recover import reestimate_batch_norm
from autorank.solvers.whitening import LayerStats
from autorank.space import SearchSpace, build_space, read_space
from autorank.strategies.catalog import Catalog
from autorank.strategies.mckp import front
from autorank.tasks import Task, load_task
from autorank.tasks.batch import Batch
from autorank.types import Errors

SHARES = (0.7, 0.5, 0.35, 0.2)
PICKED = ("weight error²", "output error²", "output snr", "K-FAC", "K-FAC snr", "K-FAC log signal")
"""The sums by which (b) picks plans."""
MEASURED, LARGEST = "measured, one layer alone", "largest output error"
BATCH = 250
ISSUE = (
    ("Tucker-2, plain, KL of one layer", (81.3, 55.1, 28.2), (81.6, 74.1, 60.0)),
    ("Tucker-2, input whitening, KL", (85.0, 74.6, 45.9), (84.3, 77.8, 64.8)),
    ("+ channel and spatial SVD, KL", (87.8, 83.1, 61.6), (83.7, 82.0, 76.7)),
    ("+ both orders, both whitenings, K-FAC", (87.3, 83.3, 70.6), (83.7, 83.7, 75.3)),
    ("AIMET 2.42, greedy spatial SVD", (82.8, 66.3, 27.9), (82.5, 78.6, 63.3)),
)
"""First figures on the same network and data (dense 88.0 %) at 0.7, 0.5 and 0.35: before and after batch norm."""


class Bench:
    """A network, its candidates, and how plans are measured."""

    def __init__(self, task: Task, space: str, images: int, examples: int, cache: Path, seed: int, norm: int) -> None:
        self.task, self.seed = task, seed
        self.model = task.model().eval()
        self.profile = profile(self.model, task.example_inputs)
        self.stats: dict[str, LayerStats]
        self.stats, _ = statistics(task, self.model, self.profile, examples)
        self.cache = FitCache(cache)
        plain = build_space(read_space(space), self.profile)
        begun = time.perf_counter()
        with open_reporter() as reporter:
            self.table = candidate_errors(self.model, plain.layers, self.stats, cache, seed, reporter, 1)
        self.seconds = {"errors": time.perf_counter() - begun}
        self.space: SearchSpace = plain.with_errors(self.table)
        self.catalog = Catalog(self.space, (), "macs_kept", seed)
        self.batches = list(task.batches("test", BATCH, limit=images))
        self.norm_batches = list(task.train_batches(-(-norm // 128), 128, seed))
        self.macs = [
            [float(layer.spec.macs), *(float(c.cost.macs) for c in layer.candidates)] for layer in plain.layers
        ]
        self.fixed = self.profile.dense.macs - sum(row[0] for row in self.macs)
        self.dense = self.measure(self.model)

    def measure(self, model: nn.Module, limit: int | None = None) -> tuple[float, float]:
        """Return mean loss and accuracy in percent on the images, or about the first `limit` of them."""
        loss, right, count = 0.0, 0, 0
        with torch.no_grad():
            for batch in self.batches[: None if limit is None else max(1, limit // BATCH)]:
                logits = model(*batch.inputs)
                loss += float(functional.cross_entropy(logits, batch.targets, reduction="sum"))
                right += int((logits.argmax(1) == batch.targets).sum())
                count += len(batch)
        return loss / count, 100 * right / count

    def decomposed(self, vector: Vector) -> nn.Module:
        """Return the network of a plan, not trained."""
        plan = replace(self.catalog.plan(vector), seed=self.seed)
        other, _ = apply(self.model, plan, specs=self.profile.layers, stats=self.stats, cache=self.cache)
        return other.eval()

    def both(self, vector: Vector, limit: int | None = None) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return loss and accuracy before and after batch norm is re-estimated."""
        other = self.decomposed(vector)
        again = reestimate_batch_norm(other, self.norm_batches)
        return self.measure(other, limit), self.measure(again if again is not None else other, limit)

    def values(self, table: Table, kind: str) -> list[list[float]]:
        """Return what every index of every layer adds to a sum; index 0 is dense."""
        add = SUMS[kind]
        return [
            [0.0, *(add(table[layer.spec.name, c.choice]) for c in layer.candidates)] for layer in self.space.layers
        ]

    def measured(self, images: int, knots: int) -> list[list[float]]:
        """Return the divergence from the dense predictions with one layer replaced, the ranks between interpolated."""
        ranked = [family for layer in self.space.layers for family in families(layer)]
        fitted = [family.spread(knots) for family in ranked]
        pairs = [(family.spec, c.choice) for family in fitted for c in family.candidates]
        order = {spec.name: i for i, spec in enumerate(self.profile.layers)}
        pairs.sort(key=lambda pair: order[pair[0].name])
        batches = [Batch(b.inputs, b.targets) for b in self.task.calibration_batches(images, 64)]

        def divergence(outputs: Tensor, dense: Tensor, targets: Tensor) -> Tensor:
            return functional.kl_div(
                outputs.log_softmax(1), dense.log_softmax(1), reduction="batchmean", log_target=True
            )

        begun = time.perf_counter()
        with open_reporter() as reporter:
            found = measured_increases(
                self.model,
                pairs,
                batches,
                divergence,
                stats=self.stats,
                cache=self.cache,
                seed=self.seed,
                reporter=reporter,
            )
        self.seconds["measured"] = time.perf_counter() - begun
        table: Table = {key: Errors(1.0, loss=max(rise, 1e-9)) for key, rise in found.values.items()}
        for family, some in zip(ranked, fitted, strict=True):
            table |= interpolated(family, some, table)
        return self.values(table, "K-FAC")

    def knapsack(self, values: Sequence[Sequence[float]], share: float) -> Vector:
        """Return the plan of least value within a share of the MACs."""
        budget = share * self.profile.dense.macs - self.fixed
        return [s for s in front([self.macs], values, limit=4000) if s.costs[0] <= budget][-1].indices

    def kept(self, vector: Vector) -> float:
        """Return the share of the network's MACs that a plan keeps."""
        return (self.fixed + sum(row[k] for row, k in zip(self.macs, vector, strict=True))) / self.profile.dense.macs


def terms(values: Sequence[Sequence[float]], vectors: Sequence[Vector]) -> Floats:
    """Return what each layer adds to each plan, plans × layers."""
    return np.asarray([[row[k] for row, k in zip(values, vector, strict=True)] for vector in vectors])


def plans(bench: Bench, count: int) -> list[tuple[float, Vector]]:
    """Return joint plans with their share of the MACs: random ones, and knapsack plans of disturbed predictions."""
    rng, found = random.Random(bench.seed), []
    values = bench.values(bench.table, "K-FAC snr")
    for i in range(count):
        share = SHARES[i % len(SHARES)]
        if (i // len(SHARES)) % 2:
            factors = [rng.lognormvariate(0, 1) for _ in values]
            disturbed = [
                [0.0, *(factor * value * rng.lognormvariate(0, 0.5) for value in row[1:])]
                for factor, row in zip(factors, values, strict=True)
            ]
            found.append((share, bench.knapsack(disturbed, share)))
        else:
            found.append((share, bench.catalog.spread(share, rng, 0.3)))
    return found


def singles(bench: Bench, all_values: dict[str, list[list[float]]], count: int, limit: int) -> dict[str, float]:
    """Return the rank correlations with the rise of the loss when one layer is replaced."""
    rng = random.Random(bench.seed)
    dense, _ = bench.measure(bench.model, limit)
    places, rises = [], []
    for i in range(count):
        layer = i % len(bench.space.layers)
        index = rng.randrange(1, len(bench.macs[layer]))
        vector = tuple(index if j == layer else 0 for j in range(len(bench.macs)))
        places.append((layer, index))
        rises.append(bench.measure(bench.decomposed(vector), limit)[0] - dense)
    return {name: spearman([values[i][k] for i, k in places], rises) for name, values in all_values.items()}


def joint(
    bench: Bench, all_values: dict[str, list[list[float]]], count: int, limit: int
) -> tuple[dict[str, dict[str, float]], dict[str, Floats]]:
    """Return, by predictor, the rank correlations with the losses of joint plans; and the factors learned from all."""
    chosen = plans(bench, count)
    shares = np.asarray([share for share, _ in chosen])
    good = np.asarray([(i // len(SHARES)) % 2 == 1 for i in range(count)])
    vectors = [vector for _, vector in chosen]
    dense, _ = bench.measure(bench.model, limit)
    found = [bench.both(vector, limit) for vector in vectors]
    before = np.asarray([b[0] for b, _ in found]) - dense
    best = np.asarray([min(b[0], a[0]) for b, a in found]) - dense
    rows: dict[str, dict[str, float]] = {}

    def row(predicted: Floats, which: Floats | slice = slice(None)) -> dict[str, float]:
        p, b, m, s, g = predicted, before[which], best[which], shares[which], good[which]
        within = [spearman(p[s == x], m[s == x]) for x in SHARES if (s == x).sum() > 3]
        near = [spearman(p[(s == x) & g], m[(s == x) & g]) for x in SHARES if ((s == x) & g).sum() > 3]
        return {
            "before": spearman(p, b),
            "best": spearman(p, m),
            "within a share": mean(within),
            "near the front": mean(near),
        }

    for name, values in all_values.items():
        rows[name] = row(terms(values, vectors).max(1) if name == LARGEST else terms(values, vectors).sum(1))
    learned: dict[str, Floats] = {}
    for name in ("K-FAC snr", MEASURED):
        matrix = terms(all_values[name], vectors)
        for pairs in (False, True):
            halves = []
            for draw in range(20):
                order = np.random.default_rng(draw).permutation(count)
                train, test = order[: count // 2], order[count // 2 :]
                model = Learned.fit(matrix[train], best[train], pairs)
                halves.append((row(model(matrix[test]), test), row(matrix[test].sum(1), test)))
            label = f"{name}, learned {'with pairs' if pairs else 'factors'}"
            rows[label] = {key: mean(half[0][key] for half in halves) for key in halves[0][0]}
            if not pairs:
                unlearned = {key: mean(half[1][key] for half in halves) for key in halves[0][1]}
                rows[f"{name}, the same halves unlearned"] = unlearned
                learned[label] = Learned.fit(matrix, best, False).factors
    return rows, learned


def mean(values: Iterable[float]) -> float:
    """Return the mean of those that are numbers: a half may hold too few plans of a share to be ranked."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def picked(bench: Bench, all_values: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """Return, by predictor, the accuracies of its plans."""
    rows = []
    for name, values in all_values.items():
        row: dict[str, Any] = {"predictor": name, "kept": [], "before": [], "after": []}
        for share in SHARES:
            budget = share * bench.profile.dense.macs - bench.fixed
            vector = smallest_largest(bench.macs, values, budget) if name == LARGEST else bench.knapsack(values, share)
            before, after = bench.both(vector)
            row["kept"].append(bench.kept(vector))
            row["before"].append(before[1])
            row["after"].append(after[1])
        rows.append(row)
        print(line(name, row["before"], row["after"]), flush=True)
    return rows


def line(name: str, before: Sequence[float], after: Sequence[float]) -> str:
    texts = [" / ".join(f"{x:5.1f}" for x in values) for values in (before, after)]
    return f"{name:<44} {texts[0]:<31} {texts[1]}"


def load(args: Any) -> Task:
    """Return the task: CIFAR-10 where it lies, else digits, whose network is trained in seconds."""
    if args.task == "cifar" or (args.task == "auto" and (args.shared / "models").is_dir()):
        return load_task(**cifar(args.shared), validation=2000)
    weights = args.cache / "digits-net.safetensors"
    if not weights.is_file():
        prepare_weights(weights)
    return load_task(model=MODEL, weights=weights, data="digits", validation=0.2)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("auto", "cifar", "digits"), default="auto")
    parser.add_argument("--space", default="default")
    parser.add_argument("--images", type=int, default=2000, help="scored in (b), and at most --losses of them in (a)")
    parser.add_argument("--losses", type=int, default=1000)
    parser.add_argument("--examples", type=int, default=512, help="for layer statistics")
    parser.add_argument("--plans", type=int, default=64)
    parser.add_argument("--singles", type=int, default=72)
    parser.add_argument("--measured", type=int, default=256, help="images for layers measured one at a time")
    parser.add_argument("--knots", type=int, default=4, help="ranks of a format that are measured")
    parser.add_argument("--norm", type=int, default=1024, help="images for batch norm")
    parser.add_argument("--cache", type=Path, help="keep fits here (default: a temporary folder)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    scratch = tempfile.TemporaryDirectory()
    args.cache = args.cache or Path(scratch.name)
    if args.quick:
        args.images, args.losses, args.examples, args.plans, args.singles = 250, 250, 64, 16, 18
        args.measured, args.knots, args.norm = 64, 2, 128
        if args.space == "default":
            args.space = "spatial_svd"
    bench = Bench(load(args), args.space, args.images, args.examples, args.cache, args.seed, args.norm)
    candidates = sum(len(layer.candidates) for layer in bench.space.layers)
    print(f"dense: {bench.dense[1]:.2f} % on {sum(map(len, bench.batches))} images; {candidates} candidates\n")
    all_values = {name: bench.values(bench.table, name) for name in SUMS}
    all_values[LARGEST] = bench.values(bench.table, "output error²")
    all_values[MEASURED] = bench.measured(args.measured, args.knots)

    alone = singles(bench, all_values, args.singles, args.losses)
    together, learned = joint(bench, all_values, args.plans, args.losses)
    print(
        "\n(a) rank correlation with the rise of the loss: of one layer alone; of joint plans, right after the fit, the"
    )
    print(
        "better of before and after batch norm, the same within each share of the MACs, and of the good half of these\n"
    )
    print(f"{'predictor':<44}{'alone':>7}{'before':>8}{'best':>7}{'within':>8}{'near':>7}")
    for name, row in together.items():
        first = f"{alone[name]:>7.2f}" if name in alone else f"{'':>7}"
        print(
            f"{name:<44}{first}{row['before']:>8.2f}{row['best']:>7.2f}{row['within a share']:>8.2f}"
            f"{row['near the front']:>7.2f}"
        )

    print(
        f"\n(b) accuracy of the knapsack's plans at {' / '.join(map(str, SHARES))} of the MACs, before and after "
        "batch norm is re-estimated\n"
    )
    names = ("output error²", "K-FAC snr") if args.quick else (*PICKED, LARGEST, MEASURED)
    chosen = {name: all_values[name] for name in names}
    for label, factors in () if args.quick else learned.items():
        base = all_values[label.split(", learned")[0]]
        chosen[label] = [[f * v for v in row] for f, row in zip(factors.tolist(), base, strict=True)]
    rows = picked(bench, chosen)
    if bench.profile.dense.macs == 40_551_040 or args.task == "cifar":
        print("\nfirst figures (dense 88.0 %):")
        for name, before, after in ISSUE:
            print(line(name, before, after))
    print(
        f"\nseconds: errors of all candidates {bench.seconds['errors']:.0f}, measured {bench.seconds['measured']:.0f}"
    )
    finish(args, {"dense": bench.dense[1], "alone": alone, "joint": together, "picked": rows, "seconds": bench.seconds})
    scratch.cleanup()


if __name__ == "__main__":
    main()
