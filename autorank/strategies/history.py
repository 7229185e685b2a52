"""What keeps a Parzen estimator fast in large spaces: a block of the parameters, and a part of the history."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from autorank.pareto import minimised
from autorank.strategies.rungs import ranking
from autorank.types import Direction

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import TPESampler
    from optuna.trial import FrozenTrial


def block_sampler(
    parameters: Mapping[str, BaseDistribution], block: Callable[[], Collection[str] | None], **settings: Any
) -> TPESampler:
    """Return a multivariate TPE sampler of known parameters, of which each sample may draw a block only.

    Parameters
    ----------
    parameters : mapping
        All parameters. They are given, as finding out which ones all trials share takes longer than the sampling.
    block : callable
        Returns the names to be drawn together next; None for all.
    **settings
        Of `optuna.samplers.TPESampler`.
    """
    from optuna.samplers import TPESampler

    class BlockSampler(TPESampler):
        def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
            names = block()
            return {
                name: distribution
                for name, distribution in parameters.items()
                if (names is None or name in names) and not distribution.single()
            }

    return BlockSampler(multivariate=True, **settings)


def thinned(trials: Sequence[FrozenTrial], directions: Sequence[Direction], limit: int) -> list[FrozenTrial]:
    """Return the complete trials, or where these are too many, half of `limit` the best and half the latest others.

    The best are those on the lowest non-dominated layers, spread along them.
    """
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    if len(complete) <= limit:
        return complete
    points = [minimised(trial.values, directions) or () for trial in complete]
    best = ranking(np.asarray(points, dtype=np.float64))[: limit // 2]
    chosen = set(best)
    others = [i for i in range(len(complete)) if i not in chosen]
    return [complete[i] for i in sorted([*best, *others[len(others) - (limit - len(best)) :]])]
