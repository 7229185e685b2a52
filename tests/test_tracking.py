"""What stands in a real MLflow store, read back by MLflow's own client, after every way a sweep can go."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from dataclasses import replace
from pathlib import Path

import pandas
import pytest

from autorank.front import front_of, recommend
from autorank.growth import hypervolumes
from autorank.mlflow_store import MlflowRuns
from autorank.mlflow_ui import default_store, ui_command
from autorank.run_inputs import datasets
from autorank.run_sync import SweepRuns, Wanted
from autorank.run_values import trial_name
from autorank.tracking import Tracker
from autorank.types import Choice, Plan
from tests.sweep_samples import DENSE, HOSTILE, SECRET, header, points, records

COUNT = 18
HEAD = header(sweep_id=f'it\'s "{HOSTILE}"')
HEAD = replace(
    HEAD,
    config={
        **HEAD.config,
        "model": f"python:https://me:{SECRET}@nets.zoo/x'%:make",
        "data": f"hf:https://me:{SECRET}@hub.example/digits?token={SECRET}",
    },
    fingerprint={
        "task": HOSTILE,
        "model": "abc",
        "train": {"size": 1038, "labels": "a"},
        "validation": {"size": 259, "labels": "b"},
        "test": {"size": 500, "labels": "c"},
    },
)
FIGURES = ("pareto", "hypervolume", "rank_map", "layers", "importance")
EXAMPLE = [("float32", (1, 1, 8, 8))]
DONE = records(HEAD, COUNT)
POINTS = points(HEAD, DONE)


class Store:
    """One MLflow database with the sweep of this file written live; read through MLflow's own client."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.uri = f"sqlite:///{directory}/mlflow.db"
        note = directory / "note.txt"
        note.write_text("kept")
        self.tracker = Tracker(None, directory / "sweep")
        self.tracker.start(HEAD, EXAMPLE)
        for record in DONE:
            self.tracker.log(record)
        self.tracker.finish(POINTS, [note, directory / "missing.txt"], dense=DENSE)
        self.tracker.close()

    def client(self):
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    def runs(self, sweep_id: str = HEAD.sweep_id):
        """Return the sweep's run and its trials by number."""
        client = self.client()
        found = client.search_runs([client.get_experiment_by_name("autorank").experiment_id], max_results=1000)
        own = [run for run in found if run.data.tags["autorank.sweep_id"] == sweep_id]
        parents = [run for run in own if run.data.tags["autorank.role"] == "sweep"]
        assert len(parents) == 1
        trials = [run for run in own if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
        assert len(trials) == len(own) - 1
        by_number = {int(run.data.tags["autorank.number"]): run for run in trials}
        assert len(by_number) == len(trials)
        return parents[0], by_number

    def files(self, run) -> dict[str, bytes]:
        folder = Path(urllib.request.url2pathname(urllib.parse.urlparse(run.info.artifact_uri).path))
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def rows(self) -> dict[str, int]:
        with sqlite3.connect(self.directory / "mlflow.db") as database:
            names = ("runs", "metrics", "params", "tags", "experiments", "latest_metrics")
            return {name: database.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in names}

    def dump(self, sweep_id: str):
        """Everything of a sweep that does not depend on when and where it was written."""
        client = self.client()

        def one(run):
            tags = {k: v for k, v in run.data.tags.items() if k not in ("mlflow.parentRunId", "autorank.sweep_id")}
            history = {
                k: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, k))
                for k in run.data.metrics
                if k != "on_front"  # its history tells when MLflow heard of a trial
            }
            history["on_front"] = run.data.metrics.get("on_front", 0.0)
            inputs = client.get_run(run.info.run_id).inputs
            history["data"] = sorted(one.dataset.digest for one in inputs.dataset_inputs)
            history["models"] = len(inputs.model_inputs)
            files = {name: len(data) for name, data in self.files(run).items() if name != "sweep.json"}
            small = {n: d for n, d in files.items() if not n.startswith(FIGURES) or n == "layers.json"}
            return run.info.status, run.info.end_time, tags, run.data.params, history, small, sorted(files)

        parent, trials = self.runs(sweep_id)
        dumped = {number: one(run) for number, run in trials.items()} | {"sweep": one(parent)}
        for tag in ("mlflow.runName", "autorank.dense_model"):
            dumped["sweep"][2].pop(tag)
        return dumped


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("a sweep's 100%"))


