"""Strategies over one ask/tell interface, by name.

`make` builds one, `get` returns its class, `names` lists them, `register` adds one of your own (which should pass
`autorank.testing.strategies.StrategyContract`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autorank.errors import ConfigError, did_you_mean
from autorank.space import SearchSpace
from autorank.strategies.auto import Auto
from autorank.strategies.base import FULL, WAIT, Option, Strategy, Wait
from autorank.strategies.greedy_multi_step import MultiStepGreedy
from autorank.strategies.greedy_one_step import OneStepGreedy
from autorank.strategies.knapsack import Knapsack
from autorank.strategies.layer_wise import LayerWise
from autorank.strategies.learned_rank import LearnedRank
from autorank.strategies.multi_stage import MultiStage
from autorank.strategies.optuna import NSGA2, TPE
from autorank.strategies.random import RandomSearch
from autorank.strategies.vbmf import Vbmf
from autorank.types import Constraint, Evaluation, Fidelity, Objective

__all__ = ["WAIT", "Option", "Strategy", "Wait", "get", "make", "names", "register"]

_STRATEGIES: dict[str, type[Strategy]] = {}


def register(strategy: type[Strategy]) -> None:
    """Add a strategy under its name.

    Raises
    ------
    ConfigError
        The name is taken by another class.
    """
    if _STRATEGIES.setdefault(strategy.name, strategy) is not strategy:
        raise ConfigError(f"there is a strategy {strategy.name!r} already, choose another name")


def names() -> tuple[str, ...]:
    """Return the names of all strategies, in the order in which they were registered."""
    return tuple(_STRATEGIES)


def make(
    name: str,
    space: SearchSpace,
    objectives: tuple[Objective, ...],
    constraints: tuple[Constraint, ...] = (),
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    *,
    dense: Evaluation | None = None,
    fidelity: Fidelity = FULL,
) -> Strategy:
    """Build the strategy called `name`.

    Raises
    ------
    ConfigError
        No such strategy, an unknown option or value, or a constraint that no plan meets.
    """
    strategy = get(name)
    checked = strategy.checked(options or {})
    return strategy(space, objectives, constraints, seed, dense=dense, fidelity=fidelity, **checked)


def get(name: str) -> type[Strategy]:
    """Return the class of the strategy called `name`; ConfigError when there is none."""
    if name not in _STRATEGIES:
        raise ConfigError(f"no strategy {name!r}{did_you_mean(name, names())}; there are {', '.join(names())}")
    return _STRATEGIES[name]


_SHIPPED: tuple[type[Strategy], ...] = (
    Auto,
    Knapsack,
    OneStepGreedy,
    MultiStepGreedy,
    MultiStage,
    Vbmf,
    LayerWise,
    LearnedRank,
    TPE,
    NSGA2,
    RandomSearch,
)
for _strategy in _SHIPPED:
    register(_strategy)
