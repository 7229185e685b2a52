"""Second moments of a layer's inputs, summed patch by patch while the model runs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from autorank.types import LayerSpec

CHUNK = 1 << 23
"""Elements of one block of patches: 32 MiB of float32."""

ROWS_PER_COLUMN = 50
"""Patches that are taken for each column of a covariance: its error falls with the root of this."""

MIN_ROWS = 20_000
"""Patches that are taken of a layer in any case, if there are as many."""


def patches(x: Tensor, spec: LayerSpec) -> Tensor:
    """Return the input patches of a convolution (im2col) as a view where possible.

    A transposed convolution is a convolution, with stride one and its kernel reversed, of the input with stride − 1
    zeros between neighbours. Its patches are those: most of their entries are zero, other ones at every phase.

    Parameters
    ----------
    x : Tensor, shape (N, S, I1, ..., Id)
    spec : LayerSpec
        Stride, padding and its mode, output padding, dilation and kernel are honoured.

    Returns
    -------
    Tensor, shape (N, S, O1, ..., Od, K1, ..., Kd)
        For a transposed convolution the output positions run from the last to the first.
    """
    d = len(spec.kernel)
    strides = spec.stride
    if spec.transposed:
        x, strides = _spread(x, spec), (1,) * d
    elif any(pads := _padding(spec)):
        mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
        x = functional.pad(x, pads, mode=mode)
    for axis, (size, stride, dilation) in enumerate(zip(spec.kernel, strides, spec.dilation, strict=True)):
        x = x.unfold(2 + axis, dilation * (size - 1) + 1, stride)
        x = x[..., ::dilation]
    assert x.ndim == 2 + 2 * d
    return x


def _spread(x: Tensor, spec: LayerSpec) -> Tensor:
    """Return what a transposed convolution convolves: its input with zeros between and around, reversed.

    Reversing it, not the kernel, leaves the patches a view.
    """
    d = len(spec.kernel)
    spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], spec.stride, strict=True)))
    every: list[slice] = [slice(None, None, s) for s in spec.stride]
    spread[(slice(None), slice(None), *every)] = x
    pads: list[int] = []
    for axis in reversed(range(d)):
        around = spec.dilation[axis] * (spec.kernel[axis] - 1) - int(spec.padding[axis])
        pads += [around, around + (spec.output_padding[axis] if spec.output_padding else 0)]
    return functional.pad(spread, pads).flip(*range(2, 2 + d))  # a negative amount cuts off


def _padding(spec: LayerSpec) -> list[int]:
    """Return the padding as `functional.pad` takes it: last axis first, before and after."""
    return [amount for axis in reversed(range(len(spec.kernel))) for amount in spec.pads(axis)]


def stride_of(expected: float, wanted: int, positions: int) -> int:
    """Return every how many patches one is taken.

    Parameters
    ----------
    expected : float
        Patches there will be.
    wanted : int
        Patches that are enough.
    positions : int
        Patches of one example. The stride has no divisor in common with it, so that a walk over the examples comes by
        every position equally often; it would otherwise see, say, one column of every image.
    """
    stride = max(1, int(expected / wanted))
    while math.gcd(stride, positions) > 1:
        stride -= 1
    return stride


class Accumulator:
    """Sums x xᵀ of one layer in float64, a bounded block of patches at a time.

    Parameters
    ----------
    spec : LayerSpec
    max_patch : int
        Longest side of a covariance: a longer patch is summed up over the kernel positions (`factorised`), and more
        channels than this keep their variances only (`diagonal`).
    batches : float or None
        Batches of the first one's size that are to come; None takes every patch.
    """

    def __init__(self, spec: LayerSpec, max_patch: int, batches: float | None) -> None:
        channels, patch = spec.weight_shape[1], math.prod(spec.weight_shape[1:])
        self.spec, self.batches = spec, batches
        self.factorised = bool(spec.kernel) and patch > max_patch
        self.diagonal = channels > max_patch
        columns = 1 if self.diagonal else channels if self.factorised else patch
        self._wanted = max(ROWS_PER_COLUMN * columns, MIN_ROWS)
        self._stride: int | None = None
        self._seen = 0
        self.total: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Add the input of one call of the layer."""
        for block in self._blocks(x.detach()):
            # (rows, groups, channels, K) → (groups, rows, n), one more row per kernel position when factorised
            rows = block.permute(1, 0, 3, 2) if self.factorised else block.transpose(0, 1)
            rows = rows.reshape(rows.shape[0], -1, rows.shape[-1] if self.factorised else math.prod(rows.shape[2:]))
            product = (rows.square().sum(1) if self.diagonal else rows.mT @ rows).to(torch.float64)
            self.total = product if self.total is None else self.total.add_(product)
            self.count += block.shape[0]

    def moment(self) -> Tensor:
        """Return the mean of x xᵀ, (groups, n, n), or of x², (groups, n), when `diagonal`; float64."""
        assert self.total is not None
        return self.total / (self.count * (math.prod(self.spec.kernel) if self.factorised else 1))

    def _blocks(self, x: Tensor) -> Iterator[Tensor]:
        """Yield (rows, groups, channels, K) in float32."""
        spec = self.spec
        groups, channels, d = spec.groups, spec.weight_shape[1], len(spec.kernel)
        if d == 0:
            rows = x.reshape(-1, channels)
            positions = math.prod(x.shape[1:-1]) if x.ndim > 1 else 1
            for part in self._taken(len(rows), positions, channels, x.device):
                yield rows[part].to(torch.float32).reshape(-1, 1, channels, 1)
            return
        if x.ndim == d + 1:
            x = x[None]
        windows = patches(x.to(torch.float32), spec)
        windows = windows.permute(0, *range(2, 2 + d), 1, *range(2 + d, 2 + 2 * d))
        places = windows.shape[: d + 1]
        for part in self._taken(math.prod(places), math.prod(places[1:]), math.prod(windows.shape[d + 1 :]), x.device):
            yield windows[torch.unravel_index(part, places)].reshape(len(part), groups, channels, -1)

    def _taken(self, rows: int, positions: int, size: int, device: torch.device) -> Iterator[Tensor]:
        """Yield the numbers of the patches to take, in blocks; the count goes on from call to call."""
        if self._stride is None:
            expected = 0.0 if self.batches is None else rows * self.batches * max(1, len(self.spec.calls))
            self._stride = stride_of(expected, self._wanted, positions)
        taken = torch.arange(-self._seen % self._stride, rows, self._stride, device=device)
        self._seen += rows
        yield from taken.split(max(1, CHUNK // size)) if len(taken) else ()
