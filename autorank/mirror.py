"""Sends what a driver writes into the working copy of a URL there: files first, then the journal's lines, in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType

from autorank.errors import AutorankError, SweepError, describe
from autorank.journal import Journal
from autorank.remotedir import mark_of
from autorank.remotelock import RemoteLock
from autorank.remotestore import JOURNAL, RemoteError, Store, is_kept

PARTS = 64
"""Parts of a journal that may stand beside a first one of their size; then all are put together."""
_PATIENCE = (1.0, 30.0)
"""Seconds before something that failed is tried again: at first, and at most."""
_QUIET = 2.0
_State = tuple[int, int]


class Mirror:
    """Keeps a URL in line with the working copy in which a driver works; a context around the driver.

    Sending is done beside the driver. What cannot be sent is tried again, while trials go on.

    Parameters
    ----------
    journal : Journal
        Open, in the working copy.
    say : callable
        Gets a line at a time.

    Raises
    ------
    SweepError
        When entered: the URL cannot be written, or another driver works on it. From the journal's writes: another
        driver has taken the sweep over.
    """

    def __init__(self, journal: Journal, url: str, say: Callable[[str], None]) -> None:
        self.journal, self.directory = journal, journal.directory.absolute()
        self._say = say
        self._store = Store(url)
        self._lock = RemoteLock(self._store, mark_of(self.directory), say)
        self._changed = threading.Condition()
        self._wanted = self._sent = 0  # bytes of the journal
        self._there: dict[str, _State] = {}
        self._parts: list[tuple[int, int]] = []
        self._closing = self._dropped = False
        self._trouble = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="autorank-mirror", daemon=True)

    def __enter__(self) -> Mirror:
        self._lock.acquire()
        try:
            self._begin()
        except BaseException:
            self._lock.release()
            raise
        self.journal.written = self.wake
        self._thread.start()
        return self

    def _begin(self) -> None:
        """See what is there already, now that nobody else writes."""
        there, here = self._store.journal(), self.journal.path.read_bytes()
        if not here.startswith(there):
            raise SweepError(f"{self._store.url} has changed meanwhile; the same command looks again")
        self._sent, self._wanted = len(there), len(here)
        self._parts = sorted(self._store.parts())
        sizes = self._store.files()
        for name, state in self._files().items():
            if sizes.get(name) == state[0]:
                self._there[name] = state

    def wake(self, size: int) -> None:
        """Hear that the journal has so many bytes now, all of them whole lines."""
        if self._lock.lost:
            raise SweepError(f"{self._lock.lost}; what this run has finished stays in {self.directory}")
        with self._changed:
            self._wanted = size
            self._changed.notify_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.journal.written = lambda size: None
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        try:
            # Not by joining the thread: a Ctrl-C in that lets Python take the thread for ended.
            if not self._ended.wait(_QUIET):
                self._say(f"waiting until all is at {self._store.url} (Ctrl-C ends the waiting)")
            while not self._ended.wait(0.2):
                pass
        except KeyboardInterrupt:
            pass
        finally:
            if not (self._ended.is_set() and self._sent >= self._wanted) and not self._lock.lost:
                self._say(
                    f"not all is at {self._store.url}; the rest is safe in {self.directory}, and "
                    f"`autorank resume {self._store.url}` sends it"
                )
            with self._changed:
                self._dropped = True
                self._changed.notify_all()
            # Not when nothing answers: that may take minutes. Who comes then waits until the lock is stale.
            self._lock.release(here=not self._ended.is_set())

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self._ended.set()

    def _work(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                if pause:
                    self._changed.wait(min(pause, _PATIENCE[0]) if self._closing else pause)
                else:
                    self._changed.wait_for(lambda: self._wanted > self._sent or self._closing or self._dropped)
                if self._dropped:
                    return
                closing, wanted = self._closing, self._wanted
            try:
                self._send(wanted)
            except (AutorankError, OSError) as error:
                if self._lock.lost:
                    self._say(f"note: {self._lock.lost}; what this run has finished stays in {self.directory}")
                    return
                local = isinstance(error, OSError)
                text = f"{self.directory} cannot be read: {describe(error)}" if local else str(error)
                if not self._trouble:
                    self._say(f"note: {text}; trials go on, and it is tried again")
                self._trouble = text
                pause = min(max(2 * pause, _PATIENCE[0]), _PATIENCE[1])
                if isinstance(error, RemoteError) and error.refused:
                    with suppress(AutorankError):
                        self._store.renew()
                continue
            if self._dropped:
                return
            if self._trouble:
                self._say(f"note: {self._store.url} has everything again")
            self._trouble, pause = "", 0.0
            if closing:
                return

    def _send(self, wanted: int) -> None:
        """Send files, then the journal up to a byte, then removals: no record is there before its weights are.

        Before each, the lock is made sure of.
        """
        here = self._files()
        for name, state in here.items():
            if self._dropped:
                return
            if self._there.get(name) != state:
                self._upload(name)
                self._there[name] = state
        if wanted > self._sent:
            self._write(self._sent, wanted)
            self._sent = wanted
        if gone := [name for name in self._there.keys() - here.keys() if name.startswith("models/")]:
            self._remove(gone)
            for name in gone:
                del self._there[name]
        self._put_together()

    def _upload(self, name: str) -> None:
        self._lock.check()
        try:
            self._store.upload(name, self.directory / name)
        except RemoteError:
            if (self.directory / name).exists():
                raise
            # Dropped meanwhile; what of it may be there is removed with the next.

    def _remove(self, names: Sequence[str]) -> None:
        self._lock.check()
        self._store.remove(names)

    def _put_together(self) -> None:
        """Make one part of all: at the end, and whenever their number and size have grown enough to pay for it."""
        first, *rest = self._parts or [(0, 0)]
        grown = sum(end - start for start, end in rest) >= first[1] - first[0] and len(rest) >= PARTS
        if rest and (grown or self._closing):
            old = list(self._parts)
            if (0, self._sent) not in old:
                self._write(0, self._sent)
            self._remove([_part(*part) for part in old if part != (0, self._sent)])
            self._parts = [(0, self._sent)]

    def _write(self, start: int, end: int) -> None:
        self._lock.check()
        with self.journal.path.open("rb") as file:
            file.seek(start)
            self._store.write(_part(start, end), file.read(end - start))
        self._parts.append((start, end))

    def _files(self) -> dict[str, _State]:
        """Return the files that are kept at the remote, as they are here: name → size and time."""
        found = {}
        for folder in ("", "models", "cache"):
            with suppress(FileNotFoundError):
                for path in (self.directory / folder).iterdir():
                    name = f"{folder}/{path.name}" if folder else path.name
                    if is_kept(name):
                        with suppress(FileNotFoundError):
                            status = path.stat()
                            found[name] = (status.st_size, status.st_mtime_ns)
        return found


def _part(start: int, end: int) -> str:
    return f"{JOURNAL}/{start:012d}-{end:012d}.jsonl"
