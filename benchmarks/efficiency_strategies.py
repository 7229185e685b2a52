"""Two strategies for comparison only: uniform plans of one format, and plans that somebody else chose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from autorank import strategies
from autorank.strategies import WAIT, Option, Strategy, Wait
from autorank.types import Plan, Proposal, TrialRecord

Vector = tuple[int, ...]


class Uniform(Strategy):
    """Every layer keeps the same share of its MACs in the same format; the format that does best is used first.

    Each variant of a format is tried once where the whole network keeps about half of what the axis spans. Then the
    variants take their turn in the order of those scores, each with its whole grid of shares, in an order that covers
    the axis ever more finely. Layers that the variant does not support stay dense.
    """

    name: ClassVar[str] = "uniform"
    allowed: ClassVar[Mapping[str, Option]] = {
        "shares": Option(16, 2, 256, "plans per variant"),
    }

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        weights = [layer.spec.macs for layer in self.space.layers]
        reach: dict[str, int] = {}
        for labels, macs in zip(self.catalog.variants, weights, strict=True):
            for label in labels:
                reach[label] = reach.get(label, 0) + macs
        # A variant that hardly any layer supports is no uniform plan.
        self._labels = [label for label in sorted(reach) if reach[label] >= 0.5 * sum(weights)]
        self._opening = {self._near(label, (self.catalog.low + self.catalog.high) / 2): label for label in self._labels}
        self._to_open = list(self._opening)
        self._scores: dict[str, float | None] = {}
        self._rest: Iterator[Vector] | None = None

    def ask(self) -> Proposal | Wait | None:
        """Return the next uniform plan; None when the grids of all variants are done."""
        while self._to_open:
            vector = self._to_open.pop(0)
            if self._is_new(vector):
                return self._propose(vector)
            self._scores.setdefault(self._opening[vector], None)
        if self._rest is None:
            if len(self._scores) < len(self._opening):
                return WAIT
            self._rest = self._by_score()
        for vector in self._rest:
            if self._is_new(vector):
                return self._propose(vector)
        return None

    def tell(self, proposal: Proposal, record: TrialRecord) -> None:
        """Keep the scores of the openings."""
        vector = self.catalog.vector(proposal.plan)
        if vector is None:
            return
        self._claimed.add(vector)
        if vector in self._opening:
            self._scores[self._opening[vector]] = self._gain(record)

    def _by_score(self) -> Iterator[Vector]:
        """Yield all uniform plans, those of the variant with the best opening first."""
        worst = min((score for score in self._scores.values() if score is not None), default=0.0) - 1
        order = sorted(self._labels, key=lambda label: (-(self._scores.get(label) or worst), label))
        span = self.catalog.high - self.catalog.low
        for label in order:
            for at in spread(self.options["shares"]):
                yield self._near(label, self.catalog.low + span * at)

    def _near(self, label: str, target: float) -> Vector:
        """Return the uniform plan of a variant whose share of the whole network's cost is nearest to `target`."""
        plans = [self._at(label, step / 200) for step in range(1, 201)]
        return min(plans, key=lambda vector: (abs(self.catalog.share(vector) - target), vector))

    def _at(self, label: str, ratio: float) -> Vector:
        return tuple(
            self.catalog.rung(i, labels.index(label), ratio) if label in labels else 0
            for i, labels in enumerate(self.catalog.variants)
        )


class Given(Strategy):
    """Plans from elsewhere, one after the other; `plans` is set before the search."""

    name: ClassVar[str] = "given"
    plans: ClassVar[tuple[Plan, ...]] = ()

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._waiting = list(self.plans)

    def ask(self) -> Proposal | Wait | None:
        """Return the next of the plans, with this search's seed."""
        return Proposal(Plan(self._waiting.pop(0).layers, self.seed)) if self._waiting else None

    def tell(self, proposal: Proposal, record: TrialRecord) -> None:
        """Learn nothing."""


def spread(count: int) -> list[float]:
    """Return `count` numbers from 0 to 1, evenly spaced, in an order that covers the interval ever more finely."""
    left, order = list(range(count)), []
    order.extend(left.pop(at) for at in (count // 2, 0, -1) if left)
    while left:
        farthest = max(left, key=lambda i: (min(abs(i - j) for j in order), -i))
        order.append(farthest)
        left.remove(farthest)
    return [i / max(count - 1, 1) for i in order]


for _strategy in (Uniform, Given):
    strategies.register(_strategy)