@pytest.fixture(scope="module")
def written(store):
    return store.runs()


def copy_of(sweep_id: str):
    return replace(HEAD, sweep_id=sweep_id)


def test_all_went_well(store):
    assert store.tracker.problem == ""


def test_one_run_per_trial_named_for_people(written):
    parent, trials = written
    assert set(trials) == {r.number for r in DONE}
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["autorank.state"] == "finished"
    for record in DONE:
        run = trials[record.number]
        assert run.info.run_name == trial_name(record)
        assert run.info.status == {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}[record.status]
        assert run.info.start_time == record.started * 1000
        assert run.info.end_time == round((record.started + sum(record.seconds.values())) * 1000)
        assert run.data.tags["status"] == record.status
        assert run.data.tags["fidelity"] == record.fidelity.label
        assert run.data.tags["plan_id"] == record.plan_id
    complete = next(r for r in DONE if r.status == "complete")
    assert re.fullmatch(rf"#{complete.number} 0\.\d\d MACs( \w+×\d)+( \+1)?", trial_name(complete))
    pruned, failed = (next(r for r in DONE if r.status == status) for status in ("pruned", "failed"))
    assert re.fullmatch(rf"#{pruned.number} 0\.\d\d MACs pruned( \w+×\d)+( \+1)?", trial_name(pruned))
    assert re.fullmatch(rf"#{failed.number} failed( \w+×\d)+( \+1)?", trial_name(failed))


def test_a_name_stays_short_whatever_the_plan():
    formats = [*("cp",) * 3, *("tucker2",) * 2, "spatial_svd", HOSTILE * 9]
    plan = Plan.of({f"conv{i}": Choice(name, (4,)) for i, name in enumerate(formats)})
    record = replace(DONE[0], number=3, plan=plan, status="complete", kept={"macs_kept": 0.4821}, probe=True)
    assert trial_name(record) == "#3 probe 0.48 MACs cp×3 tucker2×2 +2"
    long = replace(record, plan=Plan.of({"conv": Choice("x" * 200, (4,))}))
    assert len(trial_name(long)) == 64
    assert trial_name(replace(record, plan=Plan.of({}))) == "#3 probe 0.48 MACs dense"


def test_metrics_of_the_trials(written):
    _, trials = written
    volumes = dict(zip((r.number for r in DONE), hypervolumes(HEAD, DONE), strict=True))
    front = {p.record.number for p in POINTS}
    for record in DONE:
        metrics = dict(trials[record.number].data.metrics)
        expected = {f"seconds.{phase}": value for phase, value in record.seconds.items()}
        expected["hypervolume"] = volumes[record.number]
        if record.status != "failed":
            expected |= {
                "score": record.score,
                "score_before": record.score_before,
                "score_bn": record.score_bn,
                "loss": record.loss,
                **record.kept,
                "macs": record.cost.macs,
                "params": record.cost.params,
                "bytes": record.cost.bytes,
            }
        if record.layers:
            expected |= {
                "weight_error_max": max(layer.weight_error for layer in record.layers),
                "output_error_max": max(layer.output_error for layer in record.layers),
                "sensitivity_max": max(layer.sensitivity for layer in record.layers),
            }
            rises = [layer.loss_increase for layer in record.layers if layer.loss_increase is not None]
            expected |= {"loss_increase_max": max(rises)} if rises else {}
        if record.curve:
            expected["tune_loss"] = record.curve[-1][1]
        if record.number in front:  # what was measured at the end comes on top
            expected.pop("latency_kept")
            for name in ("test_score", "latency_ms", "latency_spread_ms", "latency_kept", "slower_layers"):
                assert metrics.pop(name, None) is not None
        assert metrics.pop("on_front", 0.0) == (record.number in front)
        assert metrics == expected


