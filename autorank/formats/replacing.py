"""One layer in the place of another: what a dense layer is, and what its successor takes over from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autorank.errors import FormatError
from autorank.modules import spec_of
from autorank.types import LayerSpec, LeftAlone


def description(layer: nn.Module) -> LayerSpec:
    """Return the spec of a layer on its own, named ``layer``; FormatError when it cannot be decomposed."""
    if not isinstance(layer, nn.Module):
        raise FormatError(f"{type(layer).__name__} is no layer: only convolution and linear layers can be decomposed")
    spec = spec_of("layer", layer)
    if isinstance(spec, LeftAlone):
        raise FormatError(f"a {spec.type} cannot be decomposed: {spec.reason}")
    return spec


def in_place_of(old: nn.Module, new: nn.Module, bias: bool = True) -> nn.Module:
    """Give `new` the device, number type, memory format and mode of `old`, and what is trained of it; return it.

    Parameters
    ----------
    old : nn.Module
        A convolution or linear layer.
    new : nn.Module
        The decomposed layer; changed.
    bias : bool
        Whether it takes over the values of the bias.
    """
    weight, old_bias = old.weight, old.bias
    assert isinstance(weight, Tensor)
    new = new.to(weight.device, weight.dtype).train(old.training)
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim)
    # Where a size is one a weight may look like both; such a layer then follows its model, as the dense one does.
    if layout is not None and weight.is_contiguous(memory_format=layout) and not weight.is_contiguous():
        new = new.to(memory_format=layout)  # type: ignore[call-overload]
    for name, parameter in new.named_parameters():
        if name.rpartition(".")[2] == "bias" and isinstance(old_bias, Tensor):
            if bias:
                # Not by way of the factors' type, where it might lose digits.
                parameter.data = old_bias.detach().clone()
            parameter.requires_grad_(old_bias.requires_grad)
        else:
            parameter.requires_grad_(weight.requires_grad)
    return new
