"""Following a journal: what is said while it grows, is torn, is cut off, is replaced, or is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from autorank.errors import SweepError
from autorank.following import Follower, GrowingFront
from autorank.front import front_of
from autorank.journal import FILE_NAME, Journal, JournalContents, is_running, read
from autorank.types import Constraint
from tests.sweep_samples import header, records

HEADER = header()
RECORDS = records(HEADER, 9)


def grow(directory: Path, numbers: range) -> None:
    with Journal(directory) as journal:
        for number in numbers:
            if number == 0:
                journal.write_header(HEADER)
            journal.write_trial(RECORDS[number])


def test_what_is_followed_is_what_is_read(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "sweep")
    assert not follower.poll()
    assert follower.contents.header is None
    for numbers in (range(3), range(3, 4), range(4, 9)):
        grow(tmp_path / "sweep", numbers)
        assert follower.poll()
        assert follower.contents == read(tmp_path / "sweep")
        assert not follower.poll()
    assert follower.contents.records == RECORDS


@pytest.mark.parametrize("size", [1, 7, 100, 4096])
def test_lines_that_come_in_pieces_wait_for_their_end(tmp_path: Path, size: int) -> None:
    grow(tmp_path / "whole", range(5))
    raw = (tmp_path / "whole" / FILE_NAME).read_bytes()
    (tmp_path / "part").mkdir()
    follower, path = Follower(tmp_path / "part"), tmp_path / "part" / FILE_NAME
    for end in range(size, len(raw) + size, size):
        path.write_bytes(raw[:end])  # the same file, longer
        follower.poll()
        assert len(follower.contents.records) == max(0, raw[:end].count(b"\n") - 1)
    assert follower.contents == read(tmp_path / "whole")


def test_what_was_read_is_not_read_again(tmp_path: Path) -> None:
    grow(tmp_path, range(3))
    follower = Follower(tmp_path)
    follower.poll()
    path = tmp_path / FILE_NAME
    *earlier, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"#" * len(b"".join(earlier)) + last)  # only by its last line is it known again
    with path.open("ab") as file:
        file.write(json.dumps({"event": "trial", "record": RECORDS[3].to_json()}).encode() + b"\n")
    assert follower.poll()
    assert follower.contents.records == RECORDS[:4]


@pytest.mark.parametrize("most", [1, 3000, 10**6])
def test_a_long_journal_can_be_read_in_parts(tmp_path: Path, most: int) -> None:
    grow(tmp_path, range(9))
    follower, polls = Follower(tmp_path), 1
    while follower.poll(most) and follower.behind:
        polls += 1
    assert follower.contents == read(tmp_path)
    assert polls == {1: 10, 10**6: 1}.get(most, polls)
    assert not follower.poll(most)
    assert not follower.behind


def test_a_journal_that_was_cut_off_replaced_or_removed_is_read_again(tmp_path: Path) -> None:
    grow(tmp_path, range(4))
    follower = Follower(tmp_path)
    follower.poll()
    path = tmp_path / FILE_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    assert follower.poll()
    assert len(follower.contents.records) == 2
    path.rename(tmp_path / "old")
    assert follower.poll()
    assert follower.contents.header is None
    grow(tmp_path, range(6))
    assert follower.poll()
    assert len(follower.contents.records) == 6


def test_a_journal_copied_over_is_read_again_however_long_it_is(tmp_path: Path) -> None:
    grow(tmp_path / "one", range(2))
    other = header("digits-2")
    with Journal(tmp_path / "two") as journal:
        journal.write_header(other)
        for record in records(other, 9, seed=1):
            journal.write_trial(record)
    follower = Follower(tmp_path / "one")
    follower.poll()
    path = tmp_path / "one" / FILE_NAME
    path.write_bytes((tmp_path / "two" / FILE_NAME).read_bytes())  # the same file, longer than what was read
    assert follower.poll()
    assert follower.contents == read(tmp_path / "two")


def test_a_half_line_that_a_resume_replaced_is_not_joined_to_what_follows(tmp_path: Path) -> None:
    grow(tmp_path, range(2))
    path = tmp_path / FILE_NAME
    with path.open("ab") as file:
        file.write(b'{"event":"trial","rec')
    follower = Follower(tmp_path)
    follower.poll()
    grow(tmp_path, range(2, 4))  # cuts the half line off first
    assert follower.poll()
    assert follower.contents.records == RECORDS[:4]


def test_a_damaged_line_is_named_and_what_stands_before_it_is_known(tmp_path: Path) -> None:
    grow(tmp_path, range(2))
    follower, path = Follower(tmp_path), tmp_path / FILE_NAME
    follower.poll()
    with path.open("ab") as file:
        for entry in (RECORDS[2], None, RECORDS[3]):
            line = json.dumps({"event": "trial", "record": entry.to_json()}).encode() if entry else b"nonsense"
            file.write(line + b"\n")
            file.flush()
            if not entry or entry is RECORDS[3]:  # what comes behind the damage is not passed off as all there is
                with pytest.raises(SweepError, match="line 5: not a journal entry"):
                    follower.poll()
    assert follower.contents.records == RECORDS[:3]
    path.write_bytes(path.read_bytes().replace(b"nonsense\n", b""))
    assert follower.poll()
    assert follower.contents.records == RECORDS[:4]


@pytest.mark.parametrize("objectives", [("score", "macs_kept"), ("score", "macs_kept", "latency_kept")], ids=len)
@pytest.mark.parametrize("step", [1, 7, 60])
def test_the_front_grows_to_what_it_is_when_worked_out_at_once(objectives: tuple[str, ...], step: int) -> None:
    head = header(objectives=objectives)
    done = records(head, 60, seed=step, mixed_fidelity=True)
    done += tuple(replace(record, number=100 + record.number) for record in done[::4])  # equal values: the first counts
    growing = GrowingFront()
    for end in range(step, len(done) + step, step):
        contents = JournalContents(head, done[:end])
        before = growing.records
        assert growing.take(contents) == (growing.records != before)
        assert growing.records == front_of(done[:end], head.objectives, head.constraints)
    shorter = JournalContents(head, done[:10])  # another journal
    growing.take(shorter)
    assert growing.records == front_of(done[:10], head.objectives, head.constraints)
    bounded = replace(head, constraints=(Constraint("macs_kept", "<=", 0.5),))
    growing.take(JournalContents(bounded, done))
    assert growing.records == front_of(done, head.objectives, bounded.constraints)
    growing.take(JournalContents())
    assert growing.records == ()


def test_it_is_known_whether_a_process_works_on_the_sweep(tmp_path: Path) -> None:
    assert not is_running(tmp_path / "nowhere")
    code = (
        "import sys, time; from pathlib import Path; from autorank.journal import Journal\n"
        "with Journal(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert is_running(tmp_path)
        with pytest.raises(SweepError, match="another autorank is running"), Journal(tmp_path):
            pass
        process.kill()
    assert not is_running(tmp_path)
    assert not Follower(tmp_path).running
