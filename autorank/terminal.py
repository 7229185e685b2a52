"""The front as a small plot of characters, and a running sweep followed from another shell."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autorank.captions import cost_label, score_label
from autorank.errors import SweepError
from autorank.following import Follower, GrowingFront, SweepState
from autorank.front import eligible, front_of
from autorank.progress import duration, front_line
from autorank.types import SweepHeader, TrialRecord

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_WIDTH, _HEIGHT = 78, 17
_COLOURS = {"tried": "gray", "front": "cyan", "dense": "orange"}


def front_plot(
    header: SweepHeader,
    records: Sequence[TrialRecord],
    *,
    width: int = _WIDTH,
    height: int = _HEIGHT,
    colours: bool = False,
) -> str:
    """Return a plot of the score over the first cost: what was tried, the front, and the dense model.

    Parameters
    ----------
    header : SweepHeader
    records : sequence of TrialRecord
    width, height : int
        In characters.
    colours : bool
        Whether a terminal shows it.
    """
    import plotext

    axis = next((o.name for o in header.objectives if o.name != "score"), "macs_kept")
    front = sorted(
        (record.kept[axis], record.score)
        for record in front_of(records, header.objectives, header.constraints)
        if record.score is not None
    )
    tried = [(r.kept[axis], r.score) for r in eligible(records, ()) if r.score is not None]
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(width, height)
    series = (("tried", tried, "·"), ("front", front, "●"), ("dense", [(1.0, header.dense.score)], "◆"))
    for name, points, marker in series:
        if points:
            xs, ys = zip(*points, strict=True)
            plotext.scatter(xs, ys, marker=marker, color=_COLOURS[name], label=name)
    plotext.xlabel(cost_label(axis))
    plotext.title(score_label(header))
    drawn = str(plotext.build())
    text = drawn if colours else plotext.uncolorize(drawn)
    return "\n".join(line.rstrip() for line in text.splitlines())


def standard_output() -> Console:
    """Return standard output, wide enough for tables when it is not a terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=140)


def plot_for(
    console: Console, header: SweepHeader, records: Sequence[TrialRecord], height: int = _HEIGHT
) -> RenderableType:
    """Return the plot as a console shows it; nothing where its encoding has no such characters, or no room."""
    from rich.text import Text

    width = min(console.width, _WIDTH)
    if "utf" not in (console.encoding or "").lower() or width < 40:
        return Text("")
    colours = console.is_terminal and not console.no_color
    return Text.from_ansi(front_plot(header, records, width=width, height=height, colours=colours))


def state_line(state: SweepState, front: Sequence[TrialRecord] = ()) -> str:
    """Return the state of a sweep in one line."""
    if state.stage == "preparing":
        return "preparing: the dense model is measured, candidates are fitted"
    parts = [f"{state.done} of {state.total} trials"]
    parts += [
        f"{count} {what}"
        for count, what in ((state.probes, "probes"), (state.pruned, "stopped early"), (state.failed, "failed"))
        if count
    ]
    if state.seconds_left is not None and state.done < state.total:
        parts.append(f"about {duration(state.seconds_left)} left")
    stage = f"ended, {state.reason}" if state.stage == "ended" else state.stage
    return f"{stage}: {', '.join(parts)}" + (f"; front: {front_line(front)}" if front else "")


def watch(
    directory: Path, interval: float = 1.0, pause: Callable[[float], None] = time.sleep, console: Console | None = None
) -> SweepState:
    """Follow a sweep from its journal alone until it ends; in a terminal as a picture, else line by line.

    Parameters
    ----------
    directory : Path
    interval : float
        Seconds between looks.
    pause : callable
        Waits so long.
    console : Console, optional
        By default standard output.

    Returns
    -------
    SweepState
        The last one. Ctrl-C ends the watching, not the sweep.

    Raises
    ------
    SweepError
        There is no such sweep, or its journal is damaged.
    """
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    console = console or standard_output()
    follower, front = Follower(directory), GrowingFront()
    if not Path(directory).is_dir():
        raise SweepError(
            f"{directory} is not a sweep: there is no such directory (give the one that the search printed)"
        )

    def look() -> SweepState:
        # Asked before the journal is read: what ends in between is then seen at the next look.
        running = follower.running
        follower.poll()
        return SweepState.of(follower.contents, running)

    def shown(state: SweepState) -> tuple[str, list[RenderableType]]:
        contents = follower.contents
        if contents.header is None:
            return state_line(state), []
        front.take(contents)
        height = max(8, min(_HEIGHT, console.height - 4))
        return state_line(state, front.records), [plot_for(console, contents.header, contents.records, height)]

    state = look()
    said: tuple[object, ...] = ()
    try:
        with Live(console=console, auto_refresh=False, transient=False) as live:
            while True:
                line, more = shown(state)
                if console.is_terminal:
                    live.update(Group(*more, Text(line)), refresh=True)
                elif said != (state.stage, state.done, state.probes):
                    said = state.stage, state.done, state.probes
                    console.print(line, highlight=False, markup=False, soft_wrap=True)
                if state.stage in ("ended", "stopped"):
                    break
                pause(interval)
                state = look()
    except KeyboardInterrupt:
        console.print("no longer watched; the sweep goes on", markup=False)
    return state
