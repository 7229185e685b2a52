"""How much accuracy a compressed network keeps after a fine-tune, by share of the MACs and length of the fine-tune.

For each share of the MACs the plan comes from the knapsack over the candidates' predicted losses (no search), or from
--plans; it is fitted, its batch norms are re-estimated where that helps on validation data, and it is fine-tuned once
for every length, each time from the fit. ResNet-20 on CIFAR-10 is scored on the test file, which nothing else looks at.

python benchmarks/quality.py [--quick] [--json FILE] [--task cifar|digits] [--shares 0.5,0.35,0.28,0.2]
    [--steps 391,1955] [--seeds 0] [--recipe lr=0.05,batch_size=64] [--predictor snr] [--space default]
    [--fit apart|ordered] [--plans FILE ...]

Runs are kept in --json as they end; what the file already has is not run again, so shares, lengths and seeds can be
done in pieces. --steps counts batches of 128: with another batch size there are as many more, for the same images.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from harness import arguments, cifar, finish
from torch import nn
from whitening import statistics

from autorank.demo import MODEL, prepare_weights
from autorank.errortable import candidate_errors
from autorank.evaluate import evaluate
from autorank.fitcache import FitCache
from autorank.plan import apply
from autorank.profiling import profile
from autorank.recover import Recovery, fine_tune, reestimate_batch_norm
from autorank.sequential import apply_in_order
from autorank.solvers.whitening import LayerStats
from autorank.space import build_space, read_space
from autorank.strategies.catalog import Catalog
from autorank.strategies.predictor import Predictor
from autorank.tasks import Task, load_task
from autorank.teacher import Teacher
from autorank.types import Constraint, ModelProfile, Plan

EPOCH_BATCH = 128
SHARES = "0.5,0.35,0.28,0.2"
STEPS = "391,1955"
RECIPES: dict[str, dict[str, Any]] = {"default": {}}
"""Recipes by name: what differs from the defaults of `Recovery`."""


def recipe(text: str) -> dict[str, Any]:
    """Read ``default`` or ``lr=0.05,schedule=linear``; a name may stand first."""
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            found |= RECIPES[key]
            continue
        found[key] = value
        with contextlib.suppress(json.JSONDecodeError):
            found[key] = json.loads(value)
    return found


def load(args: argparse.Namespace) -> Task:
    """Return the task; the network of the digits is trained in seconds."""
    if args.task == "cifar":
        return load_task(**cifar(args.shared), validation=args.validation or 2000)
    with tempfile.TemporaryDirectory() as directory:
        weights = Path(directory) / "digits-net.safetensors"
        prepare_weights(weights)
        return load_task(model=MODEL, weights=weights, data="digits", validation=args.validation or 0.2)


class Plans:
    """A plan for each share of the MACs: the one of --plans that comes nearest from below, else the knapsack's."""

    def __init__(self, args: argparse.Namespace, task: Task, model: nn.Module, profiled: ModelProfile) -> None:
        self.profiled = profiled
        self.stats: Mapping[str, LayerStats] = statistics(task, model, profiled, args.calibration)[0]
        self.given = [Plan.from_json(json.loads(path.read_text())) for path in args.plans]
        space = build_space(read_space(args.space), profiled)
        if not self.given:
            errors = candidate_errors(model, space.layers, self.stats, args.cache, 0)
            space = space.with_errors(errors)
        self.space, self.kind = space, args.predictor
        self.least = Catalog(space, (), "macs_kept", 0).low
        self.batches = []
        if args.fit == "ordered":
            self.batches = [batch.inputs for batch in task.calibration_batches(args.calibration)]

    def at(self, share: float) -> Plan | None:
        """Return the plan for a share of the MACs."""
        if self.given:
            kept = {plan: self.space.cost(plan).macs / self.profiled.dense.macs for plan in self.given}
            return max(
                (plan for plan in kept if kept[plan] <= share + 0.005), key=lambda plan: kept[plan], default=None
            )
        catalog = Catalog(self.space, (Constraint("macs_kept", "<=", share),), "macs_kept", 0)
        vectors = Predictor(catalog, self.kind).front()
        return catalog.plan(max(vectors, key=catalog.share)) if vectors else None


