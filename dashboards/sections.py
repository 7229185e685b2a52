"""Parts of a page that are sent again only when what they show has changed."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from dash import dcc, html, no_update

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
    """

    shows: str
    build: Callable[[], Part]


Sections = Mapping[str, Section]


def place(sections: Sections, name: str, **more: Any) -> Part:
    """Return the element that holds a section and, at first, what it shows now; its id is the section's name."""
    return html.Div(sections[name].build(), id=name, **more)


def seen(page: str, sections: Sections) -> Part:
    """Return where a page remembers what its sections show; its id is ``seen-`` and the name of the page."""
    return dcc.Store(id=f"seen-{page}", data={name: section.shows for name, section in sections.items()})


def changed(sections: Sections, before: Mapping[str, str] | None) -> tuple[list[Part], Any]:
    """Return new children for the sections that changed, `no_update` for the others, and what they show now."""
    before = before or {}
    now = {name: section.shows for name, section in sections.items()}
    parts = [no_update if before.get(name) == section.shows else section.build() for name, section in sections.items()]
    return parts, no_update if now == before else now


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
