"""All sweeps of some places, kept up to date in the background; who asks gets what is known, without waiting."""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from autorank.errors import describe
from autorank.journal import FILE_NAME

from .sweepview import SweepView, Watched

__all__ = ["Library", "SweepView"]

_PART = 1 << 17
"""Bytes read at a time: some ten trials of a deep network, about ten milliseconds."""


class Library:
    """The sweeps of some places, newest first.

    Whatever goes wrong is said in `problems` and in the `problem` of a view, and is looked at again and again.

    Parameters
    ----------
    places : sequence of Path
        Each a sweep directory, or a directory that holds such; need not exist yet.
    pause : float
        Seconds between looks.
    """

    def __init__(self, places: Sequence[Path], pause: float = 1.0) -> None:
        self.places = tuple(Path(os.path.abspath(place)) for place in places)
        self._pause = pause
        # Begun with the time, so that a page that outlives the server does not take a new version for an old one.
        self._versions = itertools.count(time.time_ns() // 1_000_000)
        self._watched: dict[str, Watched] = {}
        self._homes: dict[str, set[Path]] = {}
        self._reachable: set[str] = set()
        self._views: tuple[SweepView, ...] = ()
        self._troubles: tuple[str, ...] = ()
        self._version = 0
        self._swap, self._looking = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """List what is there, and read it in the background from now on."""
        with self._looking:
            self._discover()
        self._thread = threading.Thread(target=self._follow, name="autorank-sweeps", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reading; what is known can still be asked for."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def sweeps(self) -> tuple[SweepView, ...]:
        """Return all sweeps, newest first."""
        with self._swap:
            return self._views

    def get(self, key: str) -> SweepView | None:
        """Return the sweep of that key; None when there is none, or no longer."""
        return next((view for view in self.sweeps() if view.key == key), None)

    def problems(self) -> tuple[str, ...]:
        """Return what cannot be read and why, one line each."""
        with self._swap:
            views, troubles = self._views, self._troubles
        # A place that cannot be reached stands for all its sweeps.
        return tuple(dict.fromkeys([*troubles, *(view.problem for view in views if view.problem)]))

    @property
    def version(self) -> int:
        """Greater after every change of any sweep and of the list."""
        with self._swap:
            return self._version

    def poll(self) -> None:
        """Look once, as the background does: at what is listed, then for all that is new, newest sweeps first."""
        with self._looking:
            self._discover()
            ordered = [self._watched[view.key] for view in self.sweeps() if view.key in self._reachable]
            # A part of each first, so that the list is soon complete.
            waiting = [sweep for sweep in ordered if self._look(sweep)]
            for sweep in waiting:
                while not self._closed.is_set() and self._look(sweep):
                    time.sleep(0)  # whoever answers a browser goes first

    def _look(self, sweep: Watched) -> bool:
        """Read a part of a sweep, and say whether there is more."""
        if self._closed.is_set():
            return False
        if sweep.look(_PART):
            self._publish()
        return sweep.behind

    def _follow(self) -> None:
        while not self._closed.is_set():
            try:
                self.poll()
            except Exception as error:  # nothing that is wrong with one look may end all looking
                with self._swap:
                    self._troubles = (f"the sweeps could not be looked at: {describe(error)}",)
            self._closed.wait(self._pause)

    def _discover(self) -> None:
        """Bring the list of sweeps up to date."""
        troubles: list[str] = []
        lost: dict[Path, str] = {}
        found: dict[str, set[Path]] = {}
        news = False
        for place in self.places:
            directories, closed, trouble = _sweeps_in(place)
            if trouble:
                lost[place] = trouble
                troubles.append(trouble)
            troubles += [line for directory, line in closed.items() if _key(directory) not in self._watched]
            for directory in directories:
                key = _key(directory)
                found.setdefault(key, set()).add(place)
                if key not in self._watched:
                    self._watched[key] = Watched(key, directory, self._next_version)
                    news = True
        self._homes |= found
        self._reachable = set()
        for key, sweep in list(self._watched.items()):
            away = next((lost[place] for place in self._homes[key] if place in lost), "")
            if key in found or (not away and sweep.view.directory.is_dir()):
                self._reachable.add(key)
            elif away:  # a drive that is not there at the moment, for one
                news |= sweep.trouble(away)
            else:
                del self._watched[key], self._homes[key]
                news = True
        if news or tuple(troubles) != self._troubles:
            self._publish(troubles)

    def _next_version(self) -> int:
        return next(self._versions)

    def _publish(self, troubles: Iterable[str] | None = None) -> None:
        views = sorted((sweep.view for sweep in self._watched.values()), key=lambda v: (-v.created, v.name, v.key))
        with self._swap:
            self._views = tuple(views)
            self._version = self._next_version()
            if troubles is not None:
                self._troubles = tuple(troubles)


def _key(directory: Path) -> str:
    return hashlib.sha256(os.fsencode(directory)).hexdigest()[:20]


def _sweeps_in(place: Path) -> tuple[list[Path], dict[Path, str], str]:
    """Return the resolved sweep directories of a place, those that may be some and cannot be read, and what is wrong.

    What is wrong with the place as a whole, and with each of the directories, is one line.
    """
    try:
        home = place.resolve()
        with os.scandir(home) as entries:
            children = list(entries)
    except FileNotFoundError:
        return [], {}, f"{place} does not exist yet"
    except (OSError, RuntimeError) as error:
        return [], {}, f"cannot read {place}: {getattr(error, 'strerror', None) or error}"
    if any(child.name == FILE_NAME for child in children):
        return [home], {}, ""
    found, closed = [], {}
    for child in children:
        directory = Path(child.path)
        try:
            if child.is_dir() and stat.S_ISREG((directory / FILE_NAME).stat().st_mode):
                found.append(directory.resolve() if child.is_symlink() else directory)
        except FileNotFoundError:
            continue  # no sweep, or gone in between
        except OSError as error:
            closed[directory] = f"cannot look into {directory}: {error.strerror}"
    return found, closed, ""
