"""Applying a plan to a model of the user's own, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autorank.errors import ModelError, PlanError
from autorank.plan import apply, check
from autorank.planfile import plan_of, read_plan
from autorank.profiling import profile
from autorank.quant import QuantSettings, calibrate
from autorank.solvers import whitening
from autorank.solvers.gradients import collect_gradients
from autorank.types import Plan


def compress(
    model: nn.Module | Callable[[], nn.Module],
    plan: Plan | Mapping[str, Any] | str | Path,
    *,
    calibration: Iterable[torch.Tensor | tuple[torch.Tensor, ...]] | None = None,
    loss: Callable[[Any], torch.Tensor] | None = None,
    quantization: QuantSettings | Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return a copy of the model in which the plan's layers are decomposed; the model itself is not changed.

    The factors are fitted to the model's weights. There is no fine-tune: `autorank.search` does that.

    Parameters
    ----------
    model : nn.Module, or a function that makes it
    plan : Plan, mapping or path
        A plan, its JSON form, or a ``plan.json``.
    calibration : iterable of Tensor or tuple of Tensor, optional
        Batches of model inputs; needed when a layer of the plan is whitened or has bits.
    loss : callable, optional
        From the model's outputs to one number, the losses of the batch's examples added up; needed when a layer has
        ``whiten=output`` or ``both``. As there are no labels, draw them from the model's own predictions, or take
        `autorank.solvers.gradients.fisher_loss`, which stands for all draws at once::

            generator = torch.Generator().manual_seed(0)
            compress(model, plan, calibration=batches, loss=lambda logits: fisher_loss(logits, generator))

    quantization : QuantSettings or mapping, optional
        How layers with bits are calibrated.

    Returns
    -------
    nn.Module
        On the model's device, in its mode (train or eval); layers with bits compute with quantized numbers.

    Raises
    ------
    PlanError
        The plan does not fit the model, or it whitens or has bits and there is no calibration data, or no loss.
    """
    settings = quantization
    if settings is not None and not isinstance(settings, QuantSettings):
        settings = QuantSettings.from_mapping(settings)
    plan = as_plan(plan)
    if not isinstance(model, nn.Module):
        model = model() if callable(model) else model
    if not isinstance(model, nn.Module):
        raise ModelError(f"compress takes a torch.nn.Module or a function that makes one, not {type(model).__name__}")
    check(model, plan)
    stats: Mapping[str, whitening.LayerStats] | None = None
    outputs = [name for name, choice in plan.layers if choice.whitens("output")]
    whitened = [name for name, choice in plan.layers if choice.whitens("input") or name in outputs]
    if loss is not None and not callable(loss):
        raise PlanError(f"loss must be a function of the model's outputs, not a {type(loss).__name__}")
    quantized = next((name for name, choice in plan.layers if choice.weight_bits is not None), None)
    if outputs and loss is None:
        raise PlanError(
            f"the output of layer {outputs[0]!r} is whitened, so the plan needs gradients of the loss: "
            "give loss=, a function from the model's outputs to the sum of the examples' losses"
            + (", and calibration=, an iterable of input batches" if calibration is None else "")
        )
    batches: list[tuple[torch.Tensor, ...]] = []
    if whitened or quantized is not None:
        why = (
            f"layer {whitened[0]!r} is whitened, so the plan needs statistics of its inputs"
            if whitened
            else f"layer {quantized!r} has bits, so the plan needs the ranges of its inputs"
        )
        batches = _batches(calibration, why)
        try:
            known = profile(model, batches[0]).layers
        except ModelError as error:
            raise PlanError(
                f"calibration must give batches of model inputs, a tensor or a tuple of them (no labels): {error}"
            ) from None
        called = {spec.name for spec in known}
        if unused := next((name for name in plan.choices if name not in called), None):
            raise PlanError(
                f"layer {unused!r} cannot be in the plan: on these inputs it is never called, or used otherwise, so "
                "what takes its place would not be run"
            )
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        specs = [spec for spec in known if spec.name in whitened]
        stats = whitening.collect(model, specs, batches, str(device)) if whitened else None
        if outputs and loss is not None and stats is not None:
            chosen = [spec for spec in specs if spec.name in outputs]
            gradients = collect_gradients(model, chosen, [(batch, loss) for batch in batches], device)
            stats = {name: replace(each, gradient=gradients.get(name)) for name, each in stats.items()}
    compressed, _ = apply(model, plan, stats=stats)
    if quantized is not None:
        calibrate(compressed, batches, settings)
    return compressed


def _batches(
    calibration: Iterable[torch.Tensor | tuple[torch.Tensor, ...]] | None, why: str
) -> list[tuple[torch.Tensor, ...]]:
    """Return the batches of inputs that a plan cannot do without."""
    if calibration is None:
        raise PlanError(f"{why}: give calibration=, an iterable of input batches")
    try:
        given = iter(calibration)
    except TypeError:
        what = type(calibration).__name__
        raise PlanError(f"calibration must be an iterable of batches of model inputs, not {what}") from None
    batches = [batch if isinstance(batch, tuple) else (batch,) for batch in given]
    if not batches:
        raise PlanError("calibration has no batch; give at least one batch of model inputs")
    for batch in batches:
        for x in batch:
            if not isinstance(x, torch.Tensor):
                raise PlanError(f"calibration must give tensors, or tuples of them (no labels), not {type(x).__name__}")
    return batches


def as_plan(plan: Plan | Mapping[str, Any] | str | Path) -> Plan:
    """Return a plan from itself, its JSON form, or a file; PlanError when it is none of them."""
    if isinstance(plan, Plan):
        return plan
    return read_plan(Path(plan)) if isinstance(plan, str | Path) else plan_of(plan, "the plan")
