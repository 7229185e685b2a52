"""The ask/tell interface of all strategies, and what they share: options, constraints, no plan twice."""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Final, cast

from autorank.errors import ConfigError, did_you_mean
from autorank.space import SearchSpace
from autorank.strategies.catalog import COST_NAMES, Catalog, Vector
from autorank.types import Constraint, Evaluation, Fidelity, Objective, Proposal, Scalar, TrialRecord, Want

FULL = Fidelity()


class Wait(enum.Enum):
    """Type of `WAIT`."""

    WAIT = "wait"

    def __repr__(self) -> str:
        return "WAIT"


WAIT: Final = Wait.WAIT
"""What `Strategy.ask` returns while it needs the outcome of a pending proposal before it can go on."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a strategy: its default and what is allowed, a number between two others or one of some words."""

    default: int | float | str
    low: float = 0.0
    high: float = 0.0
    help: str = ""
    choices: tuple[str, ...] = ()

    def check(self, value: object, where: str) -> int | float | str:
        """Return `value` if it is allowed; ConfigError otherwise."""
        if self.choices:
            if value not in self.choices:
                allowed = ", ".join(self.choices)
                raise ConfigError(f"{where}: {value!r} is not known; allowed are {allowed} ({self.help})")
            return str(value)
        whole = isinstance(self.default, int)
        right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not right or not self.low <= cast(float, value) <= self.high:
            kind = "whole number" if whole else "number"
            raise ConfigError(f"{where}: {value!r} is not a {kind} from {self.low:g} to {self.high:g} ({self.help})")
        return cast("int | float", value)


