"""Decomposed and quantized networks beside each other: accuracy, bytes, bit operations, and time in ONNX Runtime.

For a share of the MACs the plan stands in quantized_plans.json (from benchmarks/quality.py for CIFAR-10, from
tensorly's Tucker ranks for the digits). It is fitted, fine-tuned, calibrated and trained with quantization as a trial
does it, with the same number of steps for every row; then written as ONNX, scored there and timed. *Naive* is the
fine-tuned model quantized with minima and maxima to the nearest level; the dense int8 reference is ONNX Runtime's own
`quantize_static`, in the same number format as autorank's file, beside autorank's.

python benchmarks/quantized.py [--quick] [--json FILE] [--work DIR] [--shares 0.5,0.35] [--steps 160]
    [--parts table,stages,orders,widths,formats]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, arguments, cifar, finish
from quantized_formats import by_format
from quantized_models import NAIVE, STAGES, Models
from quantized_speed import File, quantized_by_runtime, timed, widths, written
from torch import nn

from autorank import formats
from autorank.demo import MODEL, prepare_weights
from autorank.quant import QuantSettings
from autorank.quant.size import stored_bytes
from autorank.recover import Recovery
from autorank.tasks import Task, load_task
from autorank.types import DENSE, Plan, bit_operations

PARTS = ("table", "stages", "orders", "widths", "formats")
PLANS = Path(__file__).with_name("quantized_plans.json")


def load(args: Any, folder: Path) -> tuple[str, Task]:
    """Return the name of the task and the task."""
    if not args.quick:
        return "cifar", load_task(**cifar(args.shared), validation=1000)
    weights = folder / "digits-net.safetensors"
    if not weights.is_file():
        prepare_weights(weights)
    return "digits", load_task(model=MODEL, weights=weights, data="digits", validation=0.2)


def flags(description: str, shares: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that `prepared` reads."""
    parser = arguments(description)
    parser.add_argument("--work", type=Path, help="folder where models are kept; what is there is not made again")
    parser.add_argument("--shares", default=shares, help="of the MACs")
    parser.add_argument("--steps", type=int, default=160, help="of all recoveries together, batches of 128")
    return parser


