"""All about one trial: what it scores and costs, its layers, how to get it.

Ids: ``point`` (the whole), ``scores``, ``costs``, ``layers`` (tables), ``command`` and ``copy-command``, ``pin``,
``export-formats``, ``export`` (the button), ``export-state`` (how the export goes; the link to the file is
``download``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dash import dcc, html

from autorank.captions import clean, counted, plan_text
from autorank.exportdir import FORMATS
from autorank.layermap import rank_text
from autorank.types import Choice, FrontPoint, LayerResult, SweepHeader, TrialRecord

from . import drawings, exporting, parts
from .address import Address
from .parts import Part
from .picking import export_command

if TYPE_CHECKING:
    from .library import SweepView


def panel(view: SweepView, address: Address, number: int) -> Part:
    """Return what there is to know about a trial."""
    header, record = view.header, drawings.record_of(view, number)
    if header is None or record is None:
        return parts.card(html.P(f"There is no trial #{number} in this sweep."), id="point")
    point = view.point(number)
    tables = [_scores(view, header, record, point), _costs(header, record, point)]
    curve = [parts.card(html.H3("Fine-tune"), parts.graph("panel-figure", "figure low"))] if record.curve else []
    return html.Div(
        [
            html.Div(
                [
                    parts.card(
                        _title(view, address, record, point),
                        html.Div(tables, className="two"),
                    ),
                    parts.card(*_export(view, record, point), className="export"),
                ],
                className="column",
            ),
            html.Div([parts.card(*layers_table(record, point), className="layers"), *curve], className="column"),
        ],
        className="point",
        id="point",
    )


def _title(view: SweepView, address: Address, record: TrialRecord, point: FrontPoint | None) -> Part:
    pinned = address.pin == record.number
    best = view.recommended is not None and view.recommended.record.number == record.number
    remarks = ["recommended"] if best else []
    remarks += ["on the front"] if point else ["not on the front"]
    remarks += {"failed": ["failed"], "pruned": ["stopped early"]}.get(record.status, [])
    return html.Div(
        [
            html.H2(f"Point #{record.number}"),
            html.Span(" · ".join([*remarks, record.fidelity.label]), className="soft"),
            html.A(
                "Unpin" if pinned else "Pin for comparison",
                href=address.link(pin=None if pinned else record.number, point=record.number, tab="point"),
                id="pin",
                className="button small",
                title="Then choose another point: both are shown side by side",
            ),
            html.P(plan_text(record.plan), className="plan"),
            *([html.P(clean(record.reason, 400), className="trouble")] if record.reason else []),
        ],
        className="title",
    )


def _scores(view: SweepView, header: SweepHeader, record: TrialRecord, point: FrontPoint | None) -> Part:
    dense = view.contents.dense
    rows = [
        ("decomposed", header.dense.score, record.score_before),
        ("after batch norm", header.dense.score, record.score_bn),
        ("after recovery", header.dense.score, record.score),
        ("on test data", dense.test_score if dense else None, point.test_score if point else None),
    ]
    body = [
        html.Tr(
            [
                html.Th(name, scope="row"),
                parts.cell(parts.score(header, before)),
                parts.cell(parts.score(header, after)),
                parts.cell(parts.change(before, after)),
            ]
        )
        for name, before, after in rows
        if after is not None
    ]
    columns = ((clean(header.metric, 40), False), ("Dense", True), ("This point", True), ("Change", True))
    if not body:
        return html.P("It has no score.", className="soft", id="scores")
    return parts.table(columns, body, "Scores", id="scores")


def _costs(header: SweepHeader, record: TrialRecord, point: FrontPoint | None) -> Part:
    dense, cost = header.dense_cost, record.cost
    rows: list[tuple[str, str, str, float | None]] = []
    if cost is not None:
        rows = [
            ("MACs", counted(dense.macs), counted(cost.macs), record.kept.get("macs_kept")),
            ("Parameters", counted(dense.params), counted(cost.params), record.kept.get("params_kept")),
            ("Bytes", f"{counted(dense.bytes)}B", f"{counted(cost.bytes)}B", record.kept.get("bytes_kept")),
        ]
    if point is not None and point.latency_ms is not None:
        spread = f" ± {point.latency_spread_ms:.2g}" if point.latency_spread_ms else ""
        before = f"{dense.latency_ms:.3g} ms" if dense.latency_ms else "–"
        kept = point.latency_ms / dense.latency_ms if dense.latency_ms else None
        rows.append(("Latency", before, f"{point.latency_ms:.3g}{spread} ms", kept))
    elif (predicted := record.kept.get("latency_kept")) is not None:
        rows.append(("Latency, predicted", "–", "–", predicted))
    body = [
        html.Tr([html.Th(name, scope="row"), parts.cell(a), parts.cell(b), parts.cell(parts.ratio(kept))])
        for name, a, b, kept in rows
    ]
    if not body:
        return html.P("It has no costs.", className="soft", id="costs")
    return parts.table(
        (("Cost", False), ("Dense", True), ("This point", True), ("Ratio", True)), body, "Costs", id="costs"
    )


def _export(view: SweepView, record: TrialRecord, point: FrontPoint | None) -> list[Part]:
    title = html.H3("Take it")
    if point is None:
        return [title, html.P("Only points on the front keep their weights and can be exported.", className="soft")]
    return [
        title,
        html.Div(
            [
                html.Pre(export_command(view, record.number), id="command", className="command", tabIndex="0"),
                html.Button("Copy", id="copy-command", className="small", **parts.data(copy="command")),
            ],
            className="copyable",
        ),
        html.Div(
            [
                html.Fieldset(
                    [
                        html.Legend("Formats", className="unseen"),
                        dcc.Checklist(
                            id="export-formats",
                            options=list(FORMATS),
                            value=list(FORMATS),
                            inline=True,
                            persistence=True,
                            persistence_type="session",
                        ),
                    ]
                ),
                html.Button("Export and download", id="export", className="primary"),
            ],
            className="row",
        ),
        html.Div(id="export-state", **parts.aria(live="polite")),
        exporting.clock(),
    ]


_PLAN_COLUMNS = (("Layer", False), ("Format", False), ("Rank", False))
_LAYER_COLUMNS = (
    *_PLAN_COLUMNS,
    ("MACs", True),
    ("kept", True),
    ("Weight error", True),
    ("Output error", True),
    ("Sensitivity", True),
    ("Latency (ms)", True),
)


def layers_table(record: TrialRecord, point: FrontPoint | None) -> list[Part]:
    """Return a trial's layers as a table, those that got slower marked."""
    slower = set(point.slower_layers) if point else set()
    title = html.H3("Layers")
    if not record.layers:
        planned = [
            html.Tr([html.Th(clean(name, 80), scope="row"), *_choice(choice, None)])
            for name, choice in record.plan.layers
        ]
        if not planned:
            return [title, html.P("Every layer is dense.", className="soft", id="layers")]
        return [
            title,
            html.Div(parts.table(_PLAN_COLUMNS, planned, "Layers of the plan", id="layers"), className="scroll"),
        ]
    timed = any(layer.latency_ms is not None for layer in record.layers)
    columns = _LAYER_COLUMNS if timed else _LAYER_COLUMNS[:-1]
    note = [html.Span("⚠ slower than the dense layer on this machine", className="soft")] if slower else []
    return [
        html.Div([title, *note], className="title"),
        html.Div(
            parts.table(columns, [_layer(layer, slower, timed) for layer in record.layers], "Layers", id="layers"),
            className="scroll",
        ),
    ]


