"""Batch norms folded into the layer before them, for deployment."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from autorank.copying import model_copy
from autorank.errors import describe
from autorank.formats.running import DecomposedLayer
from autorank.modules import HOOKS, refusal, substitute
from autorank.quant.fake import SMALLEST
from autorank.quant.leaf import QuantizedLeaf
from autorank.trouble import tell


class _Tracer(fx.Tracer):
    """Sees layers as wholes, decomposed and quantized ones too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, DecomposedLayer | QuantizedLeaf) or super().is_leaf_module(m, module_qualified_name)


def fold(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode in which batch norms are part of the layer before them and Identity in their place.

    A channel's factor multiplies the scale of its weight, so that a quantized layer keeps its levels (those of a
    channel with a negative factor change their sign) and nothing is lost, whenever it is done: search, calibration and
    training work on models whose batch norms are still there. A batch norm stays where its input does not come from
    one convolution alone, where that is called more than once, ends in a step that moves channels, or has a weight that
    is used elsewhere, computed from other tensors or watched by hooks. After a linear layer it stays as well: whether
    it works on the layer's outputs or on another axis is seen at run time only.

    Parameters
    ----------
    model : nn.Module
        Not changed. Where its forward pass cannot be traced nothing is folded, and that is told.
    """
    copied = model_copy(model).eval()
    try:
        graph = _Tracer().trace(copied)
    except Exception as error:  # any forward pass may refuse to be traced
        tell(f"batch norms are not folded, as the model cannot be traced: {describe(error)}")
        return copied
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    shared = _used_elsewhere(copied, read)
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    modules = dict(copied.named_modules())
    times: dict[nn.Module, int] = {}
    for name in called:
        times[modules[name]] = times.get(modules[name], 0) + 1
    changes: dict[nn.Module, nn.Module] = {}
    with torch.no_grad():
        for node in graph.nodes:
            norm = modules.get(str(node.target)) if node.op == "call_module" else None
            source = node.args[0] if node.args else None
            if not isinstance(norm, _BatchNorm) or not isinstance(source, fx.Node) or source.op != "call_module":
                continue
            layer = modules[str(source.target)]
            last = _last(layer)
            if last is None or norm.running_var is None or len(source.users) > 1:
                continue
            if not shared.isdisjoint(map(id, last.parameters())):
                continue
            if times[norm] == times[layer] == 1:
                _fold(last, norm)
                changes[norm] = nn.Identity()
    return substitute(copied, changes)


def _last(layer: nn.Module) -> nn.Module | None:
    """Return the leaf or module that makes the layer's outputs, channel by channel; None where there is none."""
    last = list(layer.children())[-1] if isinstance(layer, DecomposedLayer) else layer
    inner = last.module if isinstance(last, QuantizedLeaf) else last
    if isinstance(inner, _ConvTransposeNd) and inner is not last and inner.groups > 1:
        return None  # its groups share their scales
    if not isinstance(inner, _ConvNd) or any(vars(module).get(name) for module in (layer, last) for name in HOOKS):
        return None
    own = isinstance(layer, DecomposedLayer | QuantizedLeaf)
    return last if own or refusal(inner) is None else None


def _used_elsewhere(model: nn.Module, read: Container[str]) -> set[int]:
    """Return the parameters that several modules hold, or that the forward pass reads beside the modules."""
    held: dict[int, int] = {}
    found: set[int] = set()
    for place, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            held[id(parameter)] = held.get(id(parameter), 0) + 1
            if held[id(parameter)] > 1 or f"{place}.{name}".lstrip(".") in read:
                found.add(id(parameter))
    return found


def _fold(last: nn.Module, norm: _BatchNorm) -> None:
    leaf = last if isinstance(last, QuantizedLeaf) else None
    module = leaf.module if leaf is not None else last
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    factor = torch.rsqrt(variance.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    shift = (bias.double() if isinstance(bias, Tensor) else 0.0) - mean.double()
    shift = shift * factor + (norm.bias.double() if norm.bias is not None else 0.0)
    if leaf is not None and leaf.weight_on:
        # The levels themselves, not the weight behind them, so that none changes by a rounding error.
        levels = leaf.integer_weight().double() * leaf.weight_grid.spread(factor.sign(), weight)
        leaf.weight_scale.copy_((leaf.weight_scale.double() * factor.abs()).clamp_min(SMALLEST))
        weight.copy_(levels * leaf.weight_grid.spread(leaf.weight_scale.double(), weight))
    else:
        weight.copy_(_scaled(weight.double(), factor, module))
    module.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)


def _scaled(weight: Tensor, factor: Tensor, module: nn.Module) -> Tensor:
    """Return a weight whose output channels are multiplied."""
    if isinstance(module, _ConvTransposeNd):
        blocks = weight.unflatten(0, (module.groups, -1))
        return (blocks * factor.reshape(module.groups, 1, -1, *[1] * (weight.ndim - 2))).flatten(0, 1)
    return weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
