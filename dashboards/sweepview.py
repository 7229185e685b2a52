"""What is known of one sweep: a snapshot that never changes, and the reader that makes the next one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from autorank.captions import clean
from autorank.errors import AutorankError, SweepError, describe
from autorank.following import Follower, GrowingFront, SweepState
from autorank.front import recommended
from autorank.journal import FILE_NAME, JournalContents
from autorank.types import FrontPoint, SweepHeader, TrialRecord


@dataclass(frozen=True, eq=False)
class SweepView:
    """One sweep as it was at one moment; shared by all who look at it.

    Attributes
    ----------
    key : str
        Stands for the sweep in addresses: opaque, and the same as long as its directory stays where it is.
    name : str
        One line, from outside: never to be rendered as anything but text.
    directory : Path
    created : float
        Unix time; that of the journal until its header is read.
    contents : JournalContents
    state : SweepState
        Its stage is ``reading`` until the journal was read to its end.
    problem : str
        What is wrong now, in one line; then the rest is what was known before. Empty when nothing is.
    version : int
        Another one, and greater, with every change.
    points : tuple of FrontPoint
        The front, best score first.
    recommended : FrontPoint or None
    why : str
        Why it is recommended, or why none is.
    """

    key: str
    name: str
    directory: Path
    created: float
    contents: JournalContents = field(default_factory=JournalContents)
    state: SweepState = field(default_factory=lambda: SweepState("reading"))
    problem: str = ""
    version: int = 0
    points: tuple[FrontPoint, ...] = ()
    recommended: FrontPoint | None = None
    why: str = ""

    @property
    def header(self) -> SweepHeader | None:
        """The journal's header, with the dense latency that was measured at the end; None before there is one."""
        header = self.contents.header
        return header and header.measured(self.contents.dense)

    def record(self, number: int) -> TrialRecord | None:
        """Return the trial of that number."""
        return next((record for record in self.contents.records if record.number == number), None)

    def point(self, number: int) -> FrontPoint | None:
        """Return the point of the front of that number."""
        return next((point for point in self.points if point.record.number == number), None)


class Watched:
    """A sweep directory that is read as it grows; for one thread, which others ask for `view` alone.

    Parameters
    ----------
    key : str
    directory : Path
    next_version : callable
        Gives numbers that grow.
    """

    def __init__(self, key: str, directory: Path, next_version: Callable[[], int]) -> None:
        self._next_version = next_version
        self._follower, self._front = Follower(directory), GrowingFront()
        self._state, self._seen = SweepState("reading"), (False, True)
        self.view = SweepView(
            key, clean(directory.name), directory, _changed(self._follower.path), version=next_version()
        )

    @property
    def behind(self) -> bool:
        """Whether more is there than was read."""
        return self._follower.behind

    def trouble(self, problem: str) -> bool:
        """Show that the sweep cannot be reached, and what is known of it; say whether that is news."""
        return self._show(self.view.contents, self.view.state, problem)

    def look(self, most: int = -1) -> bool:
        """Read what is new, at most about so many bytes, and say whether there is another view now."""
        try:
            return self._look(most)
        except Exception as error:  # what a journal of another program says must not end the reading of the others
            return self.trouble(f"{self._follower.path} cannot be shown: {describe(error)}")

    def _look(self, most: int) -> bool:
        # Asked before the journal is read: what ends in between is then seen at the next look.
        running, problem = self._follower.running, ""
        try:
            self._follower.poll(most)
        except SweepError as error:
            problem = str(error)
        contents = self._follower.contents
        if contents.header is None and not problem and not self._follower.path.exists():
            problem = f"there is no {FILE_NAME} in {self.view.directory} any more"
        seen = (running, self.behind and not problem)
        if contents is not self.view.contents or seen != self._seen:
            self._state, self._seen = SweepState.of(contents, running), seen
            if seen[1]:
                self._state = replace(self._state, stage="reading", seconds_left=None)
        return self._show(contents, self._state, problem)

    def _show(self, contents: JournalContents, state: SweepState, problem: str) -> bool:
        before = self.view
        if contents is before.contents and (state, problem) == (before.state, before.problem):
            return False
        after = replace(before, contents=contents, state=state, problem=problem, version=self._next_version())
        self.view = after if contents is before.contents else self._with_front(after)
        return True

    def _with_front(self, view: SweepView) -> SweepView:
        header = view.contents.header
        self._front.take(view.contents)
        points = tuple(map(view.contents.point, self._front.records))
        if header is None:
            return replace(view, name=clean(view.directory.name), points=(), recommended=None, why="")
        best, why = None, ""
        try:
            found = recommended(header, self._front.records)
            best, why = view.contents.point(found.record), found.reason
        except AutorankError as error:
            why = str(error)
        began = header.created if isinstance(header.created, int | float) else math.nan
        created = float(began) if math.isfinite(began) else view.created
        name = clean(header.sweep_id) or clean(view.directory.name)
        return replace(view, name=name, created=created, points=points, recommended=best, why=why)


def _changed(path: Path) -> float:
    """Return when a file was last changed, in Unix time; 0 where nobody can say."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
