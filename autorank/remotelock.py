"""One driver at a time on a sweep at a URL: an object there says who works on it, and is renewed while he does."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from autorank.errors import SweepError
from autorank.remotestore import RemoteError, Store

NAME = "lock.json"
RENEWED = 10.0
"""Seconds between renewals."""
STALE = 60.0
"""Seconds without a renewal after which a driver is taken to be dead."""
SETTLED = 1.5
"""Seconds after which a new lock is looked at again: who looked before it was written has written his own by then."""
_LARGEST = 10_000


@dataclass(frozen=True)
class Mark:
    """What stands in the lock.

    Attributes
    ----------
    owner : str
        Random; a driver's own. Empty where what stands there cannot be read.
    copy : str
        Random; the working copy's own, so that a machine knows what it left itself.
    who : str
        Machine and process, for a person.
    count : int
        Of renewals. Whether it changes is judged, not when it was written: clocks of machines differ.
    """

    owner: str
    copy: str
    who: str
    count: int = 0

    @property
    def host(self) -> str:
        """The machine."""
        return self.who.rpartition(":")[0]


def read_mark(store: Store) -> Mark | None:
    """Return what stands in the lock of a sweep; None when nobody holds it."""
    try:
        raw = store.read(NAME)
    except RemoteError as error:
        if error.gone:
            return None
        raise
    try:
        mark = Mark(**json.loads(raw)) if len(raw) < _LARGEST else None
        if mark is not None and all(isinstance(text, str) for text in (mark.owner, mark.copy, mark.who)):
            return mark
    except (ValueError, TypeError, RecursionError):
        pass
    return Mark("", "", "something unknown", len(raw))  # whoever wrote it may be at it again


class RemoteLock:
    """The lock on a sweep at a URL, held from `acquire` to `release`.

    Parameters
    ----------
    store : Store
    copy : str
        What marks the working copy. Its former driver on this machine is dead, as this process holds the copy's own
        lock; one on another machine that has the same directory may not be.
    say : callable
        Told in a line what takes long.
    """

    def __init__(self, store: Store, copy: str, say: Callable[[str], None]) -> None:
        self._store, self._say = store, say
        self._mark = Mark(secrets.token_hex(8), copy, f"{socket.gethostname()}:{os.getpid()}")
        self._looked = self._confirmed = 0.0
        self._turn = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="autorank-remote-lock", daemon=True)
        self.lost = ""
        """Who took the lock over; empty while it is ours."""

    def acquire(self) -> None:
        """Take the lock; where another one stands, wait until it is released or has not been renewed for long.

        Raises
        ------
        SweepError
            Another driver renews it.
        RemoteError
            The place cannot be read or written.
        """
        before = self._look()
        if before is not None and not (before.copy == self._mark.copy and before.host == self._mark.host):
            self._wait(before)
        self._write()
        # One who was that slow may come after another's second look: he waits until that one has looked once more.
        time.sleep(SETTLED if _within(SETTLED, self._looked) else 2 * RENEWED)
        self._confirm()
        if self.lost:
            raise SweepError(self.lost)
        self._confirmed = 0.0  # so it is looked at once more before the first write
        self._thread.start()

    def _wait(self, before: Mark) -> None:
        self._say(f"note: {before.who} has a lock on {self._store.url}; waiting up to {STALE:g} s to see if it works")
        end = time.monotonic() + STALE
        while time.monotonic() < end:
            time.sleep(min(1.0, RENEWED / 2))
            found = self._look()
            if found is None:
                return
            if found != before:
                raise SweepError(self._taken(found))
        self._say(f"note: {before.who} has not been heard of for {STALE:g} s; its lock is taken over")

    def check(self) -> None:
        """Make sure, before something is written, that the lock is still ours; asks only when that is not known.

        Raises
        ------
        SweepError
            Another driver took it over, which happens to one that slept or was cut off; or that cannot be told now.
        """
        if not _within(2 * RENEWED, self._confirmed):
            self._confirm()
        if self.lost:
            raise SweepError(self.lost)

    def release(self, here: bool = False) -> None:
        """Renew the lock no more and give it back, if it is ours and can be reached; `here`: do not try to reach it."""
        self._ended.set()
        if here:
            return
        with suppress(SweepError), self._turn:
            found = read_mark(self._store)
            if found is not None and found.owner == self._mark.owner:
                self._store.remove([NAME])

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED):
            with suppress(SweepError):  # the mirror tells what is wrong with the place
                self._confirm()
            if self.lost:
                return

    def _confirm(self) -> None:
        """Look whether the lock is ours, and renew it.

        One that is gone or half written is ours still if it was looked at not long ago: nobody took it over since.
        """
        with self._turn:
            if self._ended.is_set() or self.lost:
                return
            before = self._looked
            found = self._look()
            owner, known = found.owner if found is not None else None, _within(STALE, before)
            if owner == "" and not known:
                raise SweepError(f"{self._store.url}/{NAME} cannot be read, so another driver may work there")
            if owner != self._mark.owner and (owner or not known):
                self.lost = self._taken(found)
            else:
                self._mark = replace(self._mark, count=self._mark.count + 1)
                self._write()

    def _look(self) -> Mark | None:
        began = time.time()
        found = read_mark(self._store)
        self._looked = began
        return found

    def _write(self) -> None:
        self._store.write(NAME, json.dumps(asdict(self._mark)).encode())
        self._confirmed = time.time()

    def _taken(self, found: Mark | None) -> str:
        who = found.who if found is not None else "somebody"
        return f"another autorank ({who}) works on {self._store.url}; wait for it, stop it, or give another --sweep-dir"


def _within(seconds: float, since: float) -> bool:
    """Say whether a moment is not long ago; by the clock that goes on while a machine sleeps."""
    return 0 <= time.time() - since < seconds
