"""Reading a sweep's journal while it grows, each byte once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from autorank.errors import SweepError
from autorank.journal import FILE_NAME, JournalContents, Reading, is_running
from autorank.types import TrialRecord

_PACE = 24
"""The last so many records say how fast a sweep is."""


class Follower:
    """What a sweep's journal says so far, brought up to date by `poll`.

    Nothing is written, so it may follow a sweep of another process, one that has not begun, and one that was killed.

    Parameters
    ----------
    directory : Path
        Of the sweep; need not exist yet.

    Attributes
    ----------
    contents : JournalContents
        As of the last `poll`; empty before the sweep has begun.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.path = self.directory / FILE_NAME
        self._forget()

    def _forget(self) -> None:
        self._reading = Reading(self.path)
        self._position, self._rest, self._inode = 0, b"", -1
        self.contents = JournalContents()

    def poll(self) -> bool:
        """Read what is new, and say whether anything is.

        A last line that is still being written waits for its end. A journal that was replaced or cut off is read again.

        Raises
        ------
        SweepError
            A line is damaged, or the file cannot be read; the contents stay as they were, and the next `poll` looks
            at the whole file again.
        """
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                anew = bool(self._position) and (status.st_ino != self._inode or status.st_size < self._position)
                if anew:
                    self._forget()
                self._inode = status.st_ino
                file.seek(self._position)
                raw = file.read()
        except FileNotFoundError:
            gone = bool(self._position)
            if gone:
                self._forget()
            return gone
        except OSError as error:
            raise SweepError(f"cannot read {self.path}: {error.strerror}") from None
        self._position += len(raw)
        *lines, self._rest = (self._rest + raw).split(b"\n")
        try:
            for line in lines:
                self._reading.take(line)
        except SweepError:
            known = self.contents
            self._forget()  # going on behind the damage would leave it out in silence
            self.contents = known
            raise
        if lines or anew:
            self.contents = self._reading.contents
        return bool(lines) or anew

    @property
    def running(self) -> bool:
        """Whether a process works on the sweep now."""
        return is_running(self.directory)


@dataclass(frozen=True, slots=True)
class SweepState:
    """How far a sweep is, from its journal.

    Attributes
    ----------
    stage : {"preparing", "running", "ended", "stopped"}
        Stopped: no process works on it, and it did not say why it ended: it was killed, or its machine was.
    done, total : int
        Trials finished, and asked for.
    probes, failed, pruned : int
        Probes do not count as trials.
    seconds_left : float or None
        At the pace of the last trials; None while too few are known, and when it does not run.
    reason : str
        Why it ended.
    """

    stage: Literal["preparing", "running", "ended", "stopped"]
    done: int = 0
    total: int = 0
    probes: int = 0
    failed: int = 0
    pruned: int = 0
    seconds_left: float | None = None
    reason: str = ""

    @classmethod
    def of(cls, contents: JournalContents, running: bool) -> SweepState:
        """Return the state of a sweep; `running` says whether a process works on it."""
        if contents.header is None:
            return cls("preparing" if running else "stopped")
        trials = [record for record in contents.records if not record.probe]
        total = max(int(contents.header.config.get("trials") or 0), len(trials))
        return cls(
            "running" if running else "ended" if contents.ended else "stopped",
            len(trials),
            total,
            len(contents.records) - len(trials),
            sum(record.status == "failed" for record in trials),
            sum(record.status == "pruned" for record in trials),
            _pace(contents.records, total - len(trials)) if running else None,
            contents.ended,
        )


def _pace(records: Sequence[TrialRecord], left: int) -> float | None:
    """Return the seconds that `left` trials take at the pace of the last ones, probes in between included."""
    ends = [record.started + sum(record.seconds.values()) for record in records[-_PACE:] if record.started]
    trials = sum(not record.probe for record in records[-_PACE:])
    return (max(ends) - min(ends)) / (trials - 1) * left if trials > 1 and len(ends) > 1 else None
