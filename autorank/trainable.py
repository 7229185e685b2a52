"""The worker of a sweep on Ray: loads what all trials share once, then runs one trial after the other."""

from __future__ import annotations

import json
import pickle
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from autorank.types import TrialRecord

SAME = ("autorank", "torch")
"""Packages whose versions must be those of the driver: they shape what a trial gives."""


@dataclass(frozen=True)
class Shared:
    """What travels to the workers once, through Ray's object store.

    Attributes
    ----------
    context : array of uint8
        The pickled `TrialContext`; unpickled only when its modules and files can be found.
    versions : mapping
        The driver's, of `SAME`.
    sweep, data : str
        Sweep directory and data cache of the driver.
    token : str
        By which the sweep directory is known.
    server : actor handle or None
        Of the driver's `FileServer`; None when all workers are on its machine.
    """

    context: NDArray[np.uint8]
    versions: Mapping[str, str]
    sweep: str
    data: str
    token: str = ""
    server: Any = None


def versions_here() -> dict[str, str]:
    """Return the versions of `SAME` in this process."""
    return {name: version(name) for name in SAME}


class Worker:
    """Runs trials in one process of a cluster.

    Parameters
    ----------
    shared : Shared

    Raises
    ------
    AutorankError
        The versions differ.
    Exception
        Whatever the user's own code raises when it is imported or made.
    """

    def __init__(self, shared: Shared) -> None:
        from autorank.errors import SweepError

        for name, wanted in shared.versions.items():
            if (found := versions_here()[name]) != wanted:
                raise SweepError(f"{name} is {found} there and {wanted} where the sweep was started; install the same")
        self._files: Any = None
        self._afar = False
        try:
            self._load(shared)
        except BaseException:
            self.close()
            raise

    def _load(self, shared: Shared) -> None:
        from autorank.remotefiles import NodeFiles, sees
        from autorank.tasks.elsewhere import fetch_with

        sweep, data = Path(shared.sweep), Path(shared.data)
        if shared.server is not None:
            self._afar = not sees(sweep, shared.token)
            if self._afar or not data.is_dir():
                self._files = NodeFiles(shared.server, shared.token, sweep, data)
                fetch_with(self._files.fetch)
        context = pickle.loads(shared.context.data)  # made by the driver of this very sweep, moved by Ray
        if self._afar:
            root = self._files.directory / "sweep"
            moved = {
                name: root / path.relative_to(sweep)
                for name, path in (("stats_file", context.stats_file), ("teacher_file", context.teacher_file))
                if path is not None
            }
            context = replace(context, directory=root, **moved)
        self._context = context
        self._runner = context.runner(self._files.fetch if self._afar else None)

    def run(self, job: dict[str, Any]) -> tuple[TrialRecord, list[str]]:
        """Run a trial, and return with its record what the user should be told.

        Its weights are in the sweep directory when its record is returned.
        """
        from autorank.job import Job
        from autorank.trialfiles import carrier_file, weights_file
        from autorank.trouble import listening

        made = Job.from_json(job)
        notes: list[str] = []
        with listening(notes.append):
            record = self._runner.run(made)
        if self._afar:
            for place in (weights_file, carrier_file):
                if (path := place(self._context.directory, made)).is_file():
                    self._files.send(path)
        return record, notes

    def close(self) -> None:
        """Leave nothing behind on the node."""
        if self._files is not None:
            self._files.close()


def trainable() -> type:
    """Return the class that Ray Tune runs; it imports nothing of autorank before it can say that it is missing."""
    from ray import tune

    # Inside, so that it travels with the class.
    def trouble(error: Exception) -> str:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:600]
        return f"{socket.gethostname()}: {said}"

    class TrialTrainable(tune.Trainable):
        """One worker; each of its steps runs a trial, or waits a little for the next one."""

        def setup(self, config: dict[str, Any], **given: Any) -> None:
            self._worker: Any = None
            self._trouble = ""
            self._next: dict[str, Any] = {"done": False}
            try:
                paths = given.pop("paths", ())
                sys.path.extend(path for path in paths if path not in sys.path)
                from autorank.trainable import Shared, Worker

                self._worker = Worker(Shared(**given))
            except Exception as error:
                self._trouble = trouble(error)

        def give(self, what: dict[str, Any]) -> None:
            """Do what is next: a ``job``, a ``wait`` in seconds, or nothing; the next step says what came of it."""
            # Here and not in the step, which Tune asks for only when the driver is done with the last record.
            self._next = {"done": "wait" not in what}
            if self._trouble:
                return
            if "job" not in what:
                time.sleep(what.get("wait", 0.0))
                return
            try:
                record, notes = self._worker.run(what["job"])
                # Texts: Tune flattens nested results.
                self._next = {"record": json.dumps(record.to_json()), "notes": json.dumps(notes)}
            except Exception as error:
                self._trouble = trouble(error)

        def step(self) -> dict[str, Any]:
            if self._trouble:
                # Not the trial's fault, and the next one would end alike: the sweep says so and stops.
                return {"trouble": self._trouble, "done": True}
            return self._next

        def cleanup(self) -> None:
            if self._worker is not None:
                self._worker.close()

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Keep nothing: the results are in the journal."""

        def load_checkpoint(self, checkpoint: object) -> None:
            """Load nothing."""

    return TrialTrainable
