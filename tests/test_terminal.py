"""The front in a terminal, and a sweep watched from another process, from its journal alone."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from autorank import cli
from autorank.errors import SweepError
from autorank.following import SweepState
from autorank.front import eligible, front_of
from autorank.journal import Journal, JournalContents, read
from autorank.terminal import front_plot, plot_for, state_line, watch
from autorank.types import SweepHeader, TrialRecord
from tests.sweep_samples import header, records

HEADER = header()
RECORDS = records(HEADER, 30)

SWEEP = """
import sys, time
import autorank
from autorank.progress import Silent
from tests import tiny

class Slow(Silent):
    def trials(self, done, total, record, front, probes=0):
        print(done, flush=True)
        if done:
            time.sleep(float(sys.argv[2]))

autorank.search(tiny.task(), space={"version": 1, "defaults": {"formats": ["channel_svd"], "whiten": ["none"]}},
    strategy="random", trials=4, recovery={"steps": 0}, executor="inline", sweep_dir=sys.argv[1], progress=Slow())
"""


def marked(plot: str, marker: str) -> list[tuple[int, int]]:
    """Rows and columns of a marker inside the axes."""
    lines = [line for line in plot.splitlines() if line.rstrip().endswith("│")]
    return [(y, x) for y, line in enumerate(lines) for x, c in enumerate(line) if c == marker]


def test_the_plot_shows_what_was_tried_the_front_and_the_dense_model() -> None:
    plot = front_plot(HEADER, RECORDS, width=78, height=20)
    front = front_of(RECORDS, HEADER.objectives, HEADER.constraints)
    assert 0 < len(marked(plot, "●")) - 1 <= len(front)  # one in the legend; neighbours may share a place
    assert len(marked(plot, "·")) > 2
    assert len(eligible(RECORDS)) > len(front)
    assert "accuracy" in plot
    assert "MACs kept" in plot
    assert "\x1b" not in plot
    assert max(map(len, plot.splitlines())) <= 78
    assert len(plot.splitlines()) <= 20
    assert "\x1b" in front_plot(HEADER, RECORDS, colours=True)


def test_better_points_are_higher_and_dearer_ones_further_right() -> None:
    low, high = (
        replace(next(r for r in RECORDS if r.status == "complete"), number=n, score=s, kept={"macs_kept": k})
        for n, s, k in ((0, 60.0, 0.2), (1, 80.0, 0.6))
    )
    places = [p for p in marked(front_plot(HEADER, [low, high]), "●") if p[0] > 2]  # below the legend
    (y_high, x_high), (y_low, x_low) = sorted(places)
    assert y_high < y_low
    assert x_low < x_high


def test_nothing_is_drawn_where_the_characters_are_missing_or_there_is_no_room() -> None:
    narrow = Console(file=io.StringIO(), width=30)
    latin = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="latin-1"), width=100)
    for console in (narrow, latin):
        assert not str(plot_for(console, HEADER, RECORDS))


def finished(at: float, number: int = 0, probe: bool = False, status: str = "complete") -> TrialRecord:
    return replace(RECORDS[0], number=number, started=at, seconds={"fit": 2.0}, probe=probe, status=status)  # type: ignore[arg-type]


def planned(trials: int) -> SweepHeader:
    return replace(HEADER, config={**HEADER.config, "trials": trials})


@pytest.mark.parametrize(
    ("contents", "running", "expected"),
    [
        pytest.param(JournalContents(), True, SweepState("preparing"), id="before the first trial"),
        pytest.param(JournalContents(), False, SweepState("stopped"), id="killed before the first trial"),
        pytest.param(
            JournalContents(planned(10), tuple(finished(100 + 10.0 * n, n) for n in range(4))),
            True,
            SweepState("running", 4, 10, seconds_left=60.0),
            id="running: ten seconds a trial",
        ),
        pytest.param(
            JournalContents(planned(3), tuple(finished(100 + 10.0 * n, n, probe=n % 2 == 1) for n in range(3))),
            True,
            SweepState("running", 2, 3, probes=1, seconds_left=20.0),
            id="probes take time and do not count",
        ),
        pytest.param(
            JournalContents(planned(5), (finished(0, 0, status="failed"), finished(5, 1, status="pruned"))),
            False,
            SweepState("stopped", 2, 5, failed=1, pruned=1),
            id="killed",
        ),
        pytest.param(
            JournalContents(planned(1), (finished(0),), ended="all 1 trials done"),
            False,
            SweepState("ended", 1, 1, reason="all 1 trials done"),
            id="ended",
        ),
    ],
)
def test_state(contents: JournalContents, running: bool, expected: SweepState) -> None:
    assert SweepState.of(contents, running) == expected


def test_state_in_a_line() -> None:
    assert state_line(SweepState("running", 4, 10, 3, 1, 2, 61.0)) == (
        "running: 4 of 10 trials, 3 probes, 2 stopped early, 1 failed, about 1 min 1 s left"
    )
    assert state_line(SweepState("ended", 4, 4, reason="interrupted")) == "ended, interrupted: 4 of 4 trials"


def start(directory: Path, pause: float) -> subprocess.Popen[str]:
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(directory), str(pause)], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_a_running_sweep_is_followed_to_its_end(tmp_path: Path) -> None:
    directory = tmp_path / "s"
    directory.mkdir()
    written = io.StringIO()
    with start(directory, 0.5) as process:
        while not (directory / "lock").exists():
            assert process.poll() is None
            time.sleep(0.05)
        state = watch(directory, 0.05, console=Console(file=written, width=140))
        assert process.wait() == 0
    assert state.stage == "ended"
    assert state.done == state.total == 4
    lines = written.getvalue().splitlines()
    assert lines[0].startswith("preparing")
    assert "ended, all 4 trials done: 4 of 4 trials" in lines[-1]
    assert "front: " in lines[-1]
    counts = [int(line.split(": ")[1].split()[0]) for line in lines if line.startswith("running")]
    assert counts == sorted(set(counts))
    assert counts


def test_a_killed_sweep_is_said_to_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "s"
    with start(directory, 60) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() not in ("1", ""):
            pass
        process.send_signal(signal.SIGKILL)
    assert len(read(directory).records) >= 1
    assert watch(directory, console=Console(file=io.StringIO())).stage == "stopped"
    monkeypatch.setattr(sys, "argv", ["autorank", "watch", str(directory)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2


def test_ctrl_c_ends_the_watching_only(tmp_path: Path) -> None:
    written = io.StringIO()

    def interrupted(_seconds: float) -> None:
        raise KeyboardInterrupt

    with Journal(tmp_path) as journal:
        journal.write_header(HEADER)
        state = watch(tmp_path, pause=interrupted, console=Console(file=written, width=140))
    assert state.stage in ("running", "stopped")  # a lock of this very process may not be seen
    assert state.stage == "stopped" or "the sweep goes on" in written.getvalue()


def test_what_is_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="is not a sweep"):
        watch(tmp_path / "nowhere")


def test_in_a_terminal_the_picture_is_drawn(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.write_header(HEADER)
        for record in RECORDS:
            journal.write_trial(record)
        journal.write_end("all 30 trials done")
    written = io.StringIO()
    watch(tmp_path, console=Console(file=written, force_terminal=True, width=100, height=40))
    assert "●" in written.getvalue()
    assert "all 30 trials done" in written.getvalue()
