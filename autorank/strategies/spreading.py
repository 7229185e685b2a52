"""An order of points on a line of which every beginning is well spread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def spread_order(values: Sequence[float], taken: Sequence[float]) -> Iterator[int]:
    """Yield every index of `values` once, always that of the value farthest from those taken already.

    Farthest-point traversal (Gonzalez, 1985): between two ends first the middle, then the quarters, and so on.

    Parameters
    ----------
    values : sequence of float
    taken : sequence of float
        Where nothing more is needed, at least one.
    """
    points = np.asarray(values, dtype=float)
    if not len(points):
        return
    distances = np.abs(points[:, None] - np.asarray(taken, dtype=float)[None, :]).min(axis=1)
    for _ in range(len(points)):
        farthest = int(np.argmax(distances))
        yield farthest
        distances = np.minimum(distances, np.abs(points - points[farthest]))
        distances[farthest] = -1.0
