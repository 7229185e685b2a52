"""The dashboard's pages as one Dash application.

What is looked at stands in the address alone (`Address`). The browser asks once a second, with one small request, for a
text that differs when anything it shows has changed; only then, or when the address changes, are the parts made that
show something else.

Ids of what is on every page: ``url``, ``main``, ``theme`` (the switch), ``help-open``, ``help``, ``offline`` (says so
while the server does not answer), ``said`` (announcements). The modules `listing`, `sweep_page`, `point_page`,
`pair_page` name theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flask
from dash import ALL, ClientsideFunction, Dash, Input, Output, State, dcc, html, no_update
from dash.exceptions import PreventUpdate

from . import drawings, exporting, listing, pair_page, panels, parts, sweep_page
from .address import Address
from .choosing import chosen
from .parts import Part
from .sections import changed, token

if TYPE_CHECKING:
    from .server import Sources

_PAGES = {"list": listing, "sweep": sweep_page, "pair": pair_page}
_SECTIONS = {
    "list": ("notes", "sweeps"),
    "sweep": ("sweep-head", "axes", "filters", "choose", "answer", "members", "tabs", "panel"),
    "pair": ("pair-head", "pair-body"),
}
_INDEX = """<!DOCTYPE html>
<html lang="en">
<head>
{%metas%}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{%title%}</title>
{%favicon%}
{%css%}
</head>
<body>
{%app_entry%}
<footer>
{%config%}
{%scripts%}
{%renderer%}
</footer>
</body>
</html>
"""
_LOGO = html.Span("◢", className="logo", **parts.aria(hidden="true"))
_KEYS = (
    ("j, k", "next and previous point of the front (also the arrow keys in its table)"),
    ("/", "filter the sweeps by name"),
    ("p", "pin the point, or let it go"),
    ("c", "copy the export command"),
    ("t", "theme: the system's, light, dark"),
    ("l", "list of all sweeps"),
    ("?", "this help"),
    ("Esc", "close"),
)


def make_dash(sources: Sources, prefix: str) -> Dash:
    """Return the application.

    Parameters
    ----------
    sources : Sources
    prefix : str
        Path under which its server is mounted, with slashes around.
    """
    app = Dash(
        __name__,
        assets_folder="assets",
        requests_pathname_prefix=prefix,
        routes_pathname_prefix="/",
        serve_locally=True,
        suppress_callback_exceptions=True,
        update_title="",
        title="autorank",
        add_log_handler=False,
        index_string=_INDEX,
    )
    app.enable_dev_tools(debug=False, dev_tools_disable_version_check=True)
    app.layout = _shell(sources)
    _register(app, sources)
    exporting.register(app, sources)
    _register_browser(app)

    @app.server.route("/fresh")
    def fresh() -> flask.Response:
        response = flask.jsonify(
            {"fresh": freshness(sources, Address.of(flask.request.query_string.decode("ascii", "replace")))}
        )
        response.headers["Cache-Control"] = "no-store"
        return response

    return app


def freshness(sources: Sources, address: Address) -> str:
    """Return a text that differs when something that the address shows has changed."""
    if address.page == "list":
        return token(sources.library.version, sources.library.problems(), sources.runs.problem)
    views = [sources.library.get(key) for key in (address.sweep, address.other) if key]
    links = [sources.runs.page(v.contents.header.sweep_id) if v and v.contents.header else None for v in views]
    return token([v and (v.key, v.version) for v in views], links)


def page(sources: Sources, address: Address) -> Part:
    """Return the whole page that an address asks for."""
    made: Part = _PAGES[address.page].page(sources, address)
    return made


def title(sources: Sources, address: Address) -> str:
    """Return the title of the page."""
    views = [sources.library.get(key) for key in (address.sweep, address.other) if key]
    names = [view.name if view else "no such sweep" for view in views]
    return " · ".join([*([" and ".join(names)] if names else []), "autorank"])


def _shell(sources: Sources) -> Part:
    keys = [html.Div([html.Dt(html.Kbd(key)), html.Dd(text)]) for key, text in _KEYS]
    return html.Div(
        [
            dcc.Location(id="url", refresh=False),
            dcc.Interval(id="tick", interval=1000),
            dcc.Store(id="shown"),
            dcc.Store(id="title"),
            dcc.Store(id="fresh"),
            dcc.Store(id="dark"),
            dcc.Store(id="selected"),
            exporting.store(),
            html.A("Skip to the content", href="#main", className="skip", id="skip"),
            html.Header(
                [
                    html.A(
                        [html.Span("◢", className="logo", **parts.aria(hidden="true")), "autorank"], href="?", id="home"
                    ),
                    html.Span("", id="offline", className="offline", role="status"),
                    html.Nav(
                        [
                            html.A("Sweeps", href="?", id="go-list"),
                            html.A("MLflow ↗", href=sources.runs.home, id="go-mlflow", target="_blank", rel="noopener"),
                            html.Button("Theme: system", id="theme", className="plain"),
                            html.Button(
                                "?", id="help-open", className="plain", **parts.aria(label="Keyboard shortcuts")
                            ),
                        ],
                        **parts.aria(label="Pages"),
                    ),
                ],
                className="top",
            ),
            html.Main(id="main", tabIndex="-1"),
            html.Div("", id="said", className="unseen", **parts.aria(live="polite")),
            html.Dialog(
                [
                    html.H2("Keyboard"),
                    html.Dl(keys, className="keys"),
                    html.Button("Close", id="help-close", className="small"),
                ],
                id="help",
                **parts.aria(label="Keyboard shortcuts"),
            ),
        ]
    )


def _register(app: Dash, sources: Sources) -> None:
    """Connect what the server answers."""

    @app.callback(
        Output("main", "children"),
        Output("shown", "data"),
        Output("title", "data"),
        Input("url", "search"),
        Input("fresh", "data"),
        State("shown", "data"),
    )
    def route(search: str | None, _fresh: str | None, before: list[Any] | None) -> Any:
        address = Address.of(search)
        # A sweep that appears or goes away makes another page of the same address.
        there = [sources.library.get(key) is not None for key in (address.sweep, address.other) if key]
        now = [address.identity, there]
        named = title(sources, address)
        if before is not None and before[:2] == now:
            return (
                no_update,
                no_update if before[2] == named else [*now, named],
                no_update if before[2] == named else named,
            )
        return page(sources, address), [*now, named], named

    for name, module in _PAGES.items():
        more = (Input("filter", "value"),) if name == "list" else ()
        _register_sections(app, sources, name, module, more)

    @app.callback(
        Output("front-base", "data"),
        Output("front-shows", "data"),
        Input("fresh", "data"),
        Input("url", "search"),
        Input("dark", "data"),
        State("front-shows", "data"),
    )
    def front(_fresh: str | None, search: str | None, dark: bool | None, before: str | None) -> Any:
        address = Address.of(search)
        view = sources.library.get(address.sweep)
        if view is None or address.page != "sweep" or dark is None:
            raise PreventUpdate
        axes = drawings.axes_of(view, address)
        shows = token(view.key, view.version, axes, address.hide, address.skip, dark)
        if shows == before:
            raise PreventUpdate
        figure = drawings.front_figure(view, axes, address.hide, address.skip)
        return drawings.shown(figure, dark, token(view.key, axes)), shows

    @app.callback(
        Output("panel-figure", "figure"),
        Output("panel-figure-shows", "data"),
        Input("fresh", "data"),
        Input("url", "search"),
        Input("dark", "data"),
        State("panel-figure-shows", "data"),
    )
    def panel_figure(_fresh: str | None, search: str | None, dark: bool | None, before: str | None) -> Any:
        address = Address.of(search)
        if address.page == "list" or dark is None:
            raise PreventUpdate
        found = (
            panels.figure(sources.library.get(address.sweep), address)
            if address.page == "sweep"
            else pair_page.figure(sources, address)
        )
        if found is None or (shows := token(found.shows, dark)) == before:
            raise PreventUpdate
        return drawings.shown(found.draw(), dark, found.stays), shows

    @app.callback(Output("selected", "data"), Input("url", "search"), Input("fresh", "data"), State("selected", "data"))
    def selected(search: str | None, _fresh: str | None, before: Any) -> Any:
        address = Address.of(search)
        view = sources.library.get(address.sweep)
        now = [chosen(view, address).number if view else None, address.pin]
        return no_update if now == before else now


def _register_sections(app: Dash, sources: Sources, name: str, module: Any, more: tuple[Input, ...]) -> None:
    @app.callback(
        *(Output(section, "children") for section in _SECTIONS[name]),
        Output(f"seen-{name}", "data"),
        Input("fresh", "data"),
        Input("url", "search"),
        *more,
        State(f"seen-{name}", "data"),
        State("shown", "data"),
        prevent_initial_call=True,
    )
    def refresh(_fresh: str | None, search: str | None, *rest: Any) -> Any:
        *extra, before, shown = rest
        address = Address.of(search)
        if not shown or shown[0] != address.identity:
            raise PreventUpdate  # another page is on its way
        sections = module.sections(sources, address, *extra)
        if set(sections) != set(_SECTIONS[name]):
            raise PreventUpdate
        news, now = changed({section: sections[section] for section in _SECTIONS[name]}, before)
        if now is no_update:
            raise PreventUpdate
        return *news, now


def _register_browser(app: Dash) -> None:
    """Connect what the browser does by itself, see ``assets/autorank.js``."""

    def browser(name: str, *arguments: Any, first: bool = False) -> None:
        app.clientside_callback(ClientsideFunction("autorank", name), *arguments, prevent_initial_call=not first)

    browser(
        "poll",
        Output("fresh", "data"),
        Input("tick", "n_intervals"),
        Input("url", "search"),
        State("fresh", "data"),
        first=True,
    )
    browser("name", Input("title", "data"))
    browser("theme", Output("dark", "data"), Output("theme", "children"), Input("theme", "n_clicks"), first=True)
    browser("front", Output("front", "figure"), Input("front-base", "data"), Input("selected", "data"), first=True)
    browser("take", Input("front", "clickData"))
    browser("take_column", Input("panel-figure", "clickData"))
    browser("axes", Input("axis-x", "value"), Input("axis-y", "value"), State("usual-axes", "data"))
    browser(
        "filters",
        Input("show-groups", "value"),
        Input("show-kinds", "value"),
        State("show-groups", "options"),
        State("show-kinds", "options"),
    )
    browser("want", Input("want", "value"), Input("amount", "value"), State("usual-amounts", "data"))
    browser(
        "marks",
        Output("compare", "disabled"),
        Output("compare", "children"),
        Input({"type": "mark", "key": ALL}, "value"),
        first=True,
    )
    browser("compare", Input("compare", "n_clicks"), State({"type": "mark", "key": ALL}, "value"))
