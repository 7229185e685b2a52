"""EVBMF ranks in one shot, weakened or strengthened: a front without any search."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from autorank.errors import ConfigError
from autorank.space import Candidate
from autorank.strategies.base import Option, Strategy, Wait
from autorank.strategies.bounds import Bounds, Table, table
from autorank.strategies.catalog import Catalog, Vector
from autorank.types import Choice, Proposal, TrialRecord

Ranks = tuple[int, int]
"""(R_out, R_in) of a kernel's two unfoldings, per group."""

_WHITENING = ("whiten", "shrink")
"""Options of a fit that change neither what a rank costs nor what it can hold."""
_LIMIT = 10.0
"""Weakening beyond which no budget is looked for: by then all but the tiniest shrinkage has arrived at `least`."""


def weakened(present: int, found: int, weakening: float, least: int) -> int:
    """Return a present rank R brought towards what EVBMF finds: max(int(R − w (R − R_vbmf)), R_min).

    MUSCO (arXiv 1903.09973). Where EVBMF finds nothing (0), and where it finds no less than R, R stays; nor does
    `least` raise it.
    """
    if not 0 < found < present:
        return present
    # Without the little extra, 9 − 0.9·10/3 would be truncated to 5.
    return min(present, max(int(present - weakening * (present - found) + 1e-9), least))


