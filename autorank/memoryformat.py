"""Convolution weights in the memory format that processors run fastest: channels last.

With the channels of a pixel side by side a forward pass of a ResNet-20 takes half to four fifths of the time, a
training step 0.6 to 1.2 times as much, by format (`benchmarks/memory_format.py`). PyTorch hands the format on from the
weights to the activations. Models that call ``view`` on activations do not run in it, so each is tried first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autorank.copying import model_copy
from autorank.pytrees import tensors
from autorank.seeding import seeded

_SAME = 1e-3
"""Difference of outputs, relative to the largest, that sums in another order may make."""


def _weights(model: nn.Module) -> list[nn.Parameter]:
    found = (
        module._parameters.get("weight")
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    )
    return list(dict.fromkeys(weight for weight in found if weight is not None))


def lay_out(model: nn.Module, wanted: bool = True) -> nn.Module:
    """Put the weights of the 2-d convolutions in channels last, in place, if `wanted`; return the model."""
    for weight in _weights(model) if wanted else ():
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return model


@contextmanager
def channels_last(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Hold the weights of the 2-d convolutions in channels last inside, if `wanted`; the parameters stay the same."""
    # A model that its owner keeps in channels last stays so.
    before = [weight for weight in _weights(model) if weight.is_contiguous()]
    lay_out(model, wanted)
    try:
        yield
    finally:
        for weight in before if wanted else ():
            weight.data = weight.data.contiguous()


def runs_in_channels_last(model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Say whether a model has 2-d convolutions and gives the same outputs in channels last, training mode included.

    Parameters
    ----------
    model : Module
        Not changed.
    inputs : tuple of Tensor
    """
    if not _weights(model):
        return False
    with seeded(0), torch.no_grad():
        for training in (False, True):
            plain = model_copy(model).cpu().train(training)
            other = lay_out(model_copy(plain))
            try:
                expected = list(tensors(plain(*inputs)))
            except Exception:
                if training:  # batch norm refuses single examples, for one
                    continue
                return False
            try:
                found = list(tensors(other(*inputs)))
            except Exception:
                return False
            if not training and not all(map(_same, found, expected)):
                return False
    return True


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape
    return bool((a - b).abs().max() <= _SAME * b.abs().max()) if a.numel() else True
