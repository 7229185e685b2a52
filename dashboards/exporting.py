"""Exporting a point from its page: start it, follow it, fetch the file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dash import Dash, Input, Output, State, dcc, html
from dash.exceptions import PreventUpdate

from autorank.captions import clean, counted
from autorank.errors import AutorankError, ConfigError

from .address import Address
from .choosing import chosen
from .parts import Part

if TYPE_CHECKING:
    from .jobs import Export
    from .server import Sources

_LINES = 6


def store() -> Part:
    """Return where the pages remember exports: sweep and point → token."""
    return dcc.Store(id="exports", data={})


def clock() -> Part:
    """Return what asks how an export goes, while one does."""
    return dcc.Interval(id="export-tick", interval=700, disabled=True)


def register(app: Dash, sources: Sources) -> None:
    """Connect the controls of an export."""

    @app.callback(
        Output("exports", "data"),
        Input("export", "n_clicks"),
        State("url", "search"),
        State("export-formats", "value"),
        State("exports", "data"),
        prevent_initial_call=True,
    )
    def start(clicks: int | None, search: str | None, formats: list[str] | None, known: dict[str, str] | None) -> Any:
        name = _name(sources, search)
        view = sources.library.get(Address.of(search).sweep)
        if not clicks or name is None or view is None:
            raise PreventUpdate
        try:
            if not formats:
                raise ConfigError("choose at least one format")
            found = sources.exports.start(view, int(name.rpartition("/")[2]), tuple(formats))
        except AutorankError as error:
            return {**(known or {}), name: f"!{error}"}
        return {**(known or {}), name: found}

    @app.callback(
        Output("export-state", "children"),
        Output("export-tick", "disabled"),
        Output("export", "disabled"),
        Input("exports", "data"),
        Input("export-tick", "n_intervals"),
        State("url", "search"),
    )
    def follow(known: dict[str, str] | None, _ticks: int | None, search: str | None) -> Any:
        found = (known or {}).get(_name(sources, search) or "")
        if not found:
            return [], True, False
        if found.startswith("!"):
            return html.P(["Not exported: ", clean(found[1:], 300)], className="trouble"), True, False
        export = sources.exports.status(found)
        running = export is not None and export.state == "running"
        return state(export, f"{app.config.requests_pathname_prefix}archive/{found}"), not running, running


def _name(sources: Sources, search: str | None) -> str | None:
    """Return under which name the page remembers the export of the point that is looked at."""
    address = Address.of(search)
    view = sources.library.get(address.sweep)
    number = chosen(view, address).number if view else None
    return None if number is None else f"{address.sweep}/{number}"


def state(export: Export | None, link: str) -> Part:
    """Return how an export goes, in words."""
    if export is None:
        return html.P("This export is no longer kept; start it again.", className="soft")
    if export.state == "failed":
        return html.P(["Not exported: ", clean(export.problem, 300)], className="trouble")
    lines = [clean(line, 200) for line in export.lines if line.strip()][-_LINES:]
    said = html.Pre("\n".join(lines), className="log") if lines else ""
    if export.state == "running":
        return [html.P("Exporting; every file is loaded back and compared …"), said]
    size = f"{counted(export.bytes)}B" if export.bytes else ""
    return [
        html.P(
            [
                html.A(f"Download {clean(export.name, 100)}", href=link, id="download", className="button primary"),
                f" {size}",
            ]
        ),
        said,
    ]
