"""One factor of a layer, or a whole dense layer, whose weight and input are quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from autorank.formats.running import GroupedLinear, SummedConv
from autorank.quant.fake import QParams, weight_levels

_TRANSPOSED = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
_SCALES = ("weight_scale", "input_scale")


def can_be_quantized(module: nn.Module) -> bool:
    """Say whether a module multiplies its input by its weight in a way that `QuantizedLeaf` knows."""
    return isinstance(module, _ConvNd | nn.Linear | GroupedLinear)


class QuantizedLeaf(nn.Module):
    """A convolution or linear map with fake-quantized weight and input.

    Until it is calibrated it computes what `module` does, bit for bit. The weight is quantized per output channel (per
    output channel of a group for transposed convolutions), the input per tensor. The weight of `module` stays in
    floating point and is what is trained.

    Parameters
    ----------
    module : nn.Module
        Taken over, not copied: a convolution, a linear map, or one of autorank's modules of that kind.
    weight_bits : int
    activation_bits : int, optional
        Of the input, which stays in floating point without it.

    Attributes
    ----------
    weight_scale : Tensor, shape (channels,)
    input_scale, input_zero_point : Tensor, shape ()
        Buffers, float32 whatever the module's type is, and int32; a scale of 0 says that it is not calibrated. The
        latter two are there with `activation_bits` only.
    weight_on, input_on : bool
        Whether weight and input are quantized now. Set by calibration and when a state is loaded.
    """

    def __init__(self, module: nn.Module, weight_bits: int, activation_bits: int | None = None) -> None:
        super().__init__()
        weight = module.weight
        assert isinstance(weight, Tensor)
        self.module = module
        self.weight_bits = weight_bits
        self.activation_bits = activation_bits
        self.axis = 1 if isinstance(module, _ConvTransposeNd) else 0
        self.weight_on = self.input_on = False
        self.weight_scale: Tensor
        self.input_scale: Tensor
        self.input_zero_point: Tensor
        device = weight.device
        self.register_buffer("weight_scale", torch.zeros(weight.shape[self.axis], dtype=torch.float32, device=device))
        if activation_bits is not None:
            self.register_buffer("input_scale", torch.zeros((), dtype=torch.float32, device=device))
            self.register_buffer("input_zero_point", torch.zeros((), dtype=torch.int32, device=device))
        self.train(module.training)

    @property
    def weight(self) -> Tensor:
        """The weight in floating point, which is trained."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias, which is not quantized."""
        return self.module.bias  # type: ignore[return-value]

    @property
    def calibrated(self) -> bool:
        """Whether all that has bits is quantized."""
        return self.weight_on and (self.input_on or self.activation_bits is None)

    @property
    def weight_grid(self) -> QParams:
        """The grid of the weight."""
        low, high = weight_levels(self.weight_bits)
        return QParams(self.weight_scale, torch.zeros_like(self.weight_scale, dtype=torch.int32), low, high, self.axis)

    @property
    def input_grid(self) -> QParams | None:
        """The grid of the input; None when it stays in floating point."""
        if self.activation_bits is None:
            return None
        return QParams(self.input_scale, self.input_zero_point, 0, 2**self.activation_bits - 1)

    def quantized_weight(self) -> Tensor:
        """Return the weight on its grid, as the forward pass uses it."""
        return self.weight_grid.fake(self.weight)

    def integer_weight(self) -> Tensor:
        """Return the weight's levels as int8, in its own layout; times the scale they are `quantized_weight`."""
        return self.weight_grid.levels(self.weight)

    def set_weight_grid(self, grid: QParams) -> None:
        """Take a grid for the weight and switch its quantization on."""
        self.weight_scale.copy_(grid.scale)
        self.weight_on = True

    def set_input_grid(self, grid: QParams) -> None:
        """Take a grid for the input and switch its quantization on."""
        self.input_scale.copy_(grid.scale)
        self.input_zero_point.copy_(grid.zero_point)
        self.input_on = True

    def reset(self) -> None:
        """Go back to floating point."""
        for name in (*_SCALES, "input_zero_point"):
            if name in self._buffers:
                getattr(self, name).zero_()
        self.weight_on = self.input_on = False

    def forward(self, x: Tensor) -> Tensor:
        """Run the module on the quantized input with the quantized weight."""
        grid = self.input_grid
        if self.input_on and grid is not None:
            x = grid.fake(x)
        return with_weight(self.module, x, self.quantized_weight()) if self.weight_on else self.module(x)

    def extra_repr(self) -> str:
        """Show the bits."""
        inputs = f", activation_bits={self.activation_bits}" if self.activation_bits else ""
        return f"weight_bits={self.weight_bits}{inputs}, calibrated={self.calibrated}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLeaf:
        """Move like any module, but keep the scales in float32: 16 bits would move every level."""
        before = {name: self._buffers[name] for name in _SCALES if name in self._buffers}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.weight_on = bool((self.weight_scale > 0).all())
        self.input_on = self.activation_bits is not None and bool(self.input_scale > 0)


def with_weight(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Run a module that `can_be_quantized` with another weight."""
    if isinstance(module, SummedConv | GroupedLinear):
        return module.run(x, weight)
    if isinstance(module, nn.Linear):
        return functional.linear(x, weight, module.bias)
    if isinstance(module, _ConvTransposeNd):
        run = _TRANSPOSED[weight.ndim - 3]
        return run(
            x,
            weight,
            module.bias,
            module.stride,
            module.padding,  # type: ignore[arg-type]
            module.output_padding,
            module.groups,
            module.dilation,
        )
    return module._conv_forward(x, weight, module.bias)  # type: ignore[operator]
