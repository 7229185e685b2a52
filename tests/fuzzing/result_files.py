"""The files that hold results: plan.json, and the journal of a sweep."""

from __future__ import annotations

import json
import tempfile
from contextlib import redirect_stdout, suppress
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from autorank.compression import as_plan
from autorank.following import Follower, SweepState
from autorank.journal import FILE_NAME, Journal, JournalContents, read
from autorank.plan import check as check_plan
from autorank.show import print_front
from autorank.sweep import open_sweep
from autorank.types import FrontPoint, Plan
from tests import sweep_samples
from tests.fuzzing.common import PLACES, SCALARS, TEXTS, WILD, Target, alike, as_json, attempt, held, near, tried
from tests.tiny import network

_OPTIONS = st.dictionaries(
    st.sampled_from(["first", "whiten"]), st.sampled_from(["h", "w", "input", 1, True]), max_size=2
)
_CHOICE: dict[str, st.SearchStrategy[Any]] = {
    "format": st.sampled_from(["channel_svd", "tucker2", "spatial_svd", "svd"]),
    "rank": st.lists(st.integers(1, 20), min_size=1, max_size=3),
    "options": _OPTIONS,
}
_LAYERS = st.sampled_from(["0", "3", "5", "8", "head.conv"])
_VALID_PLAN = st.fixed_dictionaries(
    {"layers": st.dictionaries(_LAYERS, st.fixed_dictionaries(_CHOICE), max_size=4)},
    optional={"seed": st.integers(0, 2**32 - 1)},
)
_CLOSE_PLAN = near(
    {
        "layers": st.dictionaries(_LAYERS | TEXTS, near({**_CHOICE, "weight_bits": st.none() | SCALARS}), max_size=4),
        "seed": st.integers(0, 9),
    }
)


def check_plan_file(data: bytes, valid: bool, folder: Path) -> bool:
    path = folder / "plan.json"
    path.write_bytes(data)
    plan: Plan | None = attempt(lambda: as_plan(path))
    if plan is None:
        held(not valid, "a valid file is refused")
        return False
    said = json.loads(data)
    for choice in said["layers"].values():
        for key in [key for key, value in choice.items() if value is None or value == {}]:
            del choice[key]
    held(alike(said, plan.to_json()), "a value is not what the file says")
    path.write_text(json.dumps(plan.to_json()))
    again = as_plan(path)
    held(again == plan and again.plan_id == plan.plan_id, "written again it is another plan")
    attempt(lambda: check_plan(network(), plan))
    return True


@cache
def _journals() -> tuple[bytes, ...]:
    """Journals of made-up sweeps, as autorank writes them."""
    found = []
    for seed in range(6):
        head = sweep_samples.header(direction=("max", "min")[seed % 2])
        done = sweep_samples.records(head, 2 + 3 * seed, seed)
        with tempfile.TemporaryDirectory() as folder, Journal(Path(folder)) as journal:
            journal.write_header(head)
            for record in done[: seed + 2]:
                journal.write_trial(record)
            journal.write_settings({"trials": 50 + seed})
            for record in done[seed + 2 :]:
                journal.write_trial(record)
            journal.write_front(sweep_samples.points(head, done), sweep_samples.DENSE)
            journal.write_end("all trials done", {"search": 1.5})
            found.append(journal.path.read_bytes())
    return tuple(found)


def _one_value(journal: bytes, line: float, steps: list[float], value: Any, rename: bool) -> bytes:
    """Change one value, or the name of one key, somewhere inside one line of a journal."""
    lines = journal.split(b"\n")[:-1]
    chosen = min(int(line * len(lines)), len(lines) - 1)
    entry = place = json.loads(lines[chosen])
    for step in steps:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = keys[min(int(step * len(keys)), len(keys) - 1)]
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or step is steps[-1]:
            if rename and isinstance(place, dict):
                place[str(value)] = place.pop(key)
            else:
                place[key] = value
            break
        place = inner
    lines[chosen] = as_json(entry).replace(b"\n", b" ")
    return b"\n".join([*lines, b""])


_VALID_JOURNAL = st.sampled_from(range(6)).map(lambda i: _journals()[i])
_CLOSE_JOURNAL = st.builds(
    _one_value, _VALID_JOURNAL, PLACES, st.lists(PLACES, min_size=1, max_size=7), WILD, st.booleans()
)


def check_journal(data: bytes, valid: bool, folder: Path) -> bool:
    (folder / FILE_NAME).write_bytes(data)
    contents: JournalContents | None = attempt(lambda: read(folder))
    if contents is None:
        held(not valid, "a valid journal is refused")
        attempt(lambda: open_sweep(folder))
        return False
    _nothing_ignored(data if contents.torn is None else data[: contents.torn], contents)
    follower = Follower(folder)
    attempt(follower.poll)
    if contents.torn is None and (data.endswith(b"\n") or not data):
        held(repr(follower.contents) == repr(contents), "following it gives something else than reading it")
    attempt(lambda: SweepState.of(contents, running=True))
    _rewritten(contents, folder / "again")
    with redirect_stdout(StringIO()):
        attempt(lambda: print_front(open_sweep(folder), "json"))
        attempt(lambda: print_front(open_sweep(folder), "table"))
    attempt(lambda: str(open_sweep(folder)))
    attempt(lambda: open_sweep(folder).config)
    return True


def _nothing_ignored(data: bytes, contents: JournalContents) -> None:
    """Hold what was read against the lines, read here by the standard library alone."""
    entries = [json.loads(line) for line in data.split(b"\n") if line.strip()]
    trials = {entry["record"]["number"]: entry["record"] for entry in entries if entry["event"] == "trial"}
    held(len(trials) == len(contents.records), "a trial is lost")
    for record in contents.records:
        said = {**trials[record.number], "plan": None, "plan_id": None}
        held(alike(said, {**record.to_json(), "plan": None, "plan_id": None}), "a trial is not what the line says")
        plan = {**trials[record.number]["plan"]}
        plan["layers"] = {name: _plain(choice) for name, choice in plan["layers"].items()}
        held(alike(plan, record.plan.to_json()), "a plan is not what the line says")
    headers = [entry["header"] for entry in entries if entry["event"] == "sweep"]
    if headers and contents.header is not None:
        said = {**headers[-1], "config": None}
        held(alike(said, {**contents.header.to_json(), "config": None}), "the header is not what the line says")


def _plain(choice: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in choice.items() if value is not None and value != {}}


def _rewritten(contents: JournalContents, folder: Path) -> None:
    def again() -> JournalContents:
        with Journal(folder) as journal:
            if contents.header is not None:
                journal.write_header(contents.header)
            for record in contents.records:
                journal.write_trial(record)
            if contents.dense is not None:
                points: tuple[FrontPoint, ...] = tuple(contents.measured.values())
                journal.write_front(points, contents.dense)
            if contents.ended:
                journal.write_end(contents.ended, contents.seconds)
        return read(folder)

    (folder / FILE_NAME).unlink(missing_ok=True)
    with suppress(UnicodeEncodeError):
        found = attempt(again)
        held(found is not None, "written again it is refused")
        held(repr(found.records) == repr(contents.records), "written again its trials are others")
        held(repr(found.measured) == repr(contents.measured), "written again its front is another")


PLAN_FILE = Target(
    "plan.json",
    tried(_VALID_PLAN.map(as_json), _CLOSE_PLAN.map(as_json), WILD.map(as_json)),
    check_plan_file,
)


JOURNAL = Target("journal", tried(_VALID_JOURNAL, _CLOSE_JOURNAL, WILD.map(as_json)), check_journal)