@contextmanager
def prepared(args: argparse.Namespace) -> Iterator[tuple[Models, dict[float, Plan]]]:
    """Have what makes and keeps the models, and the plans of the shares that are asked for."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.work or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        name, task = load(args, folder)
        rows = [row for row in json.loads(PLANS.read_text()) if row["task"] == name]
        plans = {row["share"]: Plan.from_json(row["plan"]) for row in rows}
        models = Models(task, folder, Recovery(steps=args.steps, batch_size=128))
        yield models, {share: plans[share] for share in map(float, args.shares.split(","))}


def bops(models: Models, plan: Plan) -> int:
    """Return the bit operations of one example."""
    choices, specs = plan.choices, models.profiled.layers
    total = bit_operations(models.profiled.dense.macs - sum(spec.macs for spec in specs), None, None)
    for spec in specs:
        choice = choices.get(spec.name)
        if choice is None:
            total += bit_operations(spec.macs, None, None)
            continue
        kept = choice.format == DENSE
        macs = spec.macs if kept else formats.get(choice.format).cost(spec, choice.rank, choice.options).macs
        total += bit_operations(macs, choice.weight_bits, choice.activation_bits)
    return total


def main() -> None:
    parser = flags(__doc__.splitlines()[0], "0.5,0.35")
    parser.add_argument("--parts", default=",".join(PARTS))
    args = parser.parse_args()
    if args.quick:
        args.steps, args.shares, args.parts = 14, "0.35", "table"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    figures: dict[str, Any] = {"steps": args.steps}
    with prepared(args) as (models, plans):
        for part in args.parts.split(","):
            figures[part] = globals()[f"_{part}"](models, plans, models.folder)
    finish(args, figures)


def _table(models: Models, plans: dict[float, Plan], folder: Path) -> list[dict[str, Any]]:
    """Print the models beside each other."""
    ours = QuantSettings()
    steps = models.recovery.steps
    entries: list[tuple[str, nn.Module, Plan]] = [("dense float", models.dense, Plan())]
    dense = Plan()
    entries.append(("dense int8", models.quantized(dense, 8, 0.0, 1.0, ours), models.bits(dense, 8)))
    for share, plan in plans.items():
        entries.append((f"{share:g} float", models.tuned(plan, steps), plan))
        naive = models.quantized(plan, 8, 0.0, 1.0, NAIVE)
        entries.append((f"{share:g} int8 naive", naive, models.bits(plan, 8)))
        for bits in (8, 4):
            model = models.quantized(plan, bits, ours.qat, ours.qat_rate, ours)
            entries.append((f"{share:g} W{bits}A8 ours", model, models.bits(plan, bits)))
    files: list[File] = []
    for called, model, _ in entries:
        files += written(models.task, model, folder, called)
    files.append(quantized_by_runtime(models.task, folder, "dense float", "dense int8 by quantize_static"))
    times = timed([file.path for file in files], models.task)
    heads = (("model", 8), ("file", 8), ("bytes", 10), ("file, kB", 10), ("BOPs, M", 10), ("ms, 1", 9), ("ms, 32", 9))
    print(f"{'':<34}" + "".join(f"{head:>{width}}" for head, width in heads) + "  kernels")
    found = []
    known = {called: (model, plan) for called, model, plan in entries}
    for file in files:
        model, plan = known.get(file.row, (None, Plan()))
        row = {
            "row": file.called,
            "score": None if model is None else models.score(model, f"{file.row} {steps}"),
            "file_score": file.score(models.task),
            "bytes": None if model is None else stored_bytes(model),
            "file_bytes": file.path.stat().st_size,
            "bops": None if model is None else bops(models, plan),
            "ms": times[file.path],
            "kernels": file.kernels,
        }
        found.append(row)
        shown = ["" if row[key] is None else row[key] for key in ("score", "file_score", "bytes")]
        print(
            f"{row['row']:<34}{shown[0]:>8.6}{shown[1]:>8.6}{shown[2]:>10}{row['file_bytes'] / 1e3:>10.0f}"
            f"{(row['bops'] or 0) / 1e6:>10.0f}{row['ms'][1]:>9.3f}{row['ms'][32]:>9.2f}  {row['kernels']}",
            flush=True,
        )
    return found


def _stages(models: Models, plans: dict[float, Plan], folder: Path) -> list[dict[str, Any]]:
    """Print what each piece of the quantization after training does, without any training after it."""
    found = []
    for share, plan in plans.items():
        for bits in (8, 4):
            for name, settings in STAGES.items():
                model = models.quantized(plan, bits, 0.0, 1.0, settings)
                score = models.score(model, f"{share:g} W{bits}A8 ptq {name} {models.recovery.steps}")
                found.append({"share": share, "bits": bits, "stage": name, "score": score})
                print(f"{share:g} W{bits}A8 {name:<20}{score:>8.2f}", flush=True)
    return found


def _orders(models: Models, plans: dict[float, Plan], folder: Path) -> list[dict[str, Any]]:
    """Print what the share of steps with quantization and their rate do, all with the same number of steps."""
    found = []
    share = min(plans)
    for bits in (8, 4):
        for part, rate in ((0.0, 1.0), (0.3, 0.2), (0.3, 1.0), (1.0, 1.0)):
            model = models.quantized(plans[share], bits, part, rate, QuantSettings())
            score = models.score(model, f"{share:g} W{bits}A8 {part:g} at {rate:g} {models.recovery.steps}")
            found.append({"share": share, "bits": bits, "qat": part, "rate": rate, "score": score})
            said = f"{part:.0%} of the steps with quantization at {rate:g}"
            print(f"{share:g} W{bits}A8, {said}: {score:.2f}", flush=True)
    return found


def _widths(models: Models, plans: dict[float, Plan], folder: Path) -> list[dict[str, Any]]:
    """Print times of wider networks without training: from which width on decomposed whole numbers are faster."""
    return widths()


def _formats(models: Models, plans: dict[float, Plan], folder: Path) -> list[dict[str, Any]]:
    """Print what bits cost every format without training, at the largest share of the MACs."""
    return by_format(models, max(plans), formats.names())


if __name__ == "__main__":
    assert ROOT.is_dir()
    main()
