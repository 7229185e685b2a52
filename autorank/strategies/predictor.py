"""The predicted loss of a plan as a sum over its layers, and the plans that it says are best."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cached_property
from statistics import median

import numpy as np

from autorank.errors import ConfigError
from autorank.strategies.catalog import Catalog, Vector, amount, same_sum
from autorank.strategies.mckp import front as knapsack_front
from autorank.strategies.mending import Mender
from autorank.types import Errors

KINDS = ("snr", "sum", "shrunk", "even")
"""Kinds of prediction; see `Predictor`."""
_LIMIT = 4000
"""Sums that the knapsack keeps: points as close to the exact front as 0.02 % of the axis, in a fifth of a second."""
_LEAST_SIGNAL = 0.01
"""Least share of a layer's output that is taken to be signal; beyond it the loss alone tells candidates apart."""
_NOTHING = 1e-6
"""A relative error up to which a predicted loss of zero is believed."""
_ROUNDING = 1e-12
"""Relative difference below which two sums are equal, as they are added up in different orders."""
_MENDED = 64
"""Points of the front that are changed to meet the constraints where none of them does."""

Costs = list[list[float]]


class Predictor:
    """The predicted loss increase of a plan as a sum over its layers, and the front that follows from it.

    With ε² the square of the relative output error of a candidate (of its weight's error where outputs were not
    compared) and ℓ its predicted loss, the sum is over

    - ``sum``: ℓ, the second-order prediction itself;
    - ``snr``: ℓ / (1 - ε²), noise over what is left of the signal. It grows where an output becomes mostly error, as
      the quadratic ℓ does not, so that harsh budgets do not starve single layers;
    - ``shrunk``: √(s·s̄)·ε² / (1 - ε²) with the layer's sensitivity s = ℓ/ε² drawn half way (in logarithms) towards
      its median s̄ over the layers, in case that training levels what layers are sensitive to;
    - ``even``: s̄·ε² / (1 - ε²), as if all layers were equally sensitive.

    1 - ε² is held at 0.01 or above. Where a candidate's loss is missing, not finite, or zero although its weight is
    wrong (no gradient came that far), ℓ = s·ε² with the median s of the layer's other candidates, else of all layers,
    else one over the number of layers. A candidate without any error has an infinite loss: nothing is known of it, and
    the front leaves it out.

    Parameters
    ----------
    catalog : Catalog
        Its axis is the cost along which fronts run; its constraints hold for everything returned.
    kind : {"snr", "sum", "shrunk", "even"}
    weights : sequence of float, optional
        Positive factor on each layer's losses.
    costs : sequence of str
        Names of the cost objectives (``macs_kept`` …); the second gets an axis of the front, too. By default only the
        catalog's axis.

    Attributes
    ----------
    losses : list of list of float
        By layer and index; 0 for dense, which is index 0.

    Raises
    ------
    ConfigError
        No candidate of the space has errors, or the kind is unknown.
    ValueError
        The weights are not one positive number per layer.
    """

    def __init__(
        self, catalog: Catalog, kind: str = "snr", weights: Sequence[float] | None = None, costs: Sequence[str] = ()
    ) -> None:
        if kind not in KINDS:
            raise ConfigError(f"predictor: {kind!r} is not known; allowed are {', '.join(KINDS)}")
        layers = catalog.space.layers
        self._tables: dict[str, Costs] = {}
        self.catalog, self.kind, self.costs = catalog, kind, tuple(costs)
        self.weights = [1.0] * len(layers) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(layers) or not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"{len(layers)} positive weights are needed, one per layer, not {self.weights}")
        errors = [[candidate.errors for candidate in layer.candidates] for layer in layers]
        if not any(_relative(e) is not None for row in errors for e in row):
            raise ConfigError(
                "the predicted front needs the errors of the candidates, and no candidate of this search space has any"
            )
        table = _losses(errors, kind)
        self.losses: Costs = [
            [0.0, *(weight * loss for loss in row)] for weight, row in zip(self.weights, table, strict=True)
        ]

    def reweighted(self, weights: Sequence[float]) -> Predictor:
        """Return a predictor with each layer's losses multiplied by a further factor."""
        both = [old * new for old, new in zip(self.weights, weights, strict=True)]
        return Predictor(self.catalog, self.kind, both, self.costs)

    def predict(self, vector: Vector) -> float:
        """Return the predicted loss increase of a plan; infinite where nothing is known of one of its candidates."""
        return math.fsum(row[k] for row, k in zip(self.losses, vector, strict=True))

    def front(self) -> list[Vector]:
        """Return the plans that no other is predicted to beat in loss and cost, from cheap to dear.

        Only plans that meet the constraints on costs; the dense one may be among them. With a second cost objective
        they are non-dominated in both costs and the loss. A constraint on another cost is part of the knapsack; where
        there are several such, and with a lower bound on an axis, points that miss one are left out, so that a point
        at the very bound may be missing. Where none is left, those that miss least are changed until they meet all;
        under constraints that nearly contradict each other there may be none.
        """
        return list(self._front)

    def spread(self, count: int) -> list[Vector]:
        """Return up to `count` plans of the front at even distances along the axis, both ends among them."""
        ends = [0.5] if count == 1 else [i / (count - 1) for i in range(count)]
        return list(dict.fromkeys(vector for at in ends if (vector := self.at(at)) is not None))

    def at(self, place: float, across: float = 0.5) -> Vector | None:
        """Return the plan of the front, not the dense one, nearest to a place along the axis.

        Parameters
        ----------
        place : float
            0 is the cheapest, 1 the dearest point of the front.
        across : float
            With two cost objectives: 0 is the least, 1 the largest second cost among the points near that place.

        Returns
        -------
        tuple of int or None
            None when the front is empty, the dense plan left out.
        """
        vectors, shares, second = self._places
        if not vectors:
            return None
        target = shares[0] + place * (shares[-1] - shares[0])
        if second is None:
            return vectors[int(np.argmin(np.abs(shares - target)))]
        near = np.argsort(np.abs(shares - target), kind="stable")[: max(1, len(vectors) // 16)]
        wanted = second[near].min() + across * np.ptp(second[near])
        return vectors[int(near[np.argmin(np.abs(second[near] - wanted))])]

    def prices(self, vector: Vector) -> Costs:
        """Return what every index of every layer costs in units of loss, at the slope of the front near a plan.

        Losses and prices together are the Lagrangian of the knapsack: plans of the front are where their sum is least.
        """
        vectors, *sums = self._places
        if not vectors:
            return [[0.0] * len(row) for row in self.losses]
        costs = np.stack([own for own in sums if own is not None], axis=1)
        tables = [self.table(name) for name in self._axes][: costs.shape[1]]
        here = np.asarray([sum(row[k] for row, k in zip(table, vector, strict=True)) for table in tables])
        span = np.ptp(costs, axis=0) + 1e-12 * np.abs(costs).max(axis=0, initial=1.0)
        near = np.argsort((((costs - here) / span) ** 2).sum(axis=1), kind="stable")[: max(8, len(vectors) // 32)]
        fall = np.asarray([self.predict(vectors[i]) for i in near])
        known = np.isfinite(fall)
        sides = np.column_stack([(costs[near[known]] - here) / span, np.ones(int(known.sum()))])
        slopes = np.maximum(-np.linalg.lstsq(sides, fall[known])[0][:-1], 0.0) / span
        return [(slopes @ np.asarray(rows)).tolist() for rows in zip(*tables, strict=True)]

    def table(self, name: str) -> Costs:
        """Return what every index of every layer costs, in MACs, parameters or milliseconds."""
        if name not in self._tables:
            space = self.catalog.space
            self._tables[name] = [
                [amount(space, layer, c, name) for c in (None, *layer.candidates)] for layer in space.layers
            ]
        return self._tables[name]

    @cached_property
    def _second(self) -> str | None:
        """The cost objective beside the axis; none where it is the same sum in another unit."""
        others = (name for name in self.costs if not same_sum(self.catalog.space, name, self.catalog.axis))
        return next(others, None)

    @property
    def _axes(self) -> list[str]:
        """The costs along which the front runs, one or two."""
        return [self.catalog.axis] + ([] if self._second is None else [self._second])

    @cached_property
    def _front(self) -> list[Vector]:
        axis, second = self.catalog.axis, self._second
        tables = [self.table(axis)]
        bound = next((c for c in self.catalog.constraints if c.name != axis), None)
        if second is not None:
            tables.append(self.table(second))
        elif bound is not None:
            sign = 1 if bound.operator == "<=" else -1
            tables.append([[sign * cost for cost in row] for row in self.table(bound.name)])
        solutions = knapsack_front(tables, self.losses, limit=_LIMIT)
        if second is None:
            solutions.sort(key=lambda solution: (solution.costs[0], solution.value))
        found, least = [], sys.float_info.max
        for solution in solutions:
            # The cost of a mere constraint is no axis: only what has less loss than all that is cheaper counts.
            better = second is not None or solution.value < least - _ROUNDING * abs(least)
            if better and self.catalog.feasible(solution.indices):
                least = solution.value
                found.append(solution.indices)
        return found or self._mended([solution.indices for solution in solutions])

    def _mended(self, vectors: Sequence[Vector]) -> list[Vector]:
        """Return plans within the constraints that are near to those which miss them least, cheap to dear."""
        mender = Mender(self.catalog, self.losses)
        nearest = sorted(vectors, key=lambda vector: (mender.misses(vector), vector))[:_MENDED]
        mended = [mender.mend(vector) for vector in nearest]
        found = dict.fromkeys(vector for vector in mended if vector is not None)
        return sorted(found, key=lambda vector: (self.catalog.share(vector), vector))

    @cached_property
    def _places(self) -> tuple[list[Vector], np.ndarray, np.ndarray | None]:
        """The front without the dense plan, its shares of the axis and of the second cost objective."""
        vectors = [vector for vector in self._front if any(vector)]
        chosen = np.asarray(vectors, dtype=np.int64).reshape(len(vectors), len(self.losses))
        sums = [
            sum((np.asarray(row)[chosen[:, i]] for i, row in enumerate(self.table(name))), np.zeros(len(vectors)))
            for name in self._axes
        ]
        # Where the second cost rises with the first, there is nothing across the front.
        across = len(sums) > 1 and bool((np.diff(sums[1]) < 0).any())
        return vectors, sums[0], sums[1] if across else None


def _relative(errors: Errors | None) -> float | None:
    """Return ε², the square of the output's relative error or else of the weight's; None where neither is known."""
    for error in (errors.output, errors.weight) if errors is not None else ():
        if error is not None and math.isfinite(error):
            return error**2
    return None


def _losses(errors: Sequence[Sequence[Errors | None]], kind: str) -> Costs:
    """Return the losses of all layers' candidates."""
    noises = [[_relative(e) for e in row] for row in errors]
    known = [[_measured(e, noise) for e, noise in zip(*rows, strict=True)] for rows in zip(errors, noises, strict=True)]
    own = [
        [loss / noise for loss, noise in zip(*rows, strict=True) if loss and noise]
        for rows in zip(known, noises, strict=True)
    ]
    sensitivities = [median(row) if row else None for row in own]
    there = [s for s in sensitivities if s is not None]
    middle = median(there) if there else 1.0 / len(errors)
    found = []
    for row, losses, sensitivity in zip(noises, known, sensitivities, strict=True):
        s = middle if sensitivity is None else sensitivity
        found.append([_loss(kind, noise, loss, s, middle) for noise, loss in zip(row, losses, strict=True)])
    return found


def _measured(errors: Errors | None, noise: float | None) -> float | None:
    """Return the predicted loss if it can be believed."""
    loss = errors.loss if errors is not None else None
    if loss is None or not math.isfinite(loss) or (loss <= 0 and (noise is None or noise > _NOTHING**2)):
        return None
    return max(loss, 0.0)


def _loss(kind: str, noise: float | None, loss: float | None, s: float, middle: float) -> float:
    """Return one candidate's share of the predicted loss; `s` is its layer's sensitivity, `middle` the median one."""
    if noise is None:
        return math.inf
    signal = max(1.0 - noise, _LEAST_SIGNAL)
    if kind == "even":
        return middle * noise / signal
    if loss is None:
        loss = s * noise
    if kind == "shrunk":
        return math.sqrt(loss * middle * noise) / signal
    return loss if kind == "sum" else loss / signal
