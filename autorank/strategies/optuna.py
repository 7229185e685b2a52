"""Optuna's multi-objective samplers behind our ask/tell: tree-structured Parzen estimators and NSGA-II.

Every layer has a categorical parameter, its variant (format and options), and a number, the share of its cost that it
keeps, with dense at 1. The number means the same for all variants, so the space has no conditional parameters and both
the Parzen estimators and the crossover can relate plans that use different formats.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from autorank.space import SearchSpace
from autorank.strategies.base import Option, Strategy, Wait
from autorank.strategies.catalog import Vector
from autorank.types import Constraint, Objective, Proposal, Scalar, TrialRecord

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

_ATTEMPTS = 6
"""Samples that are taken before a plan is repaired or moved by hand."""
_INFEASIBLE_TOLD = 100
"""Rejected samples of which the sampler is told; more would only slow it down."""
_MILD, _HARSH = 0.85, 0.2

_SEEDS = Option(6, 0, 100, "uniform plans, from mild to harsh, that are proposed first")


class OptunaStrategy(Strategy):
    """An Optuna sampler that starts from uniform plans and plans spread along the cost axis.

    Samples that break a constraint on a cost are told to the sampler with how far they do, and drawn again. The study
    is in memory: it is rebuilt by replaying what was asked and told.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: tuple[Objective, ...],
        constraints: tuple[Constraint, ...] = (),
        seed: int = 0,
        **options: Scalar,
    ) -> None:
        super().__init__(space, objectives, constraints, seed, **options)
        import optuna

        directions: list[Literal["minimize", "maximize"]] = [
            "maximize" if o.direction == "max" else "minimize" for o in objectives
        ]
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self._study = optuna.create_study(sampler=self._sampler(), directions=directions)
        finally:
            optuna.logging.set_verbosity(verbosity)
        self._distributions = self._parameters()
        self._floor = [min(ladder[0][0] for ladder in ladders) for ladders in self.catalog.ladders]
        self._pending: dict[Vector, Trial] = {}
        self._answered: set[Vector] = set()
        self._complete = self._pruned = self._rejected = self._proposed = 0
        self._first = self._uniform_plans(int(self.options["seeds"]))

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

        found: dict[str, BaseDistribution] = {}
        for layer, variants in zip(self.space.layers, self.catalog.variants, strict=True):
            if len(variants) > 1:
                found[f"{layer.spec.name}.variant"] = CategoricalDistribution(variants)
            found[f"{layer.spec.name}.kept"] = FloatDistribution(0.0, 1.0)
        return found

    def _decode(self, parameters: Mapping[str, object]) -> Vector:
        """Return the plan that the parameters mean."""
        vector = []
        for i, layer in enumerate(self.space.layers):
            variants = self.catalog.variants[i]
            label = parameters.get(f"{layer.spec.name}.variant", variants[0])
            level = float(parameters[f"{layer.spec.name}.kept"])  # type: ignore[arg-type]
            ratio = self._floor[i] + level * (1.0 - self._floor[i])
            vector.append(self.catalog.rung(i, variants.index(str(label)), ratio))
        return tuple(vector)

    def _encode(self, vector: Vector) -> dict[str, object]:
        """Return parameters that mean the plan; a dense layer gets a variant at random, as all mean the same."""
        parameters: dict[str, object] = {}
        for i, (layer, index) in enumerate(zip(self.space.layers, vector, strict=True)):
            variant, ratio = self.catalog.place(i, index)
            width = 1.0 - self._floor[i]
            variants = self.catalog.variants[i]
            if len(variants) > 1:
                chosen = self.rng.randrange(len(variants)) if variant is None else variant
                parameters[f"{layer.spec.name}.variant"] = variants[chosen]
            level = (ratio - self._floor[i]) / width if width > 0 else 1.0
            parameters[f"{layer.spec.name}.kept"] = min(max(level, 0.0), 1.0)
        return parameters

    def _uniform_plans(self, count: int) -> list[Vector]:
        """Return plans with the same share in every layer, from mild to harsh, the variants taking turns."""
        low, high = max(self.catalog.low, _HARSH), min(self.catalog.high, _MILD)
        if low >= high:
            low, high = self.catalog.low, self.catalog.high
        plans = []
        for n in range(count):
            target = high - (high - low) * (n / (count - 1) if count > 1 else 0.5)
            turn = [n % len(variants) for variants in self.catalog.variants]
            vector = self.catalog.repair(self.catalog.spread(target, self.rng, 0.0, turn), self.rng)
            if vector is not None:
                plans.append(vector)
        return plans

    # Ask and tell

    def ask(self) -> Proposal | Wait | None:
        """Return a new plan within the constraints on costs; None when all were proposed."""
        from optuna.trial import TrialState

        while self._first:
            vector = self._first.pop(0)
            if self._is_new(vector):
                return self._impose(vector)
        if self._proposed < self._startup:
            drawn = self._draw(noise=0.35)
            if drawn is not None:
                return self._impose(drawn)
        vector = self.catalog.dense_vector
        for _ in range(_ATTEMPTS):
            trial = self._study.ask(self._distributions)
            vector = self._decode(trial.params)
            if self._is_new(vector):
                return self._take(trial, vector)
            violations = self.catalog.violations(vector)
            if any(value > 0 for value in violations.values()) and self._rejected < _INFEASIBLE_TOLD:
                self._rejected += 1
                for name, value in violations.items():
                    trial.set_constraint(name, value)
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                self._study.tell(trial, state=TrialState.FAIL)
        repaired = self.catalog.repair(vector, self.rng)
        found = repaired if repaired is not None and self._is_new(repaired) else self._nearby(repaired or vector)
        return None if found is None else self._impose(found)

    def _impose(self, vector: Vector) -> Proposal:
        """Propose a plan that the sampler did not choose, in a way that it learns from all the same."""
        self._study.enqueue_trial(self._encode(vector))
        return self._take(self._study.ask(self._distributions), vector)

    def _take(self, trial: Trial, vector: Vector) -> Proposal:
        self._pending[vector] = trial
        self._proposed += 1
        return self._claim(vector)

    def tell(self, proposal: Proposal, record: TrialRecord) -> None:
        """Tell the sampler: complete with values and constraints, pruned, or failed."""
        from optuna.trial import TrialState, create_trial

        vector = self.catalog.vector(proposal.plan)
        if vector is None or vector in self._answered:
            return
        self._answered.add(vector)
        self._claimed.add(vector)
        values = self._values(record)
        state = TrialState.COMPLETE if values else TrialState.PRUNED if record.status == "pruned" else TrialState.FAIL
        self._complete += state == TrialState.COMPLETE
        self._pruned += state == TrialState.PRUNED
        bounds = {str(c): c.violation(record.value(c.name) or 0.0) for c in self.constraints} if values else {}
        trial = self._pending.pop(vector, None)
        if trial is None:
            parameters = self._encode(vector)
            distributions = {name: self._distributions[name] for name in parameters}
            known = create_trial(
                state=state, values=values, params=parameters, distributions=distributions, constraints=bounds
            )
            self._study.add_trial(known)
            return
        for name, value in bounds.items():
            trial.set_constraint(name, value)
        self._study.tell(trial, values, state=state)


