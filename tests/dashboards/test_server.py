"""The process that serves the dashboard and MLflow, asked as a browser and as an attacker would ask it."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from autorank.dashboards.mlflow_app import Runs
from autorank.mlflow_ui import first_opening
from autorank.tracking import Tracker
from tests.dashboards.samples import write_sweep


def ask(address: str, path: str, method: str = "GET", body: object = None, **headers: str):
    """Ask without following redirects; return status, headers and text."""
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
    data = None if body is None else json.dumps(body)
    given = {"Content-Type": "application/json"} if data else {}
    connection.request(method, path, data, {**given, **{name.replace("_", "-"): v for name, v in headers.items()}})
    answer = connection.getresponse()
    text = answer.read().decode("utf-8", "replace")
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, text


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two sweeps of which MLflow knows one."""
    root = tmp_path_factory.mktemp("root")
    head, done = write_sweep(root / "sweeps" / "first", 12, seed=1)
    write_sweep(root / "sweeps" / "second", 6, seed=2)
    tracker = Tracker(None, root / "sweeps" / "first")
    tracker.start(head)
    for record in done:
        tracker.log(record)
    tracker.close()
    assert not tracker.problem
    return root


@pytest.fixture(scope="module")
def served(serve, place):
    return serve("sweeps", directory=place)


class TestOnePort:
    @pytest.mark.parametrize(
        ("path", "told"),
        [
            pytest.param("/dashboard/", "autorank", id="dashboard"),
            pytest.param("/", "MLflow", id="mlflow"),
            pytest.param("/version", "3.17", id="mlflow-version"),
        ],
    )
    def test_both_are_there(self, served, path, told):
        status, _, text = ask(served.mlflow, path)
        assert status == 200
        assert told in text

    def test_mlflow_lists_the_runs_beside_the_sweeps(self, served):
        body = {"experiment_ids": ["1"], "filter": "tags.`autorank.role` = 'trial'", "max_results": 100}
        status, _, text = ask(served.mlflow, "/ajax-api/2.0/mlflow/runs/search", "POST", body)
        assert status == 200
        assert len(json.loads(text)["runs"]) == 12

    def test_the_slash_at_the_end_may_be_left_out(self, served):
        status, headers, _ = ask(served.mlflow, "/dashboard")
        assert status in (301, 302, 307)
        assert urlsplit(headers["location"]).path == "/dashboard/"

    def test_it_says_where_to_look(self, served):
        assert served.dashboard.startswith("http://localhost:")
        assert any("sqlite:///" in line for line in served.said)


class TestSafety:
    @pytest.mark.parametrize("path", ["/dashboard/", "/dashboard/_dash-layout", "/dashboard/archive/x", "/"])
    def test_a_name_that_is_not_this_machines_is_refused(self, served, path):
        """A page of another site whose name was bent to 127.0.0.1 still says its own name."""
        status, _, text = ask(served.mlflow, path, Host="evil.example")
        assert status == 403
        assert "autorank" not in text

    def test_a_page_of_another_site_may_not_post(self, served):
        status, _, _ = ask(
            served.mlflow, "/dashboard/_dash-update-component", "POST", {}, Origin="http://evil.example:5000"
        )
        assert status == 403

    def test_our_own_page_may_post(self, served):
        status, _, _ = ask(served.mlflow, "/dashboard/_dash-update-component", "POST", {}, Origin=served.mlflow)
        assert status != 403

    @pytest.mark.parametrize(
        "path",
        [
            "/dashboard/archive/../../mlflow.db",
            "/dashboard/archive/..%2f..%2fmlflow.db",
            "/dashboard/archive/%2e%2e/%2e%2e/journal.jsonl",
            "/dashboard/archive//etc/passwd",
            "/dashboard/archive/first",
            "/dashboard/assets/..%2f..%2fpyproject.toml",
            "/dashboard/assets/../server.py",
            "/dashboard/_dash-component-suites/dash/..%2f..%2f..%2f..%2fpyproject.toml",
            "/dashboard/first/journal.jsonl",
        ],
    )
    def test_no_path_leads_to_a_file(self, served, place, path):
        status, _, text = ask(served.mlflow, path)
        assert status in (301, 302, 307, 308, 404, 403, 400, 405) or "react-entry-point" in text
        for secret in ("root:", "[build-system]", '"event"', "SQLite format", "def application"):
            assert secret not in text

    def test_pages_run_no_script_but_our_own(self, served):
        _, headers, _ = ask(served.mlflow, "/dashboard/")
        rules = dict(rule.strip().partition(" ")[::2] for rule in headers["content-security-policy"].split(";"))
        assert rules["default-src"] == "'none'"
        assert rules["connect-src"] == "'self'"
        assert "unsafe" not in rules["script-src"]
        assert "http" not in rules["script-src"]
        assert headers["x-content-type-options"] == "nosniff"

    def test_other_machines_cannot_reach_it(self, served):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # sends nothing; says which address the machine has outside
                outside = probe.getsockname()[0]
            except OSError:
                outside = "127.0.0.2"  # no network: then another address of its own
        with socket.socket() as other:
            other.settimeout(5)
            with pytest.raises(OSError, match=r"refused|timed out"):
                other.connect((outside, urlsplit(served.mlflow).port))


