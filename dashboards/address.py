"""What a page shows, as it stands in the address bar: bookmarks, back and forward work because nothing else says it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlencode

TABS = ("point", "compare", "ranks", "growth", "importance")
_LONGEST = 20_000

T = TypeVar("T")


@dataclass(frozen=True)
class Address:
    """The query of an address; what cannot be read in it is left out.

    Attributes
    ----------
    sweep : str
        Key of the sweep; empty for the list.
    other : str
        Key of the sweep that it is compared with.
    point, pin : int or None
        Numbers of the trial that is looked at, and of the one it is compared with.
    x, y : str
        What the axes show; empty for the usual.
    tab : str
        One of `TABS`; empty for the one that fits the rest.
    lose, need : float or None
        Points that may be lost, or how many times fewer MACs are needed: they pick the point where none is named.
    hide, skip : tuple of str
        Groups of formats and kinds of trials that are not drawn.
    """

    sweep: str = ""
    other: str = ""
    point: int | None = None
    pin: int | None = None
    x: str = ""
    y: str = ""
    tab: str = ""
    lose: float | None = None
    need: float | None = None
    hide: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    @classmethod
    def of(cls, search: str | None) -> Address:
        """Read the part of an address from its question mark on."""
        try:
            found = parse_qs((search or "")[:_LONGEST].lstrip("?"), max_num_fields=200)
        except ValueError:
            return cls()

        def one(name: str, read: Callable[[str], T]) -> T | None:
            try:
                return read(found[_WORDS.get(name, name)][-1])
            except (KeyError, ValueError):
                return None

        return cls(
            sweep=one("sweep", str) or "",
            other=one("other", str) or "",
            point=one("point", _number),
            pin=one("pin", _number),
            x=one("x", str) or "",
            y=one("y", str) or "",
            tab=one("tab", _tab) or "",
            lose=one("lose", _amount),
            need=one("need", _amount),
            hide=tuple(found.get("hide", ())),
            skip=tuple(found.get("skip", ())),
        )

    @property
    def page(self) -> str:
        """Which page it is: ``list``, ``sweep`` or ``pair``."""
        return "list" if not self.sweep else "pair" if self.other else "sweep"

    @property
    def identity(self) -> str:
        """Equal for two addresses that differ only in what is looked at on the same page."""
        return "\n".join((self.page, self.sweep, self.other))

    def link(self, **changes: Any) -> str:
        """Return the query of this address with some of it changed, fit for an `href`."""
        changed = replace(self, **changes)
        pairs = [
            (_WORDS.get(field.name, field.name), f"{item:g}" if type(item) is float else item)
            for field in fields(changed)
            for item in _items(getattr(changed, field.name))
        ]
        return "?" + urlencode(pairs)


_WORDS = {"other": "with"}


def _items(value: Any) -> list[Any]:
    return [item for item in (value if isinstance(value, tuple) else (value,)) if item not in ("", None)]


def _number(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise ValueError(text)
    return int(text)


def _amount(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise ValueError(text)
    return value


def _tab(text: str) -> str:
    if text not in TABS:
        raise ValueError(text)
    return text
