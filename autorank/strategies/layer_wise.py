"""The layer-wise optimum: the smallest largest relative error of a layer that a budget allows.

Liebenwein, Maalouf, Gal, Feldman and Rus, "Compressing neural networks: towards determining the optimal layer-wise
decomposition" (ALDS, NeurIPS 2021, arXiv 2107.11442), alternate a local step (per layer the cheapest decomposition
within an error) and a global one (the error that a budget allows). With a finite table of candidates both together are
exact, and all budgets are solved at once: only errors that stand in the table matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from autorank.errors import ConfigError
from autorank.space import Candidate
from autorank.strategies.base import Option, Strategy, Wait
from autorank.strategies.bounds import Bounds, Table, shares, table
from autorank.strategies.catalog import Vector
from autorank.strategies.spreading import spread_order
from autorank.types import Proposal, TrialRecord

_KINDS = ("auto", "output", "weight", "loss")


@dataclass(frozen=True, slots=True)
class Level:
    """A point of the exact front of (largest layer error, cost): the cheapest plan none of whose layers errs more."""

    error: float
    share: float
    vector: Vector


def error_levels(errors: Table, costs: Table) -> list[Level]:
    """Return the front of the largest layer error against the sum of costs, over all plans.

    Parameters
    ----------
    errors : array, shape (layers, indices)
        Index 0, dense, has error 0; infinite where an index must not be taken.
    costs : array, shape (layers, indices)
        `Level.share` is the sum of these.

    Returns
    -------
    list of Level
        Errors ascend, costs fall, both strictly. The first is free of error, and may be the dense plan.
    """
    # From small errors to large ones a layer changes only to what is cheaper than all before.
    layers, indices = errors.shape
    order = sorted(
        (float(errors[i, k]), float(costs[i, k]), i, k)
        for i in range(layers)
        for k in range(1, indices)
        if errors[i, k] < math.inf
    )
    now, cost = [0] * layers, [float(row[0]) for row in costs]
    levels = [Level(0.0, sum(cost), tuple(now))]
    for error, price, i, k in order:
        if price >= cost[i]:
            continue
        now[i], cost[i] = k, price
        if levels[-1].error >= error:
            levels.pop()
        levels.append(Level(error, sum(cost), tuple(now)))
    return levels


class LayerWise(Strategy):
    """Minimum of the largest relative layer error under every budget, choice of format per layer included.

    The points of the front of (largest error, cost) are proposed at full fidelity, spread along the cost axis, then
    finer until all were. The cost is that of the first cost objective.

    ALDS measures a layer by the spectral norm, ‖W − Ŵ‖₂ / ‖W‖₂. Ours, by the option ``error``, is ``output``: the
    relative root-mean-square error of the layer's output under the covariance of its inputs; ``weight``: the same
    without the inputs, ‖W − Ŵ‖ / ‖W‖ (Frobenius); or, not relative, ``loss``: the predicted rise of the loss.

    Constraints on a cost along the axis cut the front off. Under any others the plan of each error level is moved, at
    the least cost along the axis and within its error, to where they are met, which is no longer exact.
    """

    name: ClassVar[str] = "layer-wise"
    needs: ClassVar[frozenset[str]] = frozenset({"errors"})
    allowed: ClassVar[Mapping[str, Option]] = {
        "error": Option(
            "auto",
            help="a layer's error, of its output, of its weight or of the predicted loss; auto: output where known",
            choices=_KINDS,
        ),
    }

    def _set_up(self) -> None:
        self._errors = table(self._error_rows(self.options["error"]))
        self._costs = shares(self.catalog, self.catalog.axis)
        self._bounds = Bounds(self.catalog)
        self._levels = error_levels(self._errors, self._costs)
        self._order = self._vectors()
        self._proposed = 0
        self._ended = ""

    def ask(self) -> Proposal | Wait | None:
        """Return the next plan of the front; None when all were proposed."""
        if not self._ended:
            for vector in self._order:
                if self._is_new(vector):
                    self._proposed += 1
                    return self._propose(vector)
            self._ended = self._why()
        return None

    def tell(self, proposal: Proposal, record: TrialRecord) -> None:
        """Remember that the plan is known; outcomes do not change what is proposed."""
        vector = self.catalog.vector(proposal.plan)
        if vector is not None and not proposal.probe:
            self._claimed.add(vector)

    @property
    def ended(self) -> str:
        """Why nothing more is proposed, in one line."""
        return self._ended

    def _error_rows(self, kind: str) -> list[list[float]]:
        """Return the error of every index, one row per layer; infinite where it is not known."""
        if kind == "auto":
            known = all(
                c.errors is None or c.errors.output is not None for row in self.space.layers for c in row.candidates
            )
            kind = "output" if known else "weight"
        rows = [[0.0, *(_error(candidate, kind) for candidate in layer.candidates)] for layer in self.space.layers]
        if all(value == math.inf for row in rows for value in row[1:]):
            raise ConfigError(
                f"strategy {self.name}: option error={kind}: no candidate has such an error; "
                "'weight' needs no statistics, 'output' those of inputs, 'loss' those of gradients too"
            )
        return rows

    def _vectors(self) -> Iterator[Vector]:
        """Yield the plans of the front that meet all constraints, well spread at every moment."""
        slack = 1e-9
        low, high = self.catalog.low - slack, self.catalog.high + slack
        offset = 1.0 - float(self._costs[:, 0].sum())  # what the model spends outside of these layers
        within = [level for level in self._levels if low <= level.share + offset <= high]
        # The dense model, at 1, was measured before the sweep.
        found = False
        for at in spread_order([level.share + offset for level in within], (self.catalog.low, 1.0)):
            vector = self._within(within[at])
            if vector is not None:
                found = True
                yield vector
        if not found:
            # Bounds that the front jumps over, or that need what is dear along the axis: from small errors to large
            # ones, what is cheaper than all before.
            least = math.inf
            for level in (*self._levels, Level(math.inf, 0.0, self._levels[-1].vector)):
                vector = self._within(level)
                if vector is not None and self.catalog.share(vector) < least:
                    least = self.catalog.share(vector)
                    yield vector

    def _within(self, level: Level) -> Vector | None:
        if self.catalog.feasible(level.vector):
            return level.vector
        return self._bounds.meet(level.vector, self._costs, self._errors <= level.error)

    def _why(self) -> str:
        if self._proposed:
            return f"all plans with the smallest largest layer error for their cost were proposed ({self._proposed})"
        return "no plan with the smallest largest layer error for its cost is new and meets the constraints"


def _error(candidate: Candidate, kind: str) -> float:
    value = None if candidate.errors is None else getattr(candidate.errors, kind)
    return math.inf if value is None or math.isnan(value) else float(value)
