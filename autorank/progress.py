"""What a person sees while a sweep runs: a bar, the best points so far, the time left; plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from autorank.types import TrialRecord


class Reporter(Protocol):
    """Where a sweep tells what it does."""

    def say(self, text: str) -> None:
        """Show one line that stays."""

    def step(self, what: str, done: int, total: int) -> None:
        """Show how far a part of the preparation or of the end is."""

    def trials(
        self, done: int, total: int, record: TrialRecord | None, front: Sequence[TrialRecord], probes: int = 0
    ) -> None:
        """Show the state of the search after a trial; probes are trials that do not count."""


class Silent:
    """Tells nothing."""

    def say(self, text: str) -> None:
        """Ignore."""

    def step(self, what: str, done: int, total: int) -> None:
        """Ignore."""

    def trials(
        self, done: int, total: int, record: TrialRecord | None, front: Sequence[TrialRecord], probes: int = 0
    ) -> None:
        """Ignore."""


class Terminal:
    """A rich progress bar on a terminal; one line per trial elsewhere (logs, CI).

    Use `open` to make one.
    """

    def __init__(self, progress: Any, console: Any) -> None:
        self._progress, self._console = progress, console
        self._task: Any = None
        self._what = ""
        self._began = time.monotonic()
        self._replayed = 0

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, what: str, done: int, total: int) -> None:
        """Move the bar of a step, which is a new one when `what` is."""
        if self._task is None or what != self._what:
            self._close()
            self._what = what
            self._task = self._progress.add_task(what, total=total, best="")
        self._progress.update(self._task, completed=done, total=total)
        if not self._console.is_terminal and done >= total:
            self.say(f"{what}: done")

    def trials(
        self, done: int, total: int, record: TrialRecord | None, front: Sequence[TrialRecord], probes: int = 0
    ) -> None:
        """Move the bar of the search and show the front so far."""
        best = f"front: {front_line(front)}" if front else ""
        if probes:
            best = f"{probes} probes  {best}"
        if self._task is None or self._what != "trials":
            self._close()
            self._what = "trials"
            self._began, self._replayed = time.monotonic(), done
            self._task = self._progress.add_task("trials", total=total, best=best)
        self._progress.update(self._task, completed=done, total=total, best=best)
        if record is not None and record.status == "failed":
            self.say(f"trial {record.number} failed: {record.reason}")
        if not self._console.is_terminal and record is not None:
            fresh = max(done - self._replayed, 1)
            left = (time.monotonic() - self._began) / fresh * max(total - done, 0)
            self.say(f"{done}/{total} {record.status}, about {duration(left)} left; {best}")

    def _close(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None


@contextmanager
def open_reporter(enabled: bool = True) -> Iterator[Reporter]:
    """Yield a reporter on standard error, or a silent one."""
    if not enabled:
        yield Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[best]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        yield Terminal(progress, console)


def front_line(front: Sequence[TrialRecord], most: int = 4) -> str:
    """Return the front in short: score at MACs kept for a few points spread along it."""
    scored = [record for record in front if record.score is not None]
    if len(scored) > most:
        last = len(scored) - 1
        scored = [scored[round(i * last / (most - 1))] for i in range(most)]
    return "  ".join(f"{record.score:.1f} at {record.kept.get('macs_kept', float('nan')):.2f}" for record in scored)


def duration(seconds: float) -> str:
    """Return a time in words, such as ``2 h 5 min`` or ``40 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
