"""What went wrong outside and was made good: told to the user in one line, from whatever part of the program."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listeners: list[Callable[[str], None]] = []


def tell(text: str) -> None:
    """Tell whoever listens, or warn where nobody does."""
    if _listeners:
        _listeners[-1](text)
    else:
        warnings.warn(text, stacklevel=3)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Have `listener` called with every text that is told inside the block, in this process; once for each text."""
    told: set[str] = set()

    def once(text: str) -> None:
        if text not in told:
            told.add(text)
            listener(text)

    _listeners.append(once)
    try:
        yield
    finally:
        _listeners.remove(once)
