"""What channels last is worth on this processor: seconds of evaluation and of training steps, in both memory formats.

ResNet-20 on CIFAR-10 images, dense and with every layer in one format at a share of its MACs; one thread. The ratio is
the time in the usual order over that in channels last, measured one after the other in one run.

python benchmarks/memory_format.py [--quick] [--json FILE] [--formats a,b] [--share 0.35] [--batch 128]
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from harness import arguments, cifar, finish
from torch import nn
from torch.nn import functional as F

from autorank import formats
from autorank.features import FeatureMatch
from autorank.memoryformat import lay_out
from autorank.plan import apply
from autorank.profiling import profile
from autorank.space import build_space, read_space
from autorank.tasks import load_task
from autorank.tasks.batch import Batch
from autorank.types import Plan


def seconds(work: Callable[[], None], repeats: int) -> float:
    """Return the median processor time of a piece of work, after one run that does not count."""
    work()
    found = []
    for _ in range(repeats):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return sorted(found)[repeats // 2]


def measured(model: nn.Module, dense: nn.Module, batch: Batch, repeats: int) -> list[float]:
    """Return seconds of an evaluation pass and of a training step with matched blocks."""
    match = FeatureMatch(model, dense)
    inputs = batch.inputs[0]

    def evaluation() -> None:
        with torch.no_grad():
            model.eval()(inputs)

    def step() -> None:
        model.train()
        loss = F.cross_entropy(model(inputs), batch.targets)
        match.teach((inputs,))
        (loss + 3.0 * match.loss()).backward()
        model.zero_grad(set_to_none=True)

    found = [seconds(evaluation, repeats), seconds(step, repeats)]
    match.close()
    return found


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--formats", default=",".join(formats.names()))
    parser.add_argument("--share", type=float, default=0.35, help="MACs kept by every layer")
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    names = args.formats.split(",")
    if args.quick:
        names, args.batch = ["spatial_svd", "tucker2"], 32
    torch.set_num_threads(1)
    task = load_task(**cifar(args.shared), validation=500)
    dense = task.model()
    profiled = profile(dense, task.example_inputs)
    batch = next(iter(task.train_batches(1, args.batch, 0)))
    figures: dict[str, dict[str, float]] = {}
    print(f"{'':<14}{'evaluation, ms':>22}{'ratio':>8}{'training step, ms':>22}{'ratio':>8}")
    for name in ["dense", *names]:
        model = copy.deepcopy(dense)
        if name != "dense":
            rules = {"formats": [name], "whiten": ["none"]}
            space = build_space(read_space({"version": 1, "defaults": rules}), profiled)
            choices = []
            for layer in space.layers:
                kept = [c for c in layer.candidates if c.cost.macs <= args.share * layer.spec.macs]
                if kept:
                    choices.append((layer.spec.name, max(kept, key=lambda c: c.cost.macs).choice))
            model, _ = apply(dense, Plan(tuple(choices)), specs=profiled.layers)
        rows = [
            measured(
                lay_out(copy.deepcopy(model), wanted),
                lay_out(copy.deepcopy(dense), wanted),
                batch,
                3 if args.quick else 7,
            )
            for wanted in (False, True)
        ]
        ratios = [usual / last for usual, last in zip(*rows, strict=True)]
        print(
            f"{name:<14}{f'{1e3 * rows[0][0]:.0f} / {1e3 * rows[1][0]:.0f}':>22}{ratios[0]:>7.2f}×"
            f"{f'{1e3 * rows[0][1]:.0f} / {1e3 * rows[1][1]:.0f}':>22}{ratios[1]:>7.2f}×",
            flush=True,
        )
        figures[name] = {"evaluation": ratios[0], "step": ratios[1]}
    finish(args, figures)


if __name__ == "__main__":
    main()
