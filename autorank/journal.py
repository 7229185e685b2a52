"""The journal of a sweep: append-only JSON lines, the truth from which everything else can be rebuilt."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from autorank.errors import SweepError, describe
from autorank.types import DenseFigures, FrontPoint, SweepHeader, TrialRecord
from autorank.types.decoding import decoded, decoder, finite

FILE_NAME = "journal.jsonl"
LOCK_NAME = "lock"
_ATTEMPTS = 10
_KEYS = {
    "sweep": {"header"},
    "settings": {"config"},
    "trial": {"record"},
    "front": {"points", "dense"},
    "end": {"reason", "seconds"},
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class JournalContents:
    """What a journal says.

    Attributes
    ----------
    header : SweepHeader or None
        None when the sweep was stopped before its search began. Settings changed by a resume are laid over its own.
    records : tuple of TrialRecord
        In the order in which they were finished.
    measured : mapping
        Trial number → the final figures of every trial that was on a front when a run of the sweep ended.
    dense : DenseFigures or None
        The dense model, measured beside the last of these fronts.
    ended : str
        Why the last run of the sweep ended; empty while it runs or after it was killed.
    seconds : mapping
        Wall time of the last run that ended by itself: prepare, search, front.
    torn : int or None
        Byte at which a last line begins that was only half written; None when all is whole.
    """

    header: SweepHeader | None = None
    records: tuple[TrialRecord, ...] = ()
    measured: Mapping[int, FrontPoint] = field(default_factory=dict)
    dense: DenseFigures | None = None
    ended: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    torn: int | None = None

    def point(self, record: TrialRecord) -> FrontPoint:
        """Return a record of the front with its final measurements, where it has them."""
        return self.measured.get(record.number, FrontPoint(record))


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
    reading, position = Reading(path), 0
    lines = raw.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            reading.take(line)
        except SweepError:
            if number < len(lines):
                raise
            return replace(reading.contents, torn=position)
        position += len(line) + 1
    return reading.contents


class Reading:
    """What the lines of a journal come to, one after the other.

    Parameters
    ----------
    path : Path
        For messages.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._contents = JournalContents()
        self._records: dict[int, TrialRecord] = {}
        self._lines = 0

    @property
    def contents(self) -> JournalContents:
        """What the lines so far say."""
        return replace(self._contents, records=tuple(self._records.values()))

    def take(self, line: bytes) -> None:
        """Take the next line, without its end; SweepError when it is no entry."""
        self._lines += 1
        if not line.strip():
            return
        try:
            self._contents = _with(self._contents, self._records, json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise SweepError(
                f"{self.path}, line {self._lines}: not a journal entry ({describe(error)}); "
                "restore the file, or delete that line to run its trial again"
            ) from None


def _with(contents: JournalContents, records: dict[int, TrialRecord], entry: Mapping[str, Any]) -> JournalContents:
    """Return the contents with one more entry, a trial's record put into `records`; raises when it is no entry."""
    event = entry["event"]
    if unknown := entry.keys() - _KEYS.get(event, entry.keys()) - {"event"}:
        raise ValueError(f"unknown key {min(unknown)!r}")
    match event:
        case "sweep":
            return replace(contents, header=SweepHeader.from_json(entry["header"]))
        case "settings" if contents.header is not None:
            changed = decoder(Mapping[str, Any])(entry["config"])
            return replace(contents, header=contents.header.with_settings(changed))
        case "trial":
            record = TrialRecord.from_json(entry["record"])
            records[record.number] = record
            return replace(contents, ended="")
        case "front":
            points = [FrontPoint.from_json(point, records) for point in entry["points"]]
            measured = {**contents.measured, **{point.record.number: point for point in points}}
            return replace(contents, measured=measured, dense=decoded(DenseFigures, entry["dense"]))
        case "end":
            seconds = decoder(Mapping[str, float])(entry["seconds"])
            return replace(contents, ended=decoder(str)(entry["reason"]), seconds=seconds)
        case other:
            raise ValueError(f"unknown event {other!r}")


class Journal:
    """Writer of a sweep's journal; at most one at a time per sweep directory.

    Every entry is on disk (flushed and synced) before the method that wrote it returns.

    Parameters
    ----------
    sweep_dir : Path
        Made if it does not exist.

    Attributes
    ----------
    mended : str
        What was found damaged and mended when it was opened, in one line.
    written : callable
        Called after every entry with the size of the journal in bytes.

    Raises
    ------
    SweepError
        If the directory cannot be written, or another process holds it.
    """

    def __init__(self, sweep_dir: Path) -> None:
        self.directory = Path(sweep_dir)
        self.path = self.directory / FILE_NAME
        self._file: FileIO | None = None
        self._lock: IO[bytes] | None = None
        self.mended = ""
        self.written: Callable[[int], None] = lambda size: None

    def __enter__(self) -> Journal:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = (self.directory / LOCK_NAME).open("ab")
            _lock(self._lock, self.directory)
            # Unbuffered: what could not be written must not be tried again behind our back when the file is closed.
            self._file = self.path.open("ab", buffering=0)
            _sync(self.directory)  # else a crash of the machine may lose the name of a new file
            self._mend()
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
        """Read what is there; nothing yet is no error."""
        return read(self.directory)

    def _mend(self) -> None:
        """Cut off a last line that was only half written, before anything is written behind it."""
        contents = read(self.directory)
        if contents.torn is not None:
            os.truncate(self.path, contents.torn)
            self.mended = f"the last line of {self.path} was only half written and is cut off; its trial runs again"
        elif self._file is not None and self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")  # only the newline of the last entry was lost

    def write_header(self, header: SweepHeader) -> None:
        """Write the first entry."""
        self._append({"event": "sweep", "header": header.to_json()})

    def write_settings(self, config: Mapping[str, Any]) -> None:
        """Write the settings that a resumed sweep changes; they hold for every later resume."""
        self._append({"event": "settings", "config": dict(config)})

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
        line = _line(entry)
        size = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            try:
                self._file.truncate(size)  # no half line for the next entry to run into
            except OSError:  # nothing can be written any more: the next who opens the journal cuts the line off
                self._file.close()
                self._file = None
            mend = "free the disk" if error.errno in _FULL else "make it writable"
            raise SweepError(
                f"cannot write {self.path}: {error.strerror or error}; all trials before are safe: "
                f"{mend}, then `autorank resume {self.directory}`"
            ) from None
        self.written(size + len(line))


def _line(entry: Mapping[str, Any]) -> bytes:
    """Return an entry as a line; most have nothing that JSON lacks, and need not be gone through first."""
    try:
        text = json.dumps(entry, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError):
        text = json.dumps(finite(entry), separators=(",", ":"), allow_nan=False)
    return text.encode() + b"\n"


def _sync(directory: Path) -> None:
    """Bring a directory's list of names onto the disk, where directories can be opened."""
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _lock(handle: IO[bytes], directory: Path) -> None:
    """Take the exclusive lock that ends with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: no lock, one driver is then the user's promise
        return
    for attempt in range(_ATTEMPTS):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            # Somebody who only looks whether a sweep runs holds it for a moment.
            if attempt < _ATTEMPTS - 1:
                time.sleep(0.02)
    raise SweepError(
        f"another autorank is running in {directory}; wait for it, stop it, or give another --sweep-dir"
    ) from None


def is_running(directory: Path) -> bool:
    """Say whether a process writes to a sweep directory now; False also where locks cannot be asked for."""
    try:
        import fcntl

        with (directory / LOCK_NAME).open("rb") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
    except (ImportError, OSError):
        pass
    return False
