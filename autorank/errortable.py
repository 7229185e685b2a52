"""What every candidate of every layer does to its layer, before any training: the table that predictions rest on.

All candidates are fitted through the cache in which trials look their fits up, so nothing is fitted twice. Where all
the fits would take too long, some ranks of the slowest formats are fitted and the errors of those between are
interpolated; which ones follows from sizes alone, never from a clock, so that the table is the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autorank import formats
from autorank.fitcache import FitCache
from autorank.fitestimate import DEFAULT_BUDGET_S, Family, families, thinned
from autorank.fitting import Unit, fit_ahead
from autorank.layout import canonical_weight
from autorank.measure import undisturbed
from autorank.progress import Reporter, Silent
from autorank.quanterrors import quantized_errors
from autorank.solvers.whitening import LayerStats
from autorank.space import Candidate, LayerCandidates
from autorank.types import DENSE, Choice, Errors
from autorank.types.decoding import decoded

Table = dict[tuple[str, Choice], Errors]

SPAWN_FROM_S = 10.0
"""Estimated seconds of fitting from which other processes, which take a few seconds to start, are worth it."""

TELL_FROM_S = 20.0
"""Estimated seconds from which a line says beforehand how long it will take."""

UNIT_S = 5.0
"""Fits that share work stay in one process together up to about this many estimated seconds."""

_FLOOR = 1e-12
_WHAT = "layer errors"


def candidate_errors(
    model: nn.Module,
    layers: Sequence[LayerCandidates],
    stats: Mapping[str, LayerStats] | None,
    cache_dir: Path | None,
    seed: int,
    reporter: Reporter | None = None,
    processes: int = 1,
    *,
    threads: int = 1,
    budget_s: float | None = DEFAULT_BUDGET_S,
) -> Table:
    """Return what each candidate of each layer does to its layer.

    Parameters
    ----------
    model : nn.Module
        The dense model, on the device where trials will fit; not changed.
    layers : sequence of LayerCandidates
    stats : mapping of str to LayerStats, optional
        By layer. Without a layer's statistics its candidates have weight errors only, and without gradients no losses.
    cache_dir : Path or None
        Directory of the `FitCache` of the trials; None keeps nothing and fits in this process.
    seed : int
        Of the plans that the trials will apply.
    reporter : Reporter, optional
        Is told how long it will take, and how far it is.
    processes : int
        How many fit at a time on a CPU; on another device this process fits alone.
    threads : int
        PyTorch threads of each: those of a trial.
    budget_s : float or None
        Estimated seconds per process beyond which errors are interpolated; None fits everything.

    Returns
    -------
    dict from (layer name, Choice) to Errors

    Raises
    ------
    FormatError
        A weight cannot be decomposed.
    """
    reporter, given = reporter or Silent(), stats or {}
    modules = dict(model.named_modules())
    weights: dict[str, Tensor] = {}
    for layer in layers:
        weight = modules[layer.spec.name].weight
        assert isinstance(weight, Tensor)
        weights[layer.spec.name] = canonical_weight(weight.detach(), layer.spec)
    ranked = [family for layer in layers for family in families(_without_bits(layer))]
    share = max(1, processes)
    chosen = ranked if budget_s is None else thinned(ranked, budget_s * share)
    total = sum(len(family.candidates) for family in chosen)
    cache = FitCache(cache_dir)
    units = [
        left for family in chosen for unit in _units(family) if (left := _missing(unit, cache, weights, given, seed))
    ]
    own = [unit for unit in units if _travels(unit, weights)]
    seconds = sum(unit.seconds for unit in units)
    spawns = cache_dir is not None and share > 1 and sum(unit.seconds for unit in own) >= SPAWN_FROM_S
    fits = sum(len(unit.choices) for unit in units)
    _announce(
        reporter, seconds / (share if spawns else 1), fits, sum(len(family.candidates) for family in ranked) - total
    )

    reporter.step(_WHAT, 0, total)
    found = ahead = total - fits
    if spawns:
        assert cache_dir is not None
        ahead += fit_ahead(
            own,
            weights,
            given,
            cache_dir,
            seed,
            processes=share,
            threads=threads,
            progress=lambda made: reporter.step(_WHAT, min(found + made, total - 1), total),
        )
    table, done = Table(), 0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for family in chosen:
            spec = family.spec
            for candidate in family.candidates:
                choice = candidate.choice
                with undisturbed():
                    _, info = cache.get_or_fit(
                        formats.get(choice.format), weights[spec.name], spec, choice, given.get(spec.name), seed
                    )
                table[spec.name, choice] = Errors(
                    info["weight_error"], info["output_error"], info["loss_increase"], info["sensitivity"]
                )
                done += 1
                if done > ahead:
                    reporter.step(_WHAT, min(done, total - 1), total)
    finally:
        torch.set_num_threads(before)
    for family, fitted in zip(ranked, chosen, strict=True):
        table |= interpolated(family, fitted, table)
    made = {(family.spec.name, candidate.choice) for family in chosen for candidate in family.candidates}
    for family in (family for layer in layers for family in families(layer)):
        table |= _with_bits(family, made, weights[family.spec.name], given.get(family.spec.name), cache, seed)
    reporter.step(_WHAT, total, total)
    # In the order of the space.
    return {(layer.spec.name, c.choice): table[layer.spec.name, c.choice] for layer in layers for c in layer.candidates}


def _without_bits(layer: LayerCandidates) -> LayerCandidates:
    """Return the layer with every candidate once, in floating point: bits change nothing in a fit."""
    plain = {c.choice.in_float: c.cost for c in layer.candidates if c.choice.format != DENSE}
    return replace(layer, candidates=tuple(Candidate(choice, cost) for choice, cost in plain.items()))


def _with_bits(
    family: Family,
    made: Container[tuple[str, Choice]],
    weight: Tensor,
    stats: LayerStats | None,
    cache: FitCache,
    seed: int,
) -> Table:
    """Return the errors of a family with bits; nothing for one without."""
    found: Table = {}
    if family.candidates[0].choice.weight_bits is None:
        return found
    known = []
    for candidate in family.candidates:
        choice = candidate.choice
        plain = choice.in_float
        if choice.format != DENSE and (family.spec.name, plain) not in made:
            continue
        known.append(candidate)
        factors = None
        with undisturbed():
            if choice.format != DENSE:
                fmt = formats.get(choice.format)
                factors, _ = cache.get_or_fit(fmt, weight, family.spec, plain, stats, seed)
            found[family.spec.name, choice] = quantized_errors(weight, family.spec, choice, factors, stats)
    return found | interpolated(family, Family(family.spec, tuple(known)), found)


def _travels(unit: Unit, weights: Mapping[str, Tensor]) -> bool:
    """Say whether another process can make these fits: not of a format that only this one knows, nor on its GPU."""
    shipped = type(formats.get(unit.choices[0].format)).__module__.startswith("autorank.formats.")
    return shipped and weights[unit.spec.name].device.type == "cpu"


def _units(family: Family) -> list[Unit]:
    """Split a family into what is worth keeping together."""
    choices = tuple(candidate.choice for candidate in family.candidates)
    if family.seconds <= UNIT_S or formats.get(choices[0].format).nested:
        return [Unit(family.spec, choices, family.seconds)]
    return [Unit(family.spec, (c.choice,), s) for c, s in zip(family.candidates, family.each, strict=True)]


def _missing(
    unit: Unit, cache: FitCache, weights: Mapping[str, Tensor], stats: Mapping[str, LayerStats], seed: int
) -> Unit | None:
    """Return what of a unit is still to be fitted; None when nothing is."""
    spec, fmt = unit.spec, formats.get(unit.choices[0].format)
    left = tuple(
        choice
        for choice in unit.choices
        if not cache.holds(fmt, weights[spec.name], spec, choice, stats.get(spec.name), seed)
    )
    if not left:
        return None
    return Unit(spec, left, unit.seconds * (1 if fmt.nested else len(left) / len(unit.choices)))


def _announce(reporter: Reporter, seconds: float, fits: int, rest: int) -> None:
    if seconds < TELL_FROM_S:
        return
    minutes = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{10 * round(seconds / 10)} s"
    more = f"; the errors of {rest} more are interpolated" if rest else ""
    reporter.say(f"layer errors: {fits} fits, which the trials will use again, may take about {minutes}{more}")


def interpolated(family: Family, fitted: Family, table: Mapping[tuple[str, Choice], Errors]) -> Table:
    """Return the errors of the candidates of a family that were not fitted, from those that were.

    Logarithms of the errors are interpolated linearly in the cost between the nearest neighbours; beyond the ends the
    nearest one's errors hold.
    """
    name = family.spec.name
    known = {candidate.choice for candidate in fitted.candidates}
    knots = [(_position(candidate), table[name, candidate.choice]) for candidate in fitted.candidates]
    found = Table()
    for candidate in family.candidates:
        if candidate.choice not in known:
            found[name, candidate.choice] = _between(_position(candidate), knots)
    return found


def _position(candidate: Candidate) -> float:
    return float(max(candidate.cost.macs, candidate.cost.params, 1))


def _between(at: float, knots: Sequence[tuple[float, Errors]]) -> Errors:
    below = max((knot for knot in knots if knot[0] <= at), key=lambda knot: knot[0], default=knots[0])
    above = min((knot for knot in knots if knot[0] >= at), key=lambda knot: knot[0], default=knots[-1])
    span = above[0] - below[0]
    share = min(max((at - below[0]) / span, 0.0), 1.0) if span > 0 else 0.0

    def mixed(low: float | None, high: float | None) -> float | None:
        if low is None or high is None:
            return None
        if not share:
            return low
        ends = math.log(max(low, _FLOOR)), math.log(max(high, _FLOOR))
        return math.exp((1 - share) * ends[0] + share * ends[1])

    low, high = below[1], above[1]
    weight = mixed(low.weight, high.weight)
    assert weight is not None
    return Errors(
        weight, mixed(low.output, high.output), mixed(low.loss, high.loss), mixed(low.sensitivity, high.sensitivity)
    )


def to_json(table: Mapping[tuple[str, Choice], Errors]) -> list[dict[str, Any]]:
    """Return a table as plain lists and dictionaries."""
    return [{"layer": name, "choice": choice.to_json(), **asdict(errors)} for (name, choice), errors in table.items()]


def from_json(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rebuild a table from `to_json`; KeyError, TypeError or ValueError say what is wrong."""
    return {
        (str(row["layer"]), Choice.from_json(row["choice"])): decoded(
            Errors, {key: value for key, value in row.items() if key not in ("layer", "choice")}
        )
        for row in rows
    }
