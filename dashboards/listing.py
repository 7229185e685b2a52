"""The page with all sweeps.

Ids: ``filter`` (by name), ``sweeps`` (the table), ``row-KEY`` (a sweep), ``mark-KEY`` (its box), ``compare`` (the
button for the two that are ticked), ``notes`` (what cannot be read), ``no-sweeps`` (what to do when there is none).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dash import dcc, html

from autorank.captions import clean
from autorank.following import SweepState
from autorank.types import FrontPoint

from . import parts
from .address import Address
from .parts import Part
from .plain import plain
from .sections import Section, Sections, place, seen, token

if TYPE_CHECKING:
    from .library import SweepView
    from .server import Sources

_COLUMNS = (
    ("Sweep", False),
    ("State", False),
    ("Trials", False),
    ("Dense model", True),
    ("Recommended", True),
    ("MACs kept", True),
    ("On the front", True),
    ("Started", False),
)
_COMMAND = "autorank demo"


def page(sources: Sources, address: Address, _dark: bool) -> Part:
    """Return the whole page."""
    found = sections(sources, address)
    return [
        html.Div(
            [
                html.H1("Sweeps"),
                html.Div(
                    [
                        html.Label("Filter by name", htmlFor="filter"),
                        dcc.Input(
                            id="filter",
                            type="search",
                            value="",
                            autoComplete="off",
                            persistence=True,
                            persistence_type="session",
                        ),
                        html.Button(
                            "Compare two",
                            id="compare",
                            disabled=True,
                            title="Tick two sweeps in the table to compare them",
                        ),
                    ],
                    className="tools",
                ),
            ],
            className="head row",
        ),
        place(found, "notes", role="status"),
        place(found, "sweeps"),
        seen("list", found),
    ]


def sections(sources: Sources, address: Address, wanted: str = "") -> Sections:
    """Return the parts of the page that change; `wanted` is what names must hold."""
    views = sources.library.sweeps()
    problems = tuple(line for line in (*sources.library.problems(), sources.runs.problem) if line)
    wanted = (wanted or "").strip().lower()
    shown = [view for view in views if wanted in view.name.lower()]
    return {
        "notes": Section(token(problems), lambda: _notes(problems)),
        "sweeps": Section(
            token(wanted, bool(views), [view.key for view in shown]),
            lambda: _table(shown) if shown else _nothing(bool(views)),
        ),
        **{
            f"row-{view.key}": Section(token(view.version), lambda view=view: _cells(view), "sweeps")  # type: ignore[misc]
            for view in shown
        },
    }


def _notes(problems: Sequence[str]) -> Part:
    if not problems:
        return []
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return html.P(clean(problems[0], 300) + more, className="note-line", title=clean("; ".join(problems), 2000))


def _nothing(any_at_all: bool) -> Part:
    if any_at_all:
        return html.P("No sweep has such a name.", className="empty small")
    return html.Div(
        [
            html.H2("No sweep yet"),
            html.P(["Start one, and it appears here by itself:"]),
            html.Pre(_COMMAND, className="command", id="empty-command"),
            html.P(["For a model and data of your own: ", html.Code("autorank search --help"), "."], className="soft"),
        ],
        className="empty",
        id="no-sweeps",
    )


def _table(views: Sequence[SweepView]) -> Part:
    columns = (("", False), *_COLUMNS)
    return html.Div(
        parts.table(columns, [_row(view) for view in views], "All sweeps, newest first", live=True, className="list"),
        className="card scroll",
    )


def _row(view: SweepView) -> Part:
    return html.Tr(_cells(view), id=f"row-{view.key}")


def _cells(view: SweepView) -> Part:
    state, header, best = view.state, view.contents.header, view.recommended
    named = clean(view.name, 120)
    mark = html.Button(
        id=f"mark-{view.key}",
        role="checkbox",
        className="box",
        **parts.aria(checked="false", label=f"compare {named}"),
        **parts.data(mark=view.key),
    )
    link = html.A(named, href=Address(view.key).link(), title=clean(view.name, 300))
    trouble = html.Div(clean(view.problem, 300), className="trouble small", title=clean(view.problem, 400))
    cells = [
        html.Td(mark if header else "", className="mark"),
        html.Th([link, trouble] if view.problem else link, scope="row"),
        html.Td(parts.chip(state)),
        html.Td(
            [parts.bar(state), html.Span(_tally(state), className="tally")] if header else "", className="progress"
        ),
        parts.cell(parts.score(header, header.dense.score) if header else ""),
        parts.cell(_recommended(view, best)),
        parts.cell(parts.ratio(best.record.kept.get("macs_kept")) if best else ""),
        parts.cell(str(len(view.points)) if header else ""),
        html.Td(parts.when(header.created) if header else "", className="when"),
    ]
    return plain(cells)


def _tally(state: SweepState) -> str:
    left = parts.left(state)
    return f"{state.done} / {state.total}" + (f", {left} left" if left else "")


def _recommended(view: SweepView, best: FrontPoint | None) -> str:
    header = view.contents.header
    if best is None or header is None:
        return ""
    return f"{parts.score(header, best.record.score)} ({parts.change(header.dense.score, best.record.score)})"
