"""Nothing that is read runs, no path leaves its directory, nothing listens beyond this machine, no secret is told."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import autorank
from autorank import AutorankError, formats
from autorank.compression import as_plan
from autorank.config import make_config, read_config
from autorank.dashboards.library import Library
from autorank.errors import ConfigError, ExportError, SweepError
from autorank.exportdir import check_target
from autorank.fitcache import FitCache
from autorank.following import Follower
from autorank.journal import FILE_NAME, Journal, read
from autorank.plan import apply
from autorank.prepare import _saved_latencies
from autorank.profiling import profile
from autorank.recover import Recovery, Teacher
from autorank.reuse import borrowed
from autorank.solvers import whitening
from autorank.space import read_space
from autorank.sweep import resume, task_of
from autorank.tasks import load_task, travel
from autorank.tasks.weights import read_weights
from autorank.tracking import Tracker
from autorank.trialfiles import load_weights, save_weights, weights_file
from autorank.types import Choice, Plan, TrialRecord
from tests import sweep_samples, tiny
from tests.secure_samples import UNSAFE, malicious

ROOT = Path(__file__).resolve().parents[1]
KINDS = tuple(malicious(Path("trace")))
PLAN = Plan.of({"3": Choice("channel_svd", (3,))})
Entrance = Callable[[bytes, Path], object]
ENTRANCES: dict[str, Entrance] = {}


def entrance(name: str) -> Callable[[Entrance], Entrance]:
    def keep(function: Entrance) -> Entrance:
        ENTRANCES[name] = function
        return function

    return keep


def put(data: bytes, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# Nothing is unpickled: each way in, given a malicious file; an AutorankError or a result, and no trace of the attack.


for _suffix in ("safetensors", "pt", "pth", "bin"):
    ENTRANCES[f"weights .{_suffix}"] = lambda data, folder, suffix=_suffix: read_weights(  # type: ignore[misc]
        put(data, folder / f"w.{suffix}")
    )
ENTRANCES["plan"] = lambda data, folder: as_plan(put(data, folder / "plan.json"))
ENTRANCES["space file"] = lambda data, folder: read_space(put(data, folder / "space.yaml"))
ENTRANCES["sweep file"] = lambda data, folder: read_config(put(data, folder / "sweep.yaml"), {})
ENTRANCES["layer statistics"] = lambda data, folder: whitening.load(put(data, folder / "stats.safetensors"))
ENTRANCES["layer latencies"] = lambda data, folder: _saved_latencies(put(data, folder / "latencies.json"))
ENTRANCES["journal"] = lambda data, folder: read(put(data, folder / FILE_NAME).parent)
ENTRANCES["journal, followed"] = lambda data, folder: Follower(put(data + b"\n", folder / FILE_NAME).parent).poll()
ENTRANCES["journal, reused"] = lambda data, folder: borrowed(
    put(data, folder / FILE_NAME).parent, sweep_samples.header()
)
ENTRANCES["sweep that is opened"] = lambda data, folder: autorank.open_sweep(put(data, folder / FILE_NAME).parent)


@entrance("the dashboard's sweeps")
def _library(data: bytes, folder: Path) -> object:
    put(data, folder / "sweeps" / "a" / FILE_NAME)
    library = Library([folder / "sweeps"])
    library.poll()
    return library.problems()


@entrance("plan of an export")
def _exported_plan(data: bytes, folder: Path) -> object:
    put(data, folder / "plan.json")
    return autorank.load(folder, tiny.network)


@entrance("weights of an export")
def _exported_weights(data: bytes, folder: Path) -> object:
    put(data, folder / "model.safetensors")
    (folder / "plan.json").write_text(json.dumps(PLAN.to_json()))
    return autorank.load(folder, tiny.network)


@entrance("weights of a trial")
def _trial_weights(data: bytes, folder: Path) -> object:
    assert load_weights(tiny.network(), PLAN, put(data, folder / "w.safetensors")) is None
    return None


@entrance("fit cache")
def _fits(data: bytes, folder: Path) -> object:
    model, cache = tiny.network(), FitCache(folder)
    spec = profile(model, (torch.zeros(1, 3, 8, 8),)).layer("3")
    choice, weight = PLAN.choices["3"], model[3].weight.detach()
    fmt = formats.get(choice.format)
    first, _ = cache.get_or_fit(fmt, weight, spec, choice, None, 0)
    (file,) = folder.glob("*.safetensors")
    put(data, file)
    again, info = FitCache(folder).get_or_fit(fmt, weight, spec, choice, None, 0)
    assert not info["hit"]
    assert all(torch.equal(first[name], again[name]) for name in first)
    return None


@entrance("teacher outputs")
def _teacher(data: bytes, folder: Path) -> object:
    task, recovery, path = tiny.task(), Recovery(steps=2, batch_size=8, features=0.0), folder / "teacher.npy"
    made = Teacher.build(task, recovery, 0)
    Teacher.build(task, recovery, 0, path=path)
    note = path.with_suffix(".json")
    kept = json.loads(note.read_text())
    put(data, path)
    note.write_text(json.dumps({**kept, "sha256": hashlib.sha256(data).hexdigest()}))  # as the attacker would
    again = Teacher.build(task, recovery, 0, path=path)
    assert made.rows is not None
    assert again.rows is not None
    assert np.array_equal(made.rows, again.rows)
    return None


@entrance("note of the teacher outputs")
def _note(data: bytes, folder: Path) -> object:
    task, recovery, path = tiny.task(), Recovery(steps=2, batch_size=8, features=0.0), folder / "teacher.npy"
    Teacher.build(task, recovery, 0, path=path)
    put(data, path.with_suffix(".json"))
    assert Teacher.build(task, recovery, 0, path=path).rows is not None
    return None


@entrance("parquet")
def _parquet(data: bytes, folder: Path) -> object:
    put(data, folder / "train.parquet")
    return load_task(model="python:tests.tiny:network", data=f"parquet:{folder}")


@entrance("bytes of an image")
def _image_bytes(data: bytes, folder: Path) -> object:
    table = pa.table({"image": [{"bytes": data, "path": None}] * 8, "label": [0, 1] * 4})
    pq.write_table(table, folder / "train.parquet")
    return load_task(model="python:tests.tiny:network", data=f"parquet:{folder}").size("train")


@entrance("image file")
def _image(data: bytes, folder: Path) -> object:
    for name in ("train/cat/1.png", "train/dog/1.png"):
        put(data, folder / name)
    return load_task(model="python:tests.tiny:network", data=f"imagefolder:{folder}").size("train")


@entrance("data of a task, sent to a worker")
def _travelled(data: bytes, folder: Path) -> object:
    return travel._mapped(str(put(data, folder / "x.npy")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ENTRANCES)
@pytest.mark.filterwarnings("ignore")
def test_a_malicious_file_does_not_run(name: str, kind: str, tmp_path: Path) -> None:
    trace = tmp_path / "attacked"
    data = malicious(trace)[kind]
    (folder := tmp_path / "in").mkdir()
    try:
        ENTRANCES[name](data, folder)
    except AutorankError as error:
        said = str(error)
    else:
        said = ""
    assert "\n" not in said
    assert not trace.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_the_attack_is_one(kind: str, tmp_path: Path) -> None:
    """The files above do run where somebody unpickles them."""
    trace = tmp_path / "attacked"
    data = malicious(trace)[kind]
    for unsafe in UNSAFE:
        try:
            unsafe(data)
        except Exception:
            continue
    assert trace.exists()


def test_an_extension_type_in_a_parquet_file_is_not_unpickled(tmp_path: Path) -> None:
    trace = tmp_path / "attacked"
    said = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": malicious(trace)["pickle 5"],
    }
    field = pa.field("label", pa.int64(), metadata=said)
    schema = pa.schema([field, pa.field("image", pa.struct([("bytes", pa.binary())]))])
    pq.write_table(pa.table([[0, 1], [{"bytes": b"x"}] * 2], schema=schema), tmp_path / "train.parquet")
    with pytest.raises(AutorankError):
        load_task(model="python:tests.tiny:network", data=f"parquet:{tmp_path}")
    assert not trace.exists()


DEFAULTS: dict[str, Any] = {"formats": ["channel_svd"], "whiten": ["both"], "ranks": {"macs_kept": [0.5]}}
SETTINGS: dict[str, Any] = {
    "executor": "inline",
    "space": {"version": 1, "defaults": DEFAULTS},
    "recovery": {"steps": 2, "batch_size": 16, "calibration": 32, "features": 0.0},
    "calibration": 32,
}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("security") / "sweep"
    autorank.search(tiny.task(), **SETTINGS, trials=3, strategy="knapsack", sweep_dir=directory, progress=False)
    return directory


@pytest.mark.parametrize("kind", ["pickle 5", "npy"])
@pytest.mark.filterwarnings("ignore")
def test_a_sweep_whose_files_were_all_replaced_goes_on_without_running_them(
    swept: Path, tmp_path: Path, kind: str
) -> None:
    copy = Path(shutil.copytree(swept, tmp_path / "sweep"))
    files = [path for path in copy.rglob("*") if path.is_file() and path.name not in (FILE_NAME, "lock")]
    for part in ("errors-", "stats-", "teacher", "models", "fits"):
        assert any(part in str(path.relative_to(copy)) for path in files), part
    for path in files:
        path.write_bytes(malicious(tmp_path / "attacked")[kind])
    result = resume(copy, tiny.task(), trials=4, progress=False)
    assert len(result.records) == 4
    assert result.model() is not None
    assert not (tmp_path / "attacked").exists()


# Who may unpickle: Ray's workers take the task from their own driver. Nobody else, whoever writes the code.
MAY_UNPICKLE = {"autorank/tasks/base.py", "autorank/trainable.py"}
PICKLERS = {"pickle", "cloudpickle", "joblib", "shelve", "marshal", "dill"}
LOADERS = {"load", "loads", "open", "Unpickler"}
SUSPECT = {*LOADERS, "unsafe_load", "full_load", "eval", "exec", "read_pickle"}


@dataclass(frozen=True)
class Call:
    """A call in the package's source."""

    where: str
    name: str
    node: ast.Call

    def given(self, keyword: str) -> object:
        return next((ast.literal_eval(k.value) for k in self.node.keywords if k.arg == keyword), None)


