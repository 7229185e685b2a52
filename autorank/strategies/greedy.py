"""What the greedy rules share: ladders of candidates cheaper than dense, and cheap probes of what a change loses.

A *probe* is a trial without a fine-tune. By default it re-estimates batch norm if the sweep does: the points of the
front do so too, and without it harsh ranks would be judged by statistics that no longer hold, for far more than they
lose in the end. That is about half of a probe's time, and the option ``probe: decompose`` saves it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autorank.strategies.base import Option, Strategy
from autorank.strategies.catalog import Vector, amount
from autorank.types import Fidelity, Proposal, TrialRecord

FAILED = -math.inf
"""The gain of a probe that failed, was pruned or has no finite score: no threshold accepts it."""

PROBE = Option("bn", choices=("bn", "decompose"), help="whether probes re-estimate batch norm, as the sweep may do")

Rungs = tuple[int, ...]


def next_rung(rungs: Rungs, gains: Mapping[int, float], least: float) -> int | None:
    """Return the rung to measure next in a search for the cheapest acceptable one; None when it is found.

    Bisection, which takes for granted that below a rung that is not acceptable none is. Outcomes that contradict this
    (noise, or probes of another search) do no harm: of what was measured, the cheapest acceptable rung is kept, and
    the search goes on between it and the rung below it that was last refused.

    Parameters
    ----------
    rungs : tuple of int
        Candidates of one ladder, from cheap to dear.
    gains : mapping of int to float
        Measured candidates and their scores, turned so that more is better.
    least : float
        The least acceptable gain.

    Returns
    -------
    int or None
    """
    known = [gains.get(k) for k in rungs]
    high = next((at for at, gain in enumerate(known) if gain is not None and gain >= least), len(rungs))
    low = next((at for at in range(high - 1, -1, -1) if known[at] is not None), -1)
    return None if high - low < 2 else rungs[(low + high) // 2]


def spread_order(count: int) -> list[int]:
    """Return 0, ..., count − 1 in an order of which every beginning is spread evenly: by their bits read backwards."""
    bits = (count - 1).bit_length()
    backwards = (int(f"{n:0{max(bits, 1)}b}"[::-1], 2) for n in range(2**bits))
    return [n for n in backwards if n < count]


@dataclass(eq=False)
class Goal:
    """One plan to find: by its threshold, or the mildest threshold whose plan keeps the budget.

    Attributes
    ----------
    epsilon : float or None
        Largest drop of a layer alone; None for a budget whose search has not begun.
    budget : bool
    settled : set of int
        Layers whose cheapest acceptable candidate is found.
    stuck : dict
        Layer → number of its known probes at which only pending ones were left to wait for.
    rounds : int
        Thresholds that a budget has tried.
    """

    epsilon: float | None
    budget: bool = False
    settled: set[int] = field(default_factory=set)
    stuck: dict[int, int] = field(default_factory=dict)
    rounds: int = 0

    def restart(self, epsilon: float) -> None:
        """Search for another threshold."""
        self.epsilon, self.rounds = epsilon, self.rounds + 1
        self.settled.clear()
        self.stuck.clear()


class GreedyStrategy(Strategy):
    """Ladders, amounts and cheap gains for the greedy rules; `PROBE` has to be among a rule's options, as ``probe``."""

    def _set_up(self) -> None:
        axis = self.catalog.axis
        self._cheap = Fidelity(0, self.fidelity.batch_norm and self.options["probe"] == "bn")
        self._amounts: list[list[float]] = [
            [amount(self.space, layer, candidate, axis) for candidate in (None, *layer.candidates)]
            for layer in self.space.layers
        ]
        # A candidate that saves nothing along the axis (but parameters, say) is no step down.
        self._ladders: list[list[Rungs]] = [
            [tuple(k for _, k in ladder if k and row[k] < row[0]) for ladder in ladders]
            for ladders, row in zip(self.catalog.ladders, self._amounts, strict=True)
        ]
        self._text = ""

    @property
    def ended(self) -> str:
        """Why nothing more is proposed, in one line."""
        return self._text

    def _moved(self, vector: Vector, moves: Sequence[tuple[int, int]]) -> Vector:
        """Return the plan with these layers at these candidates."""
        changed = list(vector)
        for layer, index in moves:
            changed[layer] = index
        return tuple(changed)

    def _name(self, layer: int, index: int) -> str:
        """Return a candidate as a message names it."""
        spec = self.space.layers[layer].spec
        return f"{spec.name} as {self.space.layers[layer].candidates[index - 1].choice}"

    def _cheap_gain(self, proposal: Proposal, record: TrialRecord) -> float | None:
        """Return the gain at the probes' fidelity; None when the record does not tell it.

        A trial that went on to its fine-tune passed the probes' fidelity on the way and has that score as well.
        """
        gain = self._gain(record)
        if (proposal.fidelity or self.fidelity) == self._cheap:
            return FAILED if gain is None else gain
        if not self._cheap.batch_norm:
            early = record.score_before
        else:
            early = record.score_bn if (proposal.fidelity or self.fidelity).batch_norm else None
        return None if early is None or not math.isfinite(early) else self._turned(early)
