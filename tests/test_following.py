"""Following a journal: what is said while it grows, is torn, is cut off, is replaced, or is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from autorank.errors import SweepError
from autorank.following import Follower
from autorank.journal import FILE_NAME, Journal, is_running, read
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


def test_each_byte_is_read_once(tmp_path: Path) -> None:
    grow(tmp_path, range(3))
    follower = Follower(tmp_path)
    follower.poll()
    path = tmp_path / FILE_NAME
    path.write_bytes(b"#" * path.stat().st_size)  # what was read is not looked at again
    with path.open("ab") as file:
        file.write(json.dumps({"event": "trial", "record": RECORDS[3].to_json()}).encode() + b"\n")
    assert follower.poll()
    assert follower.contents.records == RECORDS[:4]


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


def test_a_damaged_line_is_named_and_what_was_read_stays(tmp_path: Path) -> None:
    grow(tmp_path, range(2))
    follower = Follower(tmp_path)
    follower.poll()
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(b"nonsense\n")
    with pytest.raises(SweepError, match="line 4: not a journal entry"):
        follower.poll()
    assert len(follower.contents.records) == 2
    grow_again = json.dumps({"event": "trial", "record": RECORDS[2].to_json()}).encode() + b"\n"
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(grow_again)
    with pytest.raises(SweepError, match="line 4: not a journal entry"):  # not passed over in silence
        follower.poll()
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes().replace(b"nonsense\n", b""))
    assert follower.poll()
    assert follower.contents.records == RECORDS[:3]


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
