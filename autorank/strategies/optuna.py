"""Optuna's multi-objective samplers behind our ask/tell: tree-structured Parzen estimators and NSGA-II.

A plan has one parameter for its share of the dense cost, and for every layer a categorical parameter, its variant
(format and options), and an offset: the logarithm of the layer's ratio to the ratio that all layers have in common. So
the parameters say how a budget is divided, apart from how large it is, and what is learned about one budget serves the
next; they mean the same for all variants, so none is conditional; and a bound on the cost axis is a bound on one
parameter. With one absolute share per layer instead, TPE ended no better than random search on the made-up problem of
`autorank.testing.strategies` (20 layers, 200 trials, four seeds: hypervolume 0.569 against 0.572); this way at 0.603.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from autorank.pareto import minimised
from autorank.strategies.base import Option, Strategy, Wait
from autorank.strategies.catalog import Vector
from autorank.strategies.history import block_sampler, thinned
from autorank.types import Direction, Proposal, TrialRecord

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

_ATTEMPTS = 6
"""Samples that are taken before a plan is repaired or moved by hand."""
_MILD, _HARSH = 0.85, 0.2
_LEVELS = 3
"""Seeds that are kept for the way from mild to harsh however many formats there are."""
_SEEDS = Option(10, 0, 100, "uniform plans tried first: each variant at the middle, then the best from mild to harsh")
_WIDTH = Option(0.6, 0.0, 3.0, "largest offset of a layer: 0.6 lets it keep from 0.55 to 1.8 times the common ratio")


def _format(label: str) -> str:
    """Return the format of a variant."""
    return label.partition("(")[0]


class OptunaStrategy(Strategy):
    """An Optuna sampler that starts from uniform plans and plans spread along the cost axis.

    The first plans compare the variants (formats and options) with each other at the same cost; when their scores are
    there, the best one is tried uniformly from mild to harsh. Plans drawn at random fill the time in between.

    Samples that break a constraint on a cost are told to the sampler with how far they do, and drawn again. The study
    is in memory: it is rebuilt by replaying what was asked and told.
    """

    _even: ClassVar[float]
    """Part of the proposals whose share is drawn evenly by us, so that the sampler cannot leave parts of the front."""

    def _set_up(self) -> None:
        self._width = float(self.options["width"])
        self._distributions = self._parameters()
        self._block: frozenset[str] | None = None
        self._elite: list[tuple[tuple[float, ...], Vector]] = []
        self._directions: list[Direction] = [o.direction for o in self.objectives]
        self._study = self._new_study(self._sampler())
        self._size = 0
        self._score_is_gain = all(o.direction == "max" for o in self.objectives if o.name == "score")
        self._pending: dict[Vector, Trial] = {}
        self._answered: set[Vector] = set()
        self._complete = self._rejected = self._proposed = 0
        self._probes = self._probe_plans(int(self.options["seeds"]))
        self._probe_gains: dict[str, float] = {}
        self._first = list(self._probes)
        self._levels: int | None = int(self.options["seeds"]) - len(self._first)

    def _new_study(self, sampler: BaseSampler) -> Study:
        import optuna

        words: list[Literal["minimize", "maximize"]] = [
            "maximize" if direction == "max" else "minimize" for direction in self._directions
        ]
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optuna.create_study(sampler=sampler, directions=words)
        finally:
            optuna.logging.set_verbosity(verbosity)

    @abstractmethod
    def _sampler(self) -> BaseSampler:
        """Return the sampler."""

    @property
    @abstractmethod
    def _startup(self) -> int:
        """How many proposals are drawn before the sampler decides."""

    # From plans to parameters and back

    def _parameters(self) -> dict[str, BaseDistribution]:
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        found: dict[str, BaseDistribution] = {"share": FloatDistribution(self.catalog.low, self.catalog.high)}
        for layer, variants in zip(self.space.layers, self.catalog.variants, strict=True):
            if len(variants) > 1:
                found[f"{layer.spec.name}.variant"] = CategoricalDistribution(variants)
            found[f"{layer.spec.name}.offset"] = FloatDistribution(-self._width, self._width)
        return found

    def _decode(self, parameters: Mapping[str, Any]) -> Vector:
        """Return the plan that the parameters mean."""
        chosen, offsets = [], []
        for layer, variants in zip(self.space.layers, self.catalog.variants, strict=True):
            chosen.append(variants.index(parameters.get(f"{layer.spec.name}.variant", variants[0])))
            offsets.append(parameters[f"{layer.spec.name}.offset"])
        return self.catalog.at_share(parameters["share"], chosen, offsets)

    def _encode(self, vector: Vector) -> dict[str, Any]:
        """Return parameters that come near to the plan; a dense layer gets a variant at random, as all mean it."""
        share = min(max(self.catalog.share(vector), self.catalog.low), self.catalog.high)
        parameters: dict[str, Any] = {"share": share}
        places = [self.catalog.place(i, index) for i, index in enumerate(vector)]
        logs = [math.log(max(ratio, 1e-6)) for _, ratio in places]
        common = sum(logs) / len(logs)
        for i, (layer, (variant, _)) in enumerate(zip(self.space.layers, places, strict=True)):
            variants = self.catalog.variants[i]
            if len(variants) > 1:
                chosen = self.rng.randrange(len(variants)) if variant is None else variant
                parameters[f"{layer.spec.name}.variant"] = variants[chosen]
            parameters[f"{layer.spec.name}.offset"] = min(max(logs[i] - common, -self._width), self._width)
        return parameters

    def _uniform(self, label: str, target: float) -> Vector | None:
        """Return a plan of equal shares in every layer that matters, in one variant wherever a layer has it.

        A layer that has not gets another variant of the format, as options such as factor shapes are of one layer.
        """
        variants = [
            max(range(len(own)), key=lambda v: (own[v] == label, _format(own[v]) == _format(label), -v))
            for own in self.catalog.variants
        ]
        uniform = self.catalog.spread(target, self.rng, 0.0, variants)
        # A first convolution or a classifier costs next to nothing and would choke all the others.
        eased = tuple(0 if i in self.catalog.minor else index for i, index in enumerate(uniform))
        return self.catalog.repair(eased, self.rng)

    def _probe_plans(self, count: int) -> dict[Vector, str]:
        """Return uniform plans at the middle of the range, one per variant, to see which suits this network.

        They are a half of the seeds. Where there are more variants than that, it is one per format, and three seeds are
        left for the levels; where there are more formats than that, too, the seed decides which are tried.
        """
        labels = self._by_reach()
        limit = (count + 1) // 2
        if len(labels) > limit:
            labels = list({_format(label): label for label in reversed(labels)}.values())
            Random(self.seed).shuffle(labels)
            limit = max(limit, count - _LEVELS)
        low, high = self._seed_range()
        found: dict[Vector, str] = {}
        for label in labels[:limit]:
            vector = self._uniform(label, (low + high) / 2)
            if vector is not None:
                found.setdefault(vector, label)
        return found

    def _by_reach(self) -> list[str]:
        """Return all variants, those first that can write most of the model's cost."""
        reach: dict[str, float] = {}
        for layer, own in zip(self.space.layers, self.catalog.variants, strict=True):
            for label in own:
                reach[label] = reach.get(label, 0.0) + layer.spec.macs
        return sorted(reach, key=lambda label: (-reach[label], label))

    def _level_plans(self, count: int) -> list[Vector]:
        """Return uniform plans from mild to harsh in the variant whose probe scored best."""
        best = max(self._probe_gains, key=lambda label: self._probe_gains[label], default=None)
        if best is None or count < 1:
            return []
        low, high = self._seed_range()
        targets = [high - (high - low) * (n / (count - 1) if count > 1 else 0.5) for n in range(count)]
        plans = [self._uniform(best, target) for target in targets]
        return [vector for vector in plans if vector is not None]

    def _seed_range(self) -> tuple[float, float]:
        low, high = max(self.catalog.low, _HARSH), min(self.catalog.high, _MILD)
        return (low, high) if low < high else (self.catalog.low, self.catalog.high)

    # Ask and tell

    def ask(self) -> Proposal | Wait | None:
        """Return a new plan within the constraints on costs; None when all were proposed."""
        from optuna.trial import TrialState

        if self._levels is not None and self._answered >= self._probes.keys():
            self._first += self._level_plans(self._levels)
            self._levels = None
        while self._first:
            vector = self._first.pop(0)
            if self._is_new(vector):
                return self._impose(vector)
        if self._proposed < self._startup:
            drawn = self._draw(noise=0.35)
            if drawn is not None:
                return self._impose(drawn)
        vector = self.catalog.dense_vector
        even = self.rng.random() < self._even
        for _ in range(_ATTEMPTS):
            trial = self._sample(even)
            vector = self._decode(trial.params)
            if self._is_new(vector):
                return self._take(trial, vector)
            violations = self.catalog.violations(vector)
            if any(value > 0 for value in violations.values()) and self._rejected < max(10, self._complete):
                # Not more of them than of complete trials, as TPE takes its share of good trials from all it is told.
                self._rejected += 1
                for name, value in violations.items():
                    trial.set_constraint(name, value)
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                self._study.tell(trial, state=TrialState.FAIL)
        repaired = self.catalog.repair(vector, self.rng)
        found = repaired if repaired is not None and self._is_new(repaired) else self._nearby(repaired or vector)
        return None if found is None else self._impose(found)

    def _sample(self, even: bool) -> Trial:
        """Let the sampler choose; `even`: at a share of the cost that is drawn evenly."""
        fixed = self._fixed()
        if even:
            fixed["share"] = self.rng.uniform(self.catalog.low, self.catalog.high)
        if fixed:
            self._study.enqueue_trial(fixed)
        self._size += 1
        return self._study.ask(self._distributions)

    def _fixed(self) -> dict[str, Any]:
        """Return parameters that the next sample takes over instead of drawing them."""
        return {}

    def samples(self, count: int) -> list[Vector]:
        """Return plans that the sampler would try next, for somebody else to choose from; nothing is proposed."""
        from optuna.trial import TrialState

        found = []
        for _ in range(count):
            trial = self._sample(self.rng.random() < self._even)
            found.append(self._decode(trial.params))
            self._study.tell(trial, state=TrialState.FAIL)
        return found

    def _impose(self, vector: Vector) -> Proposal:
        """Propose a plan that the sampler did not choose, in a way that it learns from all the same."""
        self._study.enqueue_trial(self._encode(vector))
        self._size += 1
        return self._take(self._study.ask(self._distributions), vector)

    def _take(self, trial: Trial, vector: Vector) -> Proposal:
        self._pending[vector] = trial
        self._proposed += 1
        return self._propose(vector)

    def tell(self, proposal: Proposal, record: TrialRecord) -> None:
        """Tell the sampler: complete with values and constraints, pruned, or failed."""
        from optuna.trial import TrialState, create_trial

        vector = self.catalog.vector(proposal.plan)
        if vector is None or vector in self._answered:
            return
        self._answered.add(vector)
        self._claimed.add(vector)
        values = self._values(record)
        if vector in self._probes and record.score is not None:
            self._probe_gains[self._probes[vector]] = record.score if self._score_is_gain else -record.score
        state = TrialState.COMPLETE if values else TrialState.PRUNED if record.status == "pruned" else TrialState.FAIL
        self._complete += state == TrialState.COMPLETE
        bounds = {str(c): c.violation(record.value(c.name) or 0.0) for c in self.constraints} if values else {}
        if values:
            self._enter(tuple(minimised(values, self._directions) or ()), vector)
        trial = self._pending.pop(vector, None)
        if trial is not None and trial.study is self._study:
            for name, value in bounds.items():
                trial.set_constraint(name, value)
            self._study.tell(trial, values, state=state)
        else:
            # Known beforehand, or asked for before the history was thinned.
            parameters = self._encode(vector) if trial is None else trial.params
            distributions = {name: self._distributions[name] for name in parameters}
            known = create_trial(
                state=state, values=values, params=parameters, distributions=distributions, constraints=bounds
            )
            self._study.add_trial(known)
            self._size += 1
        if self._history and self._size > 2 * self._history:
            self._forget(self._history)

    @property
    def _history(self) -> int:
        """How many trials the sampler looks at; 0 for all."""
        return 0

    def _forget(self, limit: int) -> None:
        """Begin a new study with the trials worth remembering; constraints are kept by drawing again."""
        kept = thinned(self._study.get_trials(deepcopy=False), self._directions, limit)
        self._study = self._new_study(self._study.sampler)
        self._study.add_trials(kept)
        self._size = len(kept)

    def _enter(self, point: tuple[float, ...], vector: Vector) -> None:
        """Put a plan on the front unless it is beaten there."""
        if any(all(a <= b for a, b in zip(other, point, strict=True)) for other, _ in self._elite):
            return
        self._elite = [
            (other, own) for other, own in self._elite if not all(a <= b for a, b in zip(point, other, strict=True))
        ] + [(point, vector)]


