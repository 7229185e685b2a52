"""Uniform Tucker of tensorly-torch: every convolution in the same share of its parameters, fine-tuned like all others.

`FactorizedConv.from_conv` with the spatial modes at full rank and the factorised forward pass, the strongest of its
Tucker variants; the share is found by bisection so that the *measured* MACs, its multiplication of core and spatial
factors at every pass included, come nearest to each budget from below. The same ranks as a Tucker-2 plan of autorank
without whitening say how far apart the two are before any training. Then both wait for the same fine-tune: this script
trains tensorly-torch's own layers, and writes lines that `search_efficiency.py --summarise` reads.

python benchmarks/peers/tensorly_tucker.py [--quick] [--task cifar] [--ratios 0.5,0.2] [--out FOLDER]
    [--steps 800 --runs FILE]
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

from surroundings import prepare

LIBRARY = prepare()

import torch  # noqa: E402
from efficiency_runs import append, read, tuned  # noqa: E402
from efficiency_tasks import load  # noqa: E402
from harness import arguments, finish  # noqa: E402
from peer_figures import figures, recovered, write  # noqa: E402
from tltorch import FactorizedConv  # noqa: E402
from torch import nn  # noqa: E402

from autorank import measure  # noqa: E402
from autorank.evaluate import evaluate  # noqa: E402
from autorank.tasks import Task  # noqa: E402
from autorank.types import Choice, Plan  # noqa: E402

PEER = "tensorly-tucker"
_STEPS = 12


def factorized(dense: nn.Module, share: float, *, decompose: bool = True) -> tuple[nn.Module, Plan]:
    """Return a copy whose convolutions are tensorly-torch's at a share of their parameters, and the plan of its ranks.

    Parameters
    ----------
    dense : Module
    share : float
    decompose : bool
        False leaves the factors as they are allocated: enough to count.
    """
    model, choices = copy.deepcopy(dense), {}
    for name, conv in list(model.named_modules()):
        # Its input channels are too few to be worth two more convolutions.
        if not isinstance(conv, nn.Conv2d) or min(conv.in_channels, conv.out_channels) < 4:
            continue
        if conv.padding_mode != "zeros" or conv.groups != 1 or len(set(conv.stride)) != 1:
            raise SystemExit(f"{name}: tensorly-torch drops padding modes, groups and all strides but the first")
        layer = FactorizedConv.from_conv(
            conv,
            rank=share,
            factorization="tucker",
            implementation="factorized",
            fixed_rank_modes="spatial",
            decompose_weights=decompose,
            decomposition_kwargs={"init": "svd"} if decompose else {},
        )
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
        choices[name] = Choice("tucker2", tuple(layer.rank[:2]), (("whiten", "none"),))
    return model.eval(), Plan.of(choices)


def share_for(task: Task, dense: nn.Module, budget: float) -> float:
    """Return the share of the parameters at which the measured MACs come nearest to the budget from below."""
    whole, _ = measure.count(dense, task.example_inputs)
    low, high = 0.01, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        cost, _ = measure.count(factorized(dense, middle, decompose=False)[0], task.example_inputs)
        low, high = (middle, high) if cost.macs <= budget * whole.macs else (low, middle)
    return low


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("digits", "cifar"), default="cifar")
    parser.add_argument("--ratios", default="0.7,0.5,0.35,0.2")
    parser.add_argument("--validation", type=int)
    parser.add_argument("--steps", type=int, default=0, help="fine-tune steps; 0 trains nothing")
    parser.add_argument("--runs", type=Path, help="file of JSON lines of search_efficiency.py")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for tensorly_<task>_<ratio>.json")
    args = parser.parse_args()
    if args.quick:
        args.task, args.ratios, args.steps = "digits", "0.5", min(args.steps, 20)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    base = args.runs.resolve().parent if args.runs else args.out
    task = load(args.task, args.shared.resolve(), base, args.validation)
    dense = task.model()
    rows: list[dict[str, Any]] = []
    known = read(args.runs) if args.runs else []
    for text in args.ratios.split(","):
        budget = float(text)
        begun = time.process_time()
        model, plan = factorized(dense, share_for(task, dense, budget))
        row = {"peer": PEER, "asked": budget, "seconds": time.process_time() - begun}
        row |= figures(task, args.task, dense, model, plan)
        write(row, args.out / f"tensorly_{args.task}_{text}.json")
        rows.append(row)
        final = {"kind": "final", "task": args.task, "strategy": PEER, "target": budget, "long": args.steps}
        if not args.steps or any(all(line.get(k) == v for k, v in final.items()) for line in known):
            continue
        begun = time.perf_counter()
        after = recovered(task, args.task, model)
        better = evaluate(after, task, "validation").loss < evaluate(model, task, "validation").loss
        model = after if better else model
        final |= {"level": "none", "seed": 0, "sweep": "", "macs_kept": row["macs_kept"]}
        final["searched"] = evaluate(model, task, "validation").score
        final |= tuned(model, task, args.task, base, args.steps)
        final["seconds"] = time.perf_counter() - begun
        append(args.runs, final)
        print(f"  after {args.steps} steps: validation {final['validation']:.2f}, test {final['test']:.2f}", flush=True)
        rows.append(final)
    finish(args, {"rows": rows})


if __name__ == "__main__":
    main()
