"""One-step greedy: what each layer loses alone decides its rank; one threshold gives one plan.

The idea is that of the greedy multilinear rank selection of arXiv 2006.08878; the criterion is ours: per layer, the
cheapest candidate of all its formats and ranks with which the validation score, only this layer being decomposed, drops
by at most ε. All layers are then decomposed at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from autorank.strategies.base import WAIT, Option, Wait
from autorank.strategies.catalog import Vector
from autorank.strategies.greedy import FAILED, PROBE, Goal, GreedyStrategy, next_rung, spread_order
from autorank.types import Proposal, TrialRecord

_ROUNDS = 30
"""How often the search for a budget's threshold may go on with another one; it needs a handful."""


class OneStepGreedy(GreedyStrategy):
    """Probes every layer alone, then proposes one plan per threshold.

    The largest threshold comes first, the others so that any number of them covers the range: the middle one, the
    quarters, and so on. All of them look up the same table of what was measured, so a further one costs its plan and
    the few probes that its bisection adds. With a bound ``<=`` on a cost, or the option `budget`, the smallest drop of
    the table whose plan keeps it is a threshold too, even beyond `epsilon`.
    """

    name: ClassVar[str] = "greedy-one-step"
    allowed: ClassVar[Mapping[str, Option]] = {
        "epsilon": Option(5.0, 0.0, 1e9, "largest drop of the score that a layer alone may cause"),
        "targets": Option(30, 0, 1000, "further thresholds below epsilon, each of which gives a plan"),
        "ratio": Option(0.8, 0.01, 0.99, "of each threshold to the one before"),
        "budget": Option(1.0, 0.0, 1.0, "share of the cost for which a threshold is looked for; 1: none"),
        "scan": Option("bisection", choices=("bisection", "all"), help="ranks that are probed in each ladder"),
        "probe": PROBE,
    }

    def _set_up(self) -> None:
        super()._set_up()
        self._reference = self._dense_gain
        self._gains: list[dict[int, float]] = [{} for _ in self.space.layers]
        self._pending: list[set[int]] = [set() for _ in self.space.layers]
        largest, ratio = float(self.options["epsilon"]), float(self.options["ratio"])
        count = int(self.options["targets"]) + 1 if largest else 1
        self._goals = [Goal(largest * ratio**n) for n in spread_order(count)]
        self._smallest = largest * ratio ** (count - 1)
        self._bounded = any(c.operator == "<=" for c in self.catalog.constraints)
        if self.options["budget"] < 1 or self._bounded:
            self._goals.insert(1, Goal(None, budget=True))
        self._accepted = self._points = 0
        self._notes: list[str] = []

    # Ask and tell

    def ask(self) -> Proposal | Wait | None:
        """Return a probe of one layer, or a threshold's plan as soon as its probes are known."""
        if self._reference is None:
            first = self._best_known()
            if first is not None:
                return first
            if self._reference is None:
                self._text = "no probe of a single layer has a score, and the dense model's is not known"
                return None
        waiting = False
        for goal in list(self._goals):
            # A budget looks for its threshold in what the largest one has found; a bound decides which others remain.
            if waiting and goal.budget and goal.epsilon is None:
                if self._bounded:
                    break
                continue
            if goal not in self._goals:
                continue
            answer = self._serve(goal)
            if isinstance(answer, Proposal):
                return answer
            waiting = waiting or answer is WAIT
            if waiting and goal.budget and self._bounded:
                break
        if waiting:
            return WAIT
        self._text = self._text or self._why()
        return None

    def tell(self, proposal: Proposal, record: TrialRecord) -> None:
        """Enter what one layer alone loses into the table; the first outcome counts."""
        vector = self.catalog.vector(proposal.plan)
        if vector is None or proposal.pull or proposal.parent:
            return
        if not proposal.probe and (proposal.fidelity or self.fidelity) == self.fidelity:
            self._claimed.add(vector)
        changed = [i for i, k in enumerate(vector) if k]
        gain = self._cheap_gain(proposal, record)
        if len(changed) == 1 and gain is not None:
            self._gains[changed[0]].setdefault(vector[changed[0]], gain)
            self._pending[changed[0]].discard(vector[changed[0]])

    # Goals

    def _serve(self, goal: Goal) -> Proposal | Wait | None:
        """Return a goal's next probe or its plan; None when the goal is done."""
        while True:
            if goal.epsilon is None:
                goal.restart(self._within_budget()[0])
            assert goal.epsilon is not None
            probe = self._search(goal)
            if probe is not None:
                return probe
            if not goal.budget:
                vector = self._joint(self._least(goal.epsilon))
                break
            epsilon, vector = self._within_budget()
            if epsilon == goal.epsilon or goal.rounds >= _ROUNDS:
                break
            goal.restart(epsilon)
        self._goals.remove(goal)
        if goal.budget:
            self._note_budget(goal.epsilon, vector)
            vector = self._repaired(vector)
            if self._bounded:  # plans of smaller thresholds cost more, and are not worth probes
                self._goals = [other for other in self._goals if (other.epsilon or 0.0) > goal.epsilon]
        self._accepted += any(vector)
        if not self._is_new(vector):
            return None
        self._points += 1
        return self._propose(vector)

    def _least(self, epsilon: float) -> float:
        """Return the least acceptable gain; differences of scores such as 88.45 − 88.40 are not exact."""
        assert self._reference is not None
        return self._reference - epsilon - 1e-9 * max(1.0, abs(self._reference)) if epsilon < math.inf else -1e300

    def _search(self, goal: Goal) -> Proposal | Wait | None:
        """Return the next probe that the threshold needs, `WAIT`, or None when all layers are settled."""
        assert goal.epsilon is not None
        least = self._least(goal.epsilon)
        # Layers with a pending probe come last: its outcome may spare others of the same layer.
        for busy in (False, True):
            for i, pending in enumerate(self._pending):
                if i in goal.settled or bool(pending) != busy or goal.stuck.get(i) == len(self._gains[i]):
                    continue
                index, open_ones = self._next(i, least)
                if index is not None:
                    return self._ask(i, index)
                if open_ones:
                    goal.stuck[i] = len(self._gains[i])
                else:
                    goal.settled.add(i)
        return None if len(goal.settled) == len(self._gains) else WAIT

    def _next(self, layer: int, least: float) -> tuple[int | None, bool]:
        """Return a candidate of the layer to probe, and whether a pending one is still needed."""
        gains, pending, row = self._gains[layer], self._pending[layer], self._amounts[layer]
        everything = self.options["scan"] == "all"
        # What is dearer than the best of the other formats cannot win.
        ceiling = min((row[k] for k, gain in gains.items() if gain >= least), default=math.inf)
        waiting = False
        for ladder in self._ladders[layer]:
            if everything:
                wanted = [k for k in ladder if k not in gains]
            else:
                rung = next_rung(tuple(k for k in ladder if row[k] <= ceiling), gains, least)
                wanted = [] if rung is None else [rung]
            for k in wanted:
                if k not in pending:
                    return k, True
                waiting = True
        return None, waiting

    def _ask(self, layer: int, index: int) -> Proposal:
        self._pending[layer].add(index)
        return self._propose(self._moved(self.catalog.dense_vector, [(layer, index)]), self._cheap, probe=True)

    def _best_known(self) -> Proposal | Wait | None:
        """Probe each layer's dearest candidate, and take the best outcome for the dense model, whose score is unknown.

        Afterwards the reference is set, unless no probe has a score.
        """
        waiting = False
        for i, ladders in enumerate(self._ladders):
            k = max((k for ladder in ladders for k in ladder), key=lambda k: (self._amounts[i][k], k), default=None)
            if k is None or k in self._gains[i]:
                continue
            if k not in self._pending[i]:
                return self._ask(i, k)
            waiting = True
        if waiting:
            return WAIT
        best = max((gain for gains in self._gains for gain in gains.values()), default=FAILED)
        self._reference = best if best > FAILED else None
        return None

    # From the table to plans

    def _joint(self, least: float) -> Vector:
        """Return the plan of a threshold: per layer the cheapest that is acceptable, of equally cheap the best."""
        return tuple(
            min(((row[k], -gain, k) for k, gain in gains.items() if gain >= least and row[k] < row[0]), default=(0,))[
                -1
            ]
            for row, gains in zip(self._amounts, self._gains, strict=True)
        )

    def _within_budget(self) -> tuple[float, Vector]:
        """Return the smallest drop of the table whose plan keeps the budget, and the plan.

        Infinity, and the plan that misses it least, when there is none.
        """
        assert self._reference is not None
        drops = sorted(
            (max(self._reference - gain, 0.0), i, k)  # a threshold below 0 would take noise for a merit
            for i, gains in enumerate(self._gains)
            for k, gain in gains.items()
            if gain > FAILED and self._amounts[i][k] < self._amounts[i][0]
        )
        chosen = [0] * len(self._gains)
        best = [(row[0], math.inf) for row in self._amounts]
        nearest = (self._missed(tuple(chosen)), tuple(chosen))
        dirty = False
        for at, (drop, i, k) in enumerate(drops):
            found = (self._amounts[i][k], -self._gains[i][k])
            if found < best[i]:
                chosen[i], best[i], dirty = k, found, True
            last = at + 1 == len(drops) or drops[at + 1][0] > drop
            if dirty and last:
                dirty = False
                nearest = min(nearest, (self._missed(tuple(chosen)), tuple(chosen)))
                if nearest[0] <= 0:
                    return drop, tuple(chosen)
        return math.inf, nearest[1]

    def _missed(self, vector: Vector) -> float:
        """Return how far a plan misses the constraints on costs and the option `budget`, in all; 0 when it does not."""
        over = self.catalog.share(vector) - float(self.options["budget"]) - 1e-9
        return sum(max(value, 0.0) for value in (over, *self.catalog.violations(vector).values()))

    def _repaired(self, vector: Vector) -> Vector:
        """Return the plan, or one near it that meets the constraints, as thresholds may step over a narrow window."""
        if self.catalog.feasible(vector):
            return vector
        return self.catalog.repair(vector, self.rng) or vector

    # Ends

    def _bounds(self) -> str:
        bounds = [str(c) for c in self.catalog.constraints]
        if self.options["budget"] < 1:
            bounds.append(f"budget={self.options['budget']:g}")
        return " and ".join(bounds)

    def _note_budget(self, epsilon: float, vector: Vector) -> None:
        if self._missed(vector) > 0:
            self._notes.append(
                f"no threshold gives a plan with {self._bounds()}; the nearest keeps "
                f"{self.catalog.share(vector):.4g} of the dense model's {self.catalog.axis.removesuffix('_kept')}"
            )
        elif epsilon > self.options["epsilon"]:
            self._notes.append(f"{self._bounds()} takes a threshold of {epsilon:.4g}, beyond epsilon")

    def _why(self) -> str:
        assert self._reference is not None
        if not self._accepted:
            drops = [
                (self._reference - gain, i, k)
                for i, gains in enumerate(self._gains)
                for k, gain in gains.items()
                if gain > FAILED
            ]
            if not drops:
                return "no probe of a single layer has a score"
            drop, i, k = min(drops)
            return (
                f"no candidate of any layer loses at most epsilon={self.options['epsilon']:g}; the nearest is "
                f"{self._name(i, k)}, which loses {drop:.4g}"
            )
        notes = "; ".join(["", *self._notes])
        largest = f"epsilon={self.options['epsilon']:g}"
        what = largest if self._smallest >= self.options["epsilon"] else f"{largest} and down to {self._smallest:.3g}"
        return f"every threshold has given its plan ({what}: {self._points} different ones){notes}"
