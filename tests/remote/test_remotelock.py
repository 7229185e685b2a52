"""Who may write at a URL: one driver at a time, whatever happened to the one before."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

import pytest

from autorank import remotelock
from autorank.errors import SweepError
from autorank.remotelock import Mark, RemoteLock, read_mark
from autorank.remotestore import Store
from tests.remote.driving import PATIENCE, Driving, until


def test_a_second_driver_is_refused(url: str, elsewhere: Callable[[str], None]) -> None:
    with Driving(url) as driver:
        driver.trial(1)
        elsewhere("there")
        with pytest.raises(SweepError, match=r"another autorank \(.*\) works on"), Driving(url, new=False):
            pass
        driver.trial(0)
    assert read_mark(Store(url)) is None
    with Driving(url, new=False) as driver:
        driver.trial(1)


def test_a_driver_that_slept_while_another_took_over_stops_and_writes_nothing(
    memory: str, elsewhere: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asleep = Driving(memory).__enter__()
    asleep.trial(0)
    asleep.mirror._lock._turn.acquire()  # no renewal
    elsewhere("there")
    with Driving(memory, new=False) as driver:
        driver.trial(1)
        there = Store(memory).journal()
        asleep.mirror._lock._turn.release()
        until(lambda: asleep.mirror._lock.lost)
        with pytest.raises(SweepError, match="another autorank"):
            asleep.trial(2)
        asleep.__exit__()
        assert Store(memory).journal() == there
        driver.trial(3)


def foreign(url: str, copy: str = "theirs", who: str = "elsewhere:1") -> None:
    """Have another driver's lock at a URL."""
    Store(url).write(remotelock.NAME, json.dumps(asdict(Mark("another", copy, who))).encode())


def unrenewed(lock: RemoteLock) -> None:
    """Bring a lock where it is after a machine slept: renewed long ago."""
    lock._ended.set()
    lock._thread.join()
    lock._ended.clear()
    lock._looked = lock._confirmed = 0.0


def test_a_driver_whose_lock_was_taken_over_uploads_and_removes_nothing(url: str) -> None:
    with Driving(url) as driver:
        dropped = driver.file("models/0.safetensors")
        driver.trial(0)
        store = Store(url)
        before = store.files(), store.parts()
        unrenewed(driver.mirror._lock)
        foreign(url)
        dropped.unlink()
        driver.file("models/1.safetensors")
    assert (store.files(), store.parts()) == before
    assert ["another autorank (elsewhere:1)" in line for line in driver.said] == [True]


@pytest.mark.parametrize("late", [False, True], ids=["at once", "after the first looked again"])
def test_of_two_drivers_that_begin_together_one_works(url: str, late: bool) -> None:
    looked = threading.Barrier(2)
    first_is_done = threading.Event()

    class Slow(Store):
        def read(self, name: str, start: int = 0) -> bytes:
            try:
                return super().read(name, start)
            finally:
                with suppress(threading.BrokenBarrierError):
                    looked.wait(PATIENCE)
                    looked.abort()  # only at the first time

    class Slower(Slow):
        def write(self, name: str, data: bytes) -> None:
            until(first_is_done.is_set if late else lambda: read_mark(Store(url)) is not None)
            super().write(name, data)

    locks = [RemoteLock(store, copy, print) for store, copy in ((Slow(url), "one"), (Slower(url), "two"))]
    works = [False, False]

    def acquire(number: int) -> None:
        with suppress(SweepError):
            locks[number].acquire()
            works[number] = True
        if number == 0:
            first_is_done.set()

    threads = [threading.Thread(target=acquire, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, lock in enumerate(locks):
        with suppress(SweepError):
            lock.check()
        works[number] &= not lock.lost
    for lock in locks:
        lock.release()
    assert sorted(works) == [False, True]


@pytest.mark.parametrize("found", [b"", b'{"owner": "0'], ids=["empty", "half"])
def test_a_lock_of_ours_that_is_half_written_is_written_again(
    url: str, found: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remotelock, "STALE", PATIENCE)
    with Driving(url) as driver:
        Store(url).write(remotelock.NAME, found)
        until(lambda: (mark := read_mark(Store(url))) is not None and mark.copy == driver.mirror._lock._mark.copy)
        driver.trial(0)
    assert driver.said == []


def test_a_driver_that_slept_takes_no_half_written_lock_for_its_own_at_once(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remotelock, "STALE", PATIENCE)
    lock = RemoteLock(Store(memory), "copy", print)
    lock.acquire()
    unrenewed(lock)
    Store(memory).write(remotelock.NAME, b"")
    with pytest.raises(SweepError, match="cannot be read"):
        lock.check()
    assert Store(memory).read(remotelock.NAME) == b""
    assert not lock.lost
    lock.check()  # nobody has written it meanwhile
    mark = read_mark(Store(memory))
    assert mark is not None
    assert mark.copy == "copy"
    unrenewed(lock)
    Store(memory).remove([remotelock.NAME])  # another took over, and is done
    with pytest.raises(SweepError, match="another autorank"):
        lock.check()


@pytest.mark.parametrize("host", [socket.gethostname(), "another"], ids=["this host", "another host"])
def test_the_lock_of_a_dead_driver_of_the_same_copy_is_taken_at_once_on_its_own_host_only(
    memory: str, host: str
) -> None:
    said: list[str] = []
    foreign(memory, "copy", f"{host}:77")
    lock = RemoteLock(Store(memory), "copy", said.append)
    lock.acquire()
    lock.release()
    assert len(said) == (2 if host == "another" else 0)


def test_a_lock_that_is_damaged_counts_as_held_until_it_is_stale(memory: str) -> None:
    store, said = Store(memory), list[str]()
    store.write(remotelock.NAME, b"\xff" * 20)
    lock = RemoteLock(store, "copy", said.append)
    lock.acquire()
    assert len(said) == 2
    lock.release()
    assert read_mark(store) is None
