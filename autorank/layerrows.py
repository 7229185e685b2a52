"""What became of each layer in one point, worked out once for both kinds of table; nothing is drawn here."""

from __future__ import annotations

from dataclasses import dataclass

from autorank.captions import clean, plan_text, unit_of, value_name
from autorank.layermap import layer_names, rank_text
from autorank.types import FrontPoint, LayerResult, SweepHeader, TrialRecord


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its heading with the unit, the words that explain it, and whether it holds numbers."""

    heading: str
    explained: str = ""
    number: bool = True


@dataclass(frozen=True, slots=True)
class Entry:
    """What stands in one place of a table: the text, the number by which it is sorted, and whether to flag it."""

    text: str
    value: float | None = None
    flagged: bool = False


@dataclass(frozen=True, slots=True)
class LayerTable:
    """The layers of a point in the order of the network, and the sum of their costs.

    Attributes
    ----------
    title, subtitle, note : str
    columns : tuple of Column
    rows : tuple of tuple of Entry
    total : tuple of Entry
    """

    title: str
    subtitle: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Entry, ...], ...]
    total: tuple[Entry, ...]


_COLUMNS = (
    Column("layer", number=False),
    Column("format", number=False),
    Column("rank", "of the full rank of the format, where it is known", number=False),
    Column("MACs before", "multiply-accumulates of the dense layer for one example"),
    Column("MACs after", "multiply-accumulates of the decomposed layer for one example"),
    Column("MACs kept", "after ÷ before"),
    Column("parameters kept", "compressed ÷ dense"),
    Column("weight error", "relative, Frobenius norm"),
    Column("output error", "relative root-mean-square error of the layer's output"),
    Column("sensitivity", "expected squared error of the weight under noise of variance one on the factors"),
)
_TIMES = (
    Column("before (ms)", "measured time of the dense layer alone"),
    Column("after (ms)", "measured time of the decomposed layer alone"),
    Column("time kept", "after ÷ before; the layers that are slower than they were say so"),
)


def layer_rows(header: SweepHeader, point: TrialRecord | FrontPoint) -> LayerTable:
    """Work out the table of a point's layers; layers left dense are in it, with the cost that they keep."""
    record = point.record if isinstance(point, FrontPoint) else point
    results = {layer.name: layer for layer in record.layers}
    choices = record.plan.choices
    dense = {str(layer.get("name")): layer for layer in header.layers}
    # The front's own list leaves out what two timings of one layer differ by.
    slower = set(
        point.slower_layers
        if isinstance(point, FrontPoint)
        else (
            layer.name
            for layer in record.layers
            if layer.latency_ms is not None and layer.latency_ms > (layer.latency_dense_ms or layer.latency_ms)
        )
    )
    timed = any(layer.latency_ms is not None for layer in record.layers)
    rows, macs, params, spent = [], [0, 0], [0, 0], [0.0, 0.0]
    for name in layer_names(header, [record]):
        found, choice = results.get(name), choices.get(name)
        plain = dense.get(name, {})
        before = found.macs_dense if found else int(plain.get("macs", 0))
        size = found.params_dense if found else int(plain.get("params", 0))
        known = found is not None or choice is None
        row = [Entry(clean(name, 60)), Entry(clean(choice.called, 40) if choice else "dense")]
        row.append(Entry(rank_text(choice, found) if choice else "–"))
        after, left = (found.macs, found.params) if found else (before, size)
        row += [_count(before), _count(after if known else None), _ratio(after if known else None, before)]
        row += [_ratio(left if known else None, size), *_errors(found)]
        if timed:
            row += _times(found, name in slower)
        elif name in slower:
            row[0] = Entry(f"{row[0].text} (slower)", flagged=True)
        rows.append(tuple(row))
        macs, params = [macs[0] + before, macs[1] + after], [params[0] + size, params[1] + left]
        if found and found.latency_ms is not None and found.latency_dense_ms is not None:
            spent = [spent[0] + found.latency_dense_ms, spent[1] + found.latency_ms]
    total = [Entry("all of these"), Entry(""), Entry(""), _count(macs[0]), _count(macs[1]), _ratio(macs[1], macs[0])]
    total += [_ratio(params[1], params[0]), Entry(""), Entry(""), Entry("")]
    total += [_number(spent[0]), _number(spent[1]), _ratio(spent[1], spent[0])] if timed else []
    return LayerTable(
        f"layers of trial {record.number}",
        _subtitle(header, record),
        "" if timed else "latency of single layers was not measured",
        (*_COLUMNS, *_TIMES) if timed else _COLUMNS,
        tuple(rows),
        tuple(total),
    )


def _subtitle(header: SweepHeader, record: TrialRecord) -> str:
    parts = [clean(header.sweep_id, 60), plan_text(record.plan)]
    if record.score is not None:
        parts.append(f"{value_name(header, 'score')} {record.score:.4g} {unit_of(header)}".rstrip())
    if (macs := record.value("macs_kept")) is not None:
        parts.append(f"MACs kept {macs:.3f}")
    return " · ".join(parts)


def _errors(found: LayerResult | None) -> list[Entry]:
    if found is None:
        return [Entry("–")] * 3
    return [_number(found.weight_error), _number(found.output_error), _number(found.sensitivity)]


def _times(found: LayerResult | None, slower: bool) -> list[Entry]:
    before, after = (found.latency_dense_ms, found.latency_ms) if found else (None, None)
    ratio = _ratio(after, before)
    if slower:
        ratio = Entry(f"{ratio.text} slower", ratio.value, flagged=True)
    return [_number(before), _number(after), ratio]


def _count(value: int | None) -> Entry:
    return Entry(f"{value:,}", float(value)) if value else Entry("–")


def _ratio(part: float | None, whole: float | None) -> Entry:
    return Entry("–") if part is None or not whole else Entry(f"{part / whole:.3f}", part / whole)


def _number(value: float | None) -> Entry:
    if value is None:
        return Entry("–")
    return Entry(f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}", value)