def calls() -> Iterator[Call]:
    for folder in ("autorank", "dashboards"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                named = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
                if isinstance(node, ast.Call) and named in SUSPECT:
                    yield Call(str(path.relative_to(ROOT)), ast.unparse(node.func), node)


def test_no_code_unpickles_what_it_reads() -> None:
    wrong = []
    for call in calls():
        library, _, function = call.name.rpartition(".")
        if library in PICKLERS and function in LOADERS:
            fine = call.where in MAY_UNPICKLE
        elif call.name == "torch.load":
            fine = call.given("weights_only") is True
        elif call.name in ("np.load", "numpy.load"):
            fine = call.given("allow_pickle") is False
        elif call.name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            fine = call.where == "autorank/yamlfile.py"
        elif call.name == "torch.export.load":
            fine = call.where in (
                "autorank/artifacts.py",
                "autorank/testing/format_layers.py",
            )  # what they have written
        else:
            fine = call.name not in ("eval", "exec", "torch.jit.load") and function != "read_pickle"
        if not fine:
            wrong.append(f"{call.where}:{call.node.lineno}: {call.name}")
    assert not wrong


def test_yaml_files_are_read_by_a_safe_loader() -> None:
    from autorank import yamlfile

    assert issubclass(yamlfile._Loader, yaml.SafeLoader)


# Paths


@pytest.mark.parametrize("lineage", ["../../../out", "/tmp/out", "a/b", "..", "0123456789ab/../x", "0123456789AB"])
def test_a_journal_cannot_name_a_file_elsewhere(lineage: str, tmp_path: Path) -> None:
    head = sweep_samples.header()
    record = replace(sweep_samples.records(head, 1)[0], lineage=lineage)
    with Journal(tmp_path) as journal:
        journal.write_header(head)
        journal.write_trial(record)
        journal.write_end("done")
    with pytest.raises(SweepError, match="line 2: not a journal entry"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/../../b", "\0", "x" * 400, "..", "C:\\x"])
def test_names_in_a_plan_are_no_part_of_a_path(name: str, tmp_path: Path) -> None:
    plan = Plan.from_json({"layers": {name: {"format": "channel_svd", "rank": [2]}}})
    record = TrialRecord(0, plan, sweep_samples.records(sweep_samples.header(), 1)[0].fidelity, "complete")
    file = weights_file(tmp_path, record)
    assert file.parent == tmp_path / "models"
    assert file.resolve().is_relative_to(tmp_path.resolve())


def test_an_export_does_not_replace_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("three years")
    (tmp_path / "export").symlink_to(tmp_path / "mine")
    for overwrite in (False, True):
        with pytest.raises(ExportError):
            check_target(tmp_path / "export", overwrite)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "three years"


def test_a_link_in_the_place_of_weights_is_taken_away_and_not_followed(tmp_path: Path) -> None:
    outside = put(b"mine", tmp_path / "outside.txt")
    link = tmp_path / "models" / "w.safetensors"
    link.parent.mkdir()
    link.symlink_to(outside)
    assert load_weights(tiny.network(), PLAN, link) is None
    link.symlink_to(outside)
    save_weights(apply(tiny.network(), PLAN)[0], link)
    assert outside.read_bytes() == b"mine"
    assert not link.is_symlink()


# Secrets and sockets, in a real sweep

TOKEN, PASSWORD, LOGIN = "tok-5ecretive-1", "pass-5ecretive-2", "login-5ecretive-3"


@dataclass(frozen=True)
class Run:
    """What a sweep with secrets in its settings left behind."""

    home: Path
    printed: str
    listening: frozenset[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    home = tmp_path_factory.mktemp("secrets")
    settings = {
        "model": "python:tests.secure_samples:Talkative",
        "model_args": {"token": TOKEN},
        "data": "python:tests.secure_samples:images",
        "data_args": {"password": "${IMAGES_PASSWORD}"},
        "tracking_uri": f"http://me:{LOGIN}@127.0.0.1:1/",
        "space": "space.yaml",
        "recovery": {"steps": 1, "batch_size": 8, "calibration": 16},
        "strategy": "random",
        "calibration": 16,
        "trials": 2,
        "workers": 1,
        "sweep_dir": str(home / "sweep"),
    }
    (home / "sweep.yaml").write_text(yaml.safe_dump(settings))
    space = {"version": 1, "dense": ["net.0", "net.8"], "defaults": {**DEFAULTS, "whiten": ["none"]}}
    (home / "space.yaml").write_text(yaml.safe_dump(space))
    with tempfile.TemporaryDirectory(prefix="ray-") as short:  # the names of sockets must be
        env = {**os.environ, "IMAGES_PASSWORD": PASSWORD, "RAY_TMPDIR": short, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", "from autorank.cli import main; main()", "search", str(home / "sweep.yaml")]
        with (home / "printed").open("wb") as out:
            process = subprocess.Popen(command, cwd=home, env=env, stdout=out, stderr=out, start_new_session=True)
            try:
                found: set[str] = set()
                while process.poll() is None:
                    found |= listening(process.pid)
                    time.sleep(0.2)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        shutil.copytree(short, home / "ray", ignore=lambda _, names: [n for n in names if "sockets" in n])
        yield Run(home, (home / "printed").read_text(), frozenset(found))


def listening(root: int) -> set[str]:
    """Return the local addresses on which a process and those below it listen, as the kernel lists them."""
    parents: dict[int, int] = {}
    sockets: dict[str, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                links = [os.readlink(file) for file in (entry / "fd").iterdir()]
            except OSError:
                continue
            sockets |= {link[8:-1]: int(entry.name) for link in links if link.startswith("socket:[")}
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and sockets.get(words[9]) in family:
                found.add(words[1].rpartition(":")[0])
    return found


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="only Linux lists sockets there")
def test_a_sweep_listens_on_loopback_alone(run: Run) -> None:
    assert run.listening, "Ray listens on something"
    assert run.listening <= LOOPBACK


def test_the_sweep_ran_and_told_its_trials_failures(run: Run) -> None:
    records = read(run.home / "sweep").records
    assert [record.status for record in records] == ["failed"] * 2, run.printed
    assert all("refused the token ***" in record.reason for record in records)
    assert "all 2 trials failed" in run.printed
    assert "Traceback" not in run.printed


@pytest.mark.parametrize("secret", [TOKEN, PASSWORD, LOGIN], ids=["argument", "environment", "tracking address"])
def test_no_file_and_no_line_tells_a_secret(run: Run, secret: str) -> None:
    given = {run.home / "sweep.yaml"}
    files = [path for path in run.home.rglob("*") if path.is_file() and path not in given]
    assert run.home / "sweep" / FILE_NAME in files
    assert run.home / "printed" in files
    assert any("ray" in path.parts for path in files)
    assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_a_sweep_whose_secret_was_not_kept_says_so_when_it_is_resumed(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"model_args.token holds a secret.*\$\{NAME\}"):
        resume(run.home / "sweep", progress=False, executor="inline")


def test_settings_from_the_environment_are_kept_by_name(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    header = read(run.home / "sweep").header
    assert header is not None
    assert header.config["data_args"] == {"password": "${IMAGES_PASSWORD}"}
    config = make_config({**header.config, "model_args": {"token": "x"}})
    monkeypatch.delenv("IMAGES_PASSWORD", raising=False)
    with pytest.raises(ConfigError, match=r"IMAGES_PASSWORD.*not set"):
        task_of(config)
    monkeypatch.setenv("IMAGES_PASSWORD", PASSWORD)
    assert task_of(config).size("train") > 0


@pytest.mark.parametrize(
    "uri",
    [
        f"http://me:{LOGIN}@127.0.0.1:1",
        f"postgresql://me:{LOGIN}@127.0.0.1:1/runs",
        f"postgresql://me:{LOGIN}/x@127.0.0.1:1/runs",
        f"nosuchdatabase://me:{LOGIN}@127.0.0.1/runs",
        f"sqlite:////proc/nowhere/x.db?password={LOGIN}",
    ],
    ids=["server", "database", "password with a slash", "unknown database", "database file"],
)
def test_a_store_that_cannot_be_reached_is_told_without_its_password(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(uri, tmp_path / "sweep")
    tracker.start(sweep_samples.header())
    tracker.close()
    assert tracker.problem
    printed = "".join(capfd.readouterr())
    for text in (tracker.problem, tracker.ui_command, caplog.text, printed):
        assert LOGIN not in text


@pytest.mark.parametrize(
    "message",
    [
        f"cannot connect to https://me:{LOGIN}@host/x",
        f"postgresql+psycopg2://me:{LOGIN}@h:5432/db is down",
        f"GET https://host/file?token={LOGIN}&x=1 failed",
        f"the server refused {PASSWORD}",
    ],
)
def test_errors_hide_secrets(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    text = str(SweepError(message))
    assert LOGIN not in text
    assert PASSWORD not in text


def test_the_working_directory_is_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", str(tmp_path))
    assert str(tmp_path) in str(SweepError(f"there is nothing in {tmp_path}"))
