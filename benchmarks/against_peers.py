"""The plans of other tools beside autorank's at the same measured MACs, in one run: accuracy before and after training.

The peers' plans are those that benchmarks/peers wrote, in an environment of their own; what they found last is kept in
peers/found.json. MACs are those of the peer's own model; the network here is autorank's with the peer's ranks, which
for AIMET is the same one. For each, autorank's knapsack gives the plan of least predicted loss that needs no more MACs.
Both are fitted their own way, have their batch-norm statistics re-estimated where that lowers the validation loss, and
get the same fine-tune. Scores are those of the test file; the ratio is points of accuracy lost by the peer over those
lost by autorank.

python benchmarks/against_peers.py [--quick] [--json FILE] [--task cifar|digits] [--steps 0,391]
    [--peers aimet,tensorly-tucker] [--targets 0.7,0.5,0.35,0.2] [--space FILE] [--fit apart|ordered] [--seed 0]
    [--found FILE]
"""

from __future__ import annotations

import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from harness import arguments, finish
from quality import EPOCH_BATCH, Plans, load, started
from torch import nn

from autorank.evaluate import evaluate
from autorank.fitcache import FitCache
from autorank.profiling import profile
from autorank.recover import Recovery, fine_tune
from autorank.teacher import Teacher
from autorank.types import Plan

HERE = Path(__file__).parent
NEAREST = 0.05
"""Farthest from a target that a peer's plan may be."""


def peers(args: Any) -> list[dict[str, Any]]:
    """Return what the peers found for the task, a row for each peer and target."""
    rows = [row for row in json.loads(args.found.read_text()) if row["task"] == args.task]
    chosen = []
    for name in args.peers.split(","):
        own = [row for row in rows if row["peer"] == name]
        for target in map(float, args.targets.split(",")):
            nearest = min(own, key=lambda row: abs(row["macs_kept"] - target), default=None)
            if nearest is not None and abs(nearest["macs_kept"] - target) <= NEAREST and nearest not in chosen:
                chosen.append(nearest)
    return chosen


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("cifar", "digits"), default="cifar")
    parser.add_argument("--steps", default="0", help="lengths of the fine-tune, batches of 128; 0: none")
    parser.add_argument("--peers", default="aimet,tensorly-tucker")
    parser.add_argument("--targets", default="0.7,0.5,0.35,0.2", help="MACs kept")
    parser.add_argument("--space", default=str(HERE / "efficiency_space.yaml"))
    parser.add_argument("--fit", choices=("apart", "ordered"), default="ordered", help="of autorank's plans")
    parser.add_argument("--predictor", default="snr")
    parser.add_argument("--calibration", type=int, default=512, help="images for the statistics of the layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation", type=int, default=1000)
    parser.add_argument("--test", type=int, help="only the first so many test images")
    parser.add_argument("--cache", type=Path, help="directory for fits")
    parser.add_argument("--found", type=Path, default=HERE / "peers" / "found.json")
    args = parser.parse_args()
    args.plans = []
    if args.quick:
        args.task, args.steps, args.targets, args.validation, args.space = "digits", "0,20", "0.35,0.2", 260, "small"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    task = load(args)
    split = "test" if task.size("test") else "validation"
    model = task.model()
    profiled = profile(model, task.example_inputs)
    begun = time.process_time()
    ours, cache = Plans(args, task, model, profiled), FitCache(args.cache)
    before_s = time.process_time() - begun
    dense = evaluate(model, task, split, limit=args.test).score
    print(f"dense: {dense:.2f} % on {args.test or task.size(split)} images; candidates fitted in {before_s:.0f} s")
    print(f"{'peer':<16}{'MACs kept, peer / ours':>24}{'steps':>7}{'accuracy, peer / ours':>24}{'lost, ratio':>13}")
    rows: list[dict[str, Any]] = []
    teachers: dict[int, Teacher] = {}
    done: dict[tuple[Plan, int], float] = {}

    def tuned(begin: nn.Module, plan: Plan, steps: int) -> float:
        """Return the score of a plan after a fine-tune; a plan that several peers are compared with is trained once."""
        if (plan, steps) not in done:
            other = copy.deepcopy(begin)
            recovery = Recovery(steps=steps, batch_size=EPOCH_BATCH)
            teacher = teachers.setdefault(steps, Teacher.build(task, recovery, args.seed))
            fine_tune(other, task, recovery, args.seed, teacher=teacher)
            done[plan, steps] = evaluate(other, task, split, limit=args.test).score
        return done[plan, steps]

    for peer in peers(args):
        theirs = Plan.from_json(peer["plan"])
        kept = peer["macs_kept"]
        mine = ours.at(kept) if kept >= ours.least else None
        if mine is None:
            print(f"{peer['peer']:<16}{kept:>24.3f}  autorank has no plan that cheap")
            continue
        begins = (
            started(task, model, theirs, ours, Recovery(), cache, ordered=False),
            started(task, model, mine, ours, Recovery(), cache),
        )
        own = ours.space.cost(mine).macs / profiled.dense.macs
        for steps in map(int, args.steps.split(",")):
            scores = [tuned(begin, plan, steps) for begin, plan in zip(begins, (theirs, mine), strict=True)]
            lost = [dense - score for score in scores]
            ratio = lost[0] / lost[1] if lost[1] > 0 else float("inf")
            print(
                f"{peer['peer']:<16}{f'{kept:.3f} / {own:.3f}':>24}{steps:>7}"
                f"{f'{scores[0]:.2f} / {scores[1]:.2f}':>24}{f'{ratio:.2f}×':>13}",
                flush=True,
            )
            rows.append(
                {
                    "peer": peer["peer"],
                    "macs_kept": {"peer": kept, "autorank": own},
                    "steps": steps,
                    "score": dict(zip(("peer", "autorank"), scores, strict=True)),
                    "ratio_of_losses": ratio,
                }
            )
    finish(args, {"dense": dense, "split": split, "candidates_s": before_s, "rows": rows})


if __name__ == "__main__":
    main()
