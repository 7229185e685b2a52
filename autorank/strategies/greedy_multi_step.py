"""Multi-step greedy: from the dense model down, step by step, always where the least score is lost per cost saved.

The idea is that of arXiv 2006.08878; the criterion is ours. At each step the next cheaper candidates of every layer are
probed from the present state, the ones that lose least per unit of the cost axis saved are taken, and the new state is
a point of the front. Every `interval` points the fine-tuned weights become the state from which the next probes start,
so that what fine-tunes restore is carried on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from autorank.strategies.base import WAIT, Option, Wait
from autorank.strategies.catalog import Vector
from autorank.strategies.greedy import FAILED, PROBE, GreedyStrategy
from autorank.types import Proposal, TrialRecord

Move = tuple[int, int]
"""A layer and the candidate to which it goes."""

_POINTS = 40
"""Points on the way to the budget when the length of a step is left to us: as many as a default sweep has trials."""


class MultiStepGreedy(GreedyStrategy):
    """Descends the ladders of all layers, guided by probes.

    A move that is not probed at a step keeps the loss per saving that it had when it last was (lazy greedy); a rung
    that never was is guessed from the rung above it. Losses rise on the way down, so such guesses are too low rather
    than too high, and the most promising moves, which are probed first, are those that may be guessed wrong.

    States that miss a bound ``<=`` on a cost are no points, so nothing is restored on the way to it: to compress
    harshly and well, set `budget` and leave the bound away.
    """

    name: ClassVar[str] = "greedy-multi-step"
    chains: ClassVar[bool] = True
    allowed: ClassVar[Mapping[str, Option]] = {
        "budget": Option(0.2, 0.0, 1.0, "share of the cost at which it ends"),
        "epsilon": Option(50.0, 0.0, 1e9, "ends when a point has lost more of the score than this"),
        "interval": Option(2, 0, 10_000, "points after which fine-tuned weights are carried on; 0: never"),
        "tries": Option(12, 0, 1_000_000, "moves probed again per step, besides as many as the last one took; 0: all"),
        "stride": Option(0, 0, 10_000, f"moves per step, of different layers; 0: a {_POINTS}th of the way each step"),
        "probe": PROBE,
    }

    def _set_up(self) -> None:
        super()._set_up()
        self._base: Vector = self.catalog.dense_vector
        # States are the weights that were started from: the dense model's, then those of each restored point.
        self._parents: list[Proposal | None] = [None]
        self._gains: dict[tuple[int, Vector], float] = {}
        if self._dense_gain is not None:
            self._gains[0, self._base] = self._dense_gain
        self._pending: set[tuple[int, Vector]] = set()
        self._queue: list[Vector] | None = None
        self._moves: list[Move] = []
        self._refused: set[Move] = set()
        self._rates: dict[tuple[int, int, int], float] = {}
        self._ladder_rates: dict[tuple[int, int], float] = {}
        self._variant = [
            {k: v for v, ladder in enumerate(ladders) for k in ladder} | {0: -1} for ladders in self._ladders
        ]
        self._lower = any(c.operator == ">=" for c in self.catalog.constraints)
        self._pace = (1.0 - max(float(self.options["budget"]), self.catalog.low)) / _POINTS
        self._asked_points: dict[Vector, Proposal] = {}
        self._restoring: Vector | None = None
        self._points = self._taken = 0

    # Ask and tell

    def ask(self) -> Proposal | Wait | None:
        """Return the next probe of the step, or the point that the step leads to."""
        while not self._text:
            if self._restoring is not None:
                return WAIT
            if self._queue is None:
                self._plan_step()
            answer = self._next_probe()
            if answer is not None:
                return answer
            self._queue = None
            chosen = self._choose()
            if chosen:
                point = self._take(chosen)
                if point is not None:
                    return point
            elif chosen is None:
                return self._finish()
        return None

    def tell(self, proposal: Proposal, record: TrialRecord) -> None:
        """Enter a probe's gain; start from a restored point, or end after a point that has lost too much."""
        vector = self.catalog.vector(proposal.plan)
        state = self._state_of(proposal.parent)
        if vector is None or proposal.pull:
            return
        if state is not None:
            gain = self._cheap_gain(proposal, record)
            if gain is not None:
                self._gains.setdefault((state, vector), gain)
                self._pending.discard((state, vector))
        if proposal.probe or (proposal.fidelity or self.fidelity) != self.fidelity:
            return
        self._claimed.add(vector)
        asked = self._asked_points.pop(vector, None)
        if asked is not None:
            self._after_point(vector, asked, self._gain(record))

    def _after_point(self, vector: Vector, asked: Proposal, gain: float | None) -> None:
        if vector == self._restoring:
            self._restoring = None
            # A point that failed or was stopped leaves no weights to go on with; the last ones serve once more.
            if gain is not None:
                self._parents.append(asked)
        dense = self._dense_gain
        if dense is None:
            dense = max((g for (state, _), g in self._gains.items() if state == 0), default=None)
        if gain is not None and dense is not None and dense - gain > self.options["epsilon"]:
            self._text = self._text or (
                f"a point at {self.catalog.share(vector):.3g} of the dense model's {self._axis} lost "
                f"{dense - gain:.4g}, more than epsilon={self.options['epsilon']:g}"
            )

    def _state_of(self, parent: Proposal | None) -> int | None:
        return next((n for n in reversed(range(len(self._parents))) if self._parents[n] == parent), None)

    @property
    def _state(self) -> int:
        return len(self._parents) - 1

    @property
    def _axis(self) -> str:
        return self.catalog.axis.removesuffix("_kept")

    # A step: which moves there are, which of them are probed, and which are taken

    def _steps_down(self) -> list[Move]:
        """Return every layer's next cheaper candidates: one per variant, the dearest that is cheaper than now."""
        found = []
        for i, now in enumerate(self._base):
            row = self._amounts[i]
            for ladder in self._ladders[i]:
                k = next((k for k in reversed(ladder) if row[k] < row[now] and (i, k) not in self._refused), None)
                if k is not None:
                    found.append((i, k))
        return [move for move in found if self._allowed(self._moved(self._base, [move]))]

    def _allowed(self, vector: Vector) -> bool:
        """Say whether the plan is above the lower bounds on costs; a descent would never come back to them."""
        if not self._lower:
            return True
        kept = self.catalog.kept(vector)
        return all(c.violation(kept[c.name]) <= 0 for c in self.catalog.constraints if c.operator == ">=")

    def _plan_step(self) -> None:
        """Choose what to probe: every ladder that never was, and the most promising of the others."""
        self._moves = self._steps_down()
        unknown = [m for m in self._moves if (self._state, self._moved(self._base, [m])) not in self._gains]
        first = [m for m in unknown if self._guess(m) is None]
        others = sorted((m for m in unknown if self._guess(m) is not None), key=lambda m: (self._guess(m), m))
        tries = int(self.options["tries"])
        wanted = first + others[: tries + self._taken if tries else None]
        self._queue = [self._moved(self._base, [m]) for m in wanted]
        # What a state loses on its own (an unknown joint effect of several moves, or of the rounding of a restored
        # one) is no move's fault, so losses are taken against a probe of the state itself.
        if self._moves and any(self._base) and (self._state, self._base) not in self._gains:
            self._queue.append(self._base)

    def _guess(self, move: Move) -> float | None:
        """Return the loss per saving that a move had, or that its ladder had further up; None when never probed."""
        i, k = move
        known = self._rates.get((i, self._base[i], k))
        return known if known is not None else self._ladder_rates.get((i, self._variant[i][k]))

    def _next_probe(self) -> Proposal | Wait | None:
        """Return the step's next probe, `WAIT` while some are pending, None when all are known."""
        waiting = False
        for vector in self._queue or ():
            key = (self._state, vector)
            if key in self._gains:
                continue
            if key in self._pending:
                waiting = True
                continue
            self._pending.add(key)
            return self._propose(vector, self._cheap, parent=self._parents[-1], probe=True)
        return WAIT if waiting else None

    def _choose(self) -> list[Move] | None:
        """Return the moves to take; none when failures call for others to be probed, None when there is no move."""
        state, base = self._state, self._base
        gains = {m: self._gains.get((state, self._moved(base, [m]))) for m in self._moves}
        reference = self._gains.get((state, base), FAILED)
        if reference == FAILED:
            reference = max((gain for gain in gains.values() if gain is not None), default=FAILED)
        failed = [m for m, gain in gains.items() if gain == FAILED]
        self._refused.update(failed)
        ranked = []
        for (i, k), gain in gains.items():
            saving = self._amounts[i][base[i]] - self._amounts[i][k]
            if gain is not None and gain > FAILED:
                # A gain through noise is no reason to prefer a small saving: what loses nothing goes by its saving.
                rate = max(reference - gain, 0.0) / saving
                self._rates[i, base[i], k] = self._ladder_rates[i, self._variant[i][k]] = rate
            elif gain is None and (i, base[i], k) in self._rates:
                rate = self._rates[i, base[i], k]
            else:
                continue
            ranked.append((rate, -saving, i, k))
        if not ranked:
            return [] if failed else None
        return self._first_of(sorted(ranked)) or None

    def _first_of(self, ranked: list[tuple[float, float, int, int]]) -> list[Move]:
        """Return the best moves of different layers, until the step is long enough or the budget is reached."""
        stride, start = int(self.options["stride"]), self.catalog.share(self._base)
        chosen: list[Move] = []
        for _, _, i, k in ranked:
            vector = self._moved(self._base, [*chosen, (i, k)])
            if any(i == layer for layer, _ in chosen) or not self._allowed(vector):
                continue
            chosen.append((i, k))
            long = len(chosen) >= stride if stride else start - self.catalog.share(vector) >= self._pace - 1e-12
            if long or self._arrived(vector):
                break
        return chosen

    def _arrived(self, vector: Vector) -> bool:
        return self.catalog.share(vector) <= float(self.options["budget"]) + 1e-12 and self.catalog.feasible(vector)

    def _take(self, chosen: list[Move]) -> Proposal | None:
        """Make the moves; return the point, or None where it is not within the constraints yet or is known."""
        self._base, self._taken = self._moved(self._base, chosen), len(chosen)
        if self._arrived(self._base):
            bounds = [f"budget={self.options['budget']:g}", *map(str, self.catalog.constraints)]
            self._text = f"{' and '.join(bounds)}: reached at {self.catalog.share(self._base):.4g} of the dense model"
        if not self._is_new(self._base):
            return None
        return self._point(self._base)

    def _point(self, vector: Vector) -> Proposal:
        self._points += 1
        proposal = self._propose(vector, parent=self._parents[-1])
        self._asked_points[vector] = proposal
        interval = int(self.options["interval"])
        # Without a fine-tune nothing is restored, and factors fitted to factors would only add up their errors.
        if interval and self.fidelity.steps and self._points % interval == 0:
            self._restoring = vector
        if self.fidelity == self._cheap:
            self._pending.add((self._state, vector))
        return proposal

    def _finish(self) -> Proposal | None:
        """End, with a plan that was moved by hand if none on the way met the constraints."""
        scored = any(gain > FAILED for (_, vector), gain in self._gains.items() if any(vector))
        self._text = "no move is left" if scored else "no probe of a move has a score"
        if self._points or not scored:
            return None
        vector = self.catalog.repair(self._base, self.rng)
        if vector is None or not self._is_new(vector):
            return None
        bounds = " and ".join(map(str, self.catalog.constraints))
        self._text += f"; no step on the way met {bounds}, so the plan nearest to the last that does was taken"
        return self._point(vector)
