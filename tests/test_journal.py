"""The journal: nothing finished is lost, a torn last line is cut off, one driver at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autorank.errors import SweepError
from autorank.journal import FILE_NAME, Journal, read
from autorank.types import (
    Choice,
    Constraint,
    Cost,
    DenseFigures,
    Evaluation,
    Fidelity,
    FrontPoint,
    LayerResult,
    LeftAlone,
    Objective,
    Plan,
    SweepHeader,
    TrialRecord,
)

CHOICE = Choice("tucker2", (4, 8), (("whiten", "input"),))
HEADER = SweepHeader(
    "s1",
    1.5,
    {"trials": 3},
    "accuracy",
    "max",
    (Objective("score", "max"), Objective("macs_kept", "min")),
    (Constraint("macs_kept", "<=", 0.5),),
    Evaluation(88.0, 0.4, 500),
    Cost(1000, 100, 400),
    ({"name": "conv", "candidates": 3},),
    (LeftAlone("up", "ConvTranspose2d", "no format supports it", 9, 8),),
)


def record(number: int, **more: object) -> TrialRecord:
    fields: dict[str, object] = {
        "score": 87.5,
        "score_before": 80.0,
        "score_bn": 81.0,
        "cost": Cost(500, 50, 200, 1.5),
        "kept": {"macs_kept": 0.5, "params_kept": 0.5, "bytes_kept": 0.5},
        "layers": (LayerResult("conv", CHOICE, 0.1, 5, 6, 7, 8, output_error=0.05, full_rank=(16, 9)),),
        "curve": ((0, 1.0), (9, 0.5)),
        "seconds": {"fit": 0.1},
        "target": Fidelity(10),
        **more,
    }
    return TrialRecord(number, Plan.of({"conv": CHOICE}, number), Fidelity(10), "complete", **fields)  # type: ignore[arg-type]


def test_what_was_written_is_read_back_equal(tmp_path: Path) -> None:
    records = [record(0), record(1, score=None, reason="it diverged")]
    point = FrontPoint(records[0], 87.0, 1.2, 0.1, ("conv",))
    with Journal(tmp_path) as journal:
        journal.write_header(HEADER)
        for item in records:
            journal.write_trial(item)
        journal.write_front([point], DenseFigures(88.2, 2.0, 0.1))
        journal.write_end("all done")
    contents = read(tmp_path)
    assert contents.header == HEADER
    assert list(contents.records) == records
    assert contents.measured == {0: point}
    assert contents.dense == DenseFigures(88.2, 2.0, 0.1)
    assert contents.ended == "all done"


def test_layers_of_an_older_version_have_no_full_rank(tmp_path: Path) -> None:
    data = record(0).to_json()
    for layer in data["layers"]:
        del layer["full_rank"]
    (layer,) = TrialRecord.from_json(data).layers
    assert layer.full_rank is None
    assert layer.rank_kept is None


def test_what_was_measured_stays_known_after_later_trials_and_a_later_front(tmp_path: Path) -> None:
    first, second = FrontPoint(record(0), 87.0), FrontPoint(record(1), 86.0)
    with Journal(tmp_path) as journal:
        journal.write_header(HEADER)
        journal.write_trial(first.record)
        journal.write_front([first], DenseFigures(88.0))
        journal.write_end("all done")
        journal.write_trial(second.record)
    assert read(tmp_path).measured == {0: first}
    assert read(tmp_path).ended == ""
    with Journal(tmp_path) as journal:
        journal.write_front([second], DenseFigures(88.0))
    assert read(tmp_path).measured == {0: first, 1: second}


def test_settings_changed_by_a_resume_hold_from_then_on(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.write_header(HEADER)
        journal.write_settings({"trials": 9})
    header = read(tmp_path).header
    assert header is not None
    assert header.config == {"trials": 9}


@pytest.mark.parametrize("room", [0, 1, 100], ids=lambda n: f"{n} bytes left")
def test_a_full_disk_loses_only_the_entry_that_did_not_fit(tmp_path: Path, room: int) -> None:
    code = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from autorank.errors import SweepError
from autorank.journal import FILE_NAME, Journal
from tests.test_journal import HEADER, record
with Journal(Path(sys.argv[1])) as journal:
    journal.write_header(HEADER)
    journal.write_trial(record(0))
    size = (Path(sys.argv[1]) / FILE_NAME).stat().st_size + int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        journal.write_trial(record(1))
    except SweepError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    journal.write_trial(record(2))
"""
    root = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-c", code, str(tmp_path), root, str(room)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "all trials before are safe" in printed
    assert [r.number for r in read(tmp_path).records] == [0, 2]


@pytest.mark.parametrize("cut", [1, 10, 200], ids=lambda n: f"{n} bytes short")
def test_a_torn_last_line_costs_only_that_line(tmp_path: Path, cut: int) -> None:
    with Journal(tmp_path) as journal:
        journal.write_header(HEADER)
        for number in range(3):
            journal.write_trial(record(number))
    path = tmp_path / FILE_NAME
    os.truncate(path, path.stat().st_size - cut)
    torn = cut > 1  # one byte short is only the newline
    assert len(read(tmp_path).records) == (2 if torn else 3)
    with Journal(tmp_path) as journal:
        journal.contents()
        journal.write_trial(record(7))
    assert [r.number for r in read(tmp_path).records] == ([0, 1, 7] if torn else [0, 1, 2, 7])


def test_a_torn_last_line_is_cut_off_before_anything_is_written_behind_it(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.write_header(HEADER)
        journal.write_trial(record(0))
        journal.write_trial(record(1))
    os.truncate(tmp_path / FILE_NAME, (tmp_path / FILE_NAME).stat().st_size - 200)
    with Journal(tmp_path) as journal:
        journal.write_settings({"trials": 9})  # what a resume with more trials writes first
    contents = read(tmp_path)
    assert contents.header is not None
    assert contents.header.config["trials"] == 9
    assert [r.number for r in contents.records] == [0]


def test_damage_in_the_middle_is_named_with_its_line(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.write_header(HEADER)
        journal.write_trial(record(0))
        journal.write_trial(record(1))
    path = tmp_path / FILE_NAME
    lines = path.read_bytes().split(b"\n")
    lines[1] = b'{"event": "trial", "record": {"number": 0}}'
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(SweepError, match=r"line 2: not a journal entry"):
        read(tmp_path)


def test_a_nan_score_is_written_as_null_not_as_invalid_json(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.write_header(HEADER)
        journal.write_trial(
            record(0, loss=float("nan"), kept={"macs_kept": float("inf"), "params_kept": 0.5, "bytes_kept": 0.5})
        )
    assert read(tmp_path).records[0].loss is None


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from autorank.errors import SweepError
from autorank.journal import Journal
try:
    Journal(Path(sys.argv[1])).__enter__()
    print("taken")
except SweepError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    with Journal(tmp_path):
        refused = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "another autorank is running" in refused
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "taken"


def test_a_directory_without_a_journal_is_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="is not a sweep"):
        read(tmp_path)
