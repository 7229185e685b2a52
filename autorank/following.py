"""Reading a sweep's journal while it grows, each byte once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from autorank.errors import SweepError
from autorank.front import eligible, front_of
from autorank.journal import FILE_NAME, JournalContents, Reading, is_running
from autorank.types import Fidelity, TrialRecord

_PACE = 24
"""The last so many records say how fast a sweep is."""
_LOWEST = Fidelity(0, batch_norm=False)


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
    behind : bool
        Whether the last `poll` left something for the next one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.path = self.directory / FILE_NAME
        self._forget()

    def _forget(self) -> None:
        self._reading = Reading(self.path)
        self._file: tuple[int, int] | None = None
        self._position, self._tail = 0, b""
        self._damage, self._trouble = b"", ""
        self.contents, self.behind = JournalContents(), False

    def poll(self, most: int = -1) -> bool:
        """Read what is new, and say whether anything is.

        A last line that is still being written waits for its end. A journal that was replaced or cut off is read again.

        Parameters
        ----------
        most : int
            About so many bytes, then the rest of their last line; by default all there are.

        Raises
        ------
        SweepError
            A line is damaged, or the file cannot be read. The contents are what stands before; nothing behind a damaged
            line is read until the line is mended, upon which the whole file is read again.
        """
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                anew = self._file is not None and not self._goes_on(file, status)
                if anew:
                    self._forget()
                elif self._damage:
                    raise SweepError(self._trouble)
                self._file = status.st_dev, status.st_ino
                if status.st_size == self._position:
                    self.behind = False
                    return anew
                file.seek(self._position)
                raw = file.read(most) + file.readline()
        except FileNotFoundError:
            gone = self._file is not None
            if gone:
                self._forget()
            return gone
        except OSError as error:
            raise SweepError(f"cannot read {self.path}: {error.strerror}") from None
        self.behind = self._position + len(raw) < status.st_size
        return self._take(raw) or anew

    def _goes_on(self, file: IO[bytes], status: os.stat_result) -> bool:
        """Say whether a file still begins with what was read, judged by its size and by the last line of that."""
        if self._file != (status.st_dev, status.st_ino) or status.st_size < self._position + len(self._damage):
            return False
        if status.st_size == self._position:
            return True
        file.seek(self._position - len(self._tail))
        return file.read(len(self._tail) + len(self._damage)) == self._tail + self._damage

    def _take(self, raw: bytes) -> bool:
        """Take the whole lines of `raw`, and say whether there were any."""
        *lines, _ = raw.split(b"\n")
        try:
            for line in lines:
                self._damage = line + b"\n"
                self._reading.take(line)
                self._position += len(self._damage)
                self._tail = self._damage
            self._damage = b""
        except SweepError as error:
            self._trouble = str(error)
            raise
        finally:
            if lines:
                self.contents = self._reading.contents
        return bool(lines)

    @property
    def running(self) -> bool:
        """Whether a process works on the sweep now."""
        return is_running(self.directory)


class GrowingFront:
    """The front of a journal that grows: only new records are compared, and only with the front.

    Attributes
    ----------
    records : tuple of TrialRecord
        As `autorank.front.front_of` gives them for all records of the contents taken last.
    """

    def __init__(self) -> None:
        self.records: tuple[TrialRecord, ...] = ()
        self._seen: tuple[TrialRecord, ...] = ()
        self._rules: object = None
        self._highest = _LOWEST

    def take(self, contents: JournalContents) -> bool:
        """Bring the front up to date, and say whether it is another."""
        header, before = contents.header, self.records
        rules = header and (header.objectives, header.constraints)
        if header is None or rules != self._rules or contents.records[: len(self._seen)] != self._seen:
            self.records, self._seen, self._rules, self._highest = (), (), rules, _LOWEST
        if header is not None:
            fresh = contents.records[len(self._seen) :]
            self._highest = max([self._highest, *(record.fidelity for record in eligible(fresh))])
            # Once beaten stays beaten: nothing that left the front can come back to it.
            self.records = front_of([*self.records, *fresh], header.objectives, header.constraints, self._highest)
            self._seen = contents.records
        return self.records != before


@dataclass(frozen=True, slots=True)
class SweepState:
    """How far a sweep is, from its journal.

    Attributes
    ----------
    stage : {"preparing", "running", "ended", "stopped", "reading"}
        Stopped: no process works on it, and it did not say why it ended: it was killed, or its machine was. Reading:
        its journal is still being read, and may say more.
    done, total : int
        Trials finished, and asked for.
    probes, failed, pruned : int
        Probes do not count as trials.
    seconds_left : float or None
        At the pace of the last trials; None while too few are known, and when it does not run.
    reason : str
        Why it ended.
    """

    stage: Literal["preparing", "running", "ended", "stopped", "reading"]
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
        asked = contents.header.config.get("trials")
        total = max(asked if type(asked) is int else 0, len(trials))
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
