"""Fake quantization: values on the levels of a few bits, kept as floating-point numbers, with gradients passed on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SMALLEST = 2.0**-100
"""Smallest scale: its reciprocal is finite in float32."""


@dataclass(frozen=True)
class QParams:
    """A grid: value = scale · (level − zero point), with whole levels from `low` to `high`.

    Attributes
    ----------
    scale : Tensor, shape () or (channels,)
        float32.
    zero_point : Tensor
        int32, of the shape of `scale`.
    low, high : int
    axis : int or None
        The axis of the channels; None for one grid for all.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    axis: int | None = None

    def fake(self, x: Tensor) -> Tensor:
        """Return the nearest values on the grid, of the type of `x`; gradients pass where nothing is clipped.

        The level of x is clamp(round(zero point + x · (1 / scale))), halves to even, in float32 (float64 for such x).
        """
        work = x if x.dtype in (torch.float32, torch.float64) else x.float()
        if self.axis is None:
            y = torch.fake_quantize_per_tensor_affine(work, self.scale, self.zero_point, self.low, self.high)
        else:
            y = torch.fake_quantize_per_channel_affine(
                work, self.scale, self.zero_point, self.axis, self.low, self.high
            )
        return y.to(x.dtype)

    def levels(self, x: Tensor) -> Tensor:
        """Return the levels of `fake` as int8, or as uint8 where none is negative."""
        work = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        found = torch.round(self.fake(work) / self.spread(self.scale, x)) + self.spread(self.zero_point, x)
        return found.to(torch.int8 if self.low < 0 else torch.uint8)

    def values(self, levels: Tensor) -> Tensor:
        """Return the float32 values of levels."""
        shifted = levels.to(torch.int32) - self.spread(self.zero_point, levels)
        return shifted.to(torch.float32) * self.spread(self.scale, levels)

    def to(self, device: torch.device) -> QParams:
        """Return the grid on a device."""
        return replace(self, scale=self.scale.to(device), zero_point=self.zero_point.to(device))

    def spread(self, of: Tensor, x: Tensor) -> Tensor:
        """Return a tensor per channel in a shape that is broadcast against `x`."""
        return of if self.axis is None else of.reshape([-1 if i == self.axis else 1 for i in range(x.ndim)])


def weight_levels(bits: int) -> tuple[int, int]:
    """Return the lowest and highest level of a weight: as many below zero as above."""
    top = 2 ** (bits - 1) - 1
    return -top, top


def symmetric(largest: Tensor, bits: int, axis: int) -> QParams:
    """Return the grid of weights whose largest representable magnitude per channel is `largest`; 0 is allowed."""
    low, high = weight_levels(bits)
    scale = (largest.detach().float() / high).clamp_min(SMALLEST)
    return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), low, high, axis)


def affine(low: float, high: float, bits: int = 8) -> QParams:
    """Return the grid over a range, widened to hold zero, which is exactly a level."""
    low, high, top = min(low, 0.0), max(high, 0.0), 2**bits - 1
    scale = torch.tensor((high - low) / top if high > low else 1.0, dtype=torch.float32).clamp_min(SMALLEST)
    zero_point = torch.tensor(min(max(round(-low / float(scale)), 0), top), dtype=torch.int32)
    return QParams(scale, zero_point, 0, top)
