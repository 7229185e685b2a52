"""Layers with bits: made of quantized leaves, and calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autorank.copying import model_copy
from autorank.errors import DataError, ModelError, PlanError
from autorank.modules import substitute
from autorank.quant.balance import equalise, junctions
from autorank.quant.leaf import QuantizedLeaf, can_be_quantized
from autorank.quant.ranges import Watch, activation_grid, weight_grid
from autorank.quant.rounding import Inputs, best_rounded, column_form, output_grid, spatial_axes
from autorank.quant.settings import QuantSettings
from autorank.trouble import tell
from autorank.types import Choice, LayerSpec, Plan

Batch = tuple[Tensor, ...]


def with_bits(model: nn.Module, plan: Plan, specs: Sequence[LayerSpec] = ()) -> nn.Module:
    """Return a copy of a decomposed model in which the layers that have bits are made of `QuantizedLeaf`.

    Nothing is calibrated yet: the copy computes what the model does, bit for bit. The same plan always gives the same
    structure, so that a state dict loads onto it.

    Parameters
    ----------
    model : nn.Module
        To which `plan` was applied, without its bits; not changed.
    plan : Plan
    specs : sequence of LayerSpec
        Not needed; for callers that hold them.

    Raises
    ------
    PlanError
        A layer is not there, or its format runs it by modules of its own that cannot be quantized.
    """
    copied = model_copy(model)
    modules = dict(copied.named_modules())
    changes: dict[nn.Module, nn.Module] = {}
    for name, choice in plan.layers:
        if choice.weight_bits is None:
            continue
        if name not in modules:
            raise PlanError(f"the model has no layer {name!r}")
        changes[modules[name]] = quantized_layer(modules[name], choice, name)
    return substitute(copied, changes)


def quantized_layer(layer: nn.Module, choice: Choice, name: str = "layer") -> nn.Module:
    """Return a layer, dense or decomposed, with the bits of a choice, uncalibrated; it is taken over, not copied."""
    if choice.weight_bits is None:
        return layer
    bits = choice.weight_bits, choice.activation_bits
    if can_be_quantized(layer):
        return QuantizedLeaf(layer, *bits)
    found = [module for module in layer.modules() if can_be_quantized(module)]
    known = {parameter for module in found for parameter in module.parameters(recurse=False)}
    others = [key for key, value in layer.named_parameters() if value not in known and key.split(".")[-1] != "bias"]
    if not found or others:
        raise PlanError(f"layer {name!r}: format {choice.format} runs it by modules of its own, which have no bits")
    return substitute(layer, {module: QuantizedLeaf(module, *bits) for module in found})


def leaves(model: nn.Module) -> dict[str, QuantizedLeaf]:
    """Return the quantized leaves of a model by name, in the order in which they are registered."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLeaf)}


def without_bits(model: nn.Module) -> nn.Module:
    """Return a copy in floating point: every leaf is replaced by its module with the weight that is trained."""
    copied = model_copy(model)
    return substitute(copied, {leaf: leaf.module for leaf in leaves(copied).values()})


def calibrate(model: nn.Module, batches: Iterable[Batch], settings: QuantSettings | None = None) -> None:
    """Set the ranges of all leaves of a model and round their weights; from then on it is quantized.

    Deterministic: the same model, batches and settings give the same state, bit for bit.

    Parameters
    ----------
    model : nn.Module
        Changed in place; its mode is kept. It may have been calibrated before.
    batches : iterable of tuples of Tensor
        The positional inputs of the model, batch by batch. The one that reaches ``settings.calibration`` examples is
        the last one read; it is taken whole, as the first axis of a model's inputs need not be that of the batch.
    settings : QuantSettings, optional

    Raises
    ------
    DataError
        There is no example.
    ModelError
        Some layer's input is not finite.
    """
    settings = settings or QuantSettings()
    found = leaves(model)
    if not found:
        return
    examples = _taken(batches, settings.calibration, next(iter(found.values())).weight.device)
    for leaf in found.values():
        leaf.reset()
    with _still(model):
        if settings.equalise:
            _equalise(model, examples, settings)
        watches = {
            name: Watch(len(examples), spatial_axes(leaf.module), seed)
            for seed, (name, leaf) in enumerate(found.items())
        }
        needed = settings.rounding != "nearest" or settings.weight_ranges == "mse"
        inputs = {name: Inputs(leaf.module, len(examples)) for name, leaf in found.items()} if needed else {}
        _run(
            model,
            examples,
            [(leaf, to[name].add) for to in (watches, inputs) for name, leaf in found.items() if name in to],
        )
        wrong = next((name for name, watch in watches.items() if not watch.finite), None)
        if wrong is not None:
            raise ModelError(f"layer {wrong!r} gets inputs that are not finite, so it cannot be quantized")
        for name, leaf in found.items():
            _set(name, leaf, watches[name], inputs[name].moment() if needed else None, settings)


def _equalise(model: nn.Module, examples: Sequence[Batch], settings: QuantSettings) -> None:
    """Balance the channels between the factors of each layer, each junction by itself."""
    places = junctions(model)
    _run(model, examples[:1], [(place.first, place.see) for place in places])
    for place in places:
        if place.seen is not None and bool(place.seen.isfinite().all()):
            equalise(place, centred=settings.rounding != "nearest")
            # What the next one of the layer gets is scaled and mixed from now on.
            after = next((other for other in places if other.first is place.second), None)
            if after is not None:
                after.seen = place.between(place.first.module(place.seen))
            place.seen = None


def _set(name: str, leaf: QuantizedLeaf, watch: Watch, moment: Tensor | None, settings: QuantSettings) -> None:
    """Set the ranges of one leaf and round its weight."""
    form = column_form(leaf.module, leaf.weight.detach().float())
    widest = weight_grid(leaf.weight, leaf.weight_bits, leaf.axis, "max")
    if settings.weight_ranges == "max":
        grids = [widest]
    elif moment is None:
        grids = [weight_grid(leaf.weight, leaf.weight_bits, leaf.axis)]
    else:
        # Weights that are rounded together may do better with the whole range.
        grids = [output_grid(leaf.module, leaf.weight_bits, leaf.axis, moment), widest]
    grid = grids[0]
    if moment is not None and settings.rounding != "nearest":
        grid, weight = best_rounded(leaf.module, grids, moment)
        leaf.weight.copy_(weight)
    leaf.set_weight_grid(grid)
    if leaf.activation_bits is None:
        return
    if watch.seen:
        leaf.set_input_grid(activation_grid(watch, settings, leaf.activation_bits, form))
    else:
        tell(f"layer {name!r} got no input in calibration: its input stays in floating point")


def _taken(batches: Iterable[Batch], count: int, device: torch.device) -> list[Batch]:
    """Return the batches up to the one with the example number `count`, on a device."""
    found: list[Batch] = []
    left = count
    for inputs in batches:
        size = next((len(x) for x in inputs if x.ndim), 1)
        if size:
            found.append(tuple(x.to(device) for x in inputs))
        left -= size
        if left <= 0:
            break
    if not found:
        raise DataError("there is no example to calibrate the quantization on")
    return found


def _run(
    model: nn.Module, examples: Sequence[Batch], watchers: Sequence[tuple[nn.Module, Callable[[Tensor], None]]]
) -> None:
    """Run the model and hand the inputs of modules on."""
    handles = [
        module.register_forward_pre_hook(lambda _module, args, see=see: see(args[0])) for module, see in watchers
    ]
    try:
        for inputs in examples:
            model(*(x.clone() for x in inputs))  # a forward pass may change what it is given
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode, without gradients."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
