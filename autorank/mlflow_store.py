"""Runs in one experiment of an MLflow store, by explicit ids: MLflow's own address and active run are left alone."""

# ruff: noqa: D102 (what the methods do is said in `run_sync.Runs`)

from __future__ import annotations

import json
import logging
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from autorank.mlflow_ui import ARTIFACTS, first_opening, is_server, sqlite_file
from autorank.run_inputs import DataInput, ModelInput, Package
from autorank.run_sync import Metric, Run
from autorank.run_values import RunValues

_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # Without these a server that is away would hold the writing thread for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}
_quiet_threads: set[int] = set()


CHAMPION = "champion"
"""Alias of the version that the newest finished sweep of a network has registered."""

LOGGED = "recommended"
_REGISTERED = (
    "Compressed copies of one network, the recommended one of each sweep of autorank. The newest sweep that finished "
    f"holds the alias {CHAMPION}."
)


class _Quiet(logging.Filter):
    """Keeps what libraries log in our thread off the user's terminal; what other threads log passes."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread not in _quiet_threads or record.name.startswith("autorank")


_quiet = _Quiet()


@contextmanager
def quiet_thread() -> Iterator[None]:
    """Keep what libraries log in this thread off the user's terminal."""
    _quiet_threads.add(threading.get_ident())
    try:
        yield
    finally:
        _quiet_threads.discard(threading.get_ident())


