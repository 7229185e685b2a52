"""Learned ranks: training that pulls the weights towards a decomposed copy, in turn with the choice of ranks.

Idelbayev and Carreira-Perpiñán, "Low-rank compression of neural nets: learning the rank of each layer" (CVPR 2020):
minimise L(W) + α·cost(k) by a quadratic penalty. A learning step trains W with (μ/2)·Σ‖W_l − Ŵ_l‖² towards the copy Ŵ;
a compression step chooses per layer the k that minimises α·cost_l(k) + (μ/2)·‖W_l − Ŵ_l(k)‖²; then μ grows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from autorank.strategies.base import WAIT, Option, Strategy, Wait
from autorank.strategies.bounds import Bounds, Table, shares, table
from autorank.strategies.catalog import Vector
from autorank.strategies.hulls import Step, compression_path
from autorank.strategies.spreading import spread_order
from autorank.types import Fidelity, Proposal, TrialRecord


@dataclass
class _Chain:
    """The alternation for one α: its budget, what was chosen last, and how far it is."""

    target: float
    alpha: float
    vector: Vector
    distances: Table
    parent: Proposal | None = None
    trained: int = 0
    waiting: bool = False
    over: bool = False


class LearnedRank(Strategy):
    """Alternation of training with a quadratic pull and the choice of rank and format per layer.

    First the distances of all candidates to the dense weights are measured, once (a probe without training; if it
    fails, relative errors stand in for them). Then, for each of several values of α, `iterations` pulled trainings,
    each from the weights of the one before and with a pull ``growth`` times as strong, are run as probes, and after
    each the plan is chosen anew from the distances that it measured. Last, the plan is proposed at full fidelity from
    the last pulled weights: a point of the front. Values of α are independent, so their trials run in parallel. A trial
    that fails ends its own alternation.

    α is not asked for: a budget is. Budgets are spread over the cost that is within reach and bounds, and α is what
    makes the dense weights' choice meet the budget. With ``hold=share`` it is found anew at each step, so that the
    budget holds: the compression step of the constrained problem, min L(W) under cost ≤ budget. With ``hold=alpha`` it
    stays, as in the paper, and the cost goes where the training takes it: with few and short steps mostly up, as μ
    grows while the weights are still far from low rank.

    Distances are not relative, as the pull itself is not; a whitened fit is judged by the same distance of weights.
    Without training (a fidelity of no steps) there is nothing to alternate: the first choice is proposed at once.
    """

    name: ClassVar[str] = "learned-rank"
    needs: ClassVar[frozenset[str]] = frozenset({"errors"})
    chains: ClassVar[bool] = True
    allowed: ClassVar[Mapping[str, Option]] = {
        "points": Option(20, 1, 10_000, "values of alpha, each of which ends in one point of the front"),
        "iterations": Option(4, 1, 1000, "pulled trainings before the final fine-tune"),
        "steps": Option(0.25, 0.0, 1000.0, "length of each pulled training, in lengths of the sweep's fine-tune"),
        "mu": Option(0.1, 1e-9, 1e9, "strength of the first pull, in loss per squared weight"),
        "growth": Option(4.0, 1.0, 1e6, "factor from one pull to the next"),
        "hold": Option("share", help="what stays from step to step: the budget, or alpha", choices=("share", "alpha")),
    }

    def _set_up(self) -> None:
        self._costs = shares(self.catalog, self.catalog.axis)
        self._outside = 1.0 - float(self._costs[:, 0].sum())  # what the model spends outside of these layers
        self._bounds = Bounds(self.catalog)
        self._steps = round(self.options["steps"] * self.fidelity.steps)
        self._iterations = self.options["iterations"] if self._steps else 0
        self._targets = self._budgets()
        self._first: Proposal | None = None
        self._distances: Table | None = None
        self._chains: list[_Chain] = []
        self._pending: dict[Proposal, _Chain] = {}
        self._starts: set[Vector] = set()
        self._points = self._failed = 0
        self._ended = ""

    def ask(self) -> Proposal | Wait | None:
        """Return the next training or point; WAIT while all alternations wait; None when all are over."""
        if self._first is None:
            dense = self.catalog.dense_vector
            self._first = self._propose(dense, Fidelity(0, False), probe=True, want="distances")
            return self._first
        if self._distances is None:
            return WAIT
        # What was begun is ended first: a sweep that is stopped early has its points.
        for chain in self._chains:
            if not chain.waiting and not chain.over:
                proposal = self._advance(chain)
                if proposal is not None:
                    return proposal
        while (begun := self._begin()) is not None:
            proposal = self._advance(begun)
            if proposal is not None:
                return proposal
        if any(not chain.over for chain in self._chains):
            return WAIT
        self._ended = self._why()
        return None

    def tell(self, proposal: Proposal, record: TrialRecord) -> None:
        """Choose anew from the distances to the newly trained weights; a failed training ends its alternation."""
        if proposal == self._first and self._distances is None:
            self._distances = self._measured(record)
            if self._distances is None:
                self._distances = self._guessed()
            return
        chain = self._pending.pop(proposal, None)
        if chain is None:
            vector = self.catalog.vector(proposal.plan)
            if vector is not None and not proposal.probe:
                self._claimed.add(vector)
            return
        chain.waiting = False
        distances = self._measured(record)
        if distances is None:
            chain.over = True
            self._failed += 1
            return
        chain.distances = distances
        chain.vector = self._chosen(chain, self._pull(chain.trained - 1)) or chain.vector

    @property
    def ended(self) -> str:
        """Why nothing more is proposed, in one line."""
        return self._ended

    # The alternation

    def _pull(self, iteration: int) -> float:
        """Return μ of a learning step, counted from 0."""
        return min(self.options["mu"] * self.options["growth"] ** iteration, 1e12)

    def _budgets(self) -> Iterator[float]:
        """Return the budgets as shares of the dense cost, well spread at every moment."""
        low, high, count = self.catalog.low, self.catalog.high, self.options["points"]
        # Neither the cheapest plan nor, without a bound, the dense one.
        parts = count if high < 1.0 - 1e-9 else count + 1
        targets = [low + (high - low) * j / parts for j in range(1, count + 1)]
        return (targets[i] for i in spread_order(targets, (low, 1.0)))

    def _begin(self) -> _Chain | None:
        """Return the alternation for the next budget; None when there is none with a plan of its own to start from."""
        assert self._distances is not None
        for target in self._targets:
            path = compression_path(self._costs, self._distances)
            chain = _Chain(target, self._alpha(path, target), (), self._distances)
            vector = self._chosen(chain, self._pull(0))
            if vector is None or vector in self._starts or vector == self.catalog.dense_vector:
                continue
            self._starts.add(vector)
            chain.vector = vector
            self._chains.append(chain)
            return chain
        return None

    def _advance(self, chain: _Chain) -> Proposal | None:
        """Return the next trial of an alternation; None when it has none left."""
        if chain.trained < self._iterations:
            pull = self._pull(chain.trained)
            fidelity = Fidelity(self._steps, self.fidelity.batch_norm)
            proposal = self._propose(
                chain.vector, fidelity, parent=chain.parent, pull=pull, probe=True, want="distances"
            )
            chain.trained, chain.parent, chain.waiting = chain.trained + 1, proposal, True
            self._pending[proposal] = chain
            return proposal
        chain.over = True
        vector = self._unclaimed(chain)
        if vector is None:
            return None
        self._points += 1
        return self._propose(vector, parent=chain.parent)

    def _chosen(self, chain: _Chain, pull: float) -> Vector | None:
        """Return the compression step's plan, moved to where all constraints are met."""
        if self.options["hold"] == "share":
            path = compression_path(self._costs, chain.distances)
            at = self._within(path, chain.target)
            vector, values = path[at].vector, self._values_at(_rate(path, at), 1.0, chain.distances)
        else:
            values = self._values_at(chain.alpha, 0.5 * pull, chain.distances)
            vector = tuple(int(k) for k in np.argmin(values, axis=1))
        return self._bounds.meet(vector, values)

    def _values_at(self, alpha: float, weight: float, distances: Table) -> Table:
        """Return α·cost + weight·distance, which the compression step minimises per layer."""
        with np.errstate(invalid="ignore"):
            values = alpha * self._costs + weight * distances
        return np.where(np.isfinite(values), values, np.inf)

    def _unclaimed(self, chain: _Chain) -> Vector | None:
        """Return the chain's plan, or if it was proposed before the nearest one in cost that is a choice for some α."""
        if self._is_new(chain.vector):
            return chain.vector
        here = self.catalog.share(chain.vector) - self._outside
        path = compression_path(self._costs, chain.distances)
        return next(
            (step.vector for step in sorted(path, key=lambda s: abs(s.share - here)) if self._is_new(step.vector)), None
        )

    def _within(self, path: Sequence[Step], target: float) -> int:
        """Return the number of the dearest step within a budget; the cheapest where none is."""
        inside = [j for j, step in enumerate(path) if step.share + self._outside <= target + 1e-9]
        return inside[-1] if inside else 0

    def _alpha(self, path: Sequence[Step], target: float) -> float:
        """Return the α whose choice, at the first μ, is the dearest within a budget."""
        return 0.5 * self._pull(0) * _rate(path, self._within(path, target))

    # What is known of the weights

    def _measured(self, record: TrialRecord) -> Table | None:
        """Return the squared distances, dense first; None when the trial failed or did not measure every layer."""
        if record.status != "complete":
            return None
        rows = []
        for layer in self.space.layers:
            row = record.measured.get(layer.spec.name, ())
            if len(row) != len(layer.candidates):
                return None
            rows.append([0.0, *(value if math.isfinite(value) else math.inf for value in row)])
        return table(rows)

    def _guessed(self) -> Table:
        """Return squared relative errors, as if all layers' weights were of the same norm."""
        return table(
            [
                [0.0, *(math.inf if c.errors is None else c.errors.weight**2 for c in layer.candidates)]
                for layer in self.space.layers
            ]
        )

    def _why(self) -> str:
        failed = f"; {self._failed} alternations ended early, as a training failed" if self._failed else ""
        if not self._points and not failed:
            return "no plan that meets the constraints is a choice for any budget"
        return (
            f"all budgets were alternated to their end, {self._points} points{failed}; option points sets their number"
        )


def _rate(path: Sequence[Step], at: int) -> float:
    """Return an exchange rate at which a step is the choice: between its own and that of the next dearer one."""
    below = path[at + 1].rate if at + 1 < len(path) else 0.0
    return 0.5 * (path[at].rate + below) if at else 2.0 * below + 1.0
