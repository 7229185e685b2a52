"""Exports that a page asks for: each a process of its own, and at its end one archive to fetch."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections import deque
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from autorank.captions import clean
from autorank.errors import ConfigError, describe
from autorank.exportdir import FORMATS

from .library import SweepView

_AT_ONCE = 2
_KEPT = 8
_WAITING = 20
_LINES = 200
_NICENESS = 10


@dataclass(frozen=True)
class Export:
    """How far an export is.

    Attributes
    ----------
    state : {"running", "done", "failed"}
        Running also while it waits for others.
    lines : tuple of str
        What was said so far, the last lines of it.
    problem : str
        Why it failed, in one line.
    name : str
        File name of the archive: letters, digits, ``.``, ``_`` and ``-``.
    bytes : int
        Size of the archive; 0 before it is there.
    """

    state: Literal["running", "done", "failed"]
    lines: tuple[str, ...] = ()
    problem: str = ""
    name: str = ""
    bytes: int = 0


@dataclass(eq=False)
class _Job:
    """One export; whoever changes it holds the lock of all."""

    asked: Hashable
    arguments: tuple[str, ...]
    started_in: str
    export: Export
    lines: deque[str] = field(default_factory=lambda: deque(["waiting for other exports"], maxlen=_LINES))
    folder: Path | None = None
    process: subprocess.Popen[str] | None = None

    @property
    def stem(self) -> str:
        """Name of the archive without its end, and of the directory in it."""
        return self.export.name.removesuffix(".zip")


class Exports:
    """The exports of a server: at most two at a time, the last few archives kept until `close`.

    Parameters
    ----------
    directory : Path, optional
        Where temporary directories are made; by default where the system has them.
    kept : int
        How many exports are kept that have ended; at least 1.
    """

    def __init__(self, directory: Path | None = None, kept: int = _KEPT) -> None:
        self._directory, self._kept = directory, kept
        self._jobs: dict[str, _Job] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="autorank-export")

    def start(self, view: SweepView, number: int, formats: Sequence[str] = FORMATS) -> str:
        """Begin an export, and return the token by which it is asked for.

        What is under way, or was made and is still kept, is not made again.

        Parameters
        ----------
        view : SweepView
        number : int
            Of a trial on the front.
        formats : sequence of str
            Of ``safetensors``, ``pt2``, ``onnx``.

        Raises
        ------
        ConfigError
            The number is not on the front, a format is unknown or none is given, or too many exports wait.
        """
        point, header = view.point(number), view.contents.header
        if point is None or header is None:
            raise ConfigError(f"point {number} is not on the front of this sweep")
        wanted = tuple(name for name in FORMATS if name in formats)
        if not wanted or set(formats) - set(FORMATS):
            raise ConfigError(f"choose at least one of the formats {', '.join(FORMATS)}")
        asked = (view.key, header.sweep_id, number, point.record.key, point.test_score, point.latency_ms, wanted)
        with self._lock:
            if self._closed:
                raise ConfigError("the server is stopping")
            for token, job in self._jobs.items():
                if job.asked == asked and job.export.state != "failed":
                    return token
            if sum(job.export.state == "running" for job in self._jobs.values()) >= _WAITING:
                raise ConfigError("too many exports wait already; try again when some are done")
            token = secrets.token_hex(16)
            arguments = (str(view.directory), "--point", str(number), "--formats", ",".join(wanted))
            name = re.sub(r"[^A-Za-z0-9_.-]+", "-", view.name)[:60].strip("-_.") or "sweep"
            job = _Job(asked, arguments, str(header.started_in), Export("running", name=f"{name}-{number}.zip"))
            self._jobs[token] = job
            self._pool.submit(self._work, token, job)
        return token

    def status(self, token: str) -> Export | None:
        """Return how far an export is; None when there is none of that token, or no longer."""
        with self._lock:
            job = self._jobs.get(token)
            return None if job is None else replace(job.export, lines=tuple(job.lines))

    def archive(self, token: str) -> Path | None:
        """Return the archive of an export that is done; None for any other token."""
        with self._lock:
            job = self._jobs.get(token)
            if job is None or job.folder is None or job.export.state != "done":
                return None
            return job.folder / job.export.name

    def close(self) -> None:
        """End what runs and remove what was made."""
        with self._lock:
            self._closed = True
            for job in self._jobs.values():
                _end(job.process)
        self._pool.shutdown(wait=True, cancel_futures=True)
        for job in self._jobs.values():
            _remove(job)
        self._jobs.clear()

    def _work(self, token: str, job: _Job) -> None:
        try:
            folder = Path(tempfile.mkdtemp(prefix="autorank-export-", dir=self._directory))
            with self._lock:
                job.folder = folder
            problem = self._run(job, folder / "out")
            size = 0 if problem else _pack(folder, job.stem)
        except OSError as error:
            problem, size = f"the export cannot be kept: {error.strerror or error}", 0
        except Exception as error:  # a page waits for an answer
            problem, size = describe(error), 0
        with self._lock:
            job.process = None
            job.export = replace(job.export, state="failed" if problem else "done", problem=problem, bytes=size)
            if problem:
                _remove(job)
            self._jobs[token] = self._jobs.pop(token)  # in the order in which they end
            ended = [name for name, other in self._jobs.items() if other.export.state != "running"]
            for name in ended[: -self._kept]:
                _remove(self._jobs.pop(name))

    def _run(self, job: _Job, out: Path) -> str:
        """Run the command line's export into `out`, and return what is wrong; empty when nothing is."""
        # -P: what lies in the directory must not stand in for the libraries that autorank imports.
        command = [sys.executable, "-P", "-m", "autorank.cli", "export", *job.arguments, "--out", str(out)]
        with self._lock:
            if self._closed:
                return "the server was stopped"
            job.lines.clear()
            job.process = process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                cwd=job.started_in if os.path.isdir(job.started_in) else None,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
                start_new_session=True,  # a process group of its own, for what it starts in turn
            )
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
        with process:
            for line in process.stdout or ():
                # Paths of ours mean nothing to whoever reads this.
                text = clean(line.replace(str(out), out.name), 1000)
                if text:
                    with self._lock:
                        job.lines.append(text)
        if process.returncode == 0:
            return ""
        if self._closed:
            return "the server was stopped"
        if process.returncode < 0:
            return f"the export was killed by {signal.Signals(-process.returncode).name}"
        said = list(job.lines)
        errors = [line for line in said if line.startswith("error: ")] or said
        return errors[-1].removeprefix("error: ") if errors else f"the export ended with status {process.returncode}"


def _pack(folder: Path, stem: str) -> int:
    """Put the files of an export into one archive, remove them, and return its size."""
    path, out = folder / f"{stem}.zip", folder / "out"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:  # weights hardly shrink
        for file in sorted(out.iterdir()):
            if file.is_file() and not file.is_symlink():
                archive.write(file, f"{stem}/{file.name}")
    shutil.rmtree(out)
    return path.stat().st_size


def _end(process: subprocess.Popen[str] | None) -> None:
    if process is not None and process.poll() is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # it writes only into its own temporary directory


def _remove(job: _Job) -> None:
    if job.folder is not None:
        shutil.rmtree(job.folder, ignore_errors=True)
        job.folder = None
