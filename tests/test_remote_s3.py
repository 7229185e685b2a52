"""Whole sweeps in a bucket of an S3 server: a killed driver, another machine, a server that is away, the commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import autorank
from autorank import remotelock
from autorank.cli import main
from autorank.errors import SweepError
from autorank.journal import FILE_NAME
from autorank.progress import Silent
from autorank.remotestore import Store
from autorank.types import TrialRecord
from tests import s3
from tests.faults import net, sweeps
from tests.remote.driving import Driving, until

TRIALS = 6
SETTINGS: dict[str, Any] = {
    **{key: value for key, value in sweeps.SETTINGS.items() if key not in ("workers", "tracking")},
    "trials": TRIALS,
    "recovery": {**sweeps.SETTINGS["recovery"], "steps": 4},
    "executor": "inline",
}
PATIENCE = 300.0
pytestmark = pytest.mark.xdist_group("s3")  # one server, and one sweep to compare with, for all
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.S3]:
    with s3.serving(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(autouse=True)
def here(server: s3.S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**server.environment, "AUTORANK_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remotelock, "RENEWED", 0.5)
    monkeypatch.setattr(remotelock, "STALE", 2.0)
    monkeypatch.setattr(remotelock, "SETTLED", 0.2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> autorank.SearchResult:
    return autorank.search(**SETTINGS, sweep_dir=tmp_path_factory.mktemp("plain") / "sweep", progress=False)


def essence(records: tuple[TrialRecord, ...]) -> list[tuple[Any, ...]]:
    """What depends on neither machine nor time."""
    return [(r.number, r.plan_id, r.status, r.fidelity, r.score, r.loss, r.cost, r.curve, r.layers) for r in records]


class Told(Silent):
    """Hears what a sweep says, and acts when a number of trials is done."""

    def __init__(self, **acts: Any) -> None:
        self.lines: list[str] = []
        self.acts = acts

    def say(self, text: str) -> None:
        self.lines.append(text)
        if text.startswith("waiting") and "waiting" in self.acts:
            self.acts["waiting"]()

    def trials(self, done: int, *given: Any, **more: Any) -> None:
        if f"at_{done}" in self.acts:
            self.acts[f"at_{done}"]()


def test_a_killed_driver_s_sweep_is_finished_on_a_machine_that_never_saw_it(
    undisturbed: autorank.SearchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, place = f"s3://{s3.BUCKET}/killed/net", tmp_path / "traps"
    place.mkdir()
    code = f"import autorank; autorank.search(**{SETTINGS!r}, sweep_dir={url!r}, progress=False)"
    environment = {**os.environ, net.PLACE: str(place), "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *sys.path]))}
    driver = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT, start_new_session=True)
    try:
        store, end = Store(url), time.monotonic() + PATIENCE
        while store.journal().count(b'"event":"trial"') < 3:
            assert driver.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        (place / "hold").touch()
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    before = store.journal()
    monkeypatch.setenv("AUTORANK_CACHE", str(tmp_path / "another machine"))
    told = Told()
    result = autorank.resume(url, progress=told)
    assert any("is taken over" in line for line in told.lines)
    assert store.journal().startswith(before)
    assert store.journal() == (result.directory / FILE_NAME).read_bytes()
    assert essence(result.records) == essence(undisturbed.records)
    assert [p.record.plan_id for p in result.points] == [p.record.plan_id for p in undisturbed.points]
    assert {f"models/{p.record.key}.safetensors" for p in result.points} <= store.files().keys()
    assert len(store.parts()) == 1


def test_while_the_server_is_away_trials_go_on_and_the_end_waits(
    undisturbed: autorank.SearchResult, server: s3.S3, tmp_path: Path
) -> None:
    def shut() -> None:
        server.door.shut = True

    def opened() -> None:
        server.door.shut = False

    url = f"s3://{s3.BUCKET}/away/net"
    told = Told(at_3=shut, waiting=opened)
    try:
        result = autorank.search(**SETTINGS, sweep_dir=url, progress=told)
    finally:
        opened()
    assert essence(result.records) == essence(undisturbed.records)
    assert Store(url).journal() == (result.directory / FILE_NAME).read_bytes()
    notes = [line for line in told.lines if url in line]
    assert [
        next(word for word in ("tried again", "waiting until", "everything") if word in line) for line in notes
    ] == [
        "tried again",
        "waiting until",
        "everything",
    ]
    assert all(s3.SECRET not in line and "\n" not in line for line in notes)


def test_ctrl_c_ends_the_waiting_and_resume_sends_the_rest(server: s3.S3, capsys: pytest.CaptureFixture[str]) -> None:
    def away() -> None:
        server.door.shut = True

    # A shell starts what it puts in the background with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    url = f"s3://{s3.BUCKET}/patience/net"
    told = Told(at_2=away, waiting=lambda: threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start())
    try:
        result = autorank.search(**{**SETTINGS, "trials": 3}, sweep_dir=url, progress=told)
    finally:
        server.door.shut = False
        signal.signal(signal.SIGINT, before)
    assert f"`autorank resume {url}` sends it" in told.lines[-1]
    assert str(result.directory) in told.lines[-1]
    assert len(result.records) == 3
    assert Store(url).journal() != (result.directory / FILE_NAME).read_bytes()
    again = autorank.resume(url, progress=False)
    assert essence(again.records) == essence(result.records)
    assert Store(url).journal() == (again.directory / FILE_NAME).read_bytes()


def test_credentials_that_expire_are_told_and_taken_anew(server: s3.S3) -> None:
    def unknown_after(requests: int) -> None:
        address = f"{server.environment['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
        plain = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(address, str(requests).encode(), plain)).close()

    url = f"s3://{s3.BUCKET}/expired/net"
    try:
        with Driving(url) as driver:
            driver.trial(0)
            unknown_after(0)
            driver.trial(1, sent=False)
            until(lambda: driver.said)
            unknown_after(10**9)
            driver.trial(2)
        assert "PermissionError" in driver.said[0]
        assert "tried again" in driver.said[0]
        assert driver.said[1:] == [f"note: {url} has everything again"]
        assert len(autorank.open_sweep(url).records) == 3
    finally:
        unknown_after(10**9)


def test_the_commands_take_the_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"s3://{s3.BUCKET}/commands/net"
    first = autorank.search(**{**SETTINGS, "trials": 3}, sweep_dir=url, progress=False)
    monkeypatch.setenv("AUTORANK_CACHE", str(tmp_path / "another machine"))

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["autorank", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None)
        return capsys.readouterr().out

    assert str(first.points[0].record.plan_id) in run("front", url, "--csv")
    assert "all 3 trials done" in run("watch", url)
    assert f"autorank export {url}" in run("resume", url, "--trials", "4", "-q")
    number = first.best().record.number
    run("export", url, "--point", str(number), "--formats", "safetensors")
    store = Store(url)
    assert f"exports/{number}" in {f"exports/{name}" for name in Store(f"{url}/exports").children()}
    assert b'"number"' in store.read(f"exports/{number}/report.json")
    reused = autorank.search(**{**SETTINGS, "trials": 4}, reuse=url, sweep_dir=tmp_path / "second", progress=False)
    assert essence(reused.records)[:3] == essence(first.records)
    with pytest.raises(SweepError, match="holds no sweep"):
        autorank.open_sweep(f"s3://{s3.BUCKET}/nothing")


def test_a_bucket_that_is_not_there_is_told_before_the_sweep_begins() -> None:
    told = Told()
    with pytest.raises(SweepError, match="The specified bucket does not exist"):
        autorank.search(**SETTINGS, sweep_dir="s3://no-such-bucket/net", progress=told)
    assert told.lines == []
