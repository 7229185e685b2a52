"""Plans near those of a front: one layer made dearer, another cheaper."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray

from autorank.strategies.catalog import Vector
from autorank.strategies.tables import Space

Floats = NDArray[np.float64]

_PARENTS, _EACH = 16, 6
_NEAR = 6
"""Next dearer or cheaper candidates among which a step chooses."""


def exchanges(space: Space, values: Floats, parents: Sequence[Vector], rng: Random) -> list[Vector]:
    """Return plans in which one layer is made dearer and another cheaper than in a parent.

    Parameters
    ----------
    space : Space
    values : layers × candidates
        Predicted losses.
    parents : sequence of Vector
        At most 16 of them, drawn at random, are changed in six ways each.
    rng : random.Random
    """
    found = []
    for parent in parents if len(parents) <= _PARENTS else rng.sample(list(parents), _PARENTS):
        for _ in range(_EACH):
            changed = list(parent)
            for sign in (1, -1):
                layer = rng.randrange(len(changed))
                changed[layer] = _step(space, values, layer, changed[layer], sign, rng)
            found.append(tuple(changed))
    return found


def _step(space: Space, values: Floats, layer: int, index: int, sign: int, rng: Random) -> int:
    """Return a dearer candidate (sign 1) at random, or the cheaper one (-1) that loses least, of the next ones."""
    cost = space.changes[space.catalog.axis][layer, : space.sizes[layer]]
    other = np.flatnonzero(sign * (cost - cost[index]) > 0)
    if not len(other):
        return index
    near = other[np.argsort(sign * cost[other], kind="stable")][:_NEAR]
    return int(near[np.argmin(values[layer, near])] if sign < 0 else near[rng.randrange(len(near))])
