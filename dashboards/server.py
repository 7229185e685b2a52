"""The one process that serves MLflow and the dashboard on one port."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import uvicorn

from autorank.errors import ConfigError
from autorank.mlflow_ui import default_store, is_server
from autorank.privacy import public

from . import drawings, mlflow_app
from .jobs import Exports
from .library import Library

if TYPE_CHECKING:
    from dash import Dash

PREFIX = "/dashboard/"
PORT = 5000
_TRIED = 50  # ports after the first that are looked at when the user named none


@dataclass(frozen=True)
class Sources:
    """What the pages show.

    Attributes
    ----------
    library : Library
    exports : Exports
    runs : Runs
        Links to MLflow.
    """

    library: Library
    exports: Exports
    runs: mlflow_app.Runs


def store_of(places: Sequence[Path]) -> str:
    """Return the MLflow store of sweeps that were run without an address: beside them, or in the one sweep itself."""
    from autorank.journal import FILE_NAME

    first = Path(places[0])
    return default_store(first if (first / FILE_NAME).exists() else first / "sweep")


def application(sources: Sources, uri: str) -> Any:
    """Return the whole as one ASGI application: the dashboard under `PREFIX`, MLflow under everything else."""
    from a2wsgi import WSGIMiddleware
    from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
    from starlette.routing import Mount, Route

    from .pages import make_dash

    app = mlflow_app.application(uri, PREFIX)
    dash = make_dash(sources, PREFIX)
    guard(dash)

    async def enter(request: Any) -> RedirectResponse:
        return RedirectResponse(PREFIX)

    async def archive(request: Any) -> Response:
        """Send the file of an export; not from a thread of Dash's server, which a slow download would hold for good."""
        path = sources.exports.archive(request.path_params["token"])
        if path is None:
            return PlainTextResponse("there is no such file", 404)
        return FileResponse(path, 200, {"X-Content-Type-Options": "nosniff"}, "application/zip", filename=path.name)

    pages: Any = WSGIMiddleware(dash.server)
    ours = PREFIX.rstrip("/")
    routes = [Route(f"{ours}/archive/{{token}}", archive), Mount(ours, pages), Route(ours, enter)]
    if is_server(uri):
        routes.append(Route("/", enter))
    app.router.routes[:0] = routes  # MLflow's own routes end in one that takes everything
    return app


def guard(dash: Dash) -> None:
    """Let pages run no script but our own, and take no request that another site's page sends."""
    import flask
    from dash.exceptions import DependencyException

    server = dash.server
    policy = "; ".join(
        [
            "default-src 'none'",
            "script-src 'self' " + " ".join(f"'{value}'" if "'" not in value else value for value in dash.csp_hashes()),
            "style-src 'self' 'unsafe-inline'",  # React and plotly.js set styles
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'self'",
        ]
    )

    @server.before_request
    def same_origin() -> tuple[str, int] | None:
        origin = flask.request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != flask.request.host:
            return "another site's page may not ask for this", 403
        return None

    @server.errorhandler(DependencyException)
    def no_such_file(_error: DependencyException) -> tuple[str, int]:
        return "there is no such file", 404

    @server.after_request
    def restrict(response: flask.Response) -> flask.Response:
        response.headers["Content-Security-Policy"] = policy
        response.headers["Referrer-Policy"] = "no-referrer"
        return response


def is_loopback(host: str) -> bool:
    """Say whether only programs of this machine reach a server that listens on `host`."""
    return host in ("localhost", "::1") or host.startswith("127.")


def _listen(host: str, port: int | None) -> socket.socket:
    """Open the port, or without one the first free port from `PORT` on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    wanted = range(PORT, PORT + _TRIED) if port is None else [port]
    for number in wanted:
        opened = socket.socket(family, socket.SOCK_STREAM)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind((host, number))
            opened.listen(128)
        except OSError as error:
            opened.close()
            if number == wanted[-1]:
                raise ConfigError(
                    f"cannot listen on {host}:{number}: {error.strerror or error}; give another --port or --host"
                ) from None
        else:
            return opened
    raise AssertionError("there is at least one port to try")


def serve(
    places: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    tracking_uri: str | None = None,
    browse: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the dashboard and MLflow until the process is stopped.

    Parameters
    ----------
    places : sequence of Path
        Sweep directories, or directories of sweeps; need not exist yet.
    host : str
        Address to listen on.
    port : int, optional
        By default the first free one from 5000 on.
    tracking_uri : str, optional
        MLflow database or server; by default the database beside the sweeps.
    browse : bool
        Open the browser.
    say : callable
        Gets a line at a time.

    Raises
    ------
    ConfigError
        The port cannot be had.
    """
    uri = tracking_uri or store_of(places)
    with ExitStack() as stack:
        listener = stack.enter_context(_listen(host, port))
        number = listener.getsockname()[1]
        named = f"[{host}]" if ":" in host else "localhost" if is_loopback(host) or host == "0.0.0.0" else host
        if not is_loopback(host):
            say(f"note: everyone who reaches {host}:{number} can read the sweeps and MLflow, and export models")
        mlflow_app.set_up(uri, () if is_loopback(host) else _hosts(host, number))
        library = Library(places)
        library.start()
        stack.callback(library.close)
        exports = Exports()
        stack.callback(exports.close)
        runs = mlflow_app.Runs(uri)
        stack.callback(runs.close)
        app = application(Sources(library, exports, runs), uri)
        stack.callback(drawings.aside.close)
        runs.start()
        address = f"http://{named}:{number}"
        logging.getLogger("uvicorn.error").addFilter(_unless_cancelled)
        settings = uvicorn.Config(app, log_level="error", access_log=False, lifespan="on", timeout_graceful_shutdown=2)
        server = _Announcing(settings, lambda: _announce(address, uri, places, browse, say))
        # What ends it is sent again when all is closed; it must not keep the exports from being ended.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def _hosts(host: str, port: int) -> list[str]:
    """Return the names that a browser may call this machine when it listens for others too."""
    names = {"localhost", "127.0.0.1", host, socket.gethostname(), socket.getfqdn()} - {"0.0.0.0", "::"}
    return sorted(named for name in names for named in (name, f"{name}:{port}"))


def _announce(address: str, uri: str, places: Sequence[Path], browse: bool, say: Callable[[str], None]) -> None:
    say(f"dashboard: {address}{PREFIX}   (sweeps in {', '.join(map(str, places))})")
    say(f"MLflow:    {public(uri) if is_server(uri) else f'{address}/   ({public(uri)})'}")
    say("Ctrl-C ends both; sweeps go on.")
    if browse and _has_display():
        threading.Thread(target=webbrowser.open, args=[address + PREFIX], daemon=True).start()


def _has_display() -> bool:
    """Say whether a browser would open a window here, not a text browser in this terminal."""
    windows = sys.platform in ("win32", "darwin") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    return windows and sys.stdout.isatty()


def _unless_cancelled(record: logging.LogRecord) -> bool:
    """Drop the report of an answer that was cut off because the server ends."""
    return record.exc_info is None or record.exc_info[0] is not asyncio.CancelledError


class _Announcing(uvicorn.Server):
    """A server that calls `ready` when it is up."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the doors, then say so."""
        await super().startup(sockets)
        if self.started:
            self._ready()
