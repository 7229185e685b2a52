"""Which plans go on to more fine-tuning: asynchronous successive halving with non-domination in place of a ranking.

Rungs are fidelities from few steps to all. Of the plans whose outcome at a rung is known, the best 1/eta may go on, as
many as that allows at the moment and without waiting for others (ASHA: Li et al., MLSys 2020). Best means: on a lower
non-dominated layer of score and costs, and within a layer where it is least crowded, so that the plans that go on are
spread along the front (MO-ASHA with NSGA-II's selection: Schmucker et al., arXiv 2106.12639, section 3).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from autorank.types import Fidelity

Floats = NDArray[np.float64]


def ladder(full: Fidelity, rungs: int, eta: int) -> tuple[Fidelity, ...]:
    """Return the fidelities from the cheapest to the full one.

    Parameters
    ----------
    full : Fidelity
    rungs : int
        How many; the lowest of three or more is without fine-tune. Fewer where steps repeat.
    eta : int
        Each rung has `eta` times the steps of the one below.
    """
    steps = {full.steps // eta**k for k in range(rungs)}
    if rungs > 2:
        steps = {0, *(full.steps // eta**k for k in range(rungs - 1))}
    return tuple(Fidelity(count, full.batch_norm) for count in sorted(steps))


def layers(points: Floats) -> list[list[int]]:
    """Return the non-dominated layers of points to be minimised: the front, the front of what remains, and so on.

    Parameters
    ----------
    points : points × objectives
    """
    left = list(range(len(points)))
    found = []
    while left:
        own = points[left]
        no_worse = (own[:, None, :] <= own[None, :, :]).all(axis=2)
        better = (own[:, None, :] < own[None, :, :]).any(axis=2)
        beaten = np.asarray((no_worse & better).any(axis=0)).tolist()
        found.append([i for i, lost in zip(left, beaten, strict=True) if not lost])
        left = [i for i, lost in zip(left, beaten, strict=True) if lost]
    return found


def crowding(points: Floats) -> Floats:
    """Return each point's crowding distance: the size of the gap between its neighbours, infinite at the ends.

    Deb et al., IEEE Trans. Evol. Comput. 6(2), 2002, section III-B.
    """
    distance = np.zeros(len(points))
    for column in points.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]] if len(order) else 0.0
        distance[order[[0, -1]]] = np.inf
        if span > 0:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return distance


def ranking(points: Floats) -> list[int]:
    """Return the points' indices from best to worst: by layer, then the least crowded first."""
    order = []
    for layer in layers(points):
        apart = crowding(points[layer])
        order += [layer[i] for i in sorted(range(len(layer)), key=lambda i: (-apart[i], layer[i]))]
    return order


def promotable(points: Sequence[Sequence[float]], promoted: Collection[int], eta: int) -> list[int]:
    """Return which points of a rung may go on now, the best first.

    Parameters
    ----------
    points : points × objectives
        Outcomes at the rung, turned so that less is better.
    promoted : collection of int
        Those that went on already.
    eta : int
    """
    allowed = len(points) // eta
    if allowed <= len(promoted):
        return []
    best = ranking(np.asarray(points, dtype=np.float64))[:allowed]
    return [i for i in best if i not in promoted][: allowed - len(promoted)]
