"""What bits cost every format, and what equalisation between its factors gives back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from format_quality import best
from quantized_models import STAGES, Models
from torch import Tensor, nn

from autorank import formats
from autorank.fitcache import FitCache
from autorank.plan import apply
from autorank.quant import calibrate, with_bits
from autorank.solvers import whitening
from autorank.types import Plan

SHOWN = ("naive", "+ equalise", "all but equalise", "+ rounding")
"""Of quantized_models.STAGES; the last one is what autorank does."""


def by_format(models: Models, share: float, names: list[str]) -> list[dict[str, Any]]:
    """Print what bits do to networks with every convolution in one format, on validation data, without any training.

    Batch-norm statistics are estimated again in floating point, as a trial does. The *error* is that of the outputs to
    the same network in floating point, squared, relative to the outputs' variance.
    """
    task, dense, specs = models.task, models.dense, models.profiled.layers
    inputs = (batch.inputs for batch in task.calibration_batches(512, 64))
    stats, cache = whitening.collect(dense, specs, inputs), FitCache(None)
    weights = {spec.name: dense.get_submodule(spec.name).weight.detach() for spec in specs}
    found = []
    print(f"{'accuracy, error':<17}{'float':>6}" + "".join(f"{f'W{b}A8 {name}':>24}" for b in (8, 4) for name in SHOWN))
    for name in names:
        choices = {}
        for spec in specs:
            if spec.kind != "conv2d":
                continue
            fit = best(formats.get(name), weights[spec.name], spec, stats[spec.name], "input", share, "macs", cache)
            if fit is not None:
                choices[spec.name] = fit.choice
        model = models.settled(apply(dense, Plan.of(choices), specs=specs, stats=stats, cache=cache)[0])
        wanted, score = _outputs(models, model)
        row: dict[str, Any] = {"format": name, "share": share, "layers": len(choices), "float": score}
        for bits in (8, 4):
            plan = Plan.of(
                {key: replace(choice, weight_bits=bits, activation_bits=8) for key, choice in choices.items()}
            )
            for stage in SHOWN:
                quantized = with_bits(model, plan)
                calibrate(quantized, (batch.inputs for batch in task.calibration_batches(512, 128)), STAGES[stage])
                outputs, score = _outputs(models, quantized)
                error = float((outputs - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean())
                row[f"W{bits}A8 {stage}"] = {"score": score, "error": error}
        found.append(row)
        cells = "".join(f"{cell['score']:>15.1f}{cell['error']:>9.4f}" for cell in list(row.values())[4:])
        print(f"{name:<17}{row['float']:>6.1f}{cells}", flush=True)
    return found


def _outputs(models: Models, model: nn.Module) -> tuple[Tensor, float]:
    """Return the outputs on the validation data, and their score."""
    batches = list(models.task.batches("validation"))
    with torch.no_grad():
        outputs = torch.cat([model(*batch.inputs) for batch in batches])
    return outputs, float(models.task.metric(outputs, torch.cat([batch.targets for batch in batches])))
