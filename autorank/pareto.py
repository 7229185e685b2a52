"""Dominance, hypervolume and knee of points in any number of dimensions; pure functions, standard library only.

A point is a sequence of numbers, one per objective; ``directions`` says for each whether more or less is better. A
point with a missing (None) or non-finite value is no point: it dominates nothing, is on no front and has no volume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import le

from autorank.errors import EmptyFrontError
from autorank.types import Direction

Values = Sequence[float | None]


def minimised(point: Values, directions: Sequence[Direction]) -> tuple[float, ...] | None:
    """Return `point` with every objective turned so that less is better; None when a value is missing or not finite.

    Raises
    ------
    ValueError
        The point has not as many values as there are directions.
    """
    if len(point) != len(directions):
        raise ValueError(f"a point of {len(point)} values for {len(directions)} objectives")
    turned = []
    for value, direction in zip(point, directions, strict=True):
        if value is None or not math.isfinite(value):
            return None
        turned.append(-float(value) if direction == "max" else float(value))
    return tuple(turned)


def covers(a: Sequence[float], b: Sequence[float]) -> bool:
    """Say whether `a` is at least as good as `b` in every (minimised) objective."""
    return all(map(le, a, b))


def point_dominates(a: Values, b: Values, directions: Sequence[Direction]) -> bool:
    """Say whether `a` is nowhere worse than `b` and somewhere better. Equal points do not dominate each other."""
    left, right = minimised(a, directions), minimised(b, directions)
    if left is None:
        return False
    if right is None:
        return True
    return left != right and covers(left, right)


def _front(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Return the indices of the non-dominated minimised points, of equal ones the first, in lexicographic order."""
    kept: list[int] = []
    # In lexicographic order nothing is dominated by what comes after it; the index settles ties for the first.
    order = sorted(range(len(points)), key=lambda i: (points[i], i))
    if points and len(points[0]) == 2:  # then the last one kept covers whatever any of them covers
        for i in order:
            if not kept or points[i][1] < points[kept[-1]][1]:
                kept.append(i)
        return kept
    for i in order:
        if not any(covers(points[j], points[i]) for j in kept):
            kept.append(i)
    return kept


def non_dominated(points: Sequence[Values], directions: Sequence[Direction]) -> list[int]:
    """Return the indices of the points that no other point dominates, in the order given.

    Of several equal points only the first counts, so a front never shows one outcome twice.

    Parameters
    ----------
    points : sequence of points
    directions : sequence of {"max", "min"}

    Returns
    -------
    list of int
        Ascending.
    """
    turned = [minimised(point, directions) for point in points]
    index = [i for i, point in enumerate(turned) if point is not None]
    return sorted(index[k] for k in _front([point for point in turned if point is not None]))


def hypervolume(points: Sequence[Values], reference: Sequence[float], directions: Sequence[Direction]) -> float:
    """Return the exact volume that `points` dominate and that dominates `reference`.

    One and two dimensions are a sweep; more are sliced along the last objective (hypervolume by slicing objectives,
    While et al., IEEE Trans. Evol. Comput. 10(1), 2006). Points that do not beat the reference in every objective add
    nothing.

    Parameters
    ----------
    points : sequence of points
    reference : sequence of float
        The worst corner, one value per objective.
    directions : sequence of {"max", "min"}

    Returns
    -------
    float
        Zero when there is no point better than the reference.

    Raises
    ------
    ValueError
        The reference has a missing or non-finite value, or the lengths differ.
    """
    corner = minimised(reference, directions)
    if corner is None:
        raise ValueError(f"the reference point {tuple(reference)} is not finite")
    turned = [minimised(point, directions) for point in points]
    inside = [p for p in turned if p is not None and all(x < r for x, r in zip(p, corner, strict=True))]
    return _volume(inside, corner)


def _volume(points: Sequence[tuple[float, ...]], corner: tuple[float, ...]) -> float:
    """Return the hypervolume of minimised points, all strictly inside `corner`."""
    if not points:
        return 0.0
    if len(corner) == 1:
        return corner[0] - min(point[0] for point in points)
    if len(corner) == 2:
        volume, height = 0.0, corner[1]
        for x, y in sorted(points):
            if y < height:
                volume += (corner[0] - x) * (height - y)
                height = y
        return volume
    front = [points[i] for i in _front(points)]
    levels = sorted({point[-1] for point in front})
    volume = 0.0
    for level, above in zip(levels, [*levels[1:], corner[-1]], strict=True):
        # Between two levels of the last objective, the cross-section is that of the points at or below the level.
        section = [point[:-1] for point in front if point[-1] <= level]
        volume += _volume(section, corner[:-1]) * (above - level)
    return volume


def knee(points: Sequence[Values], directions: Sequence[Direction]) -> int:
    """Return the index of the point that bulges furthest from the chord between the ends of the front.

    Every objective is scaled to 0..1 over the non-dominated points; in two dimensions the chord then is x + y = 1, in
    more the plane with coordinate sum 1, and the knee is the point of least coordinate sum. Of equals the first.

    Raises
    ------
    EmptyFrontError
        There is no point with all values finite.
    """
    index = non_dominated(points, directions)
    if not index:
        raise EmptyFrontError("no point has a finite value for every objective")
    front = [point for i in index if (point := minimised(points[i], directions)) is not None]
    low = [min(column) for column in zip(*front, strict=True)]
    span = [max(column) - least for column, least in zip(zip(*front, strict=True), low, strict=True)]

    def total(point: tuple[float, ...]) -> float:
        return sum((x - least) / width if width else 0.0 for x, least, width in zip(point, low, span, strict=True))

    # The rounding makes points that lie exactly on the chord equal, so that the choice does not hang on a last bit.
    return index[min(range(len(front)), key=lambda k: (round(total(front[k]), 12), k))]
