"""Drivers as processes of their own: started, awaited, looked after; and sweeps compared."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from autorank.journal import FILE_NAME, read
from autorank.types import TrialRecord
from tests.faults import net

ROOT = Path(__file__).resolve().parents[2]
TRIALS = 10
SETTINGS: dict[str, Any] = {
    "model": "python:tests.faults.net:network",
    "data": "python:tests.faults.net:data",
    "trials": TRIALS,
    "space": "small",
    "strategy": "nsga2",
    "recovery": {"steps": 6, "batch_size": 16, "calibration": 32, "features": 0.0},
    "calibration": 32,
    "lookahead": 4,
    "workers": 2,
    "tracking": False,
    "seed": 3,
}
PATIENCE = 300.0
"""Seconds after which something that should have happened has not; far more than it takes on a busy machine."""

# One process has imported everything; every driver is a fork of it, which saves the better part of a small sweep.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.faults.preload"])


def until(there: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Return what `there` returns once it is true."""
    end = time.monotonic() + patience
    while not (found := there()):
        assert time.monotonic() < end, f"not within {patience:g} s: {what}"
        time.sleep(0.01)
    return found


def _drive(argv: list[str], environment: Mapping[str, str], output: str) -> None:
    os.setsid()
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.environ.update(environment)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(ROOT)]))
    os.environ[net.DRIVER] = str(os.getpid())
    os.chdir(ROOT)
    if site := environment.get("PYTHONPATH"):
        runpy.run_path(f"{site}/sitecustomize.py")  # as a process does that is not forked
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["autorank", *argv]
    from autorank.cli import main

    main()


@dataclass
class Driver:
    """A running `autorank search` or `autorank resume`."""

    process: BaseProcess
    output: Path
    place: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def said(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def wait(self, patience: float = PATIENCE) -> int:
        """Return the exit status."""
        self.process.join(patience)
        assert self.process.exitcode is not None, f"the driver does not end; it said: {self.said}"
        return self.process.exitcode

    def ended(self) -> bool:
        return self.process.exitcode is not None


@dataclass
class Scene:
    """A sweep to be disturbed: its directory, its traps, its drivers.

    Use as a context: whatever happens, no process is left behind.
    """

    place: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    sweep: Path = field(init=False)
    drivers: list[Driver] = field(default_factory=list)
    environment: Mapping[str, str] = field(default_factory=dict)
    how: str = ""
    server: Any = None
    witnessed: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        self.sweep = self.place / "sweep"

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        for driver in self.drivers:
            driver.process.join()

    def search(self, **more: Any) -> Driver:
        """Start the sweep."""
        file = self.place / "sweep.yaml"
        file.write_text(yaml.safe_dump({**SETTINGS, **self.settings, **more}))
        return self._start("search", str(file), "--sweep-dir", str(self.sweep))

    def resume(self, *flags: str) -> Driver:
        """Go on with it."""
        return self._start("resume", str(self.sweep), *flags)

    def kill(self) -> None:
        """Kill the driver."""
        os.kill(self.drivers[-1].pid, signal.SIGKILL)
        self.drivers[-1].wait()

    def finish(self) -> None:
        """Wait for the end of the driver, and resume the sweep until it is complete."""
        for _ in range(4):
            status = self.drivers[-1].wait()
            self.witness()
            if status == 0:
                return
            assert not self.orphans(), "processes are left of a driver that has ended"
            self.resume()
        raise AssertionError(f"the sweep does not end: {[driver.said for driver in self.drivers]}")

    def witness(self) -> None:
        """Remember the trials that have finished so far, as the journal has them."""
        if (self.sweep / FILE_NAME).exists():
            self.witnessed.update({record.number: record.started for record in read(self.sweep).records})

    def _start(self, *argv: str) -> Driver:
        output = self.place / f"output-{len(self.drivers)}"
        given = {net.PLACE: str(self.place), **self.environment}
        process = _forks.Process(target=_drive, args=([*argv], given, str(output)))
        process.start()
        self.drivers.append(Driver(process, output, self.place))
        return self.drivers[-1]

    # What is going on

    @property
    def finished(self) -> int:
        """How many trials stand in the journal."""
        path = self.sweep / FILE_NAME
        return path.read_bytes().count(b'{"event":"trial"') if path.exists() else 0

    def after(self, trials: int) -> None:
        """Wait until so many trials are finished."""
        driver = self.drivers[-1]
        until(lambda: self.finished >= trials or driver.ended(), f"{trials} trials; it said: {driver.said}")
        assert self.finished >= trials, f"the driver ended early; it said: {driver.said}"

    def processes(self, name: str = "") -> list[int]:
        """Processes of this sweep, drivers included; those whose command line has `name` in it."""
        mark = f"{net.PLACE}={self.place}".encode()
        sessions = [driver.pid for driver in self.drivers]
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                marked = mark in (entry / "environ").read_bytes().split(b"\0")
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state, _, _, session, *_ = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if (marked or int(session) in sessions) and state != "Z" and name in line:
                found.append(int(entry.name))
        return found

    def workers(self) -> list[int]:
        """Processes in which trials run."""
        return self.processes("Trainable")

    def orphans(self, patience: float = 20.0) -> list[int]:
        """Processes that are left once all drivers have ended; they have some seconds to end by themselves."""
        end = time.monotonic() + patience
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        return left

    # Traps

    def trap(self, what: str, whom: str = "any") -> None:
        (self.place / f"{what}-{whom}").touch()

    def hold(self) -> None:
        """Make trials wait in their next forward pass."""
        (self.place / "hold").touch()

    def release(self) -> None:
        (self.place / "hold").unlink(missing_ok=True)

    def runs(self) -> list[tuple[int, str]]:
        """Process and signature of every network that was run, in order; of each once per process."""
        lines = (self.place / "runs").read_text().splitlines()
        return [(int(pid), name) for pid, name in (line.split() for line in lines)]


def essence(records: Iterable[TrialRecord]) -> dict[int, tuple[Any, ...]]:
    """What must not depend on faults, executor, worker or time."""
    return {
        r.number: (r.plan_id, r.status, r.fidelity, r.score, r.score_before, r.score_bn, r.loss, r.cost, r.curve)
        for r in records
    }


def front(sweep: Path) -> list[tuple[Any, ...]]:
    """The measured front of a sweep that ended, but for what depends on the time."""
    measured = read(sweep).measured
    return sorted((number, point.record.plan_id, point.test_score) for number, point in measured.items())


def numbers(sweep: Path) -> list[int]:
    """The number of every trial as the lines of the journal have it, so that one that ran twice is there twice."""
    lines = (sweep / FILE_NAME).read_bytes().splitlines()
    entries = [json.loads(line) for line in lines if line.strip()]
    return [entry["record"]["number"] for entry in entries if entry["event"] == "trial"]
