"""An MLflow server of our own, which can be killed and come back, and what stands in its database."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from autorank.run_values import NUMBER, SWEEP_ID
from tests.faults.sweeps import until


class Server:
    """`mlflow server` on a database below `place`; use as a context, so that none is left behind."""

    def __init__(self, place: Path) -> None:
        self.database = place / "mlflow.db"
        self._place = place
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self._place.mkdir(parents=True, exist_ok=True)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, again where it was killed, and wait until it answers."""
        store = ["--backend-store-uri", f"sqlite:///{self.database}", "--workers", "1"]
        files = ["--artifacts-destination", str(self._place / "artifacts")]
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mlflow",
                "server",
                *store,
                *files,
                "--host",
                "127.0.0.1",
                "--port",
                str(self._port),
            ],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        until(self._answers, "an answer of MLflow's server")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "MLflow's server has ended"
        try:
            with urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    def kill(self) -> None:
        """Kill it and its workers at once."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock its database against all others."""
        with closing(sqlite3.connect(self.database, timeout=60, isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            yield
            connection.execute("ROLLBACK")

    def trials(self, sweep_id: str) -> Counter[int]:
        """Return how many finished runs there are of each trial of a sweep."""
        query = (
            "SELECT n.value FROM tags n JOIN tags s ON s.run_uuid = n.run_uuid JOIN runs r ON r.run_uuid = n.run_uuid "
            "WHERE n.key = ? AND s.key = ? AND s.value = ? AND r.lifecycle_stage = 'active' AND r.status <> 'RUNNING'"
        )
        with closing(sqlite3.connect(self.database, timeout=60)) as connection:
            return Counter(int(row[0]) for row in connection.execute(query, (NUMBER, SWEEP_ID, sweep_id)))
