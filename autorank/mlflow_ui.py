"""Where the runs of a sweep stand when no server is named, and the one command that opens MLflow on them."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from autorank.privacy import public

DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
"""Folder beside the database for the files of its runs."""


def default_store(sweep_dir: Path | str) -> str:
    """Return the address of the database that holds a sweep's runs when none is given.

    ``mlflow.db`` beside the sweep's directory, so that sweeps side by side stand in one list; inside it where one is
    already, and where nothing can be written beside it.
    """
    own = Path(sweep_dir).resolve()
    shared = own.parent
    shut = shared.is_dir() and not os.access(shared, os.W_OK) and not os.path.exists(shared / DATABASE)
    place = own if shut or os.path.exists(own / DATABASE) else shared
    return f"sqlite:///{place}/{DATABASE}"


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an SQLite address, None for any other."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(path).resolve() if uri.startswith("sqlite:///") and path not in ("", ":memory:") else None


@contextmanager
def first_opening(file: Path | None) -> Iterator[None]:
    """Let one process at a time open the database `file`: MLflow does not bear two that make its tables at once.

    Its directory is made, and locked until the end of the block; other processes wait. None: nothing is done.
    """
    if file is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file.parent, os.O_RDONLY)
    try:
        with suppress(ImportError, OSError):  # no locks there: the user's promise then
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def is_server(uri: str) -> bool:
    """Say whether `uri` is the address of an MLflow server, not of a database that this process opens itself."""
    return uri.startswith(("http://", "https://"))


def ui_command(uri: str) -> str:
    """Return the shell command that shows the runs at `uri`, an MLflow server or database, in the browser.

    It listens on loopback only, and takes 2 processes instead of 15 (MLflow's job runner stays off).
    """
    if is_server(uri):
        return f"{shlex.quote(program('python'))} -m webbrowser {shlex.quote(public(uri))}"
    # A password must not reach the terminal; the user has it in the environment or fills it in.
    address = shlex.quote(uri) if public(uri) == uri else '"$MLFLOW_TRACKING_URI"'
    return (
        f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {shlex.quote(program('mlflow'))} ui --workers 1 "
        f"--backend-store-uri {address}"
    )


def program(name: str) -> str:
    """Return how the user's shell finds a program of this environment: by name if it is on the path, else in full."""
    beside = Path(sys.executable).parent / name
    on_path = shutil.which(name)
    if not beside.exists() or (on_path and Path(on_path).samefile(beside)):
        return name
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)