class TPE(OptunaStrategy):
    """Multivariate tree-structured Parzen estimator (Bergstra et al. 2011; several objectives: Ozaki et al. 2022)."""

    name: ClassVar[str] = "tpe"
    allowed: ClassVar[Mapping[str, Option]] = {
        "seeds": _SEEDS,
        "startup": Option(16, 1, 10_000, "proposals before the model of the space decides, seeds included"),
        "candidates": Option(24, 1, 1000, "samples of which the most promising is proposed"),
        "share": Option(0.1, 0.01, 0.5, "share of the trials that count as good"),
    }

    def _sampler(self) -> BaseSampler:
        from optuna.samplers import TPESampler

        return TPESampler(
            seed=self.seed,
            multivariate=True,
            n_startup_trials=self._startup,
            n_ei_candidates=int(self.options["candidates"]),
            gamma=self._good,
            warn_independent_sampling=False,
        )

    @property
    def _startup(self) -> int:
        return int(self.options["startup"])

    def _good(self, trials: int) -> int:
        """Return how many trials count as good; rejected samples must not raise it, for they are not trials."""
        of_all = math.ceil(self.options["share"] * (self._complete + self._pruned))
        return max(1, min(of_all, math.ceil(self._complete / 2), 25))


class NSGA2(OptunaStrategy):
    """Elitist genetic algorithm with non-dominated sorting (Deb et al. 2002)."""

    name: ClassVar[str] = "nsga2"
    allowed: ClassVar[Mapping[str, Option]] = {
        "seeds": _SEEDS,
        "population": Option(20, 2, 10_000, "plans of a generation"),
    }

    def _sampler(self) -> BaseSampler:
        from optuna.samplers import NSGAIISampler

        return NSGAIISampler(seed=self.seed, population_size=int(self.options["population"]))

    @property
    def _startup(self) -> int:
        return int(self.options["population"])
