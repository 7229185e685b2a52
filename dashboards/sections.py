"""Parts of a page that are sent again only when what they show has changed."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from dash import dcc, html

from .parts import Part

T = TypeVar("T")


def token(*things: object) -> str:
    """Return a short text that differs when one of `things` does."""
    return hashlib.blake2s(repr(things).encode("utf-8", "replace"), digest_size=9).hexdigest()


@dataclass(frozen=True)
class Section:
    """One part of a page.

    Attributes
    ----------
    shows : str
        Equal as long as the part looks the same, see `token`.
    build : callable
        Makes it.
    within : str
        The section that it is a piece of, and is made with; empty for one that stands by itself.
    """

    shows: str
    build: Callable[[], Part]
    within: str = ""


Sections = Mapping[str, Section]


def place(sections: Sections, name: str, **more: Any) -> Part:
    """Return the element that holds a section and, at first, what it shows now; its id is the section's name."""
    return html.Div(sections[name].build(), id=name, **more)


def seen(page: str, sections: Sections) -> Part:
    """Return where a page remembers what its sections show; its id is ``seen-`` and the name of the page."""
    return dcc.Store(id=f"seen-{page}", data=shown(sections))


def shown(sections: Sections) -> dict[str, str]:
    """Return what each section shows."""
    return {name: section.shows for name, section in sections.items()}


def changed(sections: Sections, before: Mapping[str, str] | None) -> dict[str, Part]:
    """Return the new children of the sections that changed; without pieces of those that are made anew as a whole."""
    before = before or {}
    new = {name for name, section in sections.items() if before.get(name) != section.shows}
    return {name: sections[name].build() for name in sections if name in new and sections[name].within not in new}


class Kept:
    """The last results of something slow, by what they were made from.

    Parameters
    ----------
    most : int
        So many are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._results: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result for `key`, made only if it is not kept."""
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
                found: T = self._results[key]
                return found
        made = make()
        with self._lock:
            self._results[key] = made
            while len(self._results) > self._most:
                self._results.popitem(last=False)
        return made


class Aside:
    """Results that take seconds: worked out in a thread of their own, one after the other, while pages go on.

    Attributes
    ----------
    done : int
        How many were worked out so far; a page that waits for one has news when it grows.
    """

    def __init__(self, most: int) -> None:
        self.done = 0
        self._results: OrderedDict[Hashable, tuple[Hashable, Any]] = OrderedDict()
        self._under_way: set[Hashable] = set()
        self._most = most
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="autorank-aside")

    def latest(self, what: Hashable, version: Hashable, make: Callable[[], T]) -> tuple[Hashable, T] | None:
        """Return the latest version and result for `what`, None before the first; begin a newer one where it is old."""
        with self._lock:
            found = self._results.get(what)
            if (found is not None and found[0] == version) or what in self._under_way:
                return found
            self._under_way.add(what)
        # Not under the lock: what is done at once is taken at once, in this thread.
        self._pool.submit(make).add_done_callback(lambda future: self._take(what, version, future))
        return found

    def close(self) -> None:
        """Begin nothing more: the process need not wait for it when it ends."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _take(self, what: Hashable, version: Hashable, future: Future[Any]) -> None:
        with self._lock:
            self._under_way.discard(what)
            if future.cancelled():
                return
            result = None if future.exception() else future.result()
            self._results[what] = (version, result)
            self._results.move_to_end(what)
            while len(self._results) > self._most:
                self._results.popitem(last=False)
            self.done += 1
