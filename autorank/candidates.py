"""From the settings that a search-space file gives a layer to its candidates: formats, options, ranks, costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from autorank.errors import SpaceError, did_you_mean
from autorank.spacefile import Defaults, FormatEntry, Grid, Ranks, SpaceFile
from autorank.types import DENSE, Choice, LayerCost, LayerSpec, Scalar, bit_operations

if TYPE_CHECKING:
    from autorank.formats.base import Format
    from autorank.quant.size import LayerSize

Options = tuple[tuple[str, Scalar], ...]
Bits = tuple[int | None, int | None]
"""Of weights and of activations."""

BUILTIN = {
    "ranks": Ranks(macs_kept=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
    "whiten": ["input"],
    "multiple_of": 1,
    "max_candidates": 16,
    "weight_bits": ["none"],
    "activation_bits": ["none"],
}
"""What holds where a file says nothing."""


@dataclass(frozen=True, slots=True)
class LayerSettings:
    """What the file says about one layer, with the place in the file that said it.

    Attributes
    ----------
    formats : tuple of FormatEntry
    formats_at : int
        Place of the list of formats: -1 for the defaults, else the position of the rule.
    general : dict
        Setting → (place, value); place -2 stands for what is built in.
    named : str
        The last rule that gives this layer formats by its full name, as a key path; empty when none does.
    """

    formats: tuple[FormatEntry, ...]
    formats_at: int
    general: dict[str, tuple[int, Any]]
    named: str = ""

    @classmethod
    def of(cls, file: SpaceFile, spec: LayerSpec, rules: Sequence[int]) -> LayerSettings:
        """Lay the defaults and the matching rules over each other; what comes later wins, key by key."""
        general: dict[str, tuple[int, Any]] = {key: (-2, value) for key, value in BUILTIN.items()}
        formats: tuple[FormatEntry, ...] = ()
        formats_at, named = -2, ""
        layers: list[tuple[int, Defaults]] = [(-1, file.defaults), *((i, file.rules[i]) for i in rules)]
        for place, settings in layers:
            for key in BUILTIN:
                if getattr(settings, key) is not None:
                    general[key] = (place, getattr(settings, key))
            if settings.formats is not None:
                formats, formats_at = tuple(settings.formats), place
                full_name = place >= 0 and spec.name in (file.rules[place].match.name or ())
                named = f"rules[{place}]" if full_name else ""
        return cls(formats, formats_at, general, named)

    def value(self, entry: FormatEntry, key: str) -> tuple[Any, str]:
        """Return a format's setting and the key path that set it: its own, unless a later rule sets it for all."""
        place, value = self.general[key]
        own = getattr(entry, key)
        if own is not None and self.formats_at >= place:
            return own, f"{_at(self.formats_at)}.formats[{self.formats.index(entry)}].{key}"
        return value, f"{_at(place)}.{key}"


def _at(place: int) -> str:
    return f"rules[{place}]" if place >= 0 else "defaults"


@dataclass(frozen=True, slots=True)
class Found:
    """What a layer can become.

    Attributes
    ----------
    candidates : dict
        Every candidate that saves MACs, parameters or bits, with its cost.
    reasons : tuple of str
        Why formats, or some of their options, gave none.
    refused : bool
        No format takes the layer at all, whatever the rank.
    """

    candidates: dict[Choice, LayerCost]
    reasons: tuple[str, ...]
    refused: bool


def candidates_of(file: SpaceFile, spec: LayerSpec, settings: LayerSettings) -> Found:
    """Return the candidates of a layer, or why it has none.

    Raises
    ------
    SpaceError
        A format has no such option, option value or mode.
    """
    from autorank import formats

    if not settings.formats:
        return Found({}, ("neither the defaults nor a rule gives it a format",), False)
    found: dict[Choice, LayerCost] = {}
    reasons: list[str] = []
    refused_all = True
    for entry in settings.formats:
        fmt = formats.get(entry.name)
        where = f"{file.source}: {_at(settings.formats_at)}.formats[{settings.formats.index(entry)}]"
        refused = fmt.supports(spec)
        if refused is not None:
            reasons.append(f"{entry.name} refuses it ({refused})")
            continue
        sets = list(_option_sets(fmt, spec, entry, settings, where))
        if not sets:
            reasons.append(f"{entry.name} offers none of the options or whitenings asked for")
        for options in sets:
            refused = fmt.supports(spec, options)
            if refused is not None:
                reasons.append(f"{entry.name}{_shown(options)} refuses it ({refused})")
                continue
            refused_all = False
            costs = _with_ranks(fmt, spec, entry, settings, options, file.source)
            useful = {choice: c for choice, c in costs.items() if c.macs < spec.macs or c.params < spec.params}
            if not useful:
                reasons.append(f"{entry.name}{_shown(options)} has no rank that saves MACs or parameters")
            bits = _bits(entry, settings)
            found.update(
                (written, cost)
                for choice, cost in _thinned(useful, entry, settings).items()
                for written, cost in with_bits(spec, choice, cost, bits)
            )
    bits = [pair for pair in _bits(FormatEntry(name=settings.formats[0].name), settings) if pair[0] is not None]
    found.update(with_bits(spec, Choice(DENSE, ()), LayerCost(spec.macs, spec.params), bits))
    return Found(found, tuple(dict.fromkeys(reasons)), refused_all)