def started(
    task: Task,
    model: nn.Module,
    plan: Plan,
    plans: Plans,
    recovery: Recovery,
    cache: FitCache,
    ordered: bool = True,
) -> nn.Module:
    """Return the fitted model, with the batch-norm statistics of a trial."""
    specs, stats = plans.profiled.layers, plans.stats
    if plans.batches and ordered:
        other, _ = apply_in_order(model, plan, plans.batches, specs=specs, stats=stats)
    else:
        other, _ = apply(model, plan, specs=specs, stats=stats, cache=cache)
    steps = -(-recovery.calibration // EPOCH_BATCH)
    again = reestimate_batch_norm(other, task.train_batches(steps, EPOCH_BATCH, 0), laid=task.channels_last())
    if again is None:
        return other
    losses = [evaluate(each, task, "validation", limit=1000).loss for each in (other, again)]
    return again if losses[1] < losses[0] else other


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("cifar", "digits"), default="cifar")
    parser.add_argument("--shares", default=SHARES, help="of the MACs, with commas between them")
    parser.add_argument("--steps", default=STEPS, help="lengths of the fine-tune in batches of 128")
    parser.add_argument("--seeds", default="0", help="of batches and augmentation")
    parser.add_argument("--recipe", default="default", help=f"{', '.join(RECIPES)}, or settings: lr=0.05,batch_size=64")
    parser.add_argument("--fit", choices=("apart", "ordered"), default="apart", help="ordered: autorank.sequential")
    parser.add_argument("--predictor", default="snr")
    parser.add_argument("--space", default="default")
    parser.add_argument("--plans", type=Path, nargs="*", default=[], help="plans as JSON files instead of the knapsack")
    parser.add_argument("--calibration", type=int, default=512, help="images for the statistics of the layers")
    parser.add_argument("--validation", type=int)
    parser.add_argument("--test", type=int, help="only the first so many test images")
    parser.add_argument("--cache", type=Path, help="directory for fits")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.quick:
        args.task, args.shares, args.steps, args.space = "digits", "0.35,0.2", "15,60", "small"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    task = load(args)
    split = "test" if task.size("test") else "validation"
    model = task.model()
    profiled = profile(model, task.example_inputs)
    plans, cache = Plans(args, task, model, profiled), FitCache(args.cache)
    dense = evaluate(model, task, split, args.device, limit=args.test).score
    print(f"dense: {dense:.2f} % on {args.test or task.size(split)} images ({split})\n")
    print(
        f"{'MACs kept':>9}{'steps':>8}{'seed':>6}{'fitted':>9}{'tuned':>9}{'change':>9}{'s':>8}  recipe: {args.recipe}"
    )
    runs = json.loads(args.json.read_text())["figures"]["runs"] if args.json and args.json.is_file() else []
    teachers: dict[tuple[int, int], Teacher] = {}

    def figures() -> dict[str, Any]:
        return {"dense": dense, "split": split, "images": args.test or task.size(split), "runs": runs}

    for share in map(float, args.shares.split(",")):
        plan = plans.at(share)
        if plan is None:
            print(f"{share:>9.2f} no plan is that cheap")
            continue
        begin: nn.Module | None = None
        for steps in sorted(map(int, args.steps.split(","))):
            for seed in map(int, args.seeds.split(",")):
                # In this order, so that what is dear comes last.
                recovery = Recovery(**{"steps": steps, "batch_size": EPOCH_BATCH, **recipe(args.recipe)})
                recovery = Recovery(**{**vars(recovery), "steps": max(1, steps * EPOCH_BATCH // recovery.batch_size)})
                key = {"share": share, "steps": steps, "seed": seed, "recipe": args.recipe, "fit": args.fit}
                key["plan"] = plan.plan_id
                known = next((run for run in runs if key.items() <= run.items()), None)
                if known is None:
                    begin = begin or started(task, model, plan, plans, recovery, cache).to(args.device)
                    begun = time.perf_counter()
                    tuned = copy.deepcopy(begin)
                    longest = max(map(int, args.steps.split(","))) * EPOCH_BATCH // recovery.batch_size
                    if (which := (recovery.batch_size, seed)) not in teachers:
                        teachers[which] = Teacher.build(
                            task, Recovery(**{**vars(recovery), "steps": longest}), seed, args.device
                        )
                    fine_tune(tuned, task, recovery, seed, args.device, teachers[which])
                    seconds = time.perf_counter() - begun
                    before, after = (
                        evaluate(each, task, split, args.device, limit=args.test) for each in (begin, tuned)
                    )
                    known = {
                        **key,
                        "macs_kept": plans.space.cost(plan).macs / profiled.dense.macs,
                        "fitted": before.score,
                        "tuned": after.score,
                        "change": after.score - dense,
                        "loss": after.loss,
                        "seconds": seconds,
                        "recovery": vars(recovery),
                        "layers": plan.to_json()["layers"],
                    }
                    runs.append(known)
                    if args.json:
                        args.json.write_text(json.dumps({"figures": figures()}, indent=1) + "\n")
                print(
                    f"{known['macs_kept']:>9.3f}{steps:>9}{seed:>9}{known['fitted']:>9.2f}{known['tuned']:>9.2f}"
                    f"{known['change']:>+9.2f}{known['seconds']:>9.0f}",
                    flush=True,
                )
    finish(args, figures())


if __name__ == "__main__":
    main()
