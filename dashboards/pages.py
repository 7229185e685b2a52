"""The dashboard's pages as one Dash application.

What is looked at stands in the address alone (`Address`). The browser asks once a second, and when the address changes,
with one small request whether anything looks different (`standing`); only then are the parts made that do.

Ids of what is on every page: ``url``, ``main``, ``theme`` (the switch), ``help-open``, ``help``, ``offline`` (says so
while the server does not answer), ``said`` (announcements). The modules `listing`, `sweep_page`, `point_page`,
`pair_page` name theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flask
from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html, no_update, set_props
from dash.exceptions import PreventUpdate

from . import drawings, exporting, parts
from .address import Address
from .parts import Part
from .sections import changed, shown
from .standing import PAGES, panel_figure, standing

if TYPE_CHECKING:
    from .server import Sources

_SECTIONS = {
    "list": ("notes", "sweeps"),
    "sweep": ("sweep-head", "axes", "filters", "choose", "measure", "answer", "members", "tabs", "panel"),
    "pair": ("pair-head", "pair-body"),
}
_TOLD = ("place", "title", "fresh", "front-shows", "panel-shows", "selected")
"""Where the browser keeps what it was told last, see `standing`."""

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

    @app.server.route("/standing")
    def answer() -> flask.Response:
        address = Address.of(flask.request.query_string.decode("ascii", "replace"))
        response = flask.jsonify(standing(sources, address))
        response.headers["Cache-Control"] = "no-store"
        return response

    return app


def page(sources: Sources, address: Address, dark: bool = False) -> Part:
    """Return the whole page that an address asks for."""
    made: Part = PAGES[address.page].page(sources, address, dark)
    return made


def _shell(sources: Sources) -> Part:
    keys = [html.Div([html.Dt(html.Kbd(key)), html.Dd(text)]) for key, text in _KEYS]
    return html.Div(
        [
            dcc.Location(id="url", refresh=False),
            dcc.Interval(id="tick", interval=1000),
            *(dcc.Store(id=name) for name in (*_TOLD, "shown", "dark", "front-known")),
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
        Input("place", "data"),
        State("url", "search"),
        State("dark", "data"),
        prevent_initial_call=True,
    )
    def route(_place: str | None, search: str | None, dark: bool | None) -> Any:
        address = Address.of(search)
        return page(sources, address, bool(dark)), address.identity

    for name, module in PAGES.items():
        more = (Input("filter", "value"),) if name == "list" else ()
        _register_sections(app, sources, name, module, more)

    @app.callback(
        Output("front-base", "data"),
        Input("front-shows", "data"),
        Input("dark", "data"),
        State("url", "search"),
        State("front-known", "data"),
        prevent_initial_call=True,  # the page brings the first one
    )
    def front(_shows: str | None, dark: bool | None, search: str | None, known: Any) -> Any:
        address = Address.of(search)
        view = sources.library.get(address.sweep)
        if view is None or address.page != "sweep" or dark is None:
            raise PreventUpdate
        return drawings.front(view, address, dark, known)

    @app.callback(
        Output("panel-figure", "figure"), Input("panel-shows", "data"), Input("dark", "data"), State("url", "search")
    )
    def panel(_shows: str | None, dark: bool | None, search: str | None) -> Any:
        drawing = panel_figure(sources, Address.of(search))
        if drawing is None or dark is None:
            raise PreventUpdate
        return drawings.shown(drawing.draw(), dark, drawing.stays)


def _register_sections(app: Dash, sources: Sources, name: str, module: Any, more: tuple[Input, ...]) -> None:
    @app.callback(
        *(Output(section, "children") for section in _SECTIONS[name]),
        Output(f"seen-{name}", "data"),
        Input("fresh", "data"),
        *more,
        State("url", "search"),
        State(f"seen-{name}", "data"),
        State("shown", "data"),
        prevent_initial_call=True,
    )
    def refresh(_fresh: str | None, *rest: Any) -> Any:
        *extra, search, before, identity = rest
        address = Address.of(search)
        if identity != address.identity:
            raise PreventUpdate  # another page is on its way
        sections = module.sections(sources, address, *extra)
        if not set(_SECTIONS[name]) <= set(sections):
            raise PreventUpdate  # the sweep is gone
        news = changed(sections, before)
        if not news:
            raise PreventUpdate
        for piece in set(news) - set(_SECTIONS[name]):
            set_props(piece, {"children": news[piece]})
        return *(news.get(section, no_update) for section in _SECTIONS[name]), shown(sections)


def _register_browser(app: Dash) -> None:
    """Connect what the browser does by itself, see ``assets/autorank.js``."""

    def browser(name: str, *arguments: Any, first: bool = False) -> None:
        app.clientside_callback(ClientsideFunction("autorank", name), *arguments, prevent_initial_call=not first)

    browser("poll", Input("tick", "n_intervals"), Input("url", "search"), first=True)
    browser("name", Input("title", "data"))
    browser("theme", Output("dark", "data"), Output("theme", "children"), Input("theme", "n_clicks"), first=True)
    browser("front", Output("front", "figure"), Input("front-base", "data"), Input("selected", "data"), first=True)
    browser("members", Input("selected", "data"))
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
