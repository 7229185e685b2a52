"""What is sent to a URL, in what order, and how a sweep goes on from there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import autorank
from autorank import remotelock
from autorank.journal import FILE_NAME, read
from autorank.mirror import PARTS
from autorank.remotedir import opened
from autorank.remotestore import Store
from tests import sweep_samples
from tests.remote.driving import HEADER, RECORDS, Driving, end_of, until


def test_another_machine_reads_the_same_bytes(url: str, elsewhere: Callable[[str], None]) -> None:
    with Driving(url) as driver:
        for number in range(5):
            driver.trial(number)
            mine = driver.journal.path.read_bytes()
            assert Store(url).journal() == mine
        elsewhere("there")
        other = opened(url)
        assert other != driver.directory
        assert (other / FILE_NAME).read_bytes() == mine
    assert len(Store(url).parts()) == 1  # put together at the end
    assert (opened(url) / FILE_NAME).read_bytes() == driver.journal.path.read_bytes()
    assert autorank.open_sweep(url).records == RECORDS[:5]


def test_files_are_there_before_the_record_that_follows_them_and_go_when_they_are_dropped(url: str) -> None:
    with Driving(url) as driver:
        driver.file("errors-abc.json")
        driver.file("cache/stats-abc.safetensors")
        driver.file("cache/teacher.npy")
        driver.file("cache/fits/0123.safetensors")
        driver.file("ray/session")
        weights = [driver.file(f"models/{number}.safetensors", b"w" * number) for number in range(3)]
        driver.trial(0)
        kept = {"errors-abc.json": 7, "cache/stats-abc.safetensors": 7, "cache/teacher.npy": 7}
        assert Store(url).files() == {**kept, **{f"models/{number}.safetensors": number for number in range(3)}}
        weights[1].unlink()
        driver.trial(1)
        until(lambda: "models/1.safetensors" not in Store(url).files())
        weights[2].write_bytes(b"retrained")
        driver.trial(2)
        assert Store(url).files()["models/2.safetensors"] == 9


def test_weights_that_are_dropped_before_they_are_sent_are_no_trouble(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = Store.upload

    def dropped(store: Store, name: str, path: Path) -> None:
        path.unlink()
        upload(store, name, path)

    with Driving(url) as driver:
        monkeypatch.setattr(Store, "upload", dropped)
        driver.file("models/0.safetensors")
        driver.trial(0)
    assert driver.said == []
    assert Store(url).files() == {}


def test_trouble_with_files_of_this_machine_is_told_and_tried_again(url: str) -> None:
    with Driving(url) as driver:
        driver.trial(0)
        trap = driver.file("models", b"no directory")
        driver.trial(1, sent=False)
        until(lambda: driver.said)
        trap.unlink()
        driver.trial(2)
    first, *rest = driver.said
    assert "NotADirectoryError" in first
    assert "tried again" in first
    assert rest == [f"note: {url} has everything again"]


def test_an_end_at_which_not_all_is_sent_says_so(memory: str) -> None:
    with Driving(memory) as driver:
        driver.trial(0)
        driver.mirror._dropped = True
        driver.trial(1, sent=False)
    assert [line for line in driver.said if f"`autorank resume {memory}` sends it" in line] == driver.said != []


def test_a_killed_driver_s_sweep_goes_on_on_another_machine(url: str, elsewhere: Callable[[str], None]) -> None:
    killed = Driving(url).__enter__()
    killed.file("models/0.safetensors")
    killed.file("errors-abc.json")
    for number in range(4):
        killed.trial(number)
    killed.die()
    elsewhere("there")
    with Driving(url, new=False) as driver:
        assert driver.journal.contents().records == RECORDS[:4]
        assert (driver.directory / "models/0.safetensors").read_bytes() == b"weights"
        assert (driver.directory / "errors-abc.json").exists()
        for number in range(4, 6):
            driver.trial(number)
    assert any("its lock is taken over" in line for line in driver.said)
    assert autorank.open_sweep(url).records == RECORDS[:6]


def test_the_same_machine_goes_on_at_once_and_sends_what_was_not_sent(memory: str) -> None:
    killed = Driving(memory).__enter__()
    killed.trial(0)
    killed.mirror._dropped = True  # as if nothing got through
    killed.journal.written = lambda size: None
    killed.trial(1, sent=False)
    killed.die()
    assert end_of(memory) < killed.journal.path.stat().st_size
    with Driving(memory, new=False) as driver:
        driver.trial(2)
    assert driver.said == []
    assert autorank.open_sweep(memory).records == RECORDS[:3]


def test_trials_that_another_machine_does_not_know_are_set_aside_not_mixed(
    memory: str, elsewhere: Callable[[str], None], tmp_path: Path
) -> None:
    killed = Driving(memory).__enter__()
    killed.trial(0)
    killed.mirror._dropped = True
    killed.trial(1, sent=False)
    killed.die()
    lonely = killed.journal.path.read_bytes()
    elsewhere("there")
    with Driving(memory, new=False) as driver:
        driver.trial(2)
    elsewhere("here")
    with pytest.warns(UserWarning, match="other trials"):
        back = opened(memory)
    assert read(back).records == (RECORDS[0], RECORDS[2])
    aside = next((tmp_path / "here" / "remote" / "aside").iterdir())
    assert (aside / FILE_NAME).read_bytes() == lonely


class Counted(MemoryFileSystem):
    """Counts what a server would be asked."""

    protocol = "counted"
    requests: ClassVar[Counter[str]] = Counter()
    sent: ClassVar[int] = 0

    def cat_file(self, path: str, *given: Any, **more: Any) -> Any:
        Counted.requests["get"] += 1
        return super().cat_file(path, *given, **more)

    def ls(self, path: str, *given: Any, **more: Any) -> Any:
        Counted.requests["list"] += 1
        return super().ls(path, *given, **more)

    def pipe_file(self, path: str, value: bytes, *given: Any, **more: Any) -> Any:
        Counted.requests["put"] += 1
        Counted.sent += len(value)
        return super().pipe_file(path, value, *given, **more)

    def put_file(self, path: str, *given: Any, **more: Any) -> Any:
        Counted.requests["put"] += 1
        Counted.sent += os.path.getsize(path)
        return super().put_file(path, *given, **more)

    def rm_file(self, path: str) -> Any:
        Counted.requests["remove"] += 1
        return super().rm_file(path)


def test_requests_and_bytes_stay_linear_in_the_trials(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 1000
    fsspec.register_implementation("counted", Counted, clobber=True)
    monkeypatch.setattr(remotelock, "RENEWED", 10.0)
    monkeypatch.setattr("autorank.journal.os.fsync", lambda handle: None)
    address = memory.replace("memory", "counted")
    Counted.requests, Counted.sent = Counter(), 0
    size = 0
    with Driving(address) as driver:
        for number, record in enumerate(sweep_samples.records(HEADER, count)):
            driver.file(f"models/{number}.safetensors", b"w" * 1000)
            if number >= 8:
                (driver.directory / f"models/{number - 8}.safetensors").unlink()
            driver.journal.write_trial(record)
            size = driver.journal.path.stat().st_size
            until(lambda size=size: driver.mirror._sent == size)
            until(lambda number=number: f"models/{number - 8}.safetensors" not in driver.mirror._there)
            assert len(driver.mirror._parts) <= max(2 * PARTS, count)
    requests = Counted.requests
    assert requests["put"] <= 2 * count + 20  # weights and record
    assert requests["remove"] <= 2 * count + 20
    assert requests["list"] + requests["get"] < 30
    assert Counted.sent < 1000 * count + 4 * size
    assert Store(address).journal() == driver.journal.path.read_bytes()