def _client(uri: str) -> Any:
    """Return an MLflow client for `uri`, leaving MLflow's global address and active run alone."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for handler in logging.getLogger("mlflow").handlers:  # what alembic and sqlalchemy log goes through them as well
        handler.addFilter(_quiet)
    logging.getLogger("urllib3.connectionpool").addFilter(_quiet)
    return MlflowClient(uri)


def _write_ahead(file: Path) -> None:
    """Switch the database to write-ahead logging, so that readers (the UI) and the writer do not block each other."""
    connection = sqlite3.connect(file, timeout=20)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()


class MlflowRuns:
    """`run_sync.Runs` in one experiment of an MLflow store."""

    def __init__(self, uri: str, experiment: str) -> None:
        self._places: dict[str, str] = {}  # run → where its artifacts lie
        self._database = not is_server(uri)
        file = sqlite_file(uri)
        location = None if file is None else (file.parent / ARTIFACTS).as_uri()
        with first_opening(file):
            if file is not None:
                _write_ahead(file)
            self.client = _client(uri)
            found = self._experiment(experiment, location)
        if found.lifecycle_stage != "active":
            raise RuntimeError(f"experiment {experiment!r} is deleted there: restore it, or give another name")
        self.experiment = found.experiment_id

    def _experiment(self, name: str, location: str | None) -> Any:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                self.client.create_experiment(name, location, {"mlflow.experimentKind": "custom_model_development"})
            except Exception:  # made by somebody else meanwhile, where it is there now
                if (found := self.client.get_experiment_by_name(name)) is None:
                    raise
        return found or self.client.get_experiment_by_name(name)

    def find(self, tags: Mapping[str, str]) -> list[Run]:
        # Values with a quote in them cannot be said in MLflow's filter language, so all are compared here once more.
        said = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items() if "'" not in value)
        return [run for run in self._search(said) if all(run.tags.get(k) == v for k, v in tags.items())]

    def _search(self, condition: str) -> Iterator[Run]:
        token = None
        while True:
            page = self.client.search_runs([self.experiment], condition, max_results=1000, page_token=token)
            for run in page:
                info, data = run.info, run.data
                self._places[info.run_id] = info.artifact_uri
                yield Run(info.run_id, info.status, info.start_time, dict(data.tags), dict(data.metrics))
            token = page.token
            if not token:
                return

    def steps(self, run: Run, metric: str) -> int:
        return len(self.client.get_metric_history(run.id, metric))

    def create(self, values: RunValues, tags: Mapping[str, str]) -> Run:
        labels = {**values.tags, **tags}
        made = self.client.create_run(self.experiment, start_time=values.start, tags=labels, run_name=values.name)
        self._places[made.info.run_id] = made.info.artifact_uri
        return Run(made.info.run_id, made.info.status, values.start, labels, {})

    def write(self, run: Run, metrics: Sequence[Metric], tags: Mapping[str, str], params: Mapping[str, str]) -> None:
        from mlflow import entities

        points = [entities.Metric(name, value, when, step) for name, value, step, when in metrics]
        settings = [entities.Param(name, value) for name, value in params.items()]
        labels = [entities.RunTag(name, value) for name, value in tags.items()]
        while points or settings or labels:  # MLflow takes 1000 entries at once, of them 100 params and 100 tags
            self.client.log_batch(run.id, points[:800], settings[:100], labels[:100])
            points, settings, labels = points[800:], settings[100:], labels[100:]

    def dense(self, run: Run, model: ModelInput) -> str:
        from mlflow import entities

        found = self.client.search_logged_models([self.experiment], f"source_run_id = '{run.id}'")
        ready = [one for one in found if "mlflow.model.isExternal" in one.tags and str(one.status) == "READY"]
        if ready:
            return str(ready[0].model_id)
        tags = {**model.tags, "mlflow.model.isExternal": "true"}
        made = self.client.create_logged_model(
            self.experiment, model.name, run.id, tags, dict(model.params), "network"
        ).model_id
        self.client.log_batch(
            run.id,
            [
                entities.Metric(name, value, run.start, 0, model_id=made, run_id=run.id)
                for name, value in model.metrics.items()
            ],
        )
        self.client.finalize_logged_model(made, "READY")
        return str(made)

    def inputs(self, run: Run, data: Sequence[DataInput], model: str) -> None:
        from mlflow import entities

        found = [
            entities.DatasetInput(
                entities.Dataset(one.name, one.digest, one.source_type, one.source, one.schema or None, one.profile),
                [entities.InputTag("mlflow.data.context", one.context)],
            )
            for one in data
        ]
        self.client.log_inputs(run.id, found, [entities.LoggedModelInput(model)] if model else [])

    def register(self, run: Run, child: Run, package: Package) -> str:
        from mlflow import entities
        from mlflow.exceptions import MlflowException
        from mlflow.models import Model

        try:
            self.client.get_registered_model(package.name)
        except MlflowException:  # not there yet: a store that is away fails in the next line
            self.client.create_registered_model(package.name, description=_REGISTERED)
        logged = self.client.create_logged_model(
            self.experiment, LOGGED, child.id, dict(package.tags), model_type="compressed network"
        )
        made = logged.model_id
        # A database on this machine would look `models:/…` up at MLflow's global address, which is not ours.
        source = logged.artifact_location if self._database else f"models:/{made}"
        try:
            described = Model.load(str(package.folder))
            described.model_id, described.run_id = made, child.id
            described.save(str(package.folder / "MLmodel"))
            self.client.log_model_artifacts(made, str(package.folder))
            points = [
                entities.Metric(name, value, child.start, 0, model_id=made, run_id=child.id)
                for name, value in package.metrics.items()
            ]
            self.client.log_batch(child.id, points)
            self.client.finalize_logged_model(made, "READY")
            given = self.client.create_model_version(
                package.name, source, child.id, dict(package.tags), model_id=made, await_creation_for=0
            )
        except Exception:
            self.client.delete_logged_model(made)
            raise
        known = json.dumps([{"name": package.name, "version": given.version}])
        self.client.set_logged_model_tags(made, {"mlflow.modelVersions": known})  # its UI shows the version by it
        for one in (run, child):
            self.client.log_outputs(one.id, [entities.LoggedModelOutput(made, 0)])
        self.client.set_registered_model_alias(package.name, CHAMPION, given.version)
        return f"models:/{package.name}@{CHAMPION} (version {given.version})"

    def drop_tag(self, run: Run, tag: str) -> None:
        self.client.delete_tag(run.id, tag)

    def files(self, run: Run, files: Mapping[str, str | bytes | Path], folder: str = "") -> None:
        target = local_folder(self._places.get(run.id, ""))
        if target is not None:
            # MLflow copies bit by bit into the place that its UI reads; a renamed file is there as a whole or not.
            place = target / folder
            place.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                part = target.parent / f".{name}.part"
                _write(content, part)
                part.replace(place / name)
            return
        with tempfile.TemporaryDirectory() as scratch:
            for name, content in files.items():
                _write(content, Path(scratch, name))
            self.client.log_artifacts(run.id, scratch, folder or None)

    def set_status(self, run: Run, status: str, when: int) -> None:
        if status == "RUNNING":
            self.client.update_run(run.id, status=status)
        else:
            self.client.set_terminated(run.id, status, when)

    def delete(self, run: Run) -> None:
        self.client.delete_run(run.id)


def local_folder(uri: str) -> Path | None:
    """Return the directory of an artifact address on this machine, None for any other address."""
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(url2pathname(parts.path))
    return Path(uri) if uri.startswith("/") else None


def _write(content: str | bytes | Path, path: Path) -> None:
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
