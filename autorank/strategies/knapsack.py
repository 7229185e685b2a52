"""The predicted front, point by point: no outcome is waited for, none changes what comes next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import ClassVar

import numpy as np

from autorank.strategies.base import Option, Strategy, Wait
from autorank.strategies.catalog import COST_NAMES, Vector
from autorank.strategies.predictor import KINDS, Predictor
from autorank.types import Proposal, TrialRecord

_CHANGES = 3
"""Candidates of a layer that an exchange may turn to: those that cost least in the Lagrangian."""
_EXCHANGES = 200
"""Exchanges tried around one point of the front."""


def spread_evenly(base: int = 2) -> Iterator[float]:
    """Yield the van der Corput sequence: numbers in (0, 1) of which every beginning is spread evenly.

    The digits of 1, 2, 3, … in `base`, mirrored at the point (van der Corput, Proc. Akad. Wet. Amsterdam 38, 1935):
    1/2, 1/4, 3/4, 1/8, 5/8, … for base 2.
    """
    number = 0
    while True:
        number += 1
        rest, place, total = number, 1.0, 0.0
        while rest:
            rest, digit = divmod(rest, base)
            place /= base
            total += digit * place
        yield total


class Knapsack(Strategy):
    """The front that a sum of predicted losses has by an exact multiple-choice knapsack.

    First `points` plans of that front, from its middle outwards, always in the widest gap along the cost axis; with an
    upper bound on a cost, the dearest plan comes before all. Then plans beside those: one or two layers
    changed, by what that costs in predicted loss and in cost at the slope of the front (one layer up, another down,
    or another format at equal cost). Then plans drawn along the axis, until there are none.

    Outcomes are not needed and change nothing, so any number of trials may run at once. The seed decides nothing but
    what is drawn at the end.
    """

    name: ClassVar[str] = "knapsack"
    needs: ClassVar[frozenset[str]] = frozenset({"errors"})
    allowed: ClassVar[Mapping[str, Option]] = {
        "points": Option(32, 1, 10_000, "plans of the predicted front before plans beside it are tried"),
        "predictor": Option("snr", help="how a plan's loss is predicted from its layers' errors", choices=KINDS),
    }

    def _set_up(self) -> None:
        costs = [o.name for o in self.objectives if o.name in COST_NAMES]
        self.predictor = Predictor(self.catalog, str(self.options["predictor"]), costs=costs)
        self._plans = self._in_turn()

    def ask(self) -> Proposal | Wait | None:
        """Return the next plan; None when all were proposed."""
        vector = next((vector for vector in self._plans if self._is_new(vector)), None)
        if vector is None:
            vector = self._draw(0.35) or self._somewhere()
        return None if vector is None else self._propose(vector)

    def tell(self, proposal: Proposal, record: TrialRecord) -> None:
        """Remember that the plan is known; outcomes do not change what is proposed."""
        vector = self.catalog.vector(proposal.plan)
        if vector is not None and not record.probe:
            self._claimed.add(vector)

    def _in_turn(self) -> Iterator[Vector]:
        """Yield points of the front, then what lies beside them."""
        points: list[Vector] = []
        for vector in self._points():
            points.append(vector)
            yield vector
        # The best exchange of every point before the second best of any.
        beside = [self._beside(vector) for vector in points]
        while beside:
            for plans in list(beside):
                vector = next(plans, ())
                if vector:
                    yield vector
                else:
                    beside.remove(plans)

    def _points(self) -> Iterator[Vector]:
        """Yield `points` different plans of the front, each beginning of them spread over it."""
        wanted = int(self.options["points"])
        seen: set[Vector] = set()
        last = self.predictor.at(1.0)
        if last is not None and any(c.operator == "<=" for c in self.catalog.constraints):
            seen.add(last)
            yield last
        for place, across in islice(zip(spread_evenly(2), spread_evenly(3), strict=True), 4 * wanted):
            vector = self.predictor.at(place, across)
            if len(seen) >= wanted or vector is None:
                return
            if vector not in seen:
                seen.add(vector)
                yield vector

    def _beside(self, vector: Vector) -> Iterator[Vector]:
        """Yield plans that differ in one or two layers, those first that cost least beside the predicted front."""
        changes = self._changes(vector)
        cost = np.asarray([change[0] for change in changes])
        layer = np.asarray([change[1] for change in changes], dtype=np.int64)
        first, second = np.triu_indices(len(changes))
        # A pair with itself is one change alone; two of one layer are none.
        allowed = (first == second) | (layer[first] != layer[second])
        first, second = first[allowed], second[allowed]
        total = cost[first] + np.where(first == second, 0.0, cost[second])
        for n in np.argsort(total, kind="stable")[:_EXCHANGES]:
            changed = list(vector)
            for _, i, k in (changes[first[n]], changes[second[n]]):
                changed[i] = k
            yield tuple(changed)

    def _changes(self, vector: Vector) -> list[tuple[float, int, int]]:
        """Return (Lagrangian cost, layer, index) of the cheapest changes of every layer."""
        losses, prices = self.predictor.losses, self.predictor.prices(vector)
        found: list[tuple[float, int, int]] = []
        for i, k in enumerate(vector):
            total = np.asarray(losses[i]) + np.asarray(prices[i])
            # A repaired plan may hold a candidate of which nothing is known; then the best one is the measure.
            total -= total[k] if np.isfinite(total[k]) else total.min()
            others = [j for j in np.argsort(total, kind="stable").tolist() if j != k and np.isfinite(total[j])]
            found += [(float(total[j]), i, j) for j in others[:_CHANGES]]
        return found
