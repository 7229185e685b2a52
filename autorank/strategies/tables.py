"""Costs and predicted losses of all candidates as arrays, and the plans that follow from them without any trial."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from autorank.space import Candidate, LayerCandidates
from autorank.strategies import mckp
from autorank.strategies.catalog import COST_NAMES, Catalog, Vector, amount, whole
from autorank.strategies.predictor import Predictor
from autorank.strategies.surrogate import Tables

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

_LIMIT = 512
"""Sums kept in a knapsack; hundreds of points along the axis are more than a search can run."""
_LARGE = 1000
"""Candidates of all layers together from which on the front of the convex hull is taken for the exact one."""
_ROUNDING = 1e-9
_LEVELS = 96
"""Bounds on the largest error of a layer that are looked at."""


class Space:
    """The search space as arrays, layers × candidates, index 0 the dense layer, short rows padded with it.

    Parameters
    ----------
    catalog : Catalog
    names : sequence of str
        Costs that are objectives, the axis first.
    """

    def __init__(self, catalog: Catalog, names: Sequence[str]) -> None:
        self.catalog, self.names = catalog, tuple(names)
        space = catalog.space
        self.layers = len(space.layers)
        self.rows = np.arange(self.layers)
        self.sizes = [1 + len(layer.candidates) for layer in space.layers]
        self.width = max(self.sizes)
        wanted = dict.fromkeys([*names, *(c.name for c in catalog.constraints if c.name in COST_NAMES)])
        self.changes = {name: self._changes(name) / (whole(space, name) or 1.0) for name in wanted}
        self.tables = self._tables()

    def _padded(self, rows: Sequence[Sequence[float]]) -> Floats:
        found = np.zeros((self.layers, self.width))
        for i, row in enumerate(rows):
            found[i, : len(row)] = row
        return found

    def _changes(self, name: str) -> Floats:
        """Return by how much each candidate changes the cost of the model."""
        rows = []
        for layer in self.catalog.space.layers:
            own = [amount(self.catalog.space, layer, candidate, name) for candidate in (None, *layer.candidates)]
            rows.append([value - own[0] for value in own])
        return self._padded(rows)

    def _tables(self) -> Tables:
        layers = self.catalog.space.layers
        names = sorted({c.choice.format for layer in layers for c in layer.candidates})
        number = {name: i for i, name in enumerate(names)}
        formats = np.full((self.layers, self.width), -1, dtype=np.int64)
        for i, layer in enumerate(layers):
            formats[i, 1 : self.sizes[i]] = [number[c.choice.format] for c in layer.candidates]
        lost = self._padded([[0.0, *(_lost(layer, c) ** 2 for c in layer.candidates)] for layer in layers])
        self.known = any(c.errors is not None for layer in layers for c in layer.candidates)
        self.errors = self._padded([[0.0, *(_error(c) for c in layer.candidates)] for layer in layers])
        if not self.known:
            # Nothing is known: what is taken from a layer hurts, and the more the more it is.
            return Tables(lost + 1e-6 * (formats >= 0), formats, np.zeros((0, self.layers, self.width)))
        losses, even = (self._padded(_finite(Predictor(self.catalog, kind).losses)) for kind in ("snr", "even"))
        return Tables(losses, formats, np.stack([even, self.errors**6, lost]))

    # Plans

    def costs(self, vectors: Whole) -> Floats:
        """Return plans × objectives: ratios to the dense model, as sums over the layers."""
        return np.stack([1.0 + self.changes[name][self.rows, vectors].sum(axis=1) for name in self.names], axis=1)

    def near_bounds(self, vectors: Whole) -> NDArray[np.bool_]:
        """Say which plans meet the bounds on costs but for rounding, which `Catalog.feasible` then decides exactly."""
        met = np.ones(len(vectors), dtype=bool)
        for bound in self.catalog.constraints:
            kept = 1.0 + self.changes[bound.name][self.rows, vectors].sum(axis=1)
            over = kept - bound.bound if bound.operator == "<=" else bound.bound - kept
            met &= over <= _ROUNDING
        return met

    def front(self, values: Floats, weights: Sequence[float] | None = None) -> Whole:
        """Return the plans that no other beats in the summed values and the summed cost, cheap to dear.

        Parameters
        ----------
        values : layers × candidates
            To be small in sum.
        weights : sequence of float, optional
            Of every cost in `changes`, where it is not the axis alone.
        """
        parts = list(self.changes.values())
        cost = parts[0] if weights is None else sum(w * p for w, p in zip(weights, parts, strict=True))
        if self.layers * self.width > _LARGE:
            return hull_front(np.asarray(cost), values, self.sizes)
        rows = [np.asarray(cost)[i, :size].tolist() for i, size in enumerate(self.sizes)]
        own = [values[i, :size].tolist() for i, size in enumerate(self.sizes)]
        return np.array([s.indices for s in mckp.front([rows], own, limit=_LIMIT)], dtype=np.int64)

    def level(self) -> Whole:
        """Return plans in which no layer's error exceeds a common bound, each layer as cheap as that allows.

        The smallest largest error for its cost (Liebenwein et al., NeurIPS 2021), from harsh bounds to mild ones.
        """
        cost = next(iter(self.changes.values()))
        inside = np.arange(self.width)[None, :] < np.asarray(self.sizes)[:, None]
        bounds = np.quantile(self.errors[inside], np.linspace(1.0, 0.0, _LEVELS))
        plans = [np.where(inside & (self.errors <= bound), cost, np.inf).argmin(axis=1) for bound in bounds]
        return np.unique(np.stack(plans), axis=0)

    def spread(self, plans: Whole, targets: Sequence[float]) -> list[Vector]:
        """Return for every target the plan whose cost along the axis is nearest to it, each plan at most once."""
        shares = self.costs(plans)[:, 0]
        free = np.ones(len(plans), dtype=bool)
        found: list[Vector] = []
        for target in targets:
            for at in np.argsort(np.abs(shares - target), kind="stable"):
                vector = as_vector(plans[at])
                if free[at] and vector != self.catalog.dense_vector and self.catalog.feasible(vector):
                    free[at] = False
                    found.append(vector)
                    break
        return found


def hull_front(costs: Floats, values: Floats, sizes: Sequence[int]) -> Whole:
    """Return the plans at the corners of the convex hull of all sums, cheap to dear.

    Each step goes up the lower convex hull of one layer, steepest first over all layers (Sinha and Zoltners, Operations
    Research 27(3), 1979). With many layers the steps are small, and hardly a plan lies between the corners and the
    exact front.

    Parameters
    ----------
    costs, values : layers × candidates
    sizes : sequence of int
        Number of candidates of each layer, the rest is padding.
    """
    start, steps = [], []
    for layer, size in enumerate(sizes):
        corners = _hull(costs[layer, :size], values[layer, :size])
        start.append(corners[0])
        for old, new in pairwise(corners):
            slope = (values[layer, old] - values[layer, new]) / (costs[layer, new] - costs[layer, old])
            steps.append((-float(slope), layer, new))
    plans = np.empty((len(steps) + 1, len(sizes)), dtype=np.int64)
    plans[0] = start
    # A layer's slopes fall along its hull, so sorting all steps keeps each layer's own order.
    for at, (_, layer, new) in enumerate(sorted(steps, key=lambda step: step[:2]), start=1):
        plans[at] = plans[at - 1]
        plans[at, layer] = new
    return plans


def _hull(costs: Floats, values: Floats) -> list[int]:
    """Return the corners of the lower convex hull from the cheapest point to that of least value."""
    corners: list[int] = []
    for k in np.lexsort((values, costs)).tolist():
        if corners and values[k] >= values[corners[-1]]:
            continue
        while len(corners) > 1:
            a, b = corners[-2:]
            if (values[a] - values[b]) * (costs[k] - costs[b]) > (values[b] - values[k]) * (costs[b] - costs[a]):
                break
            corners.pop()
        corners.append(k)
    return corners


def _finite(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the rows with a loss far beyond all others where nothing is known of a candidate."""
    most = max((value for row in rows for value in row if math.isfinite(value)), default=1.0)
    return [[value if math.isfinite(value) else 10.0 * most for value in row] for row in rows]


def as_vector(row: Whole) -> Vector:
    """Return a plan of an array as index vector."""
    return tuple(row.tolist())


def _lost(layer: LayerCandidates, candidate: Candidate) -> float:
    """Return the part of a layer's parameters that the candidate does without."""
    dense = layer.spec.params
    return max(0.0, 1.0 - candidate.cost.params / dense) if dense else 0.0


def _error(candidate: Candidate) -> float:
    """Return the relative error of a candidate: of the layer's output where it is known."""
    errors = candidate.errors
    if errors is None:
        return 0.0
    return float(errors.weight if errors.output is None else errors.output)
