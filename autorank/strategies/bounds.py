"""Plans moved, at the least loss, to where every bound on a cost is met."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from autorank.strategies.catalog import Catalog, Vector, amount, whole

Table = npt.NDArray[np.float64]
"""One row per layer, one column per index: 0 is dense, k the k-th candidate; padded with infinity."""


def table(rows: Sequence[Sequence[float]]) -> Table:
    """Return the rows as one array, padded with infinity to the length of the longest."""
    found = np.full((len(rows), max(map(len, rows), default=0)), np.inf)
    for i, row in enumerate(rows):
        found[i, : len(row)] = row
    return found


def shares(catalog: Catalog, name: str) -> Table:
    """Return what each index of each layer costs, as a share of the whole dense model's cost `name`."""
    total = whole(catalog.space, name) or 1.0
    return table(
        [
            [amount(catalog.space, layer, candidate, name) / total for candidate in (None, *layer.candidates)]
            for layer in catalog.space.layers
        ]
    )


class Bounds:
    """The constraints of a catalog, and the way into them.

    Parameters
    ----------
    catalog : Catalog
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._shares = {c.name: shares(catalog, c.name) for c in catalog.constraints}

    def meet(self, vector: Vector, losses: Table, allowed: npt.NDArray[np.bool_] | None = None) -> Vector | None:
        """Return a plan near the one with the least loss that meets every constraint.

        A multiplier on each missed cost goes nearly there; then single layers are changed, each time at the least loss
        for what is gained.

        Parameters
        ----------
        vector : tuple of int
            Of all allowed plans one with the least loss.
        losses : array, shape (layers, indices)
            What is lost, in sum over the layers; infinite where an index must not be taken.
        allowed : array of bool, shape (layers, indices), optional
            Which indices may be taken.

        Returns
        -------
        tuple of int or None
            None when that leads nowhere; with a single upper bound that is only where no allowed plan meets it.
        """
        catalog, rows = self._catalog, np.arange(len(vector))
        free = np.isfinite(losses) if allowed is None else np.isfinite(losses) & allowed
        now = np.asarray(vector)
        if not catalog.feasible(vector):
            now = self._nearly(now, np.where(free, losses, np.inf), rows)
        for _ in range(10 * len(vector) + 100):
            vector = tuple(int(k) for k in now)
            violations = catalog.violations(vector)
            missed = [c for c in catalog.constraints if violations[str(c)] > 0]
            if not missed:
                return vector
            worst, rest = missed[0], [c for c in catalog.constraints if c not in missed]
            gains = self._change(worst, now, rows)
            useful = free & (gains > 0)
            # A step that breaks no bound that is met, where there is one.
            harmless = useful.copy()
            for c in rest:
                harmless &= -self._change(c, now, rows) <= -violations[str(c)]
            choice = harmless if harmless.any() else useful
            if not choice.any():
                return None
            extra = losses - losses[rows, now][:, None]
            gained = np.minimum(gains, violations[str(worst)])
            with np.errstate(divide="ignore", invalid="ignore"):
                price = np.where(choice, extra / gained, np.inf)
            layer, index = np.unravel_index(int(np.argmin(price)), price.shape)
            now[layer] = index
        return None

    def _nearly(self, now: npt.NDArray[np.int_], losses: Table, rows: npt.NDArray[np.int_]) -> npt.NDArray[np.int_]:
        """Return the plan of the largest multipliers, one missed constraint after the other, that still miss it."""
        for c in self._catalog.constraints:
            start = self._catalog.violations(tuple(int(k) for k in now))[str(c)]
            if start <= 0:
                continue
            costs, sign = self._shares[c.name], 1.0 if c.operator == "<=" else -1.0
            prices = np.where(np.isfinite(losses), sign * np.where(np.isfinite(costs), costs, 0.0), 0.0)
            begin = float(prices[rows, now].sum())
            finite = losses[np.isfinite(losses)]
            unit = max(float(np.ptp(finite)), 1e-12) / max(float(np.ptp(prices)), 1e-12)
            low, high = 0.0, None
            for _ in range(60):
                factor = unit * 1e-6 if not low and high is None else 16.0 * low if high is None else (low + high) / 2
                moved = np.argmin(losses + factor * prices, axis=1)
                if begin - float(prices[rows, moved].sum()) >= start:
                    high = factor
                else:
                    low, now = factor, moved
                if (high is None and low > 1e9 * unit) or (high is not None and high - low <= 1e-9 * high):
                    break
            losses = losses + low * prices
        return now

    def _change(self, constraint: Any, now: npt.NDArray[np.int_], rows: npt.NDArray[np.int_]) -> Table:
        """Return by how much each change of one layer brings a plan nearer to, or further within, a constraint."""
        costs = self._shares[constraint.name]
        sign = 1.0 if constraint.operator == "<=" else -1.0
        with np.errstate(invalid="ignore"):
            return np.where(np.isfinite(costs), sign * (costs[rows, now][:, None] - costs), -np.inf)