def _choice(choice: Choice, result: LayerResult | None) -> list[Part]:
    bits = f", {choice.weight_bits} bits" if choice.weight_bits else ""
    said = clean(choice, 300)
    return [
        html.Td(clean(choice.format, 40) + bits, title=said),
        html.Td(clean(rank_text(choice, result), 60), title=said),
    ]


def _layer(layer: LayerResult, slower: set[str], timed: bool) -> Part:
    late = layer.name in slower
    times = parts.number(layer.latency_ms)
    if layer.latency_ms is not None and layer.latency_dense_ms:
        times = f"{layer.latency_dense_ms:.3g} → {layer.latency_ms:.3g}"
    mark = [html.Span(" ⚠", title="slower than the dense layer"), parts.unseen("slower than dense")] if late else []
    return html.Tr(
        [
            html.Th([clean(layer.name, 80), *mark], scope="row", title=clean(layer.name, 300)),
            *_choice(layer.choice, layer),
            parts.cell(f"{counted(layer.macs_dense)} → {counted(layer.macs)}"),
            parts.cell(parts.ratio(layer.macs / layer.macs_dense if layer.macs_dense else None)),
            parts.cell(parts.number(layer.weight_error)),
            parts.cell(parts.number(layer.output_error)),
            parts.cell(parts.number(layer.sensitivity)),
            *([parts.cell(times)] if timed else []),
        ],
        className="late" if late else "",
    )
