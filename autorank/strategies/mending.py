"""Bring a plan within its constraints by the single changes that help most and cost least in predicted loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autorank.strategies.catalog import Catalog, Vector, amount, whole


class Mender:
    """Changes one layer at a time until a plan meets all constraints.

    Parameters
    ----------
    catalog : Catalog
    losses : sequence of sequence of float
        Predicted loss by layer and index; an infinite one counts as a thousand times the largest other.
    """

    def __init__(self, catalog: Catalog, losses: Sequence[Sequence[float]]) -> None:
        self.catalog = catalog
        space = catalog.space
        # One flat row of all layers' indices; a layer's part begins at its start.
        self._starts = np.cumsum([0, *(len(row) for row in losses)])
        flat = np.concatenate([np.asarray(row, dtype=np.float64) for row in losses])
        known = np.isfinite(flat)
        self._losses = np.where(known, flat, 1e3 * flat[known].max(initial=1.0))
        self._layer = np.repeat(np.arange(len(losses)), [len(row) for row in losses])
        self._kept = np.asarray(
            [
                [
                    amount(space, layer, candidate, c.name) / (whole(space, c.name) or 1.0)
                    for layer in space.layers
                    for candidate in (None, *layer.candidates)
                ]
                for c in catalog.constraints
            ]
        )
        self._signs = np.asarray([1.0 if c.operator == "<=" else -1.0 for c in catalog.constraints])
        self._bounds = np.asarray([c.bound for c in catalog.constraints])

    def misses(self, vector: Vector) -> float:
        """Return by how much the plan misses its constraints altogether."""
        return float(np.maximum(self._excess(vector), 0.0).sum())

    def mend(self, vector: Vector) -> Vector | None:
        """Return a plan near to `vector` that meets every constraint; None when single changes do not get there."""
        missed = self.misses(vector)
        while not self.catalog.feasible(vector):
            at = self._starts[:-1] + np.asarray(vector)
            changed = self._excess(vector)[:, None] + self._signs[:, None] * (
                self._kept - self._kept[:, at][:, self._layer]
            )
            left = np.maximum(changed, 0.0).sum(axis=0)
            rise = self._losses - self._losses[at][self._layer]
            best = int(np.lexsort((rise, left))[0])
            if left[best] >= missed:
                return None
            missed = float(left[best])
            layer = int(self._layer[best])
            vector = (*vector[:layer], int(best - self._starts[layer]), *vector[layer + 1 :])
        return vector

    def _excess(self, vector: Vector) -> np.ndarray:
        """Return by how much each constraint is missed; negative where it is met."""
        kept = self.catalog.kept(vector)
        return self._signs * (np.asarray([kept[c.name] for c in self.catalog.constraints]) - self._bounds)
