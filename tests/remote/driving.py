"""What a driver does to a sweep at a URL, without its trials."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autorank.journal import Journal
from autorank.mirror import Mirror
from autorank.remotedir import opened
from autorank.remotestore import Store
from tests import sweep_samples

HEADER = sweep_samples.header()
RECORDS = sweep_samples.records(HEADER, 12)
PATIENCE = 60.0


def until(there: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not there():
        assert time.monotonic() < end
        time.sleep(0.001)


def end_of(url: str) -> int:
    return max((end for _, end in Store(url).parts()), default=0)


class Driving:
    """What a driver does to a sweep at a URL, without its trials."""

    def __init__(self, url: str, new: bool = True) -> None:
        self.url, self.said = url, list[str]()
        self.directory = opened(url, everything=True, new=new)
        self.journal = Journal(self.directory)
        self.mirror = Mirror(self.journal, url, self.said.append)

    def __enter__(self) -> Driving:
        self.journal.__enter__()
        try:
            self.mirror.__enter__()
        except BaseException:
            self.journal.close()
            raise
        if self.journal.contents().header is None:
            self.journal.write_header(HEADER)
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self.mirror.__exit__(None, None, None)
        finally:
            self.journal.close()

    def file(self, name: str, data: bytes = b"weights") -> Path:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def trial(self, number: int, sent: bool = True) -> None:
        self.journal.write_trial(RECORDS[number])
        if sent:
            size = self.journal.path.stat().st_size
            until(lambda: end_of(self.url) == size)

    def die(self) -> None:
        """Leave as a killed process does: nothing is sent any more, no lock is given back."""
        self.mirror._dropped = True
        with self.mirror._changed:
            self.mirror._changed.notify_all()
        self.mirror._thread.join()
        self.mirror._lock._ended.set()
        self.mirror._lock._thread.join()
        self.journal.close()
