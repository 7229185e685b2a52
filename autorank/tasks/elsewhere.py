"""Files of the data cache that this machine may lack: a worker of a cluster asks the driver's machine for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Fetch = Callable[[Path], Path | None]
"""Takes the path of a file on the driver's machine; returns where it lies here, or None when the driver has none."""

_fetch: Fetch | None = None


def fetch_with(fetch: Fetch | None) -> None:
    """Say how files of the driver's machine are fetched in this process; None: not at all."""
    global _fetch
    _fetch = fetch


def here(path: Path) -> Path:
    """Return where a file of the cache lies on this machine, fetched if need be; `path` itself if there is none."""
    if _fetch is None or path.exists():
        return path
    return _fetch(path) or path
