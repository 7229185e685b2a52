"""Random search, spread evenly along the cost axis: the baseline that every other strategy has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from autorank.strategies.base import Option, Strategy, Wait
from autorank.types import Proposal, TrialRecord


class RandomSearch(Strategy):
    """Draws a share of the cost first, then for every layer a variant and a rank near that share.

    Drawing every layer's rank uniformly instead would put nearly all plans at the mean cost, by the law of large
    numbers, and none at the ends of the front.
    """

    name: ClassVar[str] = "random"
    allowed: ClassVar[Mapping[str, Option]] = {
        "noise": Option(
            0.35, 0.0, 3.0, "spread of the layers' ratios around the plan's, as a standard deviation of log"
        ),
    }

    def ask(self) -> Proposal | Wait | None:
        """Return a new plan; None when all were proposed."""
        vector = self._draw(self.options["noise"]) or self._nearby(self.catalog.dense_vector)
        return None if vector is None else self._propose(vector)

    def tell(self, proposal: Proposal, record: TrialRecord) -> None:
        """Remember that the plan is known; outcomes do not change what is drawn."""
        vector = self.catalog.vector(proposal.plan)
        if vector is not None:
            self._claimed.add(vector)
