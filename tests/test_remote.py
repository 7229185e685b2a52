"""A sweep directory at a URL: what is sent, in what order, who may write, and what is believed of what is there."""

from __future__ import annotations

import json
import os
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import autorank
from autorank import remotedir, remotelock
from autorank.config import make_config
from autorank.dashboards.library import Library
from autorank.errors import AutorankError, ConfigError, MissingExtraError, SweepError
from autorank.following import Follower
from autorank.journal import FILE_NAME, Journal, is_running, read
from autorank.mirror import PARTS, Mirror
from autorank.privacy import to_keep
from autorank.remotedir import copy_of, opened, url_of
from autorank.remotelock import Mark, RemoteLock, read_mark
from autorank.remotestore import Store
from autorank.remotewatch import _Sweep, followed
from tests import sweep_samples

HEADER = sweep_samples.header()
RECORDS = sweep_samples.records(HEADER, 12)
PATIENCE = 60.0


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let every test begin on a machine of its own, and move to another one."""

    def move(machine: str) -> None:
        monkeypatch.setenv("AUTORANK_CACHE", str(tmp_path / machine))

    move("here")
    monkeypatch.setattr(remotelock, "RENEWED", 0.1)
    monkeypatch.setattr(remotelock, "STALE", 0.6)
    monkeypatch.setattr(remotelock, "SETTLED", 0.05)
    return move


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield f"memory://{tmp_path.name}/net" if request.param == "memory" else f"file://{tmp_path}/far/net"
    if request.param == "memory":
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[str]:
    yield f"memory://{tmp_path.name}/net"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def until(there: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not there():
        assert time.monotonic() < end
        time.sleep(0.001)


def end_of(url: str) -> int:
    return max((end for _, end in Store(url).parts()), default=0)


class Driving:
    """What a driver does to a sweep at a URL, without its trials."""

    def __init__(self, url: str, new: bool = True) -> None:
        self.url, self.said = url, list[str]()
        self.directory = opened(url, everything=True, new=new)
        self.journal = Journal(self.directory)
        self.mirror = Mirror(self.journal, url, self.said.append)

    def __enter__(self) -> Driving:
        self.journal.__enter__()
        try:
            self.mirror.__enter__()
        except BaseException:
            self.journal.close()
            raise
        if self.journal.contents().header is None:
            self.journal.write_header(HEADER)
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self.mirror.__exit__(None, None, None)
        finally:
            self.journal.close()

    def file(self, name: str, data: bytes = b"weights") -> Path:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def trial(self, number: int, sent: bool = True) -> None:
        self.journal.write_trial(RECORDS[number])
        if sent:
            size = self.journal.path.stat().st_size
            until(lambda: end_of(self.url) == size)

    def die(self) -> None:
        """Leave as a killed process does: nothing is sent any more, no lock is given back."""
        self.mirror._dropped = True
        with self.mirror._changed:
            self.mirror._changed.notify_all()
        self.mirror._thread.join()
        self.mirror._lock._ended.set()
        self.mirror._lock._thread.join()
        self.journal.close()


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


def test_a_kill_while_parts_are_put_together_loses_and_doubles_nothing(memory: str) -> None:
    with Driving(memory) as driver:
        for number in range(3):
            driver.trial(number)
        store, raw = Store(memory), driver.journal.path.read_bytes()
        middle = raw.index(b"\n", len(raw) // 2) + 1
        store.write(f"journal/{0:012d}-{middle:012d}.jsonl", raw[:middle])  # whole, but nothing is removed yet
        assert store.journal() == raw
        store.write(f"journal/{0:012d}-{len(raw):012d}.jsonl", raw[: len(raw) // 3])  # half written
        assert store.journal() == raw
        assert store.journal(middle) == raw[middle:]


def test_a_journal_with_a_hole_is_an_error_not_a_shorter_sweep(memory: str) -> None:
    store = Store(memory)
    store.write("journal/000000000000-000000000003.jsonl", b"{}\n")
    store.write("journal/000000000005-000000000008.jsonl", b"{}\n")
    with pytest.raises(SweepError, match="lacks its bytes from 3"):
        opened(memory)


HOSTILE = (
    "models/../../../../evil.safetensors",
    "models//etc/evil.safetensors",
    "models/..safetensors",
    "models/.hidden.safetensors",
    "models/a\\..\\b.safetensors",
    "models/" + "x" * 4000 + ".safetensors",
    "models/line\nbreak.safetensors",
    "models/evil.pkl",
    "cache/fits/evil.safetensors",
    "cache/evil.pt",
    "../evil.json",
    "errors-../evil.json",
    "journal/../journal.jsonl",
    "journal/x.jsonl",
    "journal.jsonl",
    "remote.json",
    "lock",
    "exports/0/model.pt2",
)


def test_names_at_the_remote_cannot_leave_the_working_copy(
    memory: str, elsewhere: Callable[[str], None], tmp_path: Path
) -> None:
    with Driving(memory) as driver:
        driver.file("models/good.safetensors")
        driver.trial(0)
    root = f"/{memory.partition('://')[2]}"
    plain: Any = fsspec.filesystem("memory")
    for name in HOSTILE:
        plain.pipe_file(f"{root}/plain", b"evil")
        MemoryFileSystem.store[f"{root}/{name}"] = MemoryFileSystem.store.pop(f"{root}/plain")
    elsewhere("there")
    there = opened(memory, everything=True)
    found = {
        path.relative_to(tmp_path / "there").as_posix() for path in (tmp_path / "there").rglob("*") if path.is_file()
    }
    prefix = there.relative_to(tmp_path / "there").as_posix()
    expected = {FILE_NAME, "lock", "remote.json", "models/good.safetensors"}
    assert found == {f"{prefix}/{name}" for name in expected}
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize(
    "address",
    ["memory://b/../../etc", "memory://b/..", "memory://b/a b/ü\n<script>", "memory://b/" + "x" * 300],
    ids=["up", "dots", "strange", "long"],
)
def test_the_working_copy_stays_in_the_cache_whatever_the_url(address: str, tmp_path: Path) -> None:
    directory = copy_of(address)
    assert directory.resolve().is_relative_to(tmp_path / "here" / "remote")
    assert len(directory.relative_to(tmp_path / "here" / "remote").parts) == 2


def test_a_note_in_another_directory_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / remotedir.NOTE).write_text(json.dumps({"url": "memory://evil/net", "copy": "x"}))
    assert url_of(tmp_path) is None


@pytest.mark.parametrize(
    ("address", "kind", "said"),
    [
        ("gs://bucket/net", MissingExtraError, "pip install gcsfs"),
        ("abfs://bucket/net", MissingExtraError, "pip install adlfs"),
        ("sftp://host/net", MissingExtraError, "paramiko"),
        ("webdav://host/net", MissingExtraError, "pip install webdav4"),
        ("nowhere://host/net", ConfigError, "Protocol not known"),
        ("s3://", ConfigError, "one directory"),
        ("simplecache::s3://bucket/net", SweepError, "not a sweep"),
        ("s3://${NOT_SET_HERE}/net", ConfigError, "NOT_SET_HERE"),
    ],
)
def test_what_is_wrong_with_an_address_is_one_line(address: str, kind: type[AutorankError], said: str) -> None:
    with pytest.raises(kind, match=said) as caught:
        autorank.open_sweep(address)
    assert "\n" not in str(caught.value)


def test_secrets_of_a_url_are_kept_and_shown_nowhere(
    memory: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, elsewhere: Callable[[str], None]
) -> None:
    secret = "pa55word-of-mine"
    monkeypatch.setenv("REMOTE_WORD", secret)
    name = memory.partition("://")[2]
    for address in (f"memory://me:{secret}@{name}", f"memory://me:${{REMOTE_WORD}}@{name}"):
        directory = opened(address, new=True)
        assert secret not in str(directory)
        assert url_of(directory) == address
        assert secret not in remotedir.shown(directory)
        with pytest.raises(SweepError) as caught:
            opened(f"{address}/nothing")
        assert secret not in str(caught.value)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert secret.encode() not in written
    remotedir._given.clear()  # another process
    assert url_of(directory) == address  # the variable's name is kept
    first = copy_of(f"memory://me:{secret}@{name}")
    (first / remotedir.NOTE).unlink()
    opened(f"memory://me:{secret}@{name}", new=True)
    remotedir._given.clear()
    with pytest.raises(ConfigError, match="give the URL"):
        url_of(first)


def test_no_secret_of_the_sweep_directory_stands_in_the_journal() -> None:
    kept = to_keep(make_config({"sweep_dir": "sftp://me:pa55word-of-mine@host/sweeps/net"}).model_dump(mode="json"))
    assert kept["sweep_dir"] == "sftp://***@host/sweeps/net"


def test_options_from_fsspec_s_configuration_are_secrets(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "memory", {"account_key": "k3y-of-mine", "token": "t0ken-of-mine"})
    Store(memory)
    assert str(SweepError("refused: k3y-of-mine t0ken-of-mine")) == "refused: *** ***"


def test_a_working_copy_can_be_looked_at_while_its_url_is_away(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/far/net"
    with Driving(url) as driver:
        driver.trial(0)
    (tmp_path / "far").rename(tmp_path / "away")
    (tmp_path / "far").write_text("no directory")
    with pytest.warns(UserWarning, match="this is what its working copy has"):
        assert autorank.open_sweep(driver.directory).records == RECORDS[:1]
    with pytest.raises(SweepError, match="cannot be read"):
        autorank.open_sweep(url)


def test_a_watched_sweep_of_another_machine_grows_runs_and_ends(
    memory: str, elsewhere: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autorank.remotewatch.PAUSE", 0.01)
    monkeypatch.setattr("autorank.remotewatch.STALE", 5.0)
    above = memory.rpartition("/")[0]
    with Driving(memory) as driver:
        driver.trial(0)
        elsewhere("there")
        with followed([memory], pytest.fail) as (watched,), followed([above], pytest.fail, folders=True) as (folder,):
            follower = Follower(watched)
            assert watched.parent == folder
            assert follower.running
            follower.poll()
            assert len(follower.contents.records) == 1
            for number in range(1, 4):
                driver.trial(number)
            until(lambda: follower.poll() and len(follower.contents.records) == 4)
            assert follower.running
            driver.journal.write_end("all trials done")
            driver.__exit__()
            until(lambda: not is_running(watched))
            follower.poll()
            assert follower.contents.ended == "all trials done"
    elsewhere("a third one")
    with followed([above], pytest.fail, folders=True) as places:
        library = Library(places)
        library.poll()
        assert [(view.state.stage, view.state.done) for view in library.sweeps()] == [("ended", 4)]
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "autorank-remote"])


def test_a_watch_does_not_mix_two_sweeps_that_were_at_one_url(memory: str, elsewhere: Callable[[str], None]) -> None:
    with Driving(memory) as driver:
        driver.trial(0)
    elsewhere("there")
    watch, store = _Sweep(memory), Store(memory)
    watch.look()
    before = (watch.directory / FILE_NAME).read_bytes()
    store.remove(list(store.parts().values()))
    elsewhere("a third one")
    with Driving(memory) as driver:
        for number in (5, 4, 3):
            driver.trial(number)
    elsewhere("there")
    watch.look()
    assert (watch.directory / FILE_NAME).read_bytes() == before
    with pytest.warns(UserWarning, match="other trials"):
        watch.look()
    assert (watch.directory / FILE_NAME).read_bytes() == store.journal()


@contextmanager
def full() -> Iterator[None]:
    """Let files hold some bytes only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("step", ["journal", "lock", "folder"])
def test_a_cache_that_cannot_be_written_is_one_line(
    memory: str, elsewhere: Callable[[str], None], step: str, tmp_path: Path
) -> None:
    with Driving(memory) as driver:
        driver.trial(0)
    elsewhere("there")
    above = memory.rpartition("/")[0]
    if step == "lock":
        (copy_of(memory) / "lock").mkdir(parents=True)
    elif step == "folder":
        (tmp_path / "there").write_text("no directory")
    looks: list[Callable[[], Any]] = [
        lambda: autorank.open_sweep(memory),
        lambda: followed([memory], pytest.fail).__enter__(),
        lambda: followed([above], pytest.fail, folders=True).__enter__(),
    ]
    for look in looks:
        with (
            full() if step == "journal" else nullcontext(),
            pytest.raises(SweepError, match=r"cannot write the working copy .*AUTORANK_CACHE names") as caught,
        ):
            look()
        assert "\n" not in str(caught.value)


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
