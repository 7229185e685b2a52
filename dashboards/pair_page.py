"""Two side by side: two points of a sweep, or two sweeps.

Ids: ``pair-head``, ``pair-body`` with ``panel-figure`` (the fronts of both) for sweeps; ``point-pair`` for points;
in both ``pair-figures`` and ``pair-differences`` (tables).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dash import html

from autorank.captions import clean

from . import drawings, pair_figure, parts
from .address import Address
from .comparison import Comparison, Row, compare_points, compare_sweeps
from .parts import Part
from .sections import Section, Sections, place, seen, token

if TYPE_CHECKING:
    from .library import SweepView
    from .server import Sources


def page(sources: Sources, address: Address, _dark: bool) -> Part:
    """Return the page of two sweeps."""
    found = sections(sources, address)
    if not found:
        return parts.gone("One of these sweeps is not there (any more).")
    return [
        place(found, "pair-head"),
        parts.card(parts.graph("panel-figure", "figure")),
        place(found, "pair-body"),
        seen("pair", found),
    ]


def sections(sources: Sources, address: Address) -> Sections:
    """Return the parts of the page that change; none when one of the sweeps is gone."""
    one, two = sources.library.get(address.sweep), sources.library.get(address.other)
    if one is None or two is None:
        return {}
    shows = token(one.key, one.version, two.key, two.version)
    return {
        "pair-head": Section(shows, lambda: _head(one, two)),
        "pair-body": Section(shows, lambda: _tables(compare_sweeps(one, two), "Setting", "settings")),
    }


def figure(sources: Sources, address: Address) -> drawings.Drawing | None:
    """Return the figure with the fronts of both; None when one of them is gone."""
    one, two = sources.library.get(address.sweep), sources.library.get(address.other)
    return pair_figure.fronts(one, two) if one is not None and two is not None else None


def points_panel(view: SweepView, address: Address, number: int, pin: int) -> Part:
    """Return two points beside each other."""
    found = compare_points(view, number, view, pin)
    if found is None:
        return parts.card(html.P("One of these points is not in this sweep."), id="point-pair")
    bar = html.Div(
        [
            html.A("Swap", href=address.link(point=pin, pin=number), className="button small", id="swap"),
            html.A(f"Unpin #{pin}", href=address.link(pin=None, tab="point"), className="button small", id="unpin"),
        ],
        className="row",
    )
    return html.Div([bar, *_tables(found, "Layer", "layers"), *_curves(view, number, pin)], id="point-pair")


def _curves(view: SweepView, number: int, pin: int) -> list[Part]:
    records = [drawings.record_of(view, n) for n in (number, pin)]
    if not any(record and record.curve for record in records):
        return []
    return [parts.card(html.H3("Fine-tune"), parts.graph("panel-figure", "figure low"))]


def _head(one: SweepView, two: SweepView) -> Part:
    names = [
        html.Span(
            [
                html.Span(sign, className="key", style={"color": colour}, **parts.aria(hidden="true")),
                html.A(clean(view.name, 100), href=Address(view.key).link(), title=clean(view.name, 300)),
                parts.chip(view.state),
            ],
            className="one",
        )
        for view, (colour, sign) in zip((one, two), pair_figure.LOOKS, strict=True)
    ]
    return [html.H1("Two sweeps compared"), html.Div(names, className="row pair-names")]


def _tables(found: Comparison, what: str, plural: str) -> list[Part]:
    note = [html.P(clean(found.note, 300), className="note-line")] if found.note else []
    same = f"{found.equal} {plural} are the same." if found.equal else f"No {plural} are the same."
    differing: list[Part] = [html.P(f"Nothing differs: {same}", className="soft")]
    if found.differences:
        differing = [_table(what, found.names, found.differences, "pair-differences"), html.P(same, className="soft")]
    figures = _table("", found.names, found.figures, "pair-figures")
    return [
        *note,
        html.Div(
            [
                parts.card(html.H2("Key figures"), html.Div(figures, className="scroll")),
                parts.card(html.H2(f"Differing {plural}"), html.Div(differing, className="scroll")),
            ],
            className="halves",
        ),
    ]


def _table(what: str, names: Sequence[str], rows: Sequence[Row], name: str) -> Part:
    columns = ((what, False), *((clean(side, 60), False) for side in names))
    body = [
        html.Tr([html.Th(clean(row.name, 80), scope="row"), *(_value(row, side) for side in (0, 1))]) for row in rows
    ]
    return parts.table(columns, body, "Side by side", id=name, className="pair")


def _value(row: Row, side: int) -> Part:
    if row.better != side:
        return html.Td(row.values[side])
    return html.Td([row.values[side], html.Span(" ◂", title="better"), parts.unseen(" (better)")], className="better")
