"""The default search: points of the predicted front first, then what finished trials say is worth trying."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from autorank.strategies.attained import Attained, nodes
from autorank.strategies.base import Option, Strategy, Wait
from autorank.strategies.catalog import COST_NAMES, Vector
from autorank.strategies.exchanges import exchanges
from autorank.strategies.optuna import NSGA2, TPE, OptunaStrategy
from autorank.strategies.rungs import ladder, promotable
from autorank.strategies.spreading import spread_order
from autorank.strategies.stall import Stall
from autorank.strategies.surrogate import Surrogate, Trials, gain_of, limited, log_drop
from autorank.strategies.tables import Space, as_vector
from autorank.types import Proposal, TrialRecord

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

_ROWS = 160
"""Outcomes from which the surrogate is learned, at most."""
_REFIT = 16
"""The surrogate is learned anew when the outcomes have grown by one in so many."""
_NEAR = 0.1
"""Part of the dense score within which a score counts more: what people take is near the dense model, and most of the
volume above a score of nothing is won with models that nobody takes."""
_MORE = 10.0
"""How many times more it counts there."""
_EXPLORE = 4
"""At every so many proposals samples of the Optuna sampler compete, too. A place of their own would cost every fourth
point: on ResNet-20 the volume after 20 points was then that of 15."""
_SAMPLES = 3
_MILD, _HARSH = 0.85, 0.12
_PENDING = 64
_LOOKED_AT = 100
"""Plans of a front that compete for the next proposal."""


class Auto(Strategy):
    """Knapsack points, then a search around them that learns where the prediction errs.

    1. `seeds` plans of the predicted front, spread along the cost axis, go straight to full fidelity, and `level` with
       equal errors in all layers at the harsh end. A few do: what is learned from them beats more of them.
    2. A `Surrogate` of the score is learned from the outcomes. From then on plans compete by their expected improvement
       of the hypervolume, in which scores near the dense one count more: those of the knapsack solved again with the
       corrected losses, and with losses drawn from their posterior; those of equal errors; exchanges between layers of
       plans on the present front; and at every fourth proposal samples of the Optuna sampler.
    3. With `rungs` above 1 new plans begin with few fine-tune steps and are promoted by non-domination (`rungs`).

    It ends when the hypervolume has not grown for `patience` points.

    On the made-up problem of `autorank.testing.strategies` 20 evaluations reach more than NSGA-II from scratch in 200
    (a test holds it to that); `benchmarks/search_efficiency.py` compares on real networks.

    There is one rung by default, as cheaper ones did not pay: with ``rungs=2`` 50 points reached 0.777 (0.7735 without,
    noise of one point), but at the price of 128 probes, and 100 points without any reach 0.788. The surrogate already
    says of untried plans what a probe would say, and the score before the fine-tune, which comes with every trial, is
    learned from as a rung of its own. Rungs are for fine-tunes that are long beside the rest of a trial.
    """

    name: ClassVar[str] = "auto"
    needs: ClassVar[frozenset[str]] = frozenset({"errors"})
    allowed: ClassVar[Mapping[str, Option]] = {
        "seeds": Option(3, 1, 1000, "points of the predicted front that are tried first"),
        "level": Option(0, 0, 1000, "plans of equal errors in all layers that are tried next, from the harsh end"),
        "sampler": Option(
            "tpe", choices=("tpe", "nsga2"), help="Optuna sampler whose samples compete at every fourth proposal"
        ),
        "rungs": Option(1, 1, 6, "fidelities: 2 for steps/eta and all steps, 3 for none at all before them"),
        "eta": Option(3, 2, 16, "one plan in eta goes on to the next rung"),
        "patience": Option(20, 0, 1_000_000, "points without growth of the hypervolume after which it ends; 0: never"),
        "tolerance": Option(0.001, 0.0, 1.0, "growth of the hypervolume, as a fraction, that does not count"),
    }

    def _set_up(self) -> None:
        names = list(dict.fromkeys([self.catalog.axis, *(o.name for o in self.objectives if o.name in COST_NAMES)]))
        self._space = Space(self.catalog, names)
        self._random = np.random.default_rng(self.seed)
        self._rungs = ladder(self.fidelity, int(self.options["rungs"]), int(self.options["eta"]))
        self._outcomes: list[dict[Vector, float]] = [{} for _ in self._rungs]
        self._asked: list[dict[Vector, None]] = [{} for _ in self._rungs]
        self._reached: list[set[Vector]] = [set() for _ in self._rungs]
        self._told: set[tuple[Vector, int]] = set()
        self._untuned: dict[Vector, float] = {}
        self._untold: list[tuple[Proposal, TrialRecord]] = []
        self._front: list[_Point] = []
        self._stall = Stall(int(self.options["patience"]), float(self.options["tolerance"]))
        self._first = self._seeds()
        self._surrogate = Surrogate(self._space.tables)
        self._learned = self._news = self._drawn = 0
        self._predicted = self._space.front(self._surrogate.weighted())
        self._level = self._space.level() if self._space.known else self._predicted[:0]
        self._sampler: OptunaStrategy | None = None

    # What is tried first

    def _seeds(self) -> list[Vector]:
        space, count = self._space, int(self.options["seeds"])
        low, high = max(self.catalog.low, _HARSH), min(self.catalog.high, _MILD)
        if low >= high:
            low, high = self.catalog.low, self.catalog.high
        places = [low + (high - low) * (n + 0.5) / count for n in range(count)]
        # The middle, the harsh end, the mild end, and so on into the gaps: whenever a sweep ends, it has seen the axis.
        middle = places.pop(count // 2 - (count % 2 == 0))
        targets = [middle, *(places[i] for i in spread_order(places, [middle]))]
        found = space.spread(space.front(space.tables.losses), targets)
        if space.known:
            many = int(self.options["level"])
            harsh = [low + (high - low) * (n + 0.5) / (2 * max(many, 1)) for n in range(many)]
            found += space.spread(space.level(), harsh)
        return list(dict.fromkeys(found))

    # Asking

    def ask(self) -> Proposal | Wait | None:
        """Return a promoted plan, else the most promising new one; None when it has stalled or nothing is left."""
        if self.ended:
            return None
        while self._first:
            vector = self._first.pop(0)
            if self._is_new(vector):
                return self._at(vector, len(self._rungs) - 1)
        for rung in range(len(self._rungs) - 2, -1, -1):
            promoted = self._promoted(rung, int(self.options["eta"]))
            if promoted is not None:
                return self._at(promoted, rung + 1)
        new = self._best()
        if new is not None:
            return self._at(new, 0 if self._may_probe() else len(self._rungs) - 1)
        for rung in range(len(self._rungs) - 2, -1, -1):
            promoted = self._promoted(rung, 1)
            if promoted is not None:
                return self._at(promoted, rung + 1)
        return None

    def _may_probe(self) -> bool:
        """Say whether the probes so far are about as many as promotion needs for the points so far.

        Where they fail there is nothing to promote, and as probes are no trials, nobody else would ever stop them.
        """
        eta, last = int(self.options["eta"]), len(self._rungs) - 1
        needed = sum(eta**k for k in range(1, last + 1))
        return sum(map(len, self._reached[:-1])) < needed * (len(self._reached[-1]) + 1)

    def _at(self, vector: Vector, rung: int) -> Proposal:
        self._asked[rung][vector] = None
        self._reached[rung].add(vector)
        if rung == len(self._rungs) - 1:
            return self._propose(vector)
        self._claimed.add(vector)
        return self._propose(vector, self._rungs[rung], probe=True)

    def _promoted(self, rung: int, eta: int) -> Vector | None:
        """Return a plan of a rung that may go on."""
        own = list(self._outcomes[rung])
        if not own:
            return None
        costs = self._space.costs(np.array(own, dtype=np.int64))
        gains = np.array([self._outcomes[rung][vector] for vector in own])
        on = [i for i, vector in enumerate(own) if vector in self._reached[rung + 1] or vector in self._reached[-1]]
        chosen = promotable(np.column_stack([-gains, costs]).tolist(), on, eta)
        return own[chosen[0]] if chosen else None

    def _best(self) -> Vector | None:
        """Return the new plan of largest expected improvement, any new plan where none is likely to improve."""
        self._drawn += 1
        self._learn()
        sampled = self._sampled() if self._drawn % _EXPLORE == 0 else []
        found = self._first_new(self._pool() + sampled)
        return found or self._draw(noise=0.35) or self._nearby(self.catalog.dense_vector)

    def _first_new(self, pool: list[Vector]) -> Vector | None:
        pool = [vector for vector in dict.fromkeys(pool) if vector not in self._claimed]
        if not pool:
            return None
        vectors = np.array(pool, dtype=np.int64)
        within = self._space.near_bounds(vectors)
        vectors, pool = vectors[within], [vector for vector, met in zip(pool, within, strict=True) if met]
        if not pool:
            return None
        costs = self._space.costs(vectors)
        mean, spread = self._surrogate.predict(vectors, costs[:, 0])
        gains = self._worth(gain_of(nodes(mean, spread), self._level_of_dense()))
        worth = self._expected().expected(costs, gains)
        for at in np.argsort(-worth, kind="stable"):
            if self.catalog.feasible(pool[at]):
                return pool[at]
        return None

    def _pool(self) -> list[Vector]:
        """Return plans that compete for the next proposal."""
        drawn = self._space.front(self._surrogate.drawn(self._random))
        plans = [as_vector(row) for part in (self._predicted, drawn, self._level) for row in _thinned(part)]
        parents = [point.vector for point in self._front]
        return plans + exchanges(self._space, self._surrogate.weighted(), parents, self.rng)

    def _sampled(self) -> list[Vector]:
        """Return samples of the Optuna sampler, which knows the points at full fidelity."""
        if self._sampler is None:
            kind = {"tpe": TPE, "nsga2": NSGA2}[str(self.options["sampler"])]
            self._sampler = kind(self.space, self.objectives, self.constraints, self.seed, seeds=0)
        for proposal, record in self._untold:
            self._sampler.tell(proposal, record)
        self._untold.clear()
        return self._sampler.samples(_SAMPLES)

    # Learning

    def _learn(self) -> None:
        """Fit the surrogate anew when enough is new."""
        known = sum(map(len, self._outcomes))
        if not self._news or self._news < self._learned // _REFIT:
            return
        self._learned, self._news = known, 0
        # The score before any fine-tune comes with every trial: a cheap rung of its own.
        last = len(self._rungs) - 1
        least = last if last and not self._rungs[0].steps else last + 1
        rows = [(vector, gain, least) for vector, gain in self._untuned.items()]
        rows += [(vector, gain, last - rung) for rung, own in enumerate(self._outcomes) for vector, gain in own.items()]
        rows = limited(rows, _ROWS)
        vectors = np.array([vector for vector, _, _ in rows], dtype=np.int64)
        logs, spreads = log_drop(np.array([gain for _, gain, _ in rows]), self._level_of_dense())
        rungs = np.array([rung for _, _, rung in rows], dtype=np.int64)
        shares = self._space.costs(vectors)[:, 0]
        self._surrogate = Surrogate(self._space.tables, Trials(vectors, shares, logs, spreads, rungs))
        self._predicted = self._space.front(self._surrogate.weighted())

    def _level_of_dense(self) -> float:
        """Return the gain of the dense model; where it is not known, a little more than the best that was seen."""
        if self._dense_gain is not None:
            return self._dense_gain
        best = max((point.gain for point in self._front), default=1.0)
        return best + 0.02 * (abs(best) or 1.0)

    def _worth(self, gains: Floats) -> Floats:
        """Return the gains, those near the dense score stretched, so that the hypervolume is weighted there."""
        dense = self._level_of_dense()
        return gains + _MORE * np.maximum(gains - (dense - _NEAR * (abs(dense) or 1.0)), 0.0)

    def _attained(self) -> Attained:
        """Return what the front attains above the corner of no score at the dense model's costs, within the bounds."""
        dense = self._level_of_dense()
        count = len(self._space.names)
        low = [1.0 + self._space.changes[name].min(axis=1).sum() for name in self._space.names]
        least = float(self._worth(np.array(self._least_gain())))
        attained = Attained(low, [1.0] * count, dense - (abs(dense) or 1.0), least)
        for point, worth in zip(self._front, self._worth(np.array([p.gain for p in self._front])), strict=True):
            attained.add(point.costs, float(worth))
        return attained

    def _least_gain(self) -> float:
        """Return the gain that a bound on the score asks for."""
        asked = [self._turned(c.bound) for c in self.constraints if c.name == "score"]
        return max(asked, default=-math.inf)

    def _expected(self) -> Attained:
        """Return what the front attains together with the pending plans, at what is predicted for them."""
        attained = self._attained()
        pending = [vector for vector in self._asked[-1] if (vector, len(self._rungs) - 1) not in self._told]
        pending = pending[-_PENDING:]
        if pending:
            vectors = np.array(pending, dtype=np.int64)
            costs = self._space.costs(vectors)
            mean, _ = self._surrogate.predict(vectors, costs[:, 0])
            for cost, worth in zip(costs, self._worth(gain_of(mean, self._level_of_dense())), strict=True):
                attained.add(cost, float(worth))
        return attained

    # Being told

    def tell(self, proposal: Proposal, record: TrialRecord) -> None:
        """Take an outcome at any rung."""
        vector = self.catalog.vector(proposal.plan)
        if vector is None:
            return
        self._claimed.add(vector)
        last = len(self._rungs) - 1
        rung = self._rungs.index(proposal.fidelity) if proposal.probe and proposal.fidelity in self._rungs else last
        if (vector, rung) in self._told:
            return
        self._told.add((vector, rung))
        self._asked[rung].pop(vector, None)
        self._reached[rung].add(vector)
        gain = self._gain(record) if self._values(record) is not None else None
        if self.fidelity.steps and record.score_bn is not None and math.isfinite(record.score_bn):
            self._untuned[vector] = self._turned(record.score_bn)
            self._news += 1
        if gain is not None:
            self._outcomes[rung][vector] = gain
            self._news += 1
        if rung == last:
            self._untold = [*self._untold[1 - _PENDING :], (proposal, record)]
            if gain is not None:
                self._enter(_Point(vector, self._space.costs(np.array([vector], dtype=np.int64))[0], gain))
                self._stall.point(self._attained().volume)

    def _enter(self, point: _Point) -> None:
        """Put a point on the front unless it is beaten there."""
        if any(other.covers(point) for other in self._front):
            return
        self._front = [other for other in self._front if not point.covers(other)] + [point]

    @property
    def ended(self) -> str:
        """Why nothing more is proposed: the hypervolume has stalled."""
        return self._stall.reason


@dataclass(frozen=True)
class _Point:
    """A finished plan at full fidelity."""

    vector: Vector
    costs: Floats
    gain: float

    def covers(self, other: _Point) -> bool:
        """Say whether it is nowhere worse."""
        return self.gain >= other.gain and bool((self.costs <= other.costs).all())


def _thinned(plans: Whole) -> Whole:
    """Return the plans, evenly thinned to a number that can be looked at."""
    if len(plans) <= _LOOKED_AT:
        return plans
    return plans[np.linspace(0, len(plans) - 1, _LOOKED_AT).round().astype(np.int64)]
