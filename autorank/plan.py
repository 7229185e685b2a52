"""A plan and a model: does it fit, the model that it makes, and the bare structure of that model."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autorank import formats
from autorank.copying import model_copy
from autorank.errors import FormatError, PlanError
from autorank.fitcache import FitCache
from autorank.formats import Factors
from autorank.formats.replacing import in_place_of
from autorank.layout import canonical_weight, stored_weight
from autorank.measure import undisturbed
from autorank.modules import Reading, read, substitute
from autorank.quant.build import quantized_layer, without_bits
from autorank.seeding import seeded
from autorank.solvers.whitening import LayerStats
from autorank.types import ACTIVATION_BITS, DENSE, WEIGHT_BITS, Choice, LayerResult, LayerSpec, Plan


def check(model: nn.Module, plan: Plan, *, specs: Sequence[LayerSpec] = ()) -> None:
    """Make sure that a plan can be applied to a model; nothing is computed or changed.

    Parameters
    ----------
    model : nn.Module
    plan : Plan
    specs : sequence of LayerSpec
        The layers of the model's profile; when they are given, no other layer may be decomposed.

    Raises
    ------
    PlanError
        A layer is not there or is left alone, a format is unknown or does not support the layer, an option or a rank is
        not allowed. The message says what would be right.
    """
    _checked(model, plan, specs)


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    specs: Sequence[LayerSpec] = (),
    stats: Mapping[str, LayerStats] | None = None,
    cache: FitCache | None = None,
    trained: Mapping[str, nn.Module] | None = None,
) -> tuple[nn.Module, tuple[LayerResult, ...]]:
    """Return a decomposed copy of a model; layers with bits compute in floating point until they are calibrated.

    Parameters
    ----------
    model : nn.Module
        Not changed. The copy has its mode, device, number type and memory format; each new layer keeps the bias of the
        dense one and whether it is trained.
    plan : Plan
    specs : sequence of LayerSpec
        Layers of the model's profile; they hold the calls from which MACs are computed (0 without them).
    stats : mapping of str to LayerStats, optional
        Statistics by layer; needed for the layers that the plan whitens: of inputs for ``whiten=input``, of gradients
        for ``whiten=output``.
    cache : FitCache, optional
        Where earlier fits are looked up.
    trained : mapping of str to nn.Module, optional
        Layers of the plan that are decomposed already, just so: copied into their places instead of being fitted. Their
        errors are 0, as nothing is lost.

    Returns
    -------
    model : nn.Module
    results : tuple of LayerResult
        In the order of the plan.

    Raises
    ------
    PlanError
        The plan does not fit the model (see `check`), or whitens a layer without statistics.
    ModelError
        The model cannot be copied.
    FormatError
        A weight cannot be decomposed.
    """
    known = _checked(model, plan, specs)
    for name, choice in plan.layers:
        missing = _missing(choice, (stats or {}).get(name))
        if missing:
            raise PlanError(
                f"layer {name!r}: its choice has whiten={choice.option('whiten', 'none')}, and there are no {missing} "
                "statistics for it; collect them, or take the option 'whiten' out of the plan"
            )
    cache = cache or FitCache(None)
    copied = model_copy(model)
    results = []
    changes: dict[nn.Module, nn.Module] = {}
    for (name, choice), old in zip(plan.layers, _targets(copied, plan), strict=True):
        spec = known[name]
        weight = old.weight
        assert isinstance(weight, Tensor)
        done = (trained or {}).get(name)
        if choice.format == DENSE:
            kept_layer = old if done is None else without_bits(done).to(weight.device).train(old.training)
            changes[old] = quantized_layer(kept_layer, choice, name)
            results.append(kept_result(spec, choice))
            continue
        fmt = formats.get(choice.format)
        with undisturbed():
            if done is not None:
                done = without_bits(done)
                changes[old] = done.to(weight.device).train(old.training)
                factors = fmt.factors_of(done, spec, choice.rank, choice.options)
                kept = fmt.sensitivity(factors, spec, choice.rank, choice.options)
                info: dict[str, Any] = {"weight_error": 0.0, "output_error": None, "sensitivity": kept}
            else:
                plain = canonical_weight(weight.detach(), spec)
                factors, info = cache.get_or_fit(fmt, plain, spec, choice, (stats or {}).get(name), plan.seed)
                changes[old] = _layer(old, spec, choice, factors)
            changes[old] = quantized_layer(changes[old], choice, name)
        cost = fmt.cost(spec, choice.rank, choice.options)
        results.append(
            LayerResult(
                name=name,
                choice=choice,
                weight_error=info["weight_error"],
                output_error=info["output_error"],
                sensitivity=info["sensitivity"],
                loss_increase=info.get("loss_increase"),
                macs=cost.macs,
                params=cost.params,
                macs_dense=spec.macs,
                params_dense=spec.params,
                full_rank=fmt.max_rank(spec, choice.options),
            )
        )
    return substitute(copied, changes), tuple(results)


def kernels(dense: nn.Module, plan: Plan, model: nn.Module) -> dict[str, Tensor]:
    """Return the kernels that the decomposed layers of a model stand for, by name.

    Parameters
    ----------
    dense : nn.Module
        The network before `plan` was applied; its weights are not looked at.
    plan : Plan
    model : nn.Module
        The network after it, perhaps trained since.

    Returns
    -------
    dict of Tensor, shape (T, S/groups, K1, ..., Kd)
        In float64, on the device of the model; of layers with bits those of the weights that are trained.
    """
    found = {}
    for name, spec in _checked(dense, plan, ()).items():
        choice = plan.choices[name]
        layer = without_bits(model.get_submodule(name))
        if choice.format == DENSE:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            found[name] = canonical_weight(weight.detach().double(), spec)
            continue
        fmt = formats.get(choice.format)
        factors = fmt.factors_of(layer, spec, choice.rank, choice.options)
        doubled = {key: factor.double() for key, factor in factors.items()}
        found[name] = fmt.reconstruct(doubled, spec, choice.rank, choice.options)
    return found


def undecomposed(dense: nn.Module, plan: Plan, model: nn.Module) -> nn.Module:
    """Return a copy of a decomposed model in which every layer has a dense kernel again, the one that it stands for.

    So a layer is decomposed again as any dense one: for Tucker-2 that is the decomposition of its core with the new
    factors merged into the 1×1 layers around it (Gusak et al. 2019, arXiv 1903.09973), as the best approximation of
    the kernel lies in the span of its outer factors.

    Parameters
    ----------
    dense : nn.Module
        The network before `plan` was applied; gives the layers, not their weights.
    plan : Plan
    model : nn.Module
        Not changed; biases, batch norm and all else of it are kept.
    """
    known = _checked(dense, plan, ())
    copied, plain = without_bits(model), model_copy(dense)
    changes: dict[nn.Module, nn.Module] = {}
    with torch.no_grad():
        for name, kernel in kernels(dense, plan, model).items():
            old, new = copied.get_submodule(name), plain.get_submodule(name)
            weight, bias = new.weight, new.bias
            assert isinstance(weight, Tensor)
            new.to(kernel.device)
            new.weight.copy_(stored_weight(kernel, known[name]))  # type: ignore[operator]
            if isinstance(bias, Tensor):
                last = (old if plan.choices[name].format == DENSE else list(old.children())[-1]).bias
                new.bias.copy_(last)  # type: ignore[operator, arg-type]
            changes[old] = new.train(old.training)
    return substitute(copied, changes)


def _missing(choice: Choice, stats: LayerStats | None) -> str:
    """Say which statistics a choice needs and has not; empty when all are there."""
    missing = ["input"] if stats is None and choice.whitens("input") else []
    if choice.whitens("output") and (stats is None or stats.gradient is None):
        missing.append("gradient")
    return " and ".join(missing)


def build(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of a model with the plan's layers freshly initialised, for weights that are loaded afterwards.

    Parameters
    ----------
    model : nn.Module
        Not changed; its own weights need not be trained.
    plan : Plan
        Its seed fixes the initialisation.

    Raises
    ------
    PlanError
        The plan does not fit the model.
    ModelError
        The model cannot be copied.
    """
    known = _checked(model, plan, ())
    copied = model_copy(model)
    changes: dict[nn.Module, nn.Module] = {}
    with undisturbed(), seeded(plan.seed):
        for (name, choice), old in zip(plan.layers, _targets(copied, plan), strict=True):
            new = old if choice.format == DENSE else _layer(old, known[name], choice, None)
            changes[old] = quantized_layer(new, choice, name)
    return substitute(copied, changes)


