"""What bits cost every format, and what equalisation between its factors gives back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from format_quality import best
from quantized_models import STAGES, Models
from torch import nn

from autorank import formats
from autorank.evaluate import evaluate
from autorank.fitcache import FitCache
from autorank.plan import apply
from autorank.quant import calibrate, with_bits
from autorank.solvers import whitening
from autorank.types import Plan

SHOWN = ("naive", "+ equalise", "all but equalise", "+ rounding")
"""Of quantized_models.STAGES; the last one is what autorank does."""


def by_format(models: Models, share: float, names: list[str]) -> list[dict[str, Any]]:
    """Print accuracy on the validation data with every convolution in one format and bits, without any training."""
    task, dense, specs = models.task, models.dense, models.profiled.layers
    inputs = (batch.inputs for batch in task.calibration_batches(512, 64))
    stats, cache = whitening.collect(dense, specs, inputs), FitCache(None)
    weights = {spec.name: dense.get_submodule(spec.name).weight.detach() for spec in specs}
    found = []
    print(f"{'':<15}{'float':>8}" + "".join(f"{f'W{bits}A8 {name}':>24}" for bits in (8, 4) for name in SHOWN))
    for name in names:
        choices = {}
        for spec in specs:
            if spec.kind != "conv2d":
                continue
            fit = best(formats.get(name), weights[spec.name], spec, stats[spec.name], "input", share, "macs", cache)
            if fit is not None:
                choices[spec.name] = fit.choice
        model, _ = apply(dense, Plan.of(choices), specs=specs, stats=stats, cache=cache)
        row: dict[str, Any] = {"format": name, "share": share, "layers": len(choices), "float": _score(models, model)}
        for bits in (8, 4):
            plan = Plan.of(
                {name: replace(choice, weight_bits=bits, activation_bits=8) for name, choice in choices.items()}
            )
            for stage in SHOWN:
                quantized = with_bits(model, plan)
                calibrate(quantized, (batch.inputs for batch in task.calibration_batches(512, 128)), STAGES[stage])
                row[f"W{bits}A8 {stage}"] = _score(models, quantized)
        found.append(row)
        print(f"{name:<15}{row['float']:>8.2f}" + "".join(f"{row[key]:>24.2f}" for key in list(row)[4:]), flush=True)
    return found


def _score(models: Models, model: nn.Module) -> float:
    return evaluate(model, models.task, "validation").score
