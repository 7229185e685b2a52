"""The journal of a sweep: append-only JSON lines, the truth from which everything else can be rebuilt."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from autorank.errors import SweepError
from autorank.types import DenseFigures, FrontPoint, SweepHeader, TrialRecord

FILE_NAME = "journal.jsonl"
LOCK_NAME = "lock"


@dataclass(frozen=True, slots=True)
class JournalContents:
    """What a journal says.

    Attributes
    ----------
    header : SweepHeader or None
        None when the sweep was stopped before its dense model was measured.
    records : tuple of TrialRecord
        In the order in which they were finished.
    front : tuple of mapping
        The last measured front: `FrontPoint.to_json` of each member.
    dense : DenseFigures or None
        The dense model, measured beside that front.
    ended : str
        Why the last run of the sweep ended; empty while it runs or after it was killed.
    seconds : mapping
        Wall time of the last run that ended by itself: prepare, search, front.
    damaged : int
        Lines that could not be read (at most the one that was being written when the driver was killed).
    """

    header: SweepHeader | None = None
    records: tuple[TrialRecord, ...] = ()
    front: tuple[Mapping[str, Any], ...] = ()
    dense: DenseFigures | None = None
    ended: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    damaged: int = 0
    good_bytes: int = field(default=0, repr=False)

    def front_points(self) -> tuple[FrontPoint, ...]:
        """Return the measured front with its records."""
        by_number = {record.number: record for record in self.records}
        return tuple(
            FrontPoint(
                by_number[point["number"]],
                point["test_score"],
                point["latency_ms"],
                point["latency_spread_ms"],
                tuple(point["slower_layers"]),
            )
            for point in self.front
            if point["number"] in by_number
        )


def read(sweep_dir: Path) -> JournalContents:
    """Read the journal of the sweep in `sweep_dir`.

    Raises
    ------
    SweepError
        If there is no journal, or a line other than the last is damaged.
    """
    path = Path(sweep_dir) / FILE_NAME
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise SweepError(
            f"{sweep_dir} is not a sweep: it has no {FILE_NAME} (give the directory that the search printed)"
        ) from None
    except OSError as error:
        raise SweepError(f"cannot read {path}: {error.strerror}") from None
    header: SweepHeader | None = None
    front: tuple[Mapping[str, Any], ...] = ()
    dense: DenseFigures | None = None
    ended = ""
    seconds: dict[str, float] = {}
    records: dict[int, TrialRecord] = {}
    lines = raw.split(b"\n")
    good = 0
    for position, line in enumerate(lines):
        if not line.strip():
            good += len(line) + 1
            continue
        try:
            entry = json.loads(line)
            event = entry["event"]
            if event == "sweep":
                header = SweepHeader.from_json(entry["header"])
            elif event == "trial":
                record = TrialRecord.from_json(entry["record"])
                records[record.number] = record
                front, dense, ended = (), None, ""
            elif event == "front":
                front, dense = tuple(entry["points"]), DenseFigures(**entry["dense"])
            elif event == "end":
                ended, seconds = str(entry["reason"]), dict(entry.get("seconds", {}))
            else:
                raise ValueError(f"unknown event {event!r}")
        except (ValueError, KeyError, TypeError) as error:
            if position == len(lines) - 1:
                return JournalContents(header, tuple(records.values()), front, dense, ended, seconds, 1, good)
            raise SweepError(
                f"{path}, line {position + 1}: not a journal entry ({type(error).__name__}: {error}); "
                "restore the file, or delete that line to run its trial again"
            ) from None
        good += len(line) + 1
    return JournalContents(header, tuple(records.values()), front, dense, ended, seconds, 0, min(good, len(raw)))


class Journal:
    """Writer of a sweep's journal; at most one at a time per sweep directory.

    Every entry is on disk (flushed and synced) before the method that wrote it returns.

    Parameters
    ----------
    sweep_dir : Path
        Made if it does not exist.

    Raises
    ------
    SweepError
        If the directory cannot be written, or another process holds it.
    """

    def __init__(self, sweep_dir: Path) -> None:
        self.directory = Path(sweep_dir)
        self.path = self.directory / FILE_NAME
        self._file: IO[bytes] | None = None
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Journal:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = (self.directory / LOCK_NAME).open("ab")
            _lock(self._lock, self.directory)
            self._file = self.path.open("ab")
        except OSError as error:
            self.close()
            raise SweepError(
                f"cannot write to sweep directory {self.directory}: {error.strerror or error}; "
                "give a writable --sweep-dir"
            ) from None
        except SweepError:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file and the lock."""
        for handle in (self._file, self._lock):
            if handle is not None:
                handle.close()
        self._file = self._lock = None

    def contents(self) -> JournalContents:
        """Read what is there, and cut off a last line that was only half written."""
        contents = read(self.directory)
        if contents.damaged:
            os.truncate(self.path, contents.good_bytes)
        elif self._file is not None and not self.path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")  # only the newline of the last entry was lost
        return contents

    def write_header(self, header: SweepHeader) -> None:
        """Write the first entry."""
        self._append({"event": "sweep", "header": header.to_json()})

    def write_trial(self, record: TrialRecord) -> None:
        """Write a finished trial."""
        self._append({"event": "trial", "record": record.to_json()})

    def write_front(self, points: Sequence[FrontPoint], dense: DenseFigures) -> None:
        """Write the measured front and the dense model beside it."""
        self._append({"event": "front", "points": [point.to_json() for point in points], "dense": asdict(dense)})

    def write_end(self, reason: str, seconds: Mapping[str, float] | None = None) -> None:
        """Write why this run of the sweep ended, and the wall time of its parts."""
        self._append({"event": "end", "reason": reason, "seconds": dict(seconds or {})})

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self._file is None:
            raise SweepError(f"the journal {self.path} is not open")
        line = json.dumps(_finite(entry), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise SweepError(
                f"cannot write {self.path}: {error.strerror or error}; all trials before are safe: "
                f"free the disk, then `autorank resume {self.directory}`"
            ) from None


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by null."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _lock(handle: IO[bytes], directory: Path) -> None:
    """Take the exclusive lock that ends with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: no lock, one driver is then the user's promise
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise SweepError(
            f"another autorank is running in {directory}; wait for it, stop it, or give another --sweep-dir"
        ) from None
