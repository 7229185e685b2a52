"""AIMET's automatic greedy spatial SVD: the ranks that it chooses at several budgets of MACs, as plans of autorank.

AIMET scores every layer at nine ratios on the validation images, alone, and then takes for all layers the smallest
ratio whose score is at least a common one, found by bisection. The scores depend on no budget, so they are computed
once and handed on by AIMET's own option. What it compresses is measured like everything else: MACs of the running
model, accuracy before and after batch-norm re-estimation, and the largest difference of its outputs to those of the
plan written down, spatial SVD of the same ranks without whitening.

python benchmarks/peers/aimet_svd.py [--quick] [--task cifar] [--ratios 0.5,0.2] [--out FOLDER]
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from surroundings import prepare

LIBRARY = prepare()

import torch  # noqa: E402
from aimet_torch.common.defs import CompressionScheme, CostMetric, GreedySelectionParameters  # noqa: E402
from aimet_torch.compress import ModelCompressor  # noqa: E402
from aimet_torch.defs import SpatialSvdParameters  # noqa: E402
from efficiency_tasks import load  # noqa: E402
from harness import arguments, finish  # noqa: E402
from peer_figures import figures, write  # noqa: E402
from torch import nn  # noqa: E402

from autorank.evaluate import evaluate  # noqa: E402
from autorank.tasks import Task  # noqa: E402
from autorank.types import Choice, Plan  # noqa: E402

SCORES = "data/greedy_selection_eval_scores_dict.pkl"


def compress(task: Task, ratio: float, scores: str | None, candidates: int) -> nn.Module:
    """Return AIMET's compressed copy of the task's model."""
    greedy = GreedySelectionParameters(
        target_comp_ratio=ratio, num_comp_ratio_candidates=candidates, saved_eval_scores_dict=scores
    )
    auto = SpatialSvdParameters.AutoModeParams(greedy, modules_to_ignore=[])

    def score(model: nn.Module, _iterations: int | None, use_cuda: bool = False) -> float:
        return evaluate(model, task, "validation").score

    model, _ = ModelCompressor.compress_model(
        task.model(),
        eval_callback=score,
        eval_iterations=None,
        input_shape=tuple(task.example_inputs[0][:1].shape),
        compress_scheme=CompressionScheme.spatial_svd,
        cost_metric=CostMetric.mac,
        parameters=SpatialSvdParameters(SpatialSvdParameters.Mode.auto, auto),
    )
    return model.eval()


def plan_of(dense: nn.Module, compressed: nn.Module) -> Plan:
    """Return the plan that says what AIMET did: (K1 × 1) first, then (1 × K2), of the rank found in its layers."""
    there = dict(compressed.named_modules())
    choices = {}
    for name, module in dense.named_modules():
        pair = there.get(name)
        if isinstance(module, nn.Conv2d) and isinstance(pair, nn.Sequential):
            first = pair[0]
            assert isinstance(first, nn.Conv2d)
            assert first.kernel_size[1] == 1
            choices[name] = Choice("spatial_svd", (first.out_channels,), (("first", "h"), ("whiten", "none")))
    return Plan.of(choices)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("digits", "cifar"), default="cifar")
    parser.add_argument("--ratios", default="0.9,0.8,0.7,0.6,0.5,0.4,0.35,0.3,0.2")
    parser.add_argument("--validation", type=int)
    parser.add_argument("--candidates", type=int, default=10, help="of AIMET; 10 is its default")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for aimet_<task>_<ratio>.json")
    args = parser.parse_args()
    if args.quick:
        args.task, args.ratios, args.candidates = "digits", "0.5", 4
    torch.set_num_threads(1)
    logging.disable(logging.INFO)  # AIMET tells every score
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    task = load(args.task, args.shared.resolve(), out, args.validation)
    dense = task.model()
    layers = sum(isinstance(module, nn.Conv2d) for module in dense.modules())
    rows: list[dict[str, Any]] = []
    # AIMET writes its scores below the current directory.
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        scores, table_s = None, 0.0
        for text in args.ratios.split(","):
            begun = time.process_time()  # one thread: what a machine does besides is not counted
            compressed = compress(task, float(text), scores, args.candidates)
            seconds = time.process_time() - begun
            if scores is None:
                scores, table_s = str(Path(scratch) / SCORES), seconds
            row = {
                "peer": "aimet",
                "asked": float(text),
                "seconds": seconds,
                "seconds_of_scores": table_s,
                "evaluations_of_scores": layers * (args.candidates - 1),
            }
            row |= figures(task, args.task, dense, compressed, plan_of(dense, compressed))
            write(row, out / f"aimet_{args.task}_{text}.json")
            rows.append(row)
    finish(args, {"rows": rows})


if __name__ == "__main__":
    main()
