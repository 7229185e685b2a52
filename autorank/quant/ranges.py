"""Ranges: which values the levels of a weight or an activation span."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from autorank.quant.fake import QParams, affine, symmetric
from autorank.quant.settings import QuantSettings

SAMPLE = 1 << 15
"""Values of an activation that are kept for choosing its range."""

_SHRUNK = tuple(2 ** (-k / 8) for k in range(81))
"""Shares of the whole range that are tried: down to a thousandth, for outliers."""

_MOVED = (0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3)
_WEIGHT_SHARES = tuple(k / 80 for k in range(16, 81))


class Watch:
    """What one activation looked like: its extremes, and a sample of its values.

    Parameters
    ----------
    batches : int
        How many are to come, each of which gives its share of the sample.
    seed : int
        Which values are taken.
    """

    def __init__(self, batches: int, seed: int = 0) -> None:
        self.low = self.high = 0.0
        self._each = max(SAMPLE // max(batches, 1), 64)
        self._random = torch.Generator().manual_seed(seed)
        self._parts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Look at one batch."""
        if not x.numel():
            return
        low, high = (float(value) for value in torch.aminmax(x.detach()))
        self.low, self.high = min(self.low, low), max(self.high, high)
        # A copy in channels last is read as it lies, so a flat view of it costs nothing.
        flat = x.detach().as_strided((x.numel(),), (1,)) if _dense(x) else x.detach().reshape(-1)
        if flat.numel() > self._each:
            flat = flat[torch.randint(flat.numel(), (self._each,), generator=self._random).to(x.device)]
        self._parts.append(flat.float().cpu())

    @property
    def finite(self) -> bool:
        """Whether all values were finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def seen(self) -> bool:
        """Whether there was any value."""
        return bool(self._parts)

    def sample(self) -> Tensor:
        """Return the values that were kept, float32."""
        return torch.cat(self._parts) if self._parts else torch.zeros(0)


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def activation_grid(watch: Watch, settings: QuantSettings, bits: int = 8) -> QParams:
    """Return the grid of an activation that was watched; zero is always exactly on it."""
    low, high = watch.low, watch.high
    if settings.ranges == "percentile" and watch.seen:
        share = settings.percentile / 100
        ends = torch.quantile(watch.sample().double(), torch.tensor([1 - share, share], dtype=torch.float64))
        low, high = max(low, float(ends[0])), min(high, float(ends[1]))
    elif settings.ranges == "mse" and high > low:
        low, high = least_squares_range(watch.sample(), low, high, bits)
    return affine(low, high, bits)


def least_squares_range(values: Tensor, low: float, high: float, bits: int = 8) -> tuple[float, float]:
    """Return the range within (low, high) for which rounding and clipping have the least squared error on `values`."""

    def error(ends: tuple[float, float]) -> float:
        return float((affine(*ends, bits).fake(values) - values).square().mean(dtype=torch.float64))

    def best(tried: Sequence[tuple[float, float]]) -> tuple[float, float]:
        return min(tried, key=error)

    found = best([(low * share, high * share) for share in _SHRUNK])
    for _ in range(2):
        found = best([(max(low, found[0] * move), found[1]) for move in _MOVED])
        found = best([(found[0], min(high, found[1] * move)) for move in _MOVED])
    return found


def weight_grid(
    weight: Tensor, bits: int, axis: int = 0, how: str = "mse", importance: Tensor | None = None
) -> QParams:
    """Return the grid of a weight, per channel.

    Parameters
    ----------
    weight : Tensor
    bits : int
    axis : int
        Of the channels.
    how : {"max", "mse"}
        The largest magnitude, or the clipping with the least squared error.
    importance : Tensor, optional
        What the squared errors of the entries count, broadcast against `weight`.
    """
    plain = weight.detach().float()
    rows = plain.movedim(axis, 0).flatten(1)
    largest = rows.abs().amax(1)
    if how == "max":
        return symmetric(largest, bits, axis)
    counts = None if importance is None else importance.float().expand_as(plain).movedim(axis, 0).flatten(1)
    best, least = largest, torch.full_like(largest, math.inf)
    for share in reversed(_WEIGHT_SHARES):
        squares = (symmetric(largest * share, bits, 0).fake(rows) - rows).square()
        errors = (squares if counts is None else squares * counts).sum(1)
        better = errors < least
        best, least = torch.where(better, largest * share, best), torch.where(better, errors, least)
    return symmetric(best, bits, axis)
