"""Sweeps at URLs while they run elsewhere: their working copies are kept up to date for those who look at them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from autorank.errors import AutorankError, SweepError
from autorank.journal import FILE_NAME
from autorank.remotedir import CopyError, copy_of, extend, folder_of, held, mark_of, refresh, url_of, writing
from autorank.remotelock import STALE, Mark, read_mark
from autorank.remotestore import Store, is_url

PAUSE = 1.0
"""Seconds between looks at least; more where a look takes long."""
_SHARE = 4.0
_OVERLAP = 512
"""Bytes of the copy that are compared before more is put behind them: the URL may have another sweep by now."""


class _Sweep:
    """One sweep at a URL. While a driver elsewhere renews its lock, the working copy is held as if it ran here."""

    def __init__(self, url: str) -> None:
        self._url, self._store, self.directory = url, Store(url), copy_of(url)
        self._end: int | None = None
        self._hold: ExitStack | None = None
        self._mark: Mark | None = None
        self._seen = 0.0

    def look(self) -> None:
        """Bring the working copy up to date."""
        with writing(self.directory):
            self._look()

    def _look(self) -> None:
        if self._end is None:
            refresh(self.directory, self._url, self._store)
            self._end = self._size()
        alive = self._alive()  # before the rest is read: what a driver wrote at its end is then seen
        start, news = self._news()
        with ExitStack() as stack:
            # Not while the network is asked: a driver that starts here must not meet us.
            if self._hold is None and not stack.enter_context(held(self.directory)):
                return  # a driver is here, or another who looks
            self._take(start, news)
            if alive and self._hold is None:
                self._hold = stack.pop_all()
        if not alive:
            self.close()

    def close(self) -> None:
        """Let go of the working copy."""
        if self._hold is not None:
            self._hold.close()
            self._hold = None

    def _news(self) -> tuple[int, bytes]:
        """Return the journal from a byte on: from shortly before where it ends here, if that is what was read last."""
        size, newest = self._size(), max((end for _, end in self._store.parts()), default=0)
        if size == self._end == newest:
            return size, b""
        start = max(0, size - _OVERLAP) if size == self._end and newest > size else 0
        return start, self._store.journal(start)

    def _take(self, start: int, news: bytes) -> None:
        if start:
            with (self.directory / FILE_NAME).open("r+b") as file:
                file.seek(start)
                last = file.read()
                if agree := news.startswith(last):
                    file.write(news[len(last) :])
        else:
            agree = extend(self.directory, news)
        # Another sweep, or another process was quicker: all is looked at again.
        self._end = self._size() if agree else None

    def _alive(self) -> bool:
        found = read_mark(self._store)
        if found != self._mark:
            self._mark, self._seen = found, time.monotonic()
        # Who works in this very copy holds its lock himself.
        return found is not None and found.copy != mark_of(self.directory) and time.monotonic() - self._seen < STALE

    def _size(self) -> int:
        try:
            return (self.directory / FILE_NAME).stat().st_size
        except FileNotFoundError:
            return 0


class _Folder:
    """All sweeps directly below a URL."""

    def __init__(self, url: str) -> None:
        self._url, self._store, self.directory = url.rstrip("/"), Store(url), folder_of(url)
        self._sweeps: dict[str, _Sweep] = {}
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)

    def look(self) -> None:
        """Look for new ones, and at each."""
        for name in self._store.children():
            sweep = self._sweeps.get(name) or _Sweep(f"{self._url}/{name}")
            try:
                sweep.look()
            except CopyError:
                raise
            except SweepError:  # no sweep, or not one now
                continue
            self._sweeps[name] = sweep

    def close(self) -> None:
        """Let go of all."""
        for sweep in self._sweeps.values():
            sweep.close()


@contextmanager
def followed(places: Sequence[Path | str], warn: Callable[[str], None], folders: bool = False) -> Iterator[list[Path]]:
    """Return local directories of places, and keep those up to date that stand for URLs.

    Parameters
    ----------
    places : sequence of path or str
        Sweep directories or their URLs.
    warn : callable
        Told in a line when a URL cannot be read any more.
    folders : bool
        Whether a place may also hold sweeps instead of being one.

    Raises
    ------
    SweepError
        There is no sweep at a URL, or it cannot be read now.
    """
    local, remote = [], []
    for place in places:
        url = str(place) if is_url(place) else url_of(Path(place))
        if url is None:
            local.append(Path(place))
            continue
        sweep = not folders or bool(Store(url).parts()) or (copy_of(url) / FILE_NAME).exists()
        found: _Sweep | _Folder = _Sweep(url) if sweep else _Folder(url)
        found.look()
        remote.append(found)
        local.append(found.directory)
    ended = threading.Event()
    thread = threading.Thread(target=_look, args=(remote, warn, ended), name="autorank-remote", daemon=True)
    if remote:
        thread.start()
    try:
        yield local
    finally:
        ended.set()


def _look(remote: Sequence[_Sweep | _Folder], warn: Callable[[str], None], ended: threading.Event) -> None:
    pause, troubled = PAUSE, False
    while not ended.wait(pause):
        began, wrong = time.monotonic(), ""
        for each in remote:
            try:
                each.look()
            except (AutorankError, OSError) as error:
                wrong = str(error)
        if wrong and not troubled:
            warn(f"note: {wrong}; what is shown may be old")
        troubled = bool(wrong)
        pause = max(PAUSE, _SHARE * (time.monotonic() - began))
    for each in remote:
        each.close()
