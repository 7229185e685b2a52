"""The plans that a sum of costs and losses over layers is minimised by, for every exchange rate between the two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from autorank.strategies.bounds import Table
from autorank.strategies.catalog import Vector


@dataclass(frozen=True, slots=True)
class Step:
    """A plan that minimises cost·rate + distance for some rate, and the largest of these rates.

    Attributes
    ----------
    rate : float
        Squared distance that is given up per share of cost, from here to the next cheaper step; infinite at the
        cheapest.
    share : float
        Sum of the layers' costs.
    vector : tuple of int
    """

    rate: float
    share: float
    vector: Vector


def compression_path(costs: Table, distances: Table) -> list[Step]:
    """Return every plan that is the compression step for some α/μ, the cheapest first.

    Per layer the candidates on the lower convex hull of (cost, distance), the dense layer (index 0) among them; the
    hulls' edges of all layers in the order of their steepness.

    Parameters
    ----------
    costs : array, shape (layers, indices)
    distances : array, shape (layers, indices)
        ‖W − Ŵ_k‖²; infinite where an index must not be taken, 0 at index 0.

    Returns
    -------
    list of Step
        Shares ascend, rates fall.
    """
    start, edges = [], []
    for i, (prices, errors) in enumerate(zip(costs.tolist(), distances.tolist(), strict=True)):
        hull = _hull(prices, errors)
        start.append(hull[0])
        for a, b in pairwise(hull):
            edges.append(((errors[a] - errors[b]) / (prices[b] - prices[a]), i, b))
    vector = list(start)
    share = sum(float(costs[i, k]) for i, k in enumerate(vector))
    path = [Step(math.inf, share, tuple(vector))]
    # Stable, and a layer's own edges become flatter: each layer goes along its hull.
    for rate, i, k in sorted(edges, key=lambda edge: -edge[0]):
        share += float(costs[i, k] - costs[i, vector[i]])
        vector[i] = k
        path.append(Step(rate, share, tuple(vector)))
    return path


def _hull(prices: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Return the indices on the lower left convex hull of (price, error), the cheapest first, the best last."""
    order = sorted((p, e, k) for k, (p, e) in enumerate(zip(prices, errors, strict=True)) if math.isfinite(e + p))
    hull: list[tuple[float, float, int]] = []
    for price, error, k in order:
        if hull and error >= hull[-1][1]:
            continue
        while len(hull) > 1:
            (p0, e0, _), (p1, e1, _) = hull[-2:]
            if (e1 - e0) * (price - p0) < (error - e0) * (p1 - p0):
                break
            hull.pop()
        hull.append((price, error, k))
    return [k for _, _, k in hull]
