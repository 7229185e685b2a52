"""Predictors of a plan's loss: sums of what each candidate does to its layer, the largest of it, and learned ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autorank.types import Errors

Floats = NDArray[np.float64]
Vector = tuple[int, ...]

LEAST = 0.01
"""Least share of an output that is taken for signal."""


def signal(errors: Errors) -> float:
    return max(LEAST, 1 - square(errors))


def square(errors: Errors) -> float:
    assert errors.output is not None
    return errors.output**2


def loss(errors: Errors) -> float:
    assert errors.loss is not None
    return errors.loss


SUMS: dict[str, Callable[[Errors], float]] = {
    "weight error²": lambda e: e.weight**2,
    "output error²": square,
    "output snr": lambda e: square(e) / signal(e),
    "K-FAC": loss,
    "K-FAC snr": lambda e: loss(e) / signal(e),
    "K-FAC snr, root": lambda e: loss(e) / math.sqrt(signal(e)),
    "K-FAC log signal": lambda e: -loss(e) * math.log(signal(e)) / max(square(e), 1e-12),
    "log(1 + K-FAC)": lambda e: math.log1p(loss(e)),
    "√K-FAC": lambda e: math.sqrt(loss(e)),
}
"""By name: what a candidate adds to the sum."""


@dataclass(frozen=True)
class Learned:
    """Factors of the layers' terms, fitted to the losses of plans; one more for the products of neighbours.

    With terms f_l and y the measured rise, Σ_l w_l f_l + v·Σ_l √(f_l f_{l+1}) is fitted to y in relative squares, every
    factor drawn to the best common one (ridge), so that few plans suffice.
    """

    factors: Floats
    pair: float

    def __call__(self, terms: Floats) -> Floats:
        """Return the prediction of plans from their terms (plans × layers)."""
        return terms @ self.factors + self.pair * neighbours(terms)

    @classmethod
    def fit(cls, terms: Floats, rises: Floats, pairs: bool, ridge: float = 0.3) -> Learned:
        """Fit to the rises of the loss of some plans."""
        rises = np.maximum(rises, 1e-3)
        common = math.exp(float(np.mean(np.log(rises) - np.log(terms.sum(1)))))
        columns = [terms * common] + ([neighbours(terms)[:, None] * common] if pairs else [])
        design = np.concatenate(columns, axis=1) / rises[:, None]
        start = np.ones(design.shape[1])
        if pairs:
            start[-1] = 0.0
        strength = ridge * np.trace(design.T @ design) / design.shape[1]
        step = np.linalg.solve(design.T @ design + strength * np.eye(len(start)), design.T @ (1 - design @ start))
        found = (
            np.maximum(start + step, 0.02)
            if not pairs
            else np.append(np.maximum((start + step)[:-1], 0.02), (start + step)[-1])
        )
        layers = terms.shape[1]
        return cls(found[:layers] * common, float(found[layers] * common) if pairs else 0.0)


def neighbours(terms: Floats) -> Floats:
    """Return Σ_l √(f_l f_{l+1}) for every plan."""
    return np.asarray(np.sqrt(terms[:, :-1] * terms[:, 1:]).sum(1))


def spearman(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> float:
    """Return the rank correlation; ties have their mean rank."""

    def ranks(x: Sequence[float] | Floats) -> Floats:
        values = np.asarray(x, dtype=np.float64)
        order = np.sort(values)
        return (np.searchsorted(order, values, "left") + np.searchsorted(order, values, "right")) / 2

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def smallest_largest(macs: Sequence[Sequence[float]], values: Sequence[Sequence[float]], budget: float) -> Vector:
    """Return the plan whose largest value is smallest: the cheapest candidate of each layer below a common bound."""

    def plan(bound: float) -> Vector:
        return tuple(
            min((k for k, value in enumerate(row) if value <= bound), key=lambda k: (cost[k], row[k]))
            for cost, row in zip(macs, values, strict=True)
        )

    bounds = sorted({value for row in values for value in row})
    low, high = 0, len(bounds) - 1
    while low < high:
        middle = (low + high) // 2
        if sum(cost[k] for cost, k in zip(macs, plan(bounds[middle]), strict=True)) <= budget:
            high = middle
        else:
            low = middle + 1
    return plan(bounds[low])
