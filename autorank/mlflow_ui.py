"""The one command that opens MLflow on a sweep."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from autorank.run_values import public


def ui_command(uri: str) -> str:
    """Return the shell command that shows the runs at `uri`, an MLflow server or database, in the browser.

    It listens on loopback only, and takes 2 processes instead of 15 (MLflow's job runner stays off).
    """
    if uri.startswith(("http://", "https://")):
        return f"{shlex.quote(_program('python'))} -m webbrowser {shlex.quote(public(uri))}"
    # A password must not reach the terminal; the user has it in the environment or fills it in.
    address = shlex.quote(uri) if public(uri) == uri else '"$MLFLOW_TRACKING_URI"'
    return (
        f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {shlex.quote(_program('mlflow'))} ui --workers 1 "
        f"--backend-store-uri {address}"
    )


def _program(name: str) -> str:
    """Return how the user's shell finds a program of this environment: by name if it is on the path, else in full."""
    beside = Path(sys.executable).parent / name
    on_path = shutil.which(name)
    return name if not beside.exists() or (on_path and Path(on_path).samefile(beside)) else str(beside)