def _targets(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    modules = dict(model.named_modules())
    return (modules[name] for name, _ in plan.layers)


def kept_result(spec: LayerSpec, choice: Choice) -> LayerResult:
    """Return the result of a layer that keeps its kernel and has bits."""
    return LayerResult(spec.name, choice, 0.0, spec.macs, spec.params, spec.macs, spec.params, full_rank=())


def _layer(old: nn.Module, spec: LayerSpec, choice: Choice, factors: Factors | None) -> nn.Module:
    """Return the layer that takes the place of `old`."""
    return in_place_of(old, formats.get(choice.format).layer(spec, choice.rank, choice.options, factors))


def _checked(model: nn.Module, plan: Plan, specs: Sequence[LayerSpec]) -> dict[str, LayerSpec]:
    """Check a plan and return the spec of each of its layers, with calls where `specs` has them."""
    reading = read(model)
    profiled = {spec.name: spec for spec in specs}
    chosen: dict[str, LayerSpec] = {}
    for name, choice in plan.layers:
        spec = reading.layers.get(name)
        if spec is None:
            raise PlanError(_no_such_layer(model, reading, name))
        if specs and name not in profiled:
            raise PlanError(
                f"layer {name!r} is left alone: the profile does not list it, because it is never called, is used in "
                "other ways than called, or no format supports it"
            )
        _check_bits(name, choice)
        spec = profiled.get(name, spec)
        if spec.weight_shape != reading.layers[name].weight_shape:
            found = reading.layers[name].weight_shape
            raise PlanError(f"layer {name!r} has a weight of shape {found}, its profile says {spec.weight_shape}")
        if choice.format == DENSE:
            chosen[name] = spec
            continue
        try:
            formats.get(choice.format).check(spec, choice.rank, choice.options)
        except FormatError as error:
            text = str(error)
            raise PlanError(text if repr(name) in text else f"layer {name!r}: {text}") from None
        chosen[name] = spec
    return chosen


def _check_bits(name: str, choice: Choice) -> None:
    for key, value, allowed in (
        ("weight_bits", choice.weight_bits, WEIGHT_BITS),
        ("activation_bits", choice.activation_bits, ACTIVATION_BITS),
    ):
        if value is not None and value not in allowed:
            raise PlanError(f"layer {name!r}: {key} must be {' or '.join(map(str, allowed))}, not {value}")
    if choice.activation_bits is not None and choice.weight_bits is None:
        raise PlanError(f"layer {name!r}: activation_bits need weight_bits, as no runtime mixes the two otherwise")
    if choice.format != DENSE:
        return
    if choice.rank or choice.options:
        raise PlanError(f"layer {name!r}: format {DENSE!r} keeps the kernel, so it has no rank and no options")
    if choice.weight_bits is None:
        raise PlanError(f"layer {name!r}: format {DENSE!r} needs weight_bits; without bits leave the layer out")


def _no_such_layer(model: nn.Module, reading: Reading, name: str) -> str:
    if name in reading.left_alone:
        return f"layer {name!r} cannot be decomposed: {reading.left_alone[name].reason}"
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        close = difflib.get_close_matches(name, reading.layers, n=3, cutoff=0.4) or list(reading.layers)[:3]
        nearest = ", ".join(map(repr, close))
        return f"the model has no layer {name!r}; " + (f"nearest: {nearest}" if close else "it has none to decompose")
    first = next(other for other, module in modules.items() if module is modules[name])
    if first != name:
        return f"layer {name!r} is the same module as {first!r}; name it {first!r} in the plan"
    return f"{name!r} is a {type(modules[name]).__name__}; only convolution and linear layers can be decomposed"
