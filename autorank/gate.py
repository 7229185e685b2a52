"""Early stopping: which trials are hopeless before their fine-tune, judged by the trials before them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autorank.pareto import covers
from autorank.types import Direction, TrialRecord


@dataclass(frozen=True, slots=True)
class Gate:
    """Rule that stops a hopeless trial before its fine-tune.

    A trial is hopeless when at least `patience` earlier trials were, at the same cheap fidelity, better than it by
    `margin` in score and at most as costly in every cost objective.

    Attributes
    ----------
    seen : tuple of (score, costs)
        Earlier trials at the cheap fidelity; those that cannot decide anything may be missing.
    costs : tuple of str
        Names of the cost objectives, in the order of the tuples in `seen`.
    """

    seen: tuple[tuple[float, tuple[float, ...]], ...] = ()
    costs: tuple[str, ...] = ()
    patience: int = 3
    margin: float = 2.0
    direction: Direction = "max"

    def hopeless(self, score: float, kept: Mapping[str, float]) -> str:
        """Return the reason to stop a trial with this cheap score and these costs, or an empty string."""
        sign = 1.0 if self.direction == "max" else -1.0
        mine = tuple(kept.get(name, float("inf")) for name in self.costs)
        better = [
            other
            for other, costs in self.seen
            if sign * (other - score) > self.margin and all(a <= b for a, b in zip(costs, mine, strict=True))
        ]
        if len(better) < self.patience:
            return ""
        best = max(better) if sign > 0 else min(better)
        return (
            f"stopped before the fine-tune: {self.patience} earlier trials or more that cost no more scored better "
            f"at this point (up to {best:.2f} against {score:.2f})"
        )


class Seen:
    """What the trials so far say to the gates of later ones.

    A trial that is beaten (no better in score, no cheaper in any cost) by `patience` others decides nothing: wherever
    it counts against a trial, they do as well. It is left out, so that gates stay small however long a sweep is.

    Parameters
    ----------
    costs : tuple of str
    patience : int
    margin : float
    direction : {"max", "min"}
        Of the score.
    """

    def __init__(self, costs: tuple[str, ...], patience: int, margin: float, direction: Direction) -> None:
        self._costs, self._patience, self._margin, self._direction = costs, patience, margin, direction
        self._kept: list[tuple[float, ...]] = []  # score, turned so that less is better, and costs
        self._beaten: list[int] = []  # by how many, for each that is kept

    def add(self, record: TrialRecord) -> None:
        """Take one more trial; what started from trained weights says nothing about those that do not."""
        score = record.score_bn
        if score is None or math.isnan(score) or record.status not in ("complete", "pruned") or record.lineage:
            return
        sign = -1.0 if self._direction == "max" else 1.0
        new = sign * score, *(record.kept.get(name, float("inf")) for name in self._costs)
        counts = [
            count + (old[0] >= new[0] and covers(new, old) and new != old)
            for old, count in zip(self._kept, self._beaten, strict=True)
        ]
        mine = sum(old[0] <= new[0] and covers(old, new) for old in self._kept)
        together = zip([*self._kept, new], [*counts, mine], strict=True)
        left = [(entry, count) for entry, count in together if count < self._patience]
        self._kept, self._beaten = [entry for entry, _ in left], [count for _, count in left]

    def gate(self) -> Gate:
        """Return the gate of a trial that starts now."""
        sign = -1.0 if self._direction == "max" else 1.0
        seen = tuple((sign * score, tuple(costs)) for score, *costs in self._kept)
        return Gate(seen, self._costs, self._patience, self._margin, self._direction)
