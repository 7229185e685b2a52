"""The small pieces of which all pages are made. Names come in as children of elements: as text, never as HTML."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from dash import dcc, html

from autorank.captions import clean, unit_of
from autorank.following import SweepState
from autorank.front import score_text
from autorank.progress import duration
from autorank.types import SweepHeader

from .plain import plain

Part = Any
"""A Dash component, a text, or a list of them."""

STAGES = {
    "preparing": ("preparing", "The dense model is measured and candidates are fitted; trials come after that."),
    "reading": ("reading", "Its journal is still being read."),
    "running": ("running", "Trials are going on."),
    "ended": ("ended", "It ended by itself."),
    "stopped": ("stopped", "No process works on it, and it did not say why it ended."),
}
"""State of a sweep → the word, and what it means."""


def aria(**values: str) -> dict[str, Any]:
    """Return attributes for those who do not see the page, to be given with two stars."""
    return {f"aria-{name}": value for name, value in values.items()}


def data(**values: str) -> dict[str, Any]:
    """Return attributes for our own script, to be given with two stars."""
    return {f"data-{name}": value for name, value in values.items()}


def chip(state: SweepState) -> Part:
    """Return the state of a sweep: a word with a sign of its own shape."""
    word, meaning = STAGES[state.stage]
    return html.Span(word, className=f"chip {state.stage}", title=clean(state.reason, 300) or meaning)


def bar(state: SweepState) -> Part:
    """Return how many of the trials are done, as a bar."""
    total = max(state.total, 1)
    return html.Progress(value=str(state.done), max=str(total), **aria(label=f"{state.done} of {state.total} trials"))


def left(state: SweepState) -> str:
    """Return the time left in words; empty where nobody knows."""
    if state.stage != "running" or state.seconds_left is None or state.done >= state.total:
        return ""
    return f"about {duration(state.seconds_left)}"


def when(seconds: float) -> str:
    """Return a time in this machine's time zone."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return ""


def points_word(header: SweepHeader) -> str:
    """Return what differences of the score are counted in."""
    return "points" if unit_of(header) == "%" else unit_of(header) or f"of {clean(header.metric, 30)}"


def score(header: SweepHeader, value: float | None) -> str:
    """Return a score with its unit."""
    return "–" if value is None else f"{score_text(value)} {unit_of(header)}".rstrip()


def change(dense: float | None, value: float | None) -> str:
    """Return the difference to the dense score with its sign."""
    if dense is None or value is None:
        return ""
    text = f"{abs(value - dense):.2f}" if abs(dense) >= 10 else f"{abs(value - dense):.3g}"
    return "±0" if float(text) == 0 else f"{'+' if value > dense else '−'}{text}"


def ratio(value: float | None) -> str:
    """Return a ratio to the dense model."""
    return "–" if value is None else f"{value:.3f}"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many digits."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.{digits}g}"


def fact(label: str, *value: Part, note: Part = "", **more: Any) -> Part:
    """Return one of the figures at the head of a page: what it is, its value, and a remark."""
    said = [html.Dt(label), html.Dd(list(value), className="value")]
    return html.Div(said + ([html.Dd(note, className="note")] if note else []), className="fact", **more)


def table(
    columns: Sequence[tuple[str, bool]], rows: Sequence[Part], caption: str = "", live: bool = False, **more: Any
) -> Part:
    """Return a table; a column is its heading and whether it holds numbers, a row a `html.Tr`.

    Callbacks can name what is in it only if it is `live`.
    """
    head = html.Tr([html.Th(name, scope="col", className="number" if numeric else "") for name, numeric in columns])
    named = [html.Caption(caption, className="unseen")] if caption else []
    made = html.Table([*named, html.Thead(head), html.Tbody(list(rows))], **more)
    return made if live else plain(made)


def cell(value: Part, numeric: bool = True, **more: Any) -> Part:
    """Return a cell of a table."""
    return html.Td(value, **{**more, "className": f"{'number ' if numeric else ''}{more.get('className', '')}".strip()})


def card(*children: Part, **more: Any) -> Part:
    """Return a part of a page with a border of its own."""
    return html.Section(list(children), **{**more, "className": f"card {more.get('className', '')}".strip()})


_CONFIG: Any = {
    "displaylogo": False,
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "modeBarButtonsToRemove": ["lasso2d", "select2d", "autoScale2d"],
    "toImageButtonOptions": {"scale": 2},
}
_HIDDEN = {"visible": False}
_CLEAR = "rgba(0,0,0,0)"
_BLANK: Any = {
    "data": [],
    "layout": {"xaxis": _HIDDEN, "yaxis": _HIDDEN, "paper_bgcolor": _CLEAR, "plot_bgcolor": _CLEAR},
}


def graph(name: str, classes: str) -> Part:
    """Return the place of the figure `name`."""
    drawn = dcc.Graph(id=name, config=_CONFIG, responsive=True, figure=_BLANK, style={"height": "100%"})
    return html.Div(drawn, className=classes)


def gone(what: str) -> Part:
    """Return the page of something that is not there."""
    return html.Div(
        [html.H1(what), html.P(html.A("Back to all sweeps", href="?", id="back-to-list"))], className="empty", id="gone"
    )


def unseen(text: str) -> Part:
    """Return text for those who listen to the page."""
    return html.Span(text, className="unseen")
