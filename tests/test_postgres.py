"""MLflow on PostgreSQL with its own artifact store: two sweeps write at once, over HTTP, and nothing gets mixed up."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from autorank.tracking import Tracker
from tests.conftest import POSTGRES
from tests.sweep_samples import DENSE, header, points, records

pytestmark = [pytest.mark.postgres, pytest.mark.xdist_group("tests/test_postgres.py")]

COUNT = 6
NAMES = ("net-1a2b3c", "net-4d5e6f")


@dataclass(frozen=True)
class Server:
    address: str
    password: str
    log: Path

    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.address)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """PostgreSQL and `mlflow server`, both on this machine alone; the password is in a file, in no address."""
    with ExitStack() as stack:
        # Its socket lies below it, and its owner is another user where the tests run as root.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="arp-", dir="/tmp")))
        password = secrets.token_hex(16)
        port, web = _free_port(), _free_port()
        _database(stack, folder, port, password)
        passfile = folder / "pgpass"
        passfile.touch(mode=0o600)
        passfile.write_text(f"127.0.0.1:{port}:postgres:mlflow:{password}\n")
        log = folder / "mlflow.log"
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(web),
            "--workers",
            "1",
        ]
        command += ["--backend-store-uri", f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"]
        command += ["--serve-artifacts", "--artifacts-destination", str(folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with log.open("w") as out:
            process = subprocess.Popen(
                command, env={**os.environ, **quiet, "PGPASSFILE": str(passfile)}, stdout=out, stderr=out
            )
        stack.callback(_end, process)
        server = Server(f"http://127.0.0.1:{web}", password, log)
        while not _answers(server.address):
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield server


def _database(stack: ExitStack, folder: Path, port: int, password: str) -> None:
    assert POSTGRES is not None
    # PostgreSQL does not run as root.
    owner: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
    folder.chmod(0o711)
    home = folder / "database"
    home.mkdir()
    secret = folder / "password"
    secret.touch(mode=0o600)
    secret.write_text(password)
    if owner:
        for path in (home, secret):
            subprocess.run(["chown", "postgres:postgres", path], check=True)
    make = [POSTGRES.with_name("initdb"), "-D", home / "data", "-U", "mlflow", "-A", "scram-sha-256", "--no-sync"]
    subprocess.run([*make, f"--pwfile={secret}"], check=True, capture_output=True, cwd=home, **owner)
    settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": str(home), "fsync": "off"}
    run = [POSTGRES, "-D", home / "data", "-p", str(port)]
    for name, value in settings.items():
        run += ["-c", f"{name}={value}"]
    process = subprocess.Popen(run, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **owner)
    stack.callback(_end, process)
    while subprocess.run([POSTGRES.with_name("pg_isready"), "-h", "127.0.0.1", "-p", str(port), "-q"]).returncode:
        assert process.poll() is None
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/health", timeout=10):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write(server: Server, folder: Path, name: str) -> str:
    """Write a sweep as its driver does; return what went wrong."""
    head = header(sweep_id=name)
    done = records(head, COUNT)
    tracker = Tracker(server.address, folder / name)
    tracker.start(head)
    for record in done:
        tracker.log(record)
    tracker.finish(points(head, done), dense=DENSE)
    tracker.close()
    return tracker.problem


@pytest.fixture(scope="module")
def runs(server: Server, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """All runs of the experiment after two sweeps were written at once."""
    folder = tmp_path_factory.mktemp("sweeps")
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda name: write(server, folder, name), NAMES)) == ["", ""]
    client = server.client()
    return list(client.search_runs([client.get_experiment_by_name("autorank").experiment_id], max_results=1000))


def test_two_sweeps_at_once_are_whole_and_apart(runs: list[Any]) -> None:
    parents = {run.info.run_name: run for run in runs if run.data.tags["autorank.role"] == "sweep"}
    assert sorted(parents) == sorted(NAMES)
    for name, parent in parents.items():
        children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        assert parent.info.status == "FINISHED"
        assert sorted(int(run.data.tags["autorank.number"]) for run in children) == list(range(COUNT))
        assert {run.data.tags["autorank.sweep_id"] for run in children} == {name}
    assert len(runs) == len(NAMES) * (COUNT + 1)


def test_the_figures_lie_in_the_servers_artifact_store(server: Server, runs: list[Any], tmp_path: Path) -> None:
    for info in (run.info for run in runs if run.info.run_name in NAMES):
        assert info.artifact_uri.startswith("mlflow-artifacts:/")
        page = Path(server.client().download_artifacts(info.run_id, "pareto.html", str(tmp_path)))
        assert "<html" in page.read_text()
        assert (server.log.parent / "artifacts" / info.experiment_id / info.run_id).is_dir()


def test_the_password_is_printed_nowhere(server: Server) -> None:
    assert server.password not in server.log.read_text()