class Holding:
    """Which candidates hold as much of a layer's kernel as truncating both of its unfoldings at given ranks leaves.

    *Tucker-2* is this truncation: its candidate must have both ranks. A candidate of any *other format* must have an
    error of the weight no larger than Tucker-2 makes at these ranks (`bound`). Whitening changes which part of the
    kernel a fit gives up, not how much a rank can hold, so what counts is the least error of the weight among the
    whitenings of the same rank; which of them is taken is decided by the predicted loss, the error of the output or
    that of the weight, the first of these that is known. Of the candidates that hold enough, the cheapest along the
    catalog's axis is taken, and none that is not cheaper than the dense layer.

    Parameters
    ----------
    catalog : Catalog
        Of a space with spectra and errors.

    Raises
    ------
    ConfigError
        A layer without a spectrum.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self.full: list[Ranks] = []
        """The largest ranks that the unfoldings can have."""
        self.found: list[Ranks] = []
        """EVBMF ranks."""
        self._tails: list[tuple[Sequence[float], Sequence[float]]] = []
        for layer in catalog.space.layers:
            spec = layer.spec
            if layer.spectrum is None:
                raise ConfigError(f"EVBMF ranks need the spectrum of every layer, and {spec.name!r} has none")
            out, into, positions = spec.out_channels // spec.groups, spec.weight_shape[1], math.prod(spec.kernel)
            self.full.append((min(out, into * positions), min(into, out * positions)))
            self.found.append(layer.spectrum.vbmf)
            self._tails.append((layer.spectrum.out_tail, layer.spectrum.in_tail))
        self.losses = self._losses()
        self._errors = [_least_errors(layer.candidates) for layer in catalog.space.layers]
        self._order = [self._ordered(i) for i in range(len(self.full))]
        self._memo: dict[tuple[int, Ranks, str], int] = {}

    def index(self, layer: int, ranks: Ranks, form: str = "") -> int:
        """Return the cheapest candidate (of the format `form`, or of any) that holds these ranks; 0 where none does."""
        if ranks == self.full[layer]:
            return 0
        key = layer, ranks, form
        if key not in self._memo:
            bound = self.bound(layer, ranks)
            eligible = (k for k in self._order[layer] if form in ("", self.choice(layer, k).format))
            self._memo[key] = next((k for k in eligible if self._holds(layer, k, ranks, bound)), 0)
        return self._memo[key]

    def bound(self, layer: int, ranks: Ranks) -> float:
        """Return the relative error that Tucker-2 at these ranks may be expected to make: √(1 − (1 − o)(1 − i)).

        o and i are the tails of the two unfoldings. The squared error of Tucker-2 lies between max(o, i) and o + i (De
        Lathauwer et al. 2000, property 10), but at the ranks of EVBMF the latter is often above 1 and would let
        everything through. This is the error if either truncation took the same share of whatever the other left; on
        trained kernels it is near what HOOI reaches.
        """
        out, into = self._tails[layer][0][ranks[0]], self._tails[layer][1][ranks[1]]
        if math.prod(self._catalog.space.layers[layer].spec.kernel) == 1:  # both unfoldings are one matrix
            return math.sqrt(max(out, into))
        return math.sqrt(out + into - out * into)

    def ranks(self, layer: int, index: int) -> Ranks:
        """Return the ranks that a candidate holds: of Tucker-2 its own, else the largest in proportion to the full."""
        if index == 0:
            return self.full[layer]
        choice, (out, into) = self.choice(layer, index), self.full[layer]
        if choice.format == "tucker2":
            return choice.rank[0], choice.rank[1]
        error = self._errors[layer][index - 1]
        for part in range(max(out, into), 0, -1):
            found = max(1, out * part // max(out, into)), max(1, into * part // max(out, into))
            if self.bound(layer, found) >= error:
                return found
        return 1, 1

    def choice(self, layer: int, index: int) -> Choice:
        """Return the choice behind an index other than 0."""
        return self._catalog.space.layers[layer].candidates[index - 1].choice

    def _holds(self, layer: int, index: int, ranks: Ranks, bound: float) -> bool:
        choice = self.choice(layer, index)
        if choice.format == "tucker2":
            return choice.rank[0] >= ranks[0] and choice.rank[1] >= ranks[1]
        # Errors are of factors in float32.
        return self._errors[layer][index - 1] <= bound * (1.0 + 1e-4)

    def _ordered(self, layer: int) -> list[int]:
        """Return the candidates that are cheaper than the dense layer, cheapest and of the same cost best first."""
        candidates = self._catalog.space.layers[layer].candidates

        def key(k: int) -> tuple[float, int, int, float, int]:
            cost = candidates[k - 1].cost
            return self._catalog.place(layer, k)[1], cost.macs, cost.params, float(self.losses[layer, k]), k

        return sorted((k for k in range(1, len(candidates) + 1) if self._catalog.place(layer, k)[1] < 1.0), key=key)

    def _losses(self) -> Table:
        """Return per layer and index what is lost: the first of loss, squared error of output and of weight known."""
        layers = self._catalog.space.layers
        everything = [c.errors for layer in layers for c in layer.candidates]
        with_loss = all(e is not None and e.loss is not None for e in everything)
        with_output = all(e is not None and e.output is not None for e in everything)

        def loss(candidate: Candidate) -> float:
            errors = candidate.errors
            if errors is None:
                return math.inf
            if with_loss:
                return errors.loss or 0.0
            return (errors.output or 0.0) ** 2 if with_output else errors.weight**2

        return table([[0.0, *map(loss, layer.candidates)] for layer in layers])


def _least_errors(candidates: Sequence[Candidate]) -> list[float]:
    """Return per candidate the least error of the weight among the whitenings of the same format, rank and options."""
    least: dict[Choice, float] = {}

    def plain(choice: Choice) -> Choice:
        return Choice(choice.format, choice.rank, tuple(o for o in choice.options if o[0] not in _WHITENING))

    for c in candidates:
        if c.errors is not None:
            key = plain(c.choice)
            least[key] = min(least.get(key, math.inf), c.errors.weight)
    return [least.get(plain(c.choice), math.inf) for c in candidates]


class Vbmf(Strategy):
    """Every layer at its EVBMF ranks R − w (R − R_vbmf), for a series of weakenings w; R are the dense layer's ranks.

    Plain EVBMF (w = 1) comes first, then what lies around it on both sides. First all layers get the cheapest candidate
    of any format that holds their ranks (`Holding`), then the series is repeated for each format alone. A layer in
    which EVBMF finds nothing but noise, or for which no candidate holds enough, stays dense. With a budget, the weakest
    w that meets it comes first; where no w does, the harshest plan is changed at the least predicted loss until it
    does. Scores change nothing: all proposals can run at once.
    """

    name: ClassVar[str] = "vbmf"
    needs: ClassVar[frozenset[str]] = frozenset({"spectra", "errors"})
    allowed: ClassVar[Mapping[str, Option]] = {
        "step": Option(0.2, 0.02, 1.0, "step from one weakening to the next; 1 is plain EVBMF"),
        "harshest": Option(1.4, 1.0, _LIMIT, "largest weakening of the series"),
        "least": Option(4, 1, 4096, "rank below which no layer is brought, R_min"),
        "lines": Option(
            "both",
            help="the cheapest of all formats for every layer, one format for all layers, or both after each other",
            choices=("mixed", "single", "both"),
        ),
    }

    def _set_up(self) -> None:
        self._holding = Holding(self.catalog)
        self._budget = not self.catalog.feasible(self.catalog.dense_vector)
        self._plans = self._series()
        self._proposed = 0
        self._ended = ""

    def ask(self) -> Proposal | Wait | None:
        """Return the next plan of the series; None when it has come to its end."""
        for vector in self._plans:
            if self._is_new(vector):
                self._proposed += 1
                return self._propose(vector)
        self._ended = self._ended or self._end()
        return None

    def tell(self, proposal: Proposal, record: TrialRecord) -> None:
        """Remember that the plan is known; outcomes do not change the series."""
        vector = self.catalog.vector(proposal.plan)
        if vector is not None:
            self._claimed.add(vector)

    @property
    def ended(self) -> str:
        """That the series is over, or that it has no plan within the constraints."""
        return self._ended

    def _series(self) -> Iterator[Vector]:
        step, lines = self.options["step"], self.options["lines"]
        count = int(self.options["harshest"] / step + 1e-9)
        weakenings = {round(step * k, 6) for k in range(1, count + 1)} | {1.0}
        around = sorted(weakenings, key=lambda w: (abs(w - 1.0), w))
        forms = sorted({c.choice.format for layer in self.space.layers for c in layer.candidates})
        if lines != "single":
            met = self._weakest()
            yield from [met] if met is not None else []
            yield from (self._plan(w) for w in around)
            # A budget beyond the reach of EVBMF.
            if met is None and self._budget and (vector := self._cut(self._plan(_LIMIT))) is not None:
                yield vector
        if lines != "mixed":
            yield from (met for form in forms if (met := self._weakest(form)) is not None)
            yield from (self._plan(w, form) for w in around for form in forms)

    def _plan(self, weakening: float, form: str = "") -> Vector:
        """Return the cheapest plan that holds the ranks of a weakening."""
        holding, least = self._holding, self.options["least"]
        targets = [
            (weakened(full[0], found[0], weakening, least), weakened(full[1], found[1], weakening, least))
            for full, found in zip(holding.full, holding.found, strict=True)
        ]
        return tuple(holding.index(i, ranks, form) for i, ranks in enumerate(targets))

    def _weakest(self, form: str = "") -> Vector | None:
        """Return the plan of the weakest w that meets constraints which the dense model misses; None where none does.

        Ratios of several costs need not fall together, so that every hundredth is tried.
        """
        if not self._budget:
            return None
        plans = (self._plan(w / 100, form) for w in range(1, round(100 * _LIMIT) + 1))
        return next((vector for vector in plans if self.catalog.feasible(vector)), None)

    def _cut(self, vector: Vector) -> Vector | None:
        """Return the plan, brought within the constraints at the least predicted loss."""
        return Bounds(self.catalog).meet(vector, self._holding.losses)

    def _end(self) -> str:
        bounds = " and ".join(map(str, self.catalog.constraints))
        silent = sum(found == (0, 0) for found in self._holding.found)
        why = f"; it finds nothing to cut in {silent} of {len(self._holding.found)} layers" if silent else ""
        if self._proposed:
            return f"all {self._proposed} plans of the series of EVBMF ranks were proposed{why}"
        return f"EVBMF ranks lead to no new plan{f' within {bounds}' if bounds else ''}{why}"
