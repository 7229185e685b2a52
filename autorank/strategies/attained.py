"""What a front has attained over the costs, and how much more a plan of known cost and uncertain gain may add."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_CELLS = {1: 400, 2: 32, 3: 14}
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(7)


class Attained:
    """The best gain of any point that costs at most so much, on a grid over the costs.

    The hypervolume is the sum over the cells of what is attained above the reference, so the improvement by a plan is a
    sum of positive parts, whatever the number of costs; its cost is known exactly, and only its gain is not.

    Parameters
    ----------
    low, high : sequence of float
        Range of every cost; `high` is the reference.
    reference : float
        Gain below which nothing counts.
    least : float
        Gain that a point must have to be one (a bound on the score).
    """

    def __init__(self, low: Sequence[float], high: Sequence[float], reference: float, least: float = -np.inf) -> None:
        count = _CELLS.get(len(low), 6)
        edges = [np.linspace(a, max(a + 1e-9, b), count + 1) for a, b in zip(low, high, strict=True)]
        centres = np.meshgrid(*[(e[1:] + e[:-1]) / 2 for e in edges], indexing="ij")
        self.cells: Floats = np.stack([c.ravel() for c in centres], axis=1)
        self.best: Floats = np.full(len(self.cells), reference)
        self.reference, self.least = reference, least

    @property
    def volume(self) -> float:
        """Mean of what is attained above the reference over the range of the costs."""
        return float((self.best - self.reference).mean())

    def add(self, costs: Floats, gain: float) -> None:
        """Count a point."""
        if gain >= self.least:
            reached = (self.cells >= costs).all(axis=1)
            self.best[reached] = np.maximum(self.best[reached], gain)

    def expected(self, costs: Floats, gains: Floats) -> Floats:
        """Return what each plan adds to `volume` in expectation over its possible gains.

        Parameters
        ----------
        costs : plans × costs
        gains : nodes × plans
            Gains at the nodes of `nodes`.
        """
        added = self._along(costs[:, 0]) if self.cells.shape[1] == 1 else self._over(costs)
        total = np.zeros(len(costs))
        for weight, row in zip(_WEIGHTS / _WEIGHTS.sum(), gains, strict=True):
            total += weight * np.where(row >= self.least, added(row), 0.0)
        return total

    def _over(self, costs: Floats) -> Callable[[Floats], Floats]:
        reached = (self.cells[None, :, :] >= costs[:, None, :]).all(axis=2)
        return lambda gains: np.asarray(
            (np.maximum(gains[:, None] - self.best[None, :], 0.0) * reached).mean(axis=1), dtype=np.float64
        )

    def _along(self, costs: Floats) -> Callable[[Floats], Floats]:
        """Return the same for one cost, along which what is attained only grows: a difference of running sums."""
        first = np.searchsorted(self.cells[:, 0], costs)
        sums = np.concatenate(([0.0], np.cumsum(self.best)))

        def added(gains: Floats) -> Floats:
            end = np.maximum(np.searchsorted(self.best, gains), first)
            return np.asarray((gains * (end - first) - (sums[end] - sums[first])) / len(self.best), dtype=np.float64)

        return added


def nodes(mean: Floats, spread: Floats) -> Floats:
    """Return the nodes of Gauss-Hermite quadrature for normal variables: nodes × variables."""
    return np.asarray(mean + _NODES[:, None] * spread)
