"""Ranges: which values the levels of a weight or an activation span."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from autorank.quant.fake import QParams, affine, symmetric
from autorank.quant.settings import QuantSettings

SAMPLE = 1 << 16
"""Values of an activation that are kept, as rows of all channels at one position."""

_SHARES = tuple(2 ** (-k / 2) for k in range(1, 11))
"""Shares of the whole range that are tried first, and by what each end is moved from the best of them."""

_MOVED = (0.8, 0.9, 1.1, 1.25)
_WEIGHT_SHARES = tuple(k / 40 for k in range(12, 41))


class Watch:
    """What one activation looked like: its extremes, and its channels' values at some positions.

    Parameters
    ----------
    batches : int
        How many are to come, each of which gives its share of the sample.
    spatial : int
        Axes after the channels.
    seed : int
        Which positions are taken.
    """

    def __init__(self, batches: int, spatial: int = 0, seed: int = 0) -> None:
        self.low = self.high = 0.0
        self.finite = True
        """Whether all values were finite."""
        self._batches, self._spatial = max(batches, 1), spatial
        self._random = torch.Generator().manual_seed(seed)
        self._parts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Look at one batch."""
        if not x.numel():
            return
        low, high = (float(value) for value in torch.aminmax(x.detach()))
        self.finite = self.finite and math.isfinite(low) and math.isfinite(high)
        self.low, self.high = min(low, self.low), max(high, self.high)
        moved = x.detach().movedim(-1 - self._spatial, -1)
        moved = moved.reshape(-1, moved.shape[-1]) if moved.ndim == 1 else moved
        positions = math.prod(moved.shape[:-1])
        wanted = max(SAMPLE // (self._batches * moved.shape[-1]), 16)
        if wanted < positions:
            taken = torch.randint(positions, (wanted,), generator=self._random).to(x.device)
        else:
            taken = torch.arange(positions, device=x.device)
        self._parts.append(moved[torch.unravel_index(taken, moved.shape[:-1])].float())

    @property
    def seen(self) -> bool:
        """Whether there was any value."""
        return bool(self._parts)

    def rows(self) -> Tensor:
        """Return the values that were kept, (positions, channels), float32."""
        return torch.cat(self._parts)


def activation_grid(watch: Watch, settings: QuantSettings, bits: int = 8, form: Tensor | None = None) -> QParams:
    """Return the grid of an activation that was watched; zero is always exactly on it.

    Parameters
    ----------
    watch : Watch
    settings : QuantSettings
    bits : int
    form : Tensor, shape (groups, channels of each, channels of each), optional
        What the errors e of a group's channels count: eᵀ G e, for the weight's own columns WᵀW; all the same without.
    """
    low, high = watch.low, watch.high
    if settings.ranges == "percentile" and watch.seen:
        share = settings.percentile / 100
        ends = np.quantile(watch.rows().cpu().numpy(), [1 - share, share])
        low, high = max(low, float(ends[0])), min(high, float(ends[1]))
    elif settings.ranges == "mse" and high > low:
        low, high = least_squares_range(watch.rows(), low, high, bits, form)
    return affine(low, high, bits).to(watch.rows().device if watch.seen else torch.device("cpu"))


def least_squares_range(
    rows: Tensor, low: float, high: float, bits: int = 8, form: Tensor | None = None, rounds: int = 2
) -> tuple[float, float]:
    """Return the range within (low, high) for which rounding and clipping rows have the least squared error."""

    def error(ends: tuple[float, float]) -> float:
        off = affine(*ends, bits).to(rows.device).fake(rows) - rows
        if form is None:
            return float(off.square().sum())
        parts = off.unflatten(1, (form.shape[0], -1)).transpose(0, 1)
        return float(((parts @ form) * parts).sum())

    best = min([(low, high), *((low * share, high * share) for share in _SHARES)], key=error)
    least = error(best)
    for _ in range(rounds):
        for side in range(2):
            for move in _MOVED:
                ends = (max(low, best[0] * move), best[1]) if side == 0 else (best[0], min(high, best[1] * move))
                if ends != best and (found := error(ends)) < least:
                    best, least = ends, found
    return best


def weight_grid(weight: Tensor, bits: int, axis: int = 0, how: str = "mse") -> QParams:
    """Return the grid of a weight, per channel.

    Parameters
    ----------
    weight : Tensor
    bits : int
    axis : int
        Of the channels.
    how : {"max", "mse"}
        The largest magnitude, or the clipping with the least squared error.
    """
    plain = weight.detach().float()
    rows = plain.movedim(axis, 0).flatten(1)
    if how == "max":
        return symmetric(rows.abs().amax(1), bits, axis)
    return clipped(rows, bits, axis, lambda off: off.square().sum(1))


def clipped(rows: Tensor, bits: int, axis: int, measure: Callable[[Tensor], Tensor]) -> QParams:
    """Return the grid with the least error of each row.

    Parameters
    ----------
    rows : Tensor, shape (channels, n)
        float32.
    bits, axis : int
        Of the grid.
    measure : callable
        From the differences, in the shape of `rows`, to the error of each channel.
    """
    largest = rows.abs().amax(1)
    best, least = largest, torch.full_like(largest, math.inf)
    for share in reversed(_WEIGHT_SHARES):
        errors = measure(symmetric(largest * share, bits, 0).fake(rows) - rows).to(least.dtype)
        better = errors < least
        best, least = torch.where(better, largest * share, best), torch.where(better, errors, least)
    return symmetric(best, bits, axis)
