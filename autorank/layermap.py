"""What each layer keeps along the front, worked out once for both kinds of picture; nothing is drawn here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autorank.captions import clean, cost_label, plan_text, unit_of, value_name
from autorank.scene import records_of
from autorank.types import Choice, FrontPoint, LayerResult, SweepHeader, TrialRecord

RANK_LABEL = "rank kept (rank ÷ full rank)"
PARAMS_LABEL = "parameters kept (compressed ÷ dense)"

_WRITTEN = 14
"""Up to so many columns the values are written into the cells."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One layer of one member: the share that it keeps (None where nobody knows), what to write there, plain lines."""

    kept: float | None
    text: str
    hover: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LayerMap:
    """Layers in the order of the network (rows) by members of the front from cheap to dear (columns).

    Attributes
    ----------
    title, subtitle, note, label : str
        `label` says what the colours mean.
    layers : tuple of str
        On one line each; two may be equal when their names are very long.
    numbers : tuple of int
        Numbers of the members' trials.
    rows : tuple of tuple of Cell
    """

    title: str
    subtitle: str
    note: str
    label: str
    layers: tuple[str, ...]
    numbers: tuple[int, ...]
    rows: tuple[tuple[Cell, ...], ...]


def layer_names(header: SweepHeader, records: Sequence[TrialRecord]) -> tuple[str, ...]:
    """Return the decomposable layers in the order of the network, then any others that the records' plans name."""
    known = [str(layer["name"]) for layer in header.layers if "name" in layer]
    return tuple(dict.fromkeys([*known, *(name for record in records for name, _ in record.plan.layers)]))


def rank_text(choice: Choice, result: LayerResult | None) -> str:
    """Return a rank, with the full one where it is known: ``8×4 of 16×16``."""
    rank = "×".join(map(str, choice.rank))
    full = result.full_rank if result else None
    return f"{rank} of {'×'.join(map(str, full))}" if full else rank


def layer_map(header: SweepHeader, front: Sequence[TrialRecord | FrontPoint]) -> LayerMap:
    """Work out what the rank map shows.

    Parameters
    ----------
    header : SweepHeader
    front : sequence of TrialRecord or FrontPoint

    Returns
    -------
    LayerMap
        With the rank kept of every layer, or, when a member of the front is of a version that did not report full
        ranks, the share of parameters kept; 1 for a layer left dense.
    """
    cost = next((o.name for o in header.objectives if o.name != "score"), "macs_kept")

    def costs(record: TrialRecord) -> tuple[float, int]:
        value = record.value(cost)
        return (value if value is not None and math.isfinite(value) else math.inf, record.number)

    members = sorted(records_of(front), key=costs)
    names = layer_names(header, members)
    results = [{layer.name: layer for layer in record.layers} for record in members]
    ranked = all(layer.rank_kept is not None for found in results for layer in found.values())
    rows = tuple(
        tuple(
            _cell(header, record, name, found.get(name), ranked, len(members) <= _WRITTEN)
            for record, found in zip(members, results, strict=True)
        )
        for name in names
    )
    dots = any(cell.text == "•" for row in rows for cell in row)
    unknown = any(cell.kept is None for row in rows for cell in row)
    notes = [
        "• left dense" if dots else "",
        "" if ranked else "full ranks are not in this journal",
        "empty: not reported" if unknown else "",
    ]
    return LayerMap(
        "what each layer keeps along the front",
        f"{clean(header.sweep_id, 60)} · {len(members)} on the front, in order of {cost_label(cost)}",
        " · ".join(text for text in notes if text),
        RANK_LABEL if ranked else PARAMS_LABEL,
        tuple(clean(name, 60) for name in names),
        tuple(record.number for record in members),
        rows,
    )


def _cell(
    header: SweepHeader, record: TrialRecord, name: str, result: LayerResult | None, ranked: bool, written: bool
) -> Cell:
    choice = record.plan.choices.get(name)
    member = [f"#{record.number}", plan_text(record.plan)]
    if record.score is not None:
        member.append(f"{value_name(header, 'score')} {record.score:.4g} {unit_of(header)}".rstrip())
    if (macs := record.value("macs_kept")) is not None:
        member.append(f"MACs kept {macs:.3f}")
    lines = [clean(name), " · ".join(member)]
    if choice is None:
        return Cell(1.0, "dense" if written else "•", (*lines, "left dense"))
    lines.append(f"{clean(choice.called, 40)}, rank {rank_text(choice, result)}")
    if result is None:
        return Cell(None, "", tuple(lines))
    params = result.params / max(result.params_dense, 1)
    if result.rank_kept is not None:
        lines.append(f"rank kept {result.rank_kept:.3f}")
    lines.append(f"MACs kept {result.macs / max(result.macs_dense, 1):.3f}, parameters kept {params:.3f}")
    lines.append(f"weight error {result.weight_error:.3g}")
    if result.output_error is not None:
        lines.append(f"output error {result.output_error:.3g}")
    kept = result.rank_kept if ranked else params
    return Cell(kept, f"{kept:.2f}" if written and kept is not None else "", tuple(lines))
