"""MLflow's own server as an application in this process, and where in it a sweep's run stands."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from autorank.mlflow_ui import ARTIFACTS, first_opening, is_server, sqlite_file
from autorank.privacy import public
from autorank.run_values import ROLE, SWEEP_ID, reason_of

RETRY_SECONDS = 5.0
"""Pause between two looks into MLflow's store."""

_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # its runner takes a dozen processes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
}


def set_up(uri: str, hosts: Sequence[str] = ()) -> None:
    """Put MLflow's settings into the environment, which it reads when it is imported.

    Parameters
    ----------
    uri : str
        Database or server with the runs.
    hosts : sequence of str
        Names under which browsers may ask for pages, beside this machine's own.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if hosts and "MLFLOW_SERVER_ALLOWED_HOSTS" not in os.environ:
        os.environ["MLFLOW_SERVER_ALLOWED_HOSTS"] = ",".join(hosts)
    if not is_server(uri):
        os.environ["_MLFLOW_SERVER_FILE_STORE"] = uri
        if (file := sqlite_file(uri)) is not None:
            os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = (file.parent / ARTIFACTS).as_uri()


def application(uri: str, ours: str) -> Any:
    """Return a FastAPI application with MLflow's checks of host and origin, and its pages unless a server has them.

    `ours` is the path under which requests are not for MLflow.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what MLflow's own imports will have to change some day
        from mlflow.server.fastapi_app import create_fastapi_app
        from mlflow.server.fastapi_security import init_fastapi_security
    if not is_server(uri):
        app = create_fastapi_app()
        if (file := sqlite_file(uri)) is not None:
            app.add_middleware(_FirstOpening, uri=uri, file=file, ours=ours)
        return app
    from fastapi import FastAPI

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    init_fastapi_security(app)
    return app


class _FirstOpening:
    """Makes a database that is not there yet before the first request for MLflow, unless a sweep is just making it."""

    def __init__(self, app: Any, uri: str, file: Path, ours: str) -> None:
        self._app = app
        self._uri = uri
        self._file = file
        self._ours = ours

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.concurrency import run_in_threadpool

        if scope["type"] == "http" and not scope["path"].startswith(self._ours) and not self._file.exists():
            with suppress(Exception):  # MLflow answers the request with what is wrong
                await run_in_threadpool(self._make)
        await self._app(scope, receive, send)

    def _make(self) -> None:
        from mlflow import MlflowClient

        with first_opening(self._file):
            MlflowClient(self._uri).search_experiments(max_results=1)


class Runs:
    """Where the sweeps stand in MLflow; asked now and then in the background, so that no page waits for it.

    Parameters
    ----------
    uri : str
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.base = public(uri).rstrip("/") if is_server(uri) else ""
        self._places: dict[str, str] = {}
        self._problem = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="autorank-mlflow-runs", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._closing.set()

    @property
    def problem(self) -> str:
        """Why MLflow cannot be read, in one line without secrets; empty while it can."""
        return self._problem

    @property
    def home(self) -> str:
        """Address of MLflow's pages, seen from the dashboard's."""
        return f"{self.base}/"

    def page(self, sweep_id: str) -> str | None:
        """Return the address of a sweep's run in MLflow's pages; None while it is not known there."""
        return self._places.get(sweep_id)

    def _work(self) -> None:
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        while not self._closing.is_set():
            try:
                self._places = self._look()
                self._problem = ""
            except Exception as error:
                self._problem = f"MLflow at {public(self.uri)}: {reason_of(error)}"
            self._closing.wait(RETRY_SECONDS)

    def _look(self) -> dict[str, str]:
        from mlflow import MlflowClient

        file = sqlite_file(self.uri)
        if file is not None and not file.exists():
            return {}  # looking would make it
        client = MlflowClient(self.uri)
        experiments = [found.experiment_id for found in client.search_experiments()]
        found, token = {}, None
        while experiments:
            page = client.search_runs(
                experiments, f"tags.`{ROLE}` = 'sweep'", max_results=1000, order_by=["start_time ASC"], page_token=token
            )
            for run in page:
                place = f"#/experiments/{quote(run.info.experiment_id)}/runs/{quote(run.info.run_id)}"
                found[run.data.tags.get(SWEEP_ID, "")] = f"{self.base}/{place}"
            token = page.token
            if not token:
                break
        return found