def test_fine_tune_curve_has_its_steps(store, written):
    record = next(r for r in DONE if r.curve)
    history = store.client().get_metric_history(written[1][record.number].info.run_id, "tune_loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == list(record.curve)


def test_artifacts_of_the_trials(store, written):
    for record in DONE:
        files = store.files(written[1][record.number])
        assert set(files) == {"plan.json", "layers.json"}
        assert Plan.from_json(json.loads(files["plan.json"])) == record.plan
        assert len(json.loads(files["layers.json"])["data"]) == len(record.layers)


def test_layer_table_is_one_for_mlflow(store, written):
    record = next(r for r in DONE if r.status == "complete")
    run_id = written[1][record.number].info.run_id
    client = store.client()
    path = client.download_artifacts(run_id, "layers.json", str(store.directory))
    assert pandas.read_json(path, orient="split")["layer"].tolist() == [layer.name for layer in record.layers]
    tables = json.loads(written[1][record.number].data.tags["mlflow.loggedArtifacts"])
    assert tables == [{"path": "layers.json", "type": "table"}]


def test_failed_trials_say_why(written):
    for record in (r for r in DONE if r.status == "failed"):
        tags = written[1][record.number].data.tags
        assert tags["reason"].startswith("the loss became NaN at step 12")


def test_hypervolume_over_trials(store, written):
    history = store.client().get_metric_history(written[0].info.run_id, "hypervolume")
    assert {m.step: m.value for m in history} == pytest.approx(dict(enumerate(hypervolumes(HEAD, DONE), 1)))
    assert len(history) == COUNT


def test_front_is_tagged_and_measured(written):
    parent, trials = written
    front = {p.record.number: p for p in POINTS}
    best = recommend([p.record for p in POINTS], HEAD.dense.score, "max", 1.0, HEAD.objectives).record.number
    assert parent.data.tags["autorank.recommended"] == str(best)
    assert {n for n, run in trials.items() if "recommended" in run.data.tags} == {best}
    assert {n for n, run in trials.items() if run.data.tags.get("front") == "true"} == set(front)
    assert {n for n, run in trials.items() if "test_score" in run.data.metrics} == set(front)
    for number, point in front.items():
        run = trials[number]
        assert run.data.metrics["test_score"] == point.test_score
        assert run.data.metrics["latency_ms"] == point.latency_ms
        assert run.data.metrics["latency_kept"] == pytest.approx(point.latency_ms / DENSE.latency_ms)
        assert run.data.tags["slower_layers"] == (", ".join(point.slower_layers) or "none")


def test_members_of_the_front_can_be_searched_for_and_come_first_when_sorted(store, written):
    client = store.client()
    experiment = written[0].info.experiment_id
    front = [p.record.number for p in POINTS]
    mine = f"tags.`mlflow.parentRunId` = '{written[0].info.run_id}'"
    cheap = client.search_runs([experiment], f"{mine} and tags.front = 'true'", order_by=["metrics.macs_kept"])
    by_cost = sorted(POINTS, key=lambda p: p.record.kept["macs_kept"])
    assert [int(run.data.tags["autorank.number"]) for run in cheap] == [p.record.number for p in by_cost]
    first = client.search_runs([experiment], mine, order_by=["metrics.on_front DESC"])[: len(front)]
    assert {int(run.data.tags["autorank.number"]) for run in first} == set(front)


def test_data_are_inputs_of_the_runs(store, written):
    parent, trials = written

    def said(run):
        return {one.tags[0].value: one.dataset for one in store.client().get_run(run.info.run_id).inputs.dataset_inputs}

    data = said(parent)
    assert set(data) == {"training", "validation", "test"}
    assert len({one.digest for one in data.values()}) == 3
    for context, size in (("training", 1038), ("validation", 259), ("test", 500)):
        assert (data[context].name, json.loads(data[context].profile)) == (HOSTILE, {"num_rows": size})
    from mlflow.data import get_source
    from mlflow.types.schema import Schema

    source = get_source(data["validation"])
    assert (source.path, source.split) == ("https://hub.example/digits?token=***", "validation")
    schema = Schema.from_json(json.loads(data["training"].schema)["mlflow_tensorspec"]["features"])
    assert schema.inputs[0].shape == (-1, 1, 8, 8)
    assert set(said(trials[DONE[0].number])) == {"training", "validation"}


@pytest.mark.parametrize(
    ("spec", "kind", "content"),
    [
        ("digits", "code", {"tags": {"split": "test", "data": "digits"}}),
        ("parquet:/data/cifar", "local", {"uri": "/data/cifar"}),
        ("imagefolder:/data/pets", "local", {"uri": "/data/pets"}),
        (None, "code", {"tags": {"split": "test", "made by": "a task made in Python"}}),
    ],
)
def test_where_data_come_from_is_said_in_words_that_mlflow_reads(spec, kind, content):
    from mlflow.data.dataset_source_registry import get_dataset_source_from_json

    data = datasets(replace(HEAD, config={**HEAD.config, "data": spec}))[-1]
    assert (data.context, data.source_type, json.loads(data.source)) == ("test", kind, content)
    assert get_dataset_source_from_json(data.source, kind).to_dict() == content


def test_a_sweep_without_a_fingerprint_names_no_data():
    assert datasets(replace(HEAD, fingerprint={})) == ()


def test_the_dense_model_is_an_input_of_the_runs(store, written):
    parent, trials = written
    client = store.client()
    (model,) = client.get_run(parent.info.run_id).inputs.model_inputs
    assert client.get_run(trials[DONE[0].number].info.run_id).inputs.model_inputs[0].model_id == model.model_id
    found = client.get_logged_model(model.model_id)
    assert str(found.status) == "READY"
    assert found.name == "dense python-https-nets-zoo-x-make"
    assert found.source_run_id == parent.info.run_id
    assert found.params["macs"] == str(HEAD.dense_cost.macs)
    assert {m.key: m.value for m in found.metrics} == {"dense_score": HEAD.dense.score, "dense_loss": HEAD.dense.loss}
    own = client.search_logged_models([parent.info.experiment_id], f"source_run_id = '{parent.info.run_id}'")
    assert len(own) == 1


def test_sweep_says_what_it_is(written):
    data = written[0].data
    assert data.params["recovery.steps"] == "100"
    assert data.params["metric"] == "accuracy"
    assert len(data.params["space"]) == 500
    assert data.tags["version.torch"] == "2.13.0"
    assert data.metrics["dense_score"] == HEAD.dense.score
    assert data.metrics["dense_macs"] == HEAD.dense_cost.macs
    assert data.metrics["dense_test_score"] == DENSE.test_score


def test_artifacts_of_the_sweep(store, written):
    files = store.files(written[0])
    assert set(files) == {
        "sweep.json", "front.json", "front.csv", "layers.json", "files/note.txt",
        *(f"{name}.{kind}" for name in FIGURES for kind in ("html", "png")),
    }  # fmt: skip
    for name in FIGURES:
        assert files[f"{name}.html"].startswith(b"<!DOCTYPE html>")
        assert files[f"{name}.html"].rstrip().endswith(b"</html>")
        assert files[f"{name}.png"].startswith(b"\x89PNG")
    assert json.loads(files["layers.json"])["data"]
    assert json.loads(files["sweep.json"])["metric"] == "accuracy"
    table = json.loads(files["front.json"])
    assert [row[0] for row in table["data"]] == [p.record.number for p in POINTS]
    assert len(files["front.csv"].decode().splitlines()) == len(POINTS) + 1


def test_no_secret_stands_anywhere(store):
    for path in store.directory.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path.name


def test_database_is_in_write_ahead_mode(store):
    with sqlite3.connect(store.directory / "mlflow.db") as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_global_state_of_mlflow_is_untouched(store):
    import mlflow

    assert mlflow.active_run() is None
    assert mlflow.get_tracking_uri() != store.uri
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_catching_up_twice_writes_nothing(store):
    before, rows = store.dump(HEAD.sweep_id), store.rows()
    tracker = Tracker(store.uri, store.directory)
    note = [store.directory / "note.txt"]
    tracker.start(HEAD)
    tracker.finish(POINTS, note, dense=DENSE)  # no record logged: nothing to take away either
    tracker.close()
    other = Tracker(store.uri, store.directory)
    other.catch_up(HEAD, DONE, POINTS, dense=DENSE)
    assert other.catch_up(HEAD, DONE, POINTS, dense=DENSE) == 0
    other.close()
    assert store.rows() == rows
    assert store.dump(HEAD.sweep_id).keys() == before.keys()


def test_front_is_untagged_when_it_is_beaten(store):
    head = copy_of("grows")
    tracker = Tracker(store.uri, store.directory)
    beaten = POINTS[0].record
    better = replace(beaten, number=100, score=beaten.score + 0.1, started=beaten.started + 1000)
    for done in (DONE[:4], DONE, (*DONE, better)):
        assert tracker.catch_up(head, done, ()) > 0
        parent, trials = store.runs("grows")
        tagged = {number for number, run in trials.items() if "front" in run.data.tags}
        assert tagged == {r.number for r in front_of(done, HEAD.objectives)}
        assert (beaten.number in tagged) == (done is DONE or (beaten in done and better not in done))
        assert parent.info.status == "RUNNING"
    tracker.close()
    parent, _ = store.runs("grows")
    assert (parent.info.status, parent.data.tags["autorank.state"]) == ("KILLED", "stopped")


def test_finished_sweep_can_be_resumed(store):
    head = copy_of("resumed")
    first = Tracker(store.uri, store.directory)
    assert first.catch_up(head, DONE[:6], points(HEAD, DONE[:6]), dense=DENSE) == 7
    first.close()
    assert store.runs("resumed")[0].info.status == "FINISHED"
    second = Tracker(store.uri, store.directory)
    second.start(head)
    second.catch_up(head, DONE[:6], ())
    assert store.runs("resumed")[0].info.status == "RUNNING"
    for record in DONE[6:]:
        second.log(record)
    second.finish(POINTS, [store.directory / "note.txt"], dense=DENSE)
    second.close()
    resumed, straight = store.dump("resumed"), store.dump(HEAD.sweep_id)
    stale = {p.record.number for p in points(HEAD, DONE[:6])} - {p.record.number for p in POINTS}
    for key in straight.keys() - stale - {"sweep"}:
        assert resumed[key][0:2] == straight[key][0:2]
        assert resumed[key][2].get("front") == straight[key][2].get("front")
    assert resumed["sweep"][4]["hypervolume"] == straight["sweep"][4]["hypervolume"]
    assert resumed["sweep"][6] == straight["sweep"][6]


def test_trial_that_was_run_again_replaces_the_old_one(store):
    head = copy_of("mended")
    tracker = Tracker(store.uri, store.directory)
    tracker.catch_up(head, DONE[:3], ())
    again = replace(DONE[0], plan=Plan(seed=9), started=DONE[0].started + 1000)
    assert tracker.catch_up(head, (again, *DONE[1:3]), ()) > 0
    tracker.close()
    assert store.runs("mended")[1][again.number].data.tags["plan_id"] == again.plan_id


class BreakingRuns(MlflowRuns):
    """A real store that goes away after so many writings."""

    def __init__(self, uri: str, left: int) -> None:
        super().__init__(uri, "autorank")
        self.left = left

    def _spend(self):
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("gone")


def _breaking(name):
    def method(self, *args, **kwargs):
        self._spend()
        return getattr(MlflowRuns, name)(self, *args, **kwargs)

    return method


for _name in ("create", "write", "dense", "inputs", "drop_tag", "files", "set_status", "delete"):
    setattr(BreakingRuns, _name, _breaking(_name))


BROKEN = DONE[:3]


def final_of(sweep_id: str) -> Wanted:
    return Wanted(copy_of(sweep_id), BROKEN, points(HEAD, BROKEN), DENSE, state="finished")


@pytest.fixture(scope="module")
def unbroken(store):
    final = final_of("unbroken")
    SweepRuns(runs := BreakingRuns(store.uri, 1000), final.header).sync(final, draw=True)
    return store.dump("unbroken"), 1000 - runs.left


@pytest.mark.parametrize("share", [0, 0.05, 0.12, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95])
def test_writing_that_broke_off_anywhere_is_completed(store, unbroken, share):
    whole, writings = unbroken
    final = final_of(f"broken-{share}")
    with pytest.raises(ConnectionError, match="gone"):
        SweepRuns(BreakingRuns(store.uri, int(share * writings)), final.header).sync(final, draw=True)
    SweepRuns(MlflowRuns(store.uri, "autorank"), final.header).sync(final, draw=True)
    again = SweepRuns(MlflowRuns(store.uri, "autorank"), final.header)
    again.sync(final, draw=True)
    assert not again.touched
    assert store.dump(final.header.sweep_id) == whole


KILLED = """
import os, signal, sys, time
from pathlib import Path
from autorank.tracking import Tracker
from tests.test_tracking import DONE, copy_of
tracker = Tracker(sys.argv[1], Path(sys.argv[2]))
tracker.start(copy_of("killed"))
for record in DONE:
    tracker.log(record)
while tracker._tried == 0 and not any(Path(sys.argv[2], "mlartifacts").rglob("layers.json")):
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def run_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[1]
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=root, check=False)


def test_killed_driver_is_caught_up(store, tmp_path):
    done = run_python(KILLED, f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stderr == ""
    killed = Store.__new__(Store)
    killed.directory, killed.uri = tmp_path, f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker(killed.uri, tmp_path)
    assert tracker.catch_up(copy_of("killed"), DONE, POINTS, dense=DENSE) > 0
    assert tracker.catch_up(copy_of("killed"), DONE, POINTS, dense=DENSE) == 0
    tracker.close()
    caught_up, straight = killed.dump("killed"), store.dump(HEAD.sweep_id)
    for number in straight.keys() - {"sweep"}:
        assert caught_up[number] == straight[number]


QUIET = """
import sys
from pathlib import Path
from autorank.tracking import Tracker
from tests.sweep_samples import header, records
assert "mlflow" not in sys.modules
head = header()
tracker = Tracker(None, Path(sys.argv[1], "sweep"))
tracker.start(head)
for record in records(head, 3):
    tracker.log(record)
tracker.finish([])
tracker.close()
assert not tracker.problem, tracker.problem
assert "matplotlib.pyplot" not in sys.modules
"""


def test_a_sweep_prints_nothing(tmp_path):
    done = run_python(QUIET, str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {path.name for path in tmp_path.iterdir()} >= {"mlflow.db", "mlartifacts"}


TOGETHER = """
import sys
from pathlib import Path
from autorank.tracking import Tracker
from tests.sweep_samples import header, points, records
head = header(sweep_id=Path(sys.argv[1]).name)
done = records(head, 12)
tracker = Tracker(None, Path(sys.argv[1]))
import mlflow
print("ready", flush=True)
sys.stdin.readline()
tracker.start(head)
for record in done:
    tracker.log(record)
tracker.finish(points(head, done))
tracker.close()
sys.exit(tracker.problem or 0)
"""


def test_sweeps_side_by_side_make_and_fill_one_database_at_once(tmp_path):
    names = ("first", "second")
    root = Path(__file__).resolve().parents[1]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(tmp_path / name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        for name in names
    ]
    for process in running:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    ended = [process.communicate() for process in running]
    assert [(process.returncode, *said) for process, said in zip(running, ended, strict=True)] == [(0, "", "")] * 2
    both = Store.__new__(Store)
    both.directory, both.uri = tmp_path, f"sqlite:///{tmp_path}/mlflow.db"
    for name in names:
        parent, trials = both.runs(name)
        assert parent.info.status == "FINISHED"
        assert len(trials) == 12


def test_default_store_is_beside_the_sweep(tmp_path):
    sweep = tmp_path / "sweeps" / "one"
    shared = f"sqlite:///{tmp_path}/sweeps/mlflow.db"
    assert default_store(sweep) == shared  # nothing is there yet
    sweep.mkdir(parents=True)
    assert default_store(sweep) == shared
    assert default_store(os.path.relpath(sweep)) == shared
    (sweep / "mlflow.db").touch()
    assert default_store(sweep) == f"sqlite:///{sweep}/mlflow.db"


SHUT = """
import os, sys
from pathlib import Path
from autorank.mlflow_ui import default_store
if os.geteuid() == 0:
    os.setuid(65534)  # root may write anywhere
print(default_store(Path(sys.argv[1])))
"""


def test_default_store_is_in_the_sweep_where_nothing_may_be_written_beside_it():
    with tempfile.TemporaryDirectory() as place:  # pytest's own directories are shut to others than root
        sweep = Path(place).resolve() / "one"
        sweep.mkdir()
        Path(place).chmod(0o555)
        assert run_python(SHUT, str(sweep)).stdout == f"sqlite:///{sweep}/mlflow.db\n"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_server_that_is_away_is_told_once_without_its_password(tmp_path, caplog):
    caplog.set_level(logging.INFO, "autorank")
    tracker = Tracker(f"http://me:{SECRET}@127.0.0.1:{free_port()}", tmp_path)
    tracker.start(HEAD)
    for record in DONE:
        tracker.log(record)
    tracker.finish(POINTS, [])
    assert tracker.catch_up(HEAD, DONE, POINTS) == 0
    tracker.close()
    warnings = [r.getMessage() for r in caplog.records if r.name == "autorank" and r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "connection refused" in warnings[0]
    assert "\n" not in warnings[0]
    assert SECRET not in caplog.text + tracker.problem + tracker.ui_command


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("sqlite:////dev/null/x/mlflow.db", "not a directory"),
        ("nonsense://somewhere", "nonsense"),
        (f"postgresql://me:{SECRET}@127.0.0.1:1/db", ""),
    ],
    ids=["no-directory", "unknown-scheme", "database-driver-missing-or-down"],
)
def test_address_that_cannot_work_stops_nothing(uri, said, tmp_path):
    tracker = Tracker(uri, tmp_path)
    tracker.start(HEAD)
    tracker.log(DONE[0])
    tracker.finish([])
    tracker.close()
    assert said in tracker.problem.lower().replace("notadirectory", "not a directory")
    assert tracker.problem
    assert SECRET not in tracker.problem + tracker.ui_command


def test_deleted_experiment_is_named(store):
    client = store.client()
    client.delete_experiment(client.create_experiment("gone"))
    tracker = Tracker(store.uri, store.directory, "gone")
    assert tracker.catch_up(HEAD, DONE, ()) == 0
    tracker.close()
    assert "experiment 'gone' is deleted there" in tracker.problem


def test_tracker_that_never_started_does_nothing(tmp_path):
    tracker = Tracker(None, tmp_path / "none")
    tracker.log(DONE[0])
    tracker.finish(POINTS, [])
    tracker.close()
    assert not (tmp_path / "none").exists()


def ask(port: int, path: str, body: dict | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data=data, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return answer.read()


def test_ui_command_serves_the_sweep_and_takes_another_over_http(store, written, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a server keeps the artifacts it takes in where it was started
    port = free_port()
    remote = Tracker(f"http://me:{SECRET}@127.0.0.1:{port}", tmp_path, "remote")
    remote.start(HEAD)
    assert remote.catch_up(HEAD, DONE[:6], ()) == 0
    assert "connection refused" in remote.problem
    command = f"{store.tracker.ui_command} --port {port}"
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, shell=True, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        while server.poll() is None:
            try:
                ask(port, "/health")
                break
            except OSError:
                time.sleep(0.2)
        assert server.poll() is None, (tmp_path / "server.log").read_text()
        parent, _ = written
        found = json.loads(
            ask(
                port, "/api/2.0/mlflow/runs/search", {"experiment_ids": [parent.info.experiment_id], "max_results": 500}
            )
        )["runs"]
        names = {run["info"]["run_name"] for run in found}
        assert names >= {trial_name(record) for record in DONE}
        query = urllib.parse.urlencode({"run_uuid": parent.info.run_id, "path": "pareto.html"})
        assert ask(port, f"/get-artifact?{query}") == store.files(parent)["pareto.html"]

        some = points(HEAD, DONE[:6])
        assert remote.catch_up(HEAD, DONE[:6], some, dense=DENSE) == 7
        assert remote.problem == ""
        assert remote.catch_up(HEAD, DONE[:6], some, dense=DENSE) == 0
        remote.close()
        assert SECRET not in caplog.text
        client = store.client()
        experiment = client.get_experiment_by_name("remote")
        runs = client.search_runs([experiment.experiment_id])
        assert len(runs) == 7
        top = next(run for run in runs if run.data.tags["autorank.role"] == "sweep")
        query = urllib.parse.urlencode({"run_uuid": top.info.run_id, "path": "front.csv"})
        assert len(ask(port, f"/get-artifact?{query}").splitlines()) == len(some) + 1
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def test_ui_command_is_one_line_for_the_shell(tmp_path):
    hostile = tmp_path / "a b; echo $(id) '"
    command = Tracker(None, hostile / "sweep").ui_command
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command.partition(' ')[2]}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert words[-1] == f"sqlite:///{hostile}/mlflow.db"
    assert command.startswith("MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false ")


@pytest.mark.parametrize(
    ("uri", "end"),
    [
        (f"https://me:{SECRET}@host:5000/", "-m webbrowser https://host:5000/"),
        (f"postgresql://me:{SECRET}@host/db", '--backend-store-uri "$MLFLOW_TRACKING_URI"'),
    ],
)
def test_ui_command_of_a_server_hides_its_password(uri, end):
    assert ui_command(uri).endswith(end)
    assert SECRET not in ui_command(uri)
