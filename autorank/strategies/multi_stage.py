"""MUSCO's multi-stage compression: weakened EVBMF ranks, fine-tune, EVBMF of the trained kernels, and again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from autorank.strategies.base import WAIT, Option, Strategy, Wait
from autorank.strategies.bounds import Bounds
from autorank.strategies.catalog import Vector
from autorank.strategies.vbmf import Holding, Ranks, weakened
from autorank.types import Proposal, TrialRecord

_FACTORS = (0.5, 1.5, 0.25, 2.0)
"""Of the weakening: what is tried, in this order, after trials of a stage that failed or were known beforehand."""
_WORTH = 0.02
"""Least share of the present cost that a stage of all layers has to save; of a group of them, in proportion."""
_FINER = 20
"""Parts of the weakening among which the stage that meets a budget is looked for."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """A plan, the ranks that its layers have, and the layer at which the next stage begins."""

    vector: Vector
    ranks: tuple[Ranks, ...]
    turn: int


class MultiStage(Strategy):
    """Repeats: weaken the EVBMF ranks of some layers, decompose the trained network at them, fine-tune.

    MUSCO (Gusak et al., arXiv 1903.09973). Each stage starts from the weights with which the stage before ended, and is
    a point of the front. The ranks follow R − w (R − R_vbmf), where R are the present ranks and R_vbmf those that EVBMF
    finds in the *trained* kernels. A layer that is decomposed already is decomposed again in its own format: the kernel
    that its trained factors stand for is fitted anew, which for Tucker-2 is the decomposition of the core with the new
    bases merged into its 1×1 layers. A dense layer takes the cheapest candidate of any format that holds the ranks
    (`autorank.strategies.vbmf.Holding`; the errors of candidates are those of the dense model's kernels).

    Where that rule saves next to nothing any more (EVBMF finds signal only, or the grid of ranks has nothing between
    R_vbmf and R), every layer of the group takes the next cheaper rank instead, layers that EVBMF has an opinion on
    first; with ``stall=end`` it goes on until no layer shrinks, and ends there.

    With a budget, stages that are still too dear are probes, the stage that crosses it is the weakest that meets it,
    and the last one allowed goes there at the least predicted loss, wherever it starts from; when the budget is met,
    it ends. When a trial fails, its stage is tried again with other weakenings, three times in all.
    """

    name: ClassVar[str] = "multi-stage"
    needs: ClassVar[frozenset[str]] = frozenset({"spectra", "errors"})
    chains: ClassVar[bool] = True
    allowed: ClassVar[Mapping[str, Option]] = {
        "weakening": Option(0.8, 0.02, 1.5, "w: how far ranks go towards those of EVBMF in a stage; 1 is all the way"),
        "least": Option(4, 1, 4096, "rank below which no layer is brought, R_min"),
        "group": Option(0, 0, 4096, "how many layers a stage compresses, in forward order and round again; 0 is all"),
        "stages": Option(10, 1, 1000, "largest number of stages"),
        "epsilon": Option(
            0.0,
            0.0,
            math.inf,
            "ends when a stage loses more than this against the dense model, in units of the score; 0 never",
        ),
        "stall": Option(
            "rung", help="when no rank shrinks any more: take the next cheaper rank, or end", choices=("rung", "end")
        ),
    }

    def _set_up(self) -> None:
        self._holding = Holding(self.catalog)
        self._bounds = Bounds(self.catalog)
        self._now = _Stage(self.catalog.dense_vector, tuple(self._holding.full), 0)
        self._found = list(self._holding.found)
        self._budget = not self.catalog.feasible(self.catalog.dense_vector)
        self._tried: set[Vector] = set()
        self._parent: Proposal | None = None
        self._pending: tuple[Proposal, _Stage] | None = None
        self._done = self._failures = 0
        self._ended = ""

    def ask(self) -> Proposal | Wait | None:
        """Return the next stage, `WAIT` until the one before is done, or None at the end."""
        if self._pending is not None:
            return WAIT
        stage = None if self._ended else self._next()
        if stage is None:
            return None
        self._tried.add(stage.vector)
        probe = not self.catalog.feasible(stage.vector)
        proposal = self._propose(stage.vector, parent=self._parent, probe=probe, want="spectra")
        self._pending = proposal, stage
        return proposal

    def tell(self, proposal: Proposal, record: TrialRecord) -> None:
        """Go on from the stage's weights and the spectra of its kernels; after a failure, from the stage before."""
        if self._pending is None or proposal != self._pending[0]:
            vector = self.catalog.vector(proposal.plan)
            if vector is not None:
                self._claimed.add(vector)
            return
        stage, self._pending = self._pending[1], None
        gain = self._gain(record)
        if gain is None:
            self._failures += 1
            if self._failures == 3:
                self._ended = f"three trials of stage {self._done + 1} failed, the last: {record.reason or 'no score'}"
            return
        self._now, self._parent, self._failures = stage, proposal, 0
        self._done += 1
        for i, layer in enumerate(self.space.layers):
            measured = record.measured.get(layer.spec.name, ())
            if len(measured) == 2 and all(map(math.isfinite, measured)):
                self._found[i] = round(measured[0]), round(measured[1])
        self._ended = self._over(gain)

    @property
    def ended(self) -> str:
        """Why the last stage was the last."""
        return self._ended

    @property
    def _bounds_text(self) -> str:
        return " and ".join(map(str, self.catalog.constraints))

    def _over(self, gain: float) -> str:
        """Return why the stage that was just done is the last; empty while it goes on."""
        epsilon, stages = self.options["epsilon"], self.options["stages"]
        drop = None if self._dense_gain is None else self._dense_gain - gain
        if epsilon and drop is not None and drop > epsilon:
            return f"stage {self._done} loses {drop:.4g} against the dense model, more than epsilon={epsilon:g}"
        if self._budget and self.catalog.feasible(self._now.vector):
            return f"stage {self._done} meets {self._bounds_text}"
        return f"all {stages} stages were done (stages={stages})" if self._done >= stages else ""

    def _next(self) -> _Stage | None:
        """Return the next stage; None, with the reason in `ended`, when there is none."""
        stages = options = self._stages()
        last = self._done + 1 >= self.options["stages"]
        if self._budget and (not stages or last or not self._misses(stages[0], "<=")):
            weakest_first = [stage for stage in [*self._finer(), *stages] if not self._misses(stage, "<=")]
            options = [*weakest_first, *self._met([*stages, self._now])]
        elif stages and self._misses(stages[0], ">="):
            options = [*reversed(self._finer()), *stages]
        for stage in options:
            known = stage.vector in self._tried or stage.vector in self._claimed
            if not known and not self._misses(stage, ">="):
                return stage
        bounds = self._bounds_text
        if options:
            self._ended = f"there is no further stage{f' within {bounds}' if bounds else ''} that was not tried"
        elif self.options["stall"] == "rung":
            self._ended = "every layer is at its cheapest candidate"
        else:
            self._ended = "no layer has a cheaper candidate that holds its weakened EVBMF ranks (stall=end)"
        if self._budget:
            self._ended += f"; {bounds} is not met"
        return None

    def _stages(self) -> list[_Stage]:
        """Return the stage that may follow, and others that may stand in for it if it failed or is known already."""
        w = self.options["weakening"]
        stages = [self._weaken(w)]
        if self.options["stall"] == "rung":
            stages += [self._weaken(max(w, 1.0)), self._step()]
        moved = [*filter(self._worth, stages), *filter(self._differs, stages)][:1]
        if self._failures or any(stage.vector in self._claimed for stage in moved):
            moved += filter(self._differs, [*(self._weaken(w * factor) for factor in _FACTORS), *stages])
        return moved

    def _differs(self, stage: _Stage) -> bool:
        return stage.vector != self._now.vector

    def _worth(self, stage: _Stage) -> bool:
        """Say whether a stage saves enough to be worth a fine-tune."""
        now, layers = self.catalog.share(self._now.vector), len(stage.vector)
        part = min(self.options["group"] or layers, layers) / layers
        return self._differs(stage) and now - self.catalog.share(stage.vector) >= _WORTH * part * now

    def _finer(self) -> list[_Stage]:
        """Return the different stages of weaker weakenings, weakest first."""
        parts = (self._weaken(self.options["weakening"] * part / _FINER) for part in range(1, _FINER))
        return list({stage.vector: stage for stage in parts if stage.vector != self._now.vector}.values())

    def _weaken(self, weakening: float) -> _Stage:
        """Return the stage in which each layer of the next group that can shrink by the rule does so."""
        least = self.options["least"]

        def shrunk(i: int) -> tuple[int, Ranks]:
            (out, into), found = self._now.ranks[i], self._found[i]
            target = weakened(out, found[0], weakening, least), weakened(into, found[1], weakening, least)
            index = 0 if target == (out, into) else self._holding.index(i, target, self._form(i))
            return (index if index and self._ratio(i, index) < self._ratio(i) else self._now.vector[i]), target

        return self._moved(shrunk)

    def _step(self) -> _Stage:
        """Return the stage in which each layer of the next group is cut a little, whatever EVBMF says.

        Layers in which EVBMF finds nothing but noise, and so knows no rank, wait until the others cannot be cut.
        """

        def cut(i: int) -> tuple[int, Ranks]:
            index = self._rung(i)
            return index, self._holding.ranks(i, index)

        silent = {i for i, found in enumerate(self._found) if found == (0, 0)}
        stage = self._moved(lambda i: (self._now.vector[i], self._now.ranks[i]) if i in silent else cut(i))
        return stage if stage.vector != self._now.vector else self._moved(cut)

    def _moved(self, change: Callable[[int], tuple[int, Ranks]]) -> _Stage:
        """Return the stage in which the next layers that `change` gives another candidate, a group of them, have it."""
        vector, ranks, turn = list(self._now.vector), list(self._now.ranks), self._now.turn
        left = self.options["group"] or len(vector)
        for i in (*range(self._now.turn, len(vector)), *range(self._now.turn)):
            if not left:
                break
            index, held = change(i)
            if index != vector[i]:
                vector[i], ranks[i] = index, self._held(i, index, held)
                left, turn = left - 1, (i + 1) % len(vector)
        return _Stage(tuple(vector), tuple(ranks), turn)

    def _held(self, layer: int, index: int, target: Ranks) -> Ranks:
        """Return the ranks that a layer has from now on: of Tucker-2 its own, else what it was chosen to hold."""
        if self._holding.choice(layer, index).format == "tucker2":
            return self._holding.ranks(layer, index)
        now = self._now.ranks[layer]
        return min(now[0], target[0]), min(now[1], target[1])

    def _met(self, stages: Sequence[_Stage]) -> Iterator[_Stage]:
        """Yield the stages, brought within the constraints at the least predicted loss and without dearer layers.

        Decomposed layers keep their formats where that is possible.
        """
        for own in (True, False):
            allowed = np.zeros(self._holding.losses.shape, dtype=bool)
            for i, now in enumerate(self._now.vector):
                allowed[i, [now, *self._cheaper(i, self._form(i) if own else "")]] = True
            for stage in stages:
                vector = self._bounds.meet(stage.vector, self._holding.losses, allowed)
                if vector is None or vector == self._now.vector:
                    continue
                ranks = [
                    self._held(i, k, self._holding.ranks(i, k)) if k != now else self._now.ranks[i]
                    for i, (k, now) in enumerate(zip(vector, self._now.vector, strict=True))
                ]
                yield _Stage(vector, tuple(ranks), stage.turn)

    def _rung(self, layer: int) -> int:
        """Return the candidate of least predicted loss among those that cost 0.7 to 0.9 of the present one.

        In the present format as long as it has cheaper ranks; where none costs so much, the dearest that is cheaper.
        """
        now, losses = self._ratio(layer), self._holding.losses[layer]
        cheaper = self._cheaper(layer, self._form(layer)) or self._cheaper(layer)
        if not cheaper:
            return self._now.vector[layer]
        near = [k for k in cheaper if 0.7 * now <= self._ratio(layer, k) <= 0.9 * now]
        dearest = max(self._ratio(layer, k) for k in cheaper)
        return min(
            near or [k for k in cheaper if self._ratio(layer, k) == dearest],
            key=lambda k: (losses[k], self._ratio(layer, k), k),
        )

    def _cheaper(self, layer: int, form: str = "") -> list[int]:
        """Return the candidates, of one format or of any, that are cheaper than the present one."""
        now, count = self._ratio(layer), len(self.space.layers[layer].candidates)
        fitting = (k for k in range(1, count + 1) if form in ("", self._holding.choice(layer, k).format))
        return [k for k in fitting if self._ratio(layer, k) < now]

    def _form(self, layer: int) -> str:
        """Return the present format of a layer; empty while it is dense."""
        index = self._now.vector[layer]
        return self._holding.choice(layer, index).format if index else ""

    def _ratio(self, layer: int, index: int | None = None) -> float:
        return self.catalog.place(layer, self._now.vector[layer] if index is None else index)[1]

    def _misses(self, stage: _Stage, operator: str) -> bool:
        """Say whether a stage is too dear (``<=``) or too cheap (``>=``) for a constraint on a cost."""
        missed = self.catalog.violations(stage.vector)
        return any(c.operator == operator and missed[str(c)] > 0 for c in self.catalog.constraints)