class TPE(OptunaStrategy):
    """Multivariate tree-structured Parzen estimator (Bergstra et al. 2011; several objectives: Ozaki et al. 2022)."""

    name: ClassVar[str] = "tpe"
    _even: ClassVar[float] = 0.5
    allowed: ClassVar[Mapping[str, Option]] = {
        "seeds": _SEEDS,
        "width": _WIDTH,
        "startup": Option(16, 1, 10_000, "proposals before the model of the space decides, seeds included"),
        "candidates": Option(24, 1, 1000, "samples of which the most promising is proposed"),
        "history": Option(100, 0, 1_000_000, "trials that are looked at, once there are twice as many; 0: all"),
        "block": Option(24, 0, 100_000, "layers drawn anew at a time, the others taken over from the front; 0: all"),
    }

    def _sampler(self) -> BaseSampler:
        return block_sampler(
            self._distributions,
            lambda: self._block,
            seed=self.seed,
            n_startup_trials=self._startup,
            n_ei_candidates=int(self.options["candidates"]),
        )

    @property
    def _history(self) -> int:
        return int(self.options["history"])

    def _fixed(self) -> dict[str, Any]:
        """Return the layers that are not drawn this time, as a plan of the front has them."""
        block, names = int(self.options["block"]), [layer.spec.name for layer in self.space.layers]
        if not block or len(names) <= block or not self._elite:
            self._block = None
            return {}
        drawn = set(self.rng.sample(names, block))
        self._block = frozenset({"share", *(name for name in self._distributions if name.rpartition(".")[0] in drawn)})
        taken = self._encode(self.rng.choice(self._elite)[1])
        return {name: value for name, value in taken.items() if name not in self._block}

    @property
    def _startup(self) -> int:
        return int(self.options["startup"])


class NSGA2(OptunaStrategy):
    """Elitist genetic algorithm with non-dominated sorting (Deb et al. 2002)."""

    name: ClassVar[str] = "nsga2"
    _even: ClassVar[float] = 1.0
    allowed: ClassVar[Mapping[str, Option]] = {
        "seeds": _SEEDS,
        "width": _WIDTH,
        "population": Option(10, 2, 10_000, "plans of a generation"),
    }

    def _sampler(self) -> BaseSampler:
        from optuna.samplers import NSGAIISampler

        return NSGAIISampler(seed=self.seed, population_size=int(self.options["population"]))

    @property
    def _startup(self) -> int:
        return int(self.options["population"])