class Strategy(ABC):
    """Proposes plans and learns from their outcomes.

    The state of a strategy is a function of its arguments and of the sequence of `ask` and `tell` calls, and of nothing
    else: replaying the calls rebuilds it. It sees candidates, costs and scores, never modules. `ask` may be called
    several times before a proposal is answered, and some proposals may never be.

    Parameters
    ----------
    space : SearchSpace
    objectives : tuple of Objective
    constraints : tuple of Constraint
        Bounds on costs hold for every proposal, in closed form. A bound on the score can only be learned.
    seed : int
        For what is random here; also the seed of every plan.
    dense : Evaluation, optional
        The dense model on validation data.
    fidelity : Fidelity
        The sweep's full fidelity, at which a record is a point of the front.
    **options
        See `allowed` of each strategy.

    Raises
    ------
    ConfigError
        An unknown option or a value out of range; a constraint that no plan of the space meets.
    """

    name: ClassVar[str]
    allowed: ClassVar[Mapping[str, Option]] = {}
    needs: ClassVar[frozenset[str]] = frozenset()
    """What is prepared before the search and stands in the space: ``errors`` of candidates, ``spectra`` of layers."""
    chains: ClassVar[bool] = False
    """Whether proposals start from the weights of earlier ones, which are then kept a while."""

    def __init__(
        self,
        space: SearchSpace,
        objectives: tuple[Objective, ...],
        constraints: tuple[Constraint, ...] = (),
        seed: int = 0,
        *,
        dense: Evaluation | None = None,
        fidelity: Fidelity = FULL,
        **options: Scalar,
    ) -> None:
        self.options: dict[str, Any] = self.checked(options)
        self.dense, self.fidelity = dense, fidelity
        self.space, self.objectives, self.constraints, self.seed = space, objectives, constraints, seed
        bounds = [c for c in constraints if c.name in COST_NAMES]
        axis = next((o.name for o in objectives if o.name in COST_NAMES), "macs_kept")
        for objective in objectives:
            if objective.name == "latency_kept" and not space.dense.latency_ms:
                raise ConfigError("objective latency needs a search space with measured layer times")
        self.catalog = Catalog(space, bounds, axis, seed)
        self.rng = Random(seed)
        # The dense model is measured before the sweep; proposing it again would tell nothing.
        self._claimed: set[Vector] = {self.catalog.dense_vector}
        self._in_order: Iterator[Vector] = self.catalog.every()
        self._next_in_order: Vector | None = None
        if len(bounds) > 1 and self._somewhere() is None:
            raise ConfigError(
                f"no plan of this search space meets {' and '.join(map(str, bounds))} together, "
                "though each alone can be met"
            )
        self._set_up()

    def _set_up(self) -> None:  # noqa: B027 (a hook that simple strategies need not have)
        """Set up what a strategy keeps of its own, once everything above is known."""

    @classmethod
    def checked(cls, options: Mapping[str, Any]) -> dict[str, int | float | str]:
        """Return all options, the given ones checked, the others at their defaults; ConfigError when one is wrong."""
        for key in options:
            if key not in cls.allowed:
                names = ", ".join(cls.allowed) or "none"
                hint = did_you_mean(key, cls.allowed)
                raise ConfigError(f"strategy {cls.name}: unknown option {key!r}{hint}; allowed are {names}")
        return {
            key: option.check(options.get(key, option.default), f"strategy {cls.name}: option {key}")
            for key, option in cls.allowed.items()
        }

    @abstractmethod
    def ask(self) -> Proposal | Wait | None:
        """Return the next proposal, `WAIT` while a pending outcome must come first, or None when nothing is left.

        No plan is proposed twice at the same fidelity, and none that breaks a constraint on a cost.
        """

    @abstractmethod
    def tell(self, proposal: Proposal, record: TrialRecord) -> None:
        """Take the outcome of a proposal; failed and pruned trials never count as complete points.

        A second outcome for the same proposal is ignored. The outcome of a plan that was never asked for is taken as
        known beforehand, and the plan is not proposed any more.
        """

    @property
    def ended(self) -> str:
        """Why nothing more is proposed, in one line; empty where it is simply that the space was tried."""
        return ""

    # For the strategies themselves

    def _gain(self, record: TrialRecord) -> float | None:
        """Return the score turned so that more is better; None unless the trial is complete and its score finite."""
        if record.status != "complete" or record.score is None or not math.isfinite(record.score):
            return None
        return self._turned(record.score)

    @property
    def _dense_gain(self) -> float | None:
        return None if self.dense is None else self._turned(self.dense.score)

    def _turned(self, score: float) -> float:
        return -score if any(o.name == "score" and o.direction == "min" for o in self.objectives) else score

    def _propose(
        self,
        vector: Vector,
        fidelity: Fidelity | None = None,
        *,
        parent: Proposal | None = None,
        pull: float = 0.0,
        probe: bool = False,
        want: Want = "",
    ) -> Proposal:
        """Return a proposal of a plan; one that is no probe is marked as proposed."""
        if not probe:
            self._claimed.add(vector)
        return Proposal(self.catalog.plan(vector), fidelity, parent, pull, probe, want)

    def _is_new(self, vector: Vector | None) -> bool:
        return vector is not None and vector not in self._claimed and self.catalog.feasible(vector)

    def _draw(self, noise: float) -> Vector | None:
        """Return a new plan, drawn so that the cost axis is covered evenly; None when a few draws give none."""
        for _ in range(20):
            target = self.rng.uniform(self.catalog.low, self.catalog.high)
            vector = self.catalog.repair(self.catalog.spread(target, self.rng, noise), self.rng)
            if vector is not None and self._is_new(vector):
                return vector
        return None

    def _nearby(self, vector: Vector) -> Vector | None:
        """Return a new plan near `vector`, or any new plan; None when every plan was proposed."""
        for attempt in range(40):
            moved = self.catalog.neighbour(vector, self.rng, 1 + attempt // 8)
            if moved is not None and self._is_new(moved):
                return moved
        return self._somewhere()

    def _somewhere(self) -> Vector | None:
        """Return the first new plan in a fixed order; None when there is none."""
        while self._next_in_order is None or self._next_in_order in self._claimed:
            self._next_in_order = next(self._in_order, None)
            if self._next_in_order is None:
                return None
        return self._next_in_order

    def _values(self, record: TrialRecord) -> list[float] | None:
        """Return the record's objectives; None unless it is complete and every value and bound is finite."""
        if record.status != "complete":
            return None
        values = [record.value(o.name) for o in self.objectives]
        bounded = [record.value(c.name) for c in self.constraints]
        if any(value is None or not math.isfinite(value) for value in [*values, *bounded]):
            return None
        return [value for value in values if value is not None]
