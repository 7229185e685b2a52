"""MLflow: a run for the sweep, a nested run for each trial, figures and tables.

One thread writes, so that the sweep never waits, and nothing here ever raises into the sweep: the journal is the truth,
and MLflow is brought up to date from it as soon as it can be (`run_sync`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from autorank.mlflow_store import MlflowRuns, quiet_thread
from autorank.mlflow_ui import default_store, ui_command
from autorank.privacy import public
from autorank.run_inputs import Example, Package
from autorank.run_sync import SweepRuns, Wanted
from autorank.run_values import reason_of
from autorank.types import DenseFigures, FrontPoint, SweepHeader, TrialRecord

_log = logging.getLogger("autorank")

RETRY_SECONDS = 30.0
"""Pause before MLflow is tried again after it failed."""

FIGURE_SECONDS = 30.0
"""Least time between two drawings of the figures while a sweep runs."""

_FIGURE_SHARE = 20.0  # at most one second in twenty goes into drawing


class Tracker:
    """Shows a sweep in MLflow while it runs.

    Parameters
    ----------
    uri : str or None
        Address of an MLflow server or database. None: `default_store`, in write-ahead mode, with the artifacts in
        ``mlartifacts`` beside it.
    sweep_dir : Path
    experiment : str
        Name of the MLflow experiment; made when it does not exist.
    """

    def __init__(self, uri: str | None, sweep_dir: Path, experiment: str = "autorank") -> None:
        self._uri = uri or default_store(sweep_dir)
        self._experiment = experiment
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._wanted: Wanted | None = None
        self._records: dict[int, TrialRecord] = {}
        self._asked = self._tried = self._done = 0  # counters of what was asked for, and how far the thread has come
        self._not_before = self._draw_at = 0.0
        self._draw_now = self._closing = False
        self._count = 0
        self._problem = ""
        self._registered = self._registered_as = ""

    @property
    def problem(self) -> str:
        """Why MLflow is not up to date, in one line without secrets; empty while all is well."""
        return self._problem

    @property
    def ui_command(self) -> str:
        """The one command that opens MLflow on this sweep."""
        return ui_command(self._uri)

    @property
    def registered(self) -> str:
        """Key of the sweep's model that is in the registry (`Package.key`); empty when none is, as far as known."""
        return self._registered

    def start(self, header: SweepHeader, example: Example = ()) -> None:
        """Open the sweep's run, or find it again; returns at once.

        Parameters
        ----------
        header : SweepHeader
        example : sequence of (type, shape)
            Of the network's inputs, such as ``("float32", (1, 3, 32, 32))``; said of the data.
        """
        with self._changed:
            self._wanted = Wanted(header, example=example)
            self._ask()

    def log(self, record: TrialRecord) -> None:
        """Write a finished trial; returns at once."""
        with self._changed:
            self._records.setdefault(record.number, record)
            self._ask()

    def finish(
        self,
        points: Sequence[FrontPoint],
        files: Sequence[Path] = (),
        *,
        dense: DenseFigures | None = None,
        state: str = "finished",
        wait: float = 60.0,
    ) -> None:
        """Write the measured front and the last figures, and wait until all is written.

        Parameters
        ----------
        points : sequence of FrontPoint
        files : sequence of Path
            More files to keep with the sweep's run, under ``files``.
        dense : DenseFigures, optional
            The dense model, measured beside the front.
        state : {"finished", "stopped"}
        wait : float
            Seconds to wait at most; what is not written by then goes on in the background until `close`.
        """
        with self._changed:
            if self._wanted is None:
                return
            self._wanted = replace(
                self._wanted, points=tuple(points), files=tuple(map(Path, files)), dense=dense, state=state
            )
            self._ask(now=True)
        self._await(wait)

    def register(self, package: Package, wait: float = 60.0) -> str:
        """Put a model into MLflow's registry; after `finish`.

        Parameters
        ----------
        package : Package
            Its directory must stay until it is there, or until `close`.
        wait : float
            Seconds to wait at most.

        Returns
        -------
        str
            How to load it from there; empty when it is not there yet (`problem`).
        """
        with self._changed:
            if self._wanted is None:
                return ""
            self._wanted = replace(self._wanted, package=package)
            self._ask(now=True)
        self._await(wait)
        return self._registered_as if self._registered == package.key else ""

    def catch_up(
        self,
        header: SweepHeader,
        records: Sequence[TrialRecord],
        points: Sequence[FrontPoint],
        *,
        dense: DenseFigures | None = None,
        state: str | None = None,
        wait: float = 60.0,
    ) -> int:
        """Bring MLflow up to date from the journal; writing it twice writes nothing the second time.

        Parameters
        ----------
        header : SweepHeader
        records : sequence of TrialRecord
            In the order in which they were finished.
        points : sequence of FrontPoint
            The measured front; empty when it has not been measured.
        dense : DenseFigures, optional
        state : str, optional
            ``finished`` when there are points, else ``running``, unless it is given.
        wait : float
            Seconds to wait at most; what is not written by then goes on in the background until `close`.

        Returns
        -------
        int
            How many runs were made or changed; 0 when all was there, or when MLflow could not be reached (`problem`).
        """
        with self._changed:
            self._wanted = Wanted(
                header,
                points=tuple(points) or None,
                dense=dense,
                state=state or ("finished" if points else "running"),
                example=self._wanted.example if self._wanted is not None else (),
            )
            self._records = {record.number: record for record in records}
            self._count = 0
            self._ask(now=True)
        self._await(wait)
        return self._count

    def close(self, wait: float = 60.0) -> None:
        """Write what is left, within `wait` seconds, and end the thread; a sweep not finished is ``stopped``."""
        with self._changed:
            thread = self._thread
            if thread is None:
                return
            if self._wanted is not None and self._wanted.state == "running":
                self._wanted = replace(self._wanted, state="stopped")
                self._ask(now=True)
            self._closing = True
            self._changed.notify_all()
        thread.join(wait)
        if thread.is_alive():
            self._fail(f"it has not taken everything within {wait:g} s")

    def _ask(self, now: bool = False) -> None:
        """Wake the thread; `now` also ends the pause after a failure and draws the figures. Holds the lock."""
        if self._wanted is None:
            return
        self._wanted = replace(self._wanted, records=tuple(self._records.values()))
        self._asked += 1
        if now:
            self._not_before, self._draw_now = 0.0, True
        if self._thread is None:
            self._closing = False
            self._thread = threading.Thread(target=self._work, name="autorank-mlflow", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _await(self, wait: float) -> None:
        with self._changed:
            asked = self._asked
            if not self._changed.wait_for(lambda: self._tried >= asked, wait):
                _log.info("MLflow is still being written in the background")

    def _work(self) -> None:
        try:
            with quiet_thread():
                self._write_all()
        finally:
            with self._changed:
                self._thread = None
                self._tried = self._asked
                self._changed.notify_all()

    def _write_all(self) -> None:
        store: SweepRuns | None = None
        undrawn = False
        while True:
            with self._changed:
                while not self._closing and (pause := self._pause(undrawn)) > 0:
                    self._changed.wait(min(pause, 3600.0))
                wanted, asked = self._wanted, self._asked
                last = self._closing
                draw = last or self._draw_now or time.monotonic() >= self._draw_at
                self._draw_now = False
                hopeless = self._tried == asked and time.monotonic() < self._not_before
                written = self._done == asked and not undrawn
            if wanted is None or (last and (written or hopeless)):
                return
            try:
                begun = time.monotonic()
                if store is None:
                    store = SweepRuns(MlflowRuns(self._uri, self._experiment), wanted.header)
                store.sync(wanted, draw and bool(wanted.records))
                self._registered, self._registered_as = store.registered, store.registered_as
                if draw and wanted.records:
                    spent = time.monotonic() - begun
                    self._draw_at = time.monotonic() + max(FIGURE_SECONDS, _FIGURE_SHARE * spent)
                undrawn = not draw
            except Exception as error:
                store = None  # what it believes to stand there may be wrong now
                self._settle(asked, 0, error)
            else:
                self._settle(asked, len(store.touched), None)
                store.touched.clear()
            if last:
                return

    def _pause(self, undrawn: bool) -> float:
        """Return how many seconds the thread may sleep. Holds the lock."""
        now = time.monotonic()
        if self._draw_now and self._asked > self._tried:
            return 0.0
        if self._asked > self._done:
            return self._not_before - now
        return self._draw_at - now if undrawn else float("inf")

    def _settle(self, asked: int, count: int, error: Exception | None) -> None:
        with self._changed:
            self._tried = asked
            if error is None:
                self._done = asked
                self._count += count
                self._problem = ""
            else:
                self._not_before = time.monotonic() + RETRY_SECONDS
            self._changed.notify_all()
        if error is not None:
            self._fail(reason_of(error))

    def _fail(self, reason: str) -> None:
        """Remember why MLflow is behind, and say so once."""
        said, self._problem = bool(self._problem), f"MLflow at {public(self._uri)}: {reason}"
        if not said:
            _log.warning("%s; the sweep goes on, its journal keeps everything", self._problem)


__all__ = ["FIGURE_SECONDS", "RETRY_SECONDS", "Tracker"]