class TestStarting:
    def test_where_no_sweep_is_yet(self, serve, tmp_path):
        served = serve("sweeps", directory=tmp_path)
        assert ask(served.mlflow, "/dashboard/")[0] == 200
        assert not (tmp_path / "sweeps").exists()  # looking makes nothing
        file = tmp_path / "sweeps" / "mlflow.db"
        with ThreadPoolExecutor(1) as asking:
            with first_opening(file):  # a sweep makes the database just now
                answer = asking.submit(ask, served.mlflow, "/ajax-api/2.0/mlflow/experiments/search?max_results=5")
                time.sleep(1)
                assert not file.exists()
            status, _, text = answer.result()
        assert status == 200
        assert [found["name"] for found in json.loads(text)["experiments"]] == ["Default"]
        served.process.terminate()
        assert served.process.wait(30) == 0
        assert "Traceback" not in served.errors.read_text()

    def test_when_the_server_with_the_runs_is_away(self, serve, tmp_path):
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            uri = f"http://me:s3cret@127.0.0.1:{closed.getsockname()[1]}"
        served = serve("sweeps", "--tracking-uri", uri, directory=tmp_path)
        assert ask(served.dashboard, "/dashboard/")[0] == 200
        assert urlsplit(ask(served.dashboard, "/")[1]["location"]).path == "/dashboard/"
        assert ask(served.dashboard, "/dashboard/", Host="evil.example")[0] == 403
        assert "s3cret" not in "".join(served.said)

    def test_on_a_port_that_is_taken(self, tmp_path):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            done = subprocess.run(
                [sys.executable, "-m", "autorank.cli", "dashboard", "--port", str(port), "--no-browser"],
                cwd=tmp_path,
                capture_output=True,
                text=True,
            )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert f"127.0.0.1:{port}" in done.stderr
        assert "--port" in done.stderr

    def test_ctrl_c_ends_it_quietly(self, serve, tmp_path):
        served = serve("sweeps", directory=tmp_path)
        assert served.stop() == 0
        assert "Traceback" not in served.errors.read_text()


STALLED = """
import sys
from pathlib import Path
from autorank.dashboards import jobs, server
jobs.Exports.archive = lambda self, token: Path(sys.argv[1])
server.serve([Path(sys.argv[2])], port=0, browse=False)
"""


def test_a_download_that_stands_still_does_not_hold_up_ctrl_c(tmp_path):
    large = tmp_path / "large.zip"
    with large.open("wb") as file:
        file.truncate(100_000_000)  # more than the sockets take
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", STALLED, str(large), str(tmp_path / "sweeps")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = urlsplit(process.stdout.readline().split()[1])
        with socket.create_connection((address.hostname, address.port)) as download:
            download.sendall(f"GET /dashboard/archive/x HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
            assert b"200 OK" in download.recv(1000)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in errors


def until(true, what: str) -> None:
    """Wait for a condition; the limit only keeps a broken build from hanging."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class TestLinksToMlflow:
    @pytest.fixture(autouse=True)
    def _often(self, monkeypatch):
        monkeypatch.setattr("autorank.dashboards.mlflow_app.RETRY_SECONDS", 0.1)

    def test_a_sweep_is_found_under_its_own_name(self, place, served):
        runs = Runs(f"sqlite:///{place}/sweeps/mlflow.db")
        runs.start()
        until(lambda: runs.page("first"), "the sweep's run")
        assert runs.page("second") is None
        run_id = runs.page("first").rpartition("/")[2]
        _, _, text = ask(served.mlflow, f"/ajax-api/2.0/mlflow/runs/get?run_id={run_id}")
        tags = {tag["key"]: tag["value"] for tag in json.loads(text)["run"]["data"]["tags"]}
        assert tags["autorank.sweep_id"] == "first"
        runs.close()

    def test_a_locked_database_is_named_and_forgotten_when_it_is_free(self, place, tmp_path):
        file = tmp_path / "mlflow.db"  # one that nobody else has open
        with closing(sqlite3.connect(place / "sweeps" / "mlflow.db")) as known:
            known.execute("VACUUM INTO ?", [str(file)])
        runs = Runs(f"sqlite:///{file}?timeout=0.2")
        lock = sqlite3.connect(file, isolation_level=None)
        lock.execute("PRAGMA locking_mode=EXCLUSIVE")
        lock.execute("BEGIN EXCLUSIVE")
        try:
            runs.start()
            until(lambda: runs.problem, "a word about the lock")
            assert "locked" in runs.problem
        finally:
            lock.execute("ROLLBACK")
            lock.close()
        until(lambda: not runs.problem and runs.page("first"), "the links again")
        runs.close()

    def test_before_there_is_a_database(self, tmp_path):
        runs = Runs(f"sqlite:///{tmp_path}/mlflow.db")
        assert runs._look() == {}
        assert list(Path(tmp_path).iterdir()) == []