def _bits(entry: FormatEntry, settings: LayerSettings) -> list[Bits]:
    """Return the numbers of bits that go together: activations have bits only where weights have."""
    weights, activations = (
        [None if bits == "none" else bits for bits in settings.value(entry, key)[0]]
        for key in ("weight_bits", "activation_bits")
    )
    quantized = [(w, a) for w in weights for a in activations if w is not None]
    return ([(None, None)] if None in weights else []) + quantized


def with_bits(spec: LayerSpec, choice: Choice, cost: LayerCost, bits: Sequence[Bits]) -> list[tuple[Choice, LayerCost]]:
    """Return a choice without bits once for each of `bits` that its layer can have, with what it costs then."""
    found = [(choice, cost)] if (None, None) in bits else []
    wanted = [pair for pair in bits if pair[0] is not None]
    size = layer_size(spec, choice) if wanted else None
    for weight, activation in wanted if size is not None else ():
        assert weight is not None
        assert size is not None
        kept = replace(cost, bytes=size.bytes(weight, activation), bops=bit_operations(cost.macs, weight, activation))
        found.append((replace(choice, weight_bits=weight, activation_bits=activation), kept))
    return found


def layer_size(spec: LayerSpec, choice: Choice) -> LayerSize:
    """Return the sizes of a layer's factors, or of its kernel where it keeps that."""
    import torch

    from autorank import formats
    from autorank.measure import dense_layer
    from autorank.quant.size import LayerSize

    with torch.device("meta"):
        if choice.format == DENSE:
            return LayerSize.of(dense_layer(spec))
        layer = formats.get(choice.format).layer(spec, choice.rank, choice.options)
    return LayerSize.of(layer.to(getattr(torch, spec.dtype)))


def _shown(options: Options) -> str:
    return f" ({', '.join(f'{key}={value}' for key, value in options)})" if options else ""


def _option_sets(
    fmt: Format, spec: LayerSpec, entry: FormatEntry, settings: LayerSettings, where: str
) -> Iterator[Options]:
    """Yield the option sets of a format that the file allows, whitening included."""
    wanted = dict(entry.options)
    shrinks = wanted.pop("shrink", [])
    for shrink in shrinks:
        if isinstance(shrink, bool | str) or not 0 <= shrink <= 1:
            raise SpaceError(f"{where}.shrink: {shrink!r} is not a number from 0 to 1")
    offered = dict.fromkeys([key for variant in fmt.variants(spec) for key, _ in variant] + [*fmt.free_options(spec)])
    for key, values in wanted.items():
        if key not in offered:
            allowed = [*FormatEntry.model_fields, "shrink", *offered]
            raise SpaceError(
                f"{where}: {fmt.name} has no setting or option {key!r} for layer {spec.name!r} ({spec.kind})"
                f"{did_you_mean(key, allowed)}; allowed are {', '.join(allowed)}"
            )
        for value in values:
            wrong = fmt.wrong_value(spec, key, value)
            if wrong is not None:
                raise SpaceError(f"{where}.{key}: {fmt.name} has no {key}={value}; {wrong}")
    whitens, _ = settings.value(entry, "whiten")
    for variant in fmt.option_sets(spec, wanted):
        for whiten in whitens:
            if whiten not in fmt.whitenings(spec, variant):
                continue
            if whiten == "none":
                yield tuple(sorted(variant))
                continue
            shrunk: list[Options] = [(("shrink", float(shrink)),) for shrink in shrinks] or [()]
            for extra in shrunk:
                yield tuple(sorted([*variant, ("whiten", whiten), *extra]))


