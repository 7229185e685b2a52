"""A sweep at a URL that another machine writes is looked at."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

import autorank
from autorank.dashboards.library import Library
from autorank.errors import SweepError
from autorank.following import Follower
from autorank.journal import FILE_NAME, is_running
from autorank.remotedir import copy_of
from autorank.remotestore import Store
from autorank.remotewatch import _Sweep, followed
from tests.remote.driving import RECORDS, Driving, until


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