def _with_ranks(
    fmt: Format, spec: LayerSpec, entry: FormatEntry, settings: LayerSettings, options: Options, source: str
) -> dict[Choice, LayerCost]:
    """Return the candidates of one format with one option set."""
    ranks, where = settings.value(entry, "ranks")
    multiple, _ = settings.value(entry, "multiple_of")
    largest = fmt.max_rank(spec, options)
    rows: Sequence[tuple[int, ...]]
    if ranks.macs_kept is not None:
        rows = _ranks_by_macs(largest, ranks.macs_kept, spec, lambda rank: fmt.cost(spec, rank, options))
    else:
        grids = _grids(fmt, ranks, f"{source}: {where}")
        columns = [_counts(grid, limit) for grid, limit in zip(grids, largest, strict=True)]
        # A shared grid pairs its entries; the same length for every mode, as rounding comes later.
        rows = list(zip(*columns, strict=True)) if _pairs(ranks) else list(itertools.product(*columns))
    rounded = dict.fromkeys(
        tuple(_rounded(rank, limit, multiple) for rank, limit in zip(row, largest, strict=True)) for row in rows
    )
    return {Choice(fmt.name, rank, options): fmt.cost(spec, rank, options) for rank in rounded}


def _pairs(ranks: Ranks) -> bool:
    return ranks.modes is None and ranks.combine == "equal"


def _grids(fmt: Format, ranks: Ranks, where: str) -> list[Grid]:
    if ranks.modes is None:
        return [Grid(fractions=ranks.fractions, counts=ranks.counts)] * len(fmt.rank_names)
    if set(ranks.modes) != set(fmt.rank_names):
        raise SpaceError(
            f"{where}.modes: {fmt.name} has the modes {', '.join(fmt.rank_names)}, not {', '.join(ranks.modes)}; "
            f"give {fmt.name} ranks of its own under formats"
        )
    return [ranks.modes[name] for name in fmt.rank_names]


def _counts(grid: Grid, limit: int) -> list[int]:
    """Return one mode's ranks as counts, neither rounded to multiples nor clipped."""
    if grid.counts is not None:
        return list(grid.counts)
    return [max(1, round(fraction * limit)) for fraction in grid.fractions or ()]


def _rounded(rank: int, limit: int, multiple: int) -> int:
    """Return the multiple nearest to `rank` that is within the limit; the limit itself when no multiple is."""
    if limit < multiple:
        return limit
    return min(max(multiple, math.floor(rank / multiple + 0.5) * multiple), limit // multiple * multiple)


def _ranks_by_macs(
    largest: tuple[int, ...], shares: Sequence[float], spec: LayerSpec, cost: Callable[[tuple[int, ...]], LayerCost]
) -> list[tuple[int, ...]]:
    """Return, for each share of the dense MACs, the rank along the diagonal whose MACs come nearest to it.

    The diagonal runs through (1, ..., 1) and the largest rank, all modes in proportion to their largest.
    """
    longest = max(largest)

    def at(step: int) -> tuple[int, ...]:
        return tuple(max(1, round(step * limit / longest)) for limit in largest)

    @cache
    def macs(step: int) -> int:
        return cost(at(step)).macs

    ranks = []
    for share in shares:
        target, low, high = share * spec.macs, 1, longest
        while low < high:  # the first step beyond the target; costs grow along the diagonal
            middle = (low + high) // 2
            if macs(middle) < target:
                low = middle + 1
            else:
                high = middle
        ranks.append(at(min((max(low - 1, 1), low), key=lambda step: (abs(macs(step) - target), step))))
    return ranks


def _thinned(
    candidates: dict[Choice, LayerCost], entry: FormatEntry, settings: LayerSettings
) -> dict[Choice, LayerCost]:
    """Keep at most ``max_candidates``, spread evenly along the MACs from the cheapest to the dearest."""
    limit, _ = settings.value(entry, "max_candidates")
    if len(candidates) <= limit:
        return candidates
    left = sorted(candidates.items(), key=lambda item: (item[1].macs, item[1].params, item[0].rank))
    low, high = left[0][1].macs, left[-1][1].macs
    kept: dict[Choice, LayerCost] = {}
    for i in range(limit):
        target = low + (high - low) * (i / (limit - 1) if limit > 1 else 0.5)
        choice, cost = min(left, key=lambda item: abs(item[1].macs - target))
        kept[choice] = cost
        left.remove((choice, cost))
    return kept
