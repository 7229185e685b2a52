"""Sweeps as jobs: submitted to a real Ray head with token authentication, listed, followed, stopped, gone on with."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

import autorank
from autorank import cli, jobfiles, jobrun
from autorank.config import SweepConfig, read_config
from autorank.errors import AutorankError, ConfigError
from autorank.jobs import Jobs, check_sweep_dir
from autorank.journal import Journal, read
from tests.ray_head import BIN, Head, ray_head

pytestmark = pytest.mark.xdist_group("tests/test_jobs_cli.py")

CODE = """
import torch
from torch import nn
from helping.numbers import COUNT

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 2))

def data():
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(COUNT) % 2
    return {"train": (torch.randn(COUNT, 3, 8, 8, generator=generator) + targets.view(-1, 1, 1, 1), targets)}
"""
SETTINGS = {
    "model": "python:nets:network",
    "weights": "net.safetensors",
    "data": "python:nets:data",
    "validation": 0.25,
    "space": "default",
    "strategy": "random",
    "calibration": 32,
    "recovery": {"steps": 10, "batch_size": 16, "calibration": 32},
    "tracking": False,
}
Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as head:
        yield head


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's directory: code of his own that no node has, weights, a sweep file, and what must stay at home."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "nets.py").write_text(CODE)
    (folder / "helping").mkdir()
    (folder / "helping" / "numbers.py").write_text("COUNT = 120")
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SETTINGS))
    (folder / ".env").write_text("KEY=hidden")
    make = "import nets, safetensors.torch as s; s.save_file(nets.network().state_dict(), 'net.safetensors')"
    subprocess.run([sys.executable, "-c", make], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def call(head: Head, project: Path) -> Call:
    """Run a command of autorank against the head, in the user's directory; the token is in nothing it prints."""

    def run(*arguments: object, fails: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        where = {"RAY_API_SERVER_ADDRESS": head.address, **environment}
        done = subprocess.run(
            [BIN / "autorank", *map(str, arguments)],
            cwd=project,
            env={**head.environment, **where},
            capture_output=True,
            text=True,
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        assert head.token not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


def numbers(sweep: Path) -> list[int]:
    """The trials that a sweep's journal holds; none before there is one."""
    return [record.number for record in read(sweep).records] if (sweep / "journal.jsonl").exists() else []


def listed(call: Call, job: str) -> dict[str, object]:
    return next(row for row in json.loads(call("jobs", "--json").stdout) if row["id"] == job)


def test_a_sweep_runs_as_a_job_and_is_followed_to_its_end(call: Call, head: Head, tmp_path: Path) -> None:
    sweep = tmp_path / "net"
    sent = call("submit", "sweep.yaml", "--trials", 3, "--sweep-dir", sweep)
    job = sent.stdout.strip()
    assert "does not last" in sent.stderr  # the directory of a test is below /tmp
    assert "asks for no token" not in sent.stderr
    followed = call("logs", job, "--follow")
    assert followed.stderr.strip() == f"{job}: done"
    assert "3/3 complete" in followed.stdout
    assert sorted(numbers(sweep)) == [0, 1, 2]
    assert autorank.open_sweep(sweep).config.address == "auto"  # it joined the cluster that it ran on
    row = listed(call, job)
    assert (row["state"], row["trials"], row["sweep"]) == ("done", [3, 3], str(sweep))
    assert job in call("jobs", "--address", head.address, RAY_API_SERVER_ADDRESS="http://127.0.0.1:9").stdout


def test_a_job_is_stopped_in_the_middle_gone_on_with_and_ended_at_once_and_no_trial_is_lost(
    call: Call, tmp_path: Path
) -> None:
    sweep = tmp_path / "net"
    job = call("submit", "sweep.yaml", "--trials", 5000, "--executor", "inline", "--sweep-dir", sweep).stdout.strip()
    while len(numbers(sweep)) < 3:
        time.sleep(0.1)
    call("stop", job)
    assert f"{job}: stopped" in call("logs", job, "--follow").stderr
    contents = read(sweep)
    assert contents.ended == "interrupted"
    first = list(contents.records)
    assert len(first) >= 3

    again = call("submit", "--resume", "--sweep-dir", sweep, "--trials", 6000).stdout.strip()
    while len(numbers(sweep)) < len(first) + 3:
        time.sleep(0.1)
    call("stop", again, "--now")
    assert f"{again}: stopped" in call("logs", again, "--follow").stderr
    records = list(read(sweep).records)
    assert records[: len(first)] == first
    assert len({record.number for record in records}) == len(records)
    # The job and its uploaded files are gone from the cluster; the sweep has all that it needs.
    result = autorank.resume(sweep, trials=len(records) + 1, progress=False)
    assert list(result.records)[: len(records)] == records
    assert len(result.records) == len(records) + 1


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RAY_AUTH_TOKEN": "x" * 64}, "refuses the token"),
        ({"RAY_AUTH_TOKEN_PATH": "", "HOME": "/nonexistent"}, "asks for a token"),
        ({"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}, "no Ray job server answers"),
    ],
    ids=["wrong token", "no token", "no server"],
)
def test_a_cluster_that_cannot_be_used_is_said_in_one_line(call: Call, environment: dict[str, str], says: str) -> None:
    said = call("jobs", fails=True, **environment).stderr
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("address", "says"),
    [(None, "which cluster?"), ("127.0.0.1:6379", "give the address of the cluster's dashboard")],
    ids=["none", "not a dashboard"],
)
def test_an_address_that_is_none(monkeypatch: pytest.MonkeyPatch, address: str | None, says: str) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=re.escape(says)):
        Jobs(address)


def test_a_secret_is_refused_before_a_sweep_is_gone_on_with(call: Call) -> None:
    uri = "postgresql://runs:geheim7@db/ml"
    said = call("submit", "--resume", "--sweep-dir", "/shared/net", "--tracking-uri", uri, fails=True)
    assert "tracking_uri holds a secret" in said.stderr
    assert "geheim7" not in said.stdout + said.stderr


def test_a_job_that_is_not_there(call: Call) -> None:
    said = call("logs", "autorank-gone", fails=True).stderr
    assert "has no job 'autorank-gone'" in said
    assert said.count("\n") == 1


def test_without_what_the_job_server_needs_the_extra_is_named() -> None:
    code = "import sys; sys.modules['aiohttp'] = None; from autorank.jobs import Jobs; Jobs('http://127.0.0.1:9')"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    assert "MissingExtraError" in said
    assert "pip install 'ray[default]'" in said


@pytest.mark.parametrize(
    ("path", "says"),
    [(None, "needs a sweep directory"), ("sweeps/net", "gone with the job"), ("s3://bucket/x", "so no URL")],
    ids=str,
)
def test_a_sweep_directory_that_does_not_outlive_the_job_is_refused(path: str | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_sweep_dir(path)
    assert check_sweep_dir("/shared/sweeps/net") == []
    assert "does not last" in check_sweep_dir("/shared/../tmp/net")[0]


def test_what_cannot_change_is_refused_before_a_sweep_is_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["submit", "--resume", "--sweep-dir", "/shared/net", "--seed", "3", "--address", "http://127.0.0.1:9"]
    monkeypatch.setattr(sys, "argv", ["autorank", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    assert "seed cannot change when a sweep is resumed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag", ["--trials", "--cpus-per-trial", "--gpus-per-trial", "--trial-timeout", "--max-drop", "--workers"]
)
def test_what_a_resume_takes_may_be_given_with_a_job(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["submit", "--resume", "--sweep-dir", "/shared/net", flag, "1", "--address", "http://127.0.0.1:9"]
    monkeypatch.setattr(sys, "argv", ["autorank", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().err
    assert "cannot change when" not in said
    assert "127.0.0.1:9" in said
    resumed = next(command.callback for command in cli.app.registered_commands if command.callback.__name__ == "resume")
    assert flag.removeprefix("--").replace("-", "_") in inspect.signature(resumed).parameters


def packed(project: Path, target: Path, **changes: object) -> dict[str, object]:
    """Pack the user's sweep with other settings; return what the cluster will read."""
    settings = {**SETTINGS, "weights": str(project / "net.safetensors"), **changes}
    target.mkdir(exist_ok=True)
    jobfiles.pack(SweepConfig.model_validate(settings), target, project)
    return dict(yaml.safe_load((target / jobfiles.SETTINGS).read_text()))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_code_and_weights_are_taken_along_and_nothing_else(project: Path, tmp_path: Path) -> None:
    for name in ("sweeps/a/journal.jsonl", "key.pem", "a.txt"):
        path = tmp_path / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for path in project.glob("*.py"):
        (tmp_path / "home" / path.name).write_text(path.read_text())
    (tmp_path / "home" / "outside.py").symlink_to("/etc/hostname")
    settings = packed(tmp_path / "home", tmp_path / "job", weights=str(project / "net.safetensors"))
    assert files(tmp_path / "job") == {"nets.py", "a.txt", "sweep.yaml", "files/weights/net.safetensors"}
    assert settings["weights"] == "files/weights/net.safetensors"
    assert settings["model"] == SETTINGS["model"]


def test_data_here_is_taken_along_and_data_there_is_left_there(project: Path, tmp_path: Path) -> None:
    for name in ("train/a.png", "test/b.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True)
        (tmp_path / "set" / name).write_bytes(b"x")
    here = packed(project, tmp_path / "here", model="python:installed:net", data=f"imagefolder:{tmp_path}/set")
    assert here["data"] == "imagefolder:files/data/set"
    assert {"files/data/set/train/a.png", "files/data/set/test/b.png"} < files(tmp_path / "here")
    there = packed(project, tmp_path / "there", model="python:installed:net", data="parquet:/shared/set")
    assert there["data"] == "parquet:/shared/set"
    assert files(tmp_path / "there") == {"sweep.yaml", "files/weights/net.safetensors"}


def test_each_place_of_the_data_is_taken_along(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("set/train/0.parquet", "set/train/1.parquet", "set/test/0.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    data = f"parquet:{tmp_path}/set/train/*.parquet,{tmp_path}/set/test/0.parquet,/shared/more"
    target = tmp_path / "job"
    kept = packed(project, target, model="python:installed:net", data=data)["data"]
    places = str(kept).removeprefix("parquet:").split(",")
    assert [(target / place).read_text() for place in places[:3]] == [
        "set/train/0.parquet",
        "set/train/1.parquet",
        "set/test/0.parquet",
    ]
    assert [Path(place).parent.name for place in places] == ["train", "train", "test", "shared"]
    assert places[3] == "/shared/more"


def test_relative_patterns_of_data_are_those_of_the_sweep_file(tmp_path: Path) -> None:
    (tmp_path / "here.parquet").touch()
    file = tmp_path / "sweep.yaml"
    file.write_text("model: python:a.b:net\ndata: parquet:train/*.parquet,here.parquet,gone.parquet\n")
    assert read_config(file, {}).data == f"parquet:{tmp_path}/train/*.parquet,{tmp_path}/here.parquet,gone.parquet"


def test_a_sweep_to_reuse_is_said_to_stay_where_it_is(project: Path, tmp_path: Path) -> None:
    settings = SweepConfig.model_validate({**SETTINGS, "weights": None, "reuse": "/home/me/sweeps/old"})
    (tmp_path / "job").mkdir()
    assert jobfiles.pack(settings, tmp_path / "job", project) == [
        "reuse: /home/me/sweeps/old is taken for a path on the cluster; sweeps are not uploaded"
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weights": "gone.safetensors"}, "weights: there is no gone.safetensors here"),
        ({"tracking_uri": "https://me:geheim7@server/"}, "tracking_uri holds a secret"),
        ({"model_args": {"token": "geheim7"}}, "model_args.token holds a secret"),
    ],
    ids=["no such file", "a password in an address", "a secret argument"],
)
def test_what_cannot_be_sent_is_said_before_anything_is(
    project: Path, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        packed(project, tmp_path / "job", **changes)
    assert "geheim7" not in str(error.value)


def test_too_much_to_upload_is_refused_and_the_largest_is_named(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "big.safetensors").open("wb") as file:
        file.truncate(jobfiles.MOST_BYTES + 1)
    with pytest.raises(ConfigError, match=r"200 MB would be uploaded.*big\.safetensors.*--paths-on-cluster"):
        packed(project, tmp_path / "job", weights=str(tmp_path / "big.safetensors"))
    assert not files(tmp_path / "job")


def test_a_directory_in_memory_is_known_as_the_nodes_own(tmp_path: Path) -> None:
    assert jobrun.own_disk(Path("/dev/shm/sweeps/net")) == "tmpfs"
    assert jobrun.own_disk(Path("/proc")) == ""


def test_two_jobs_do_not_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Journal(tmp_path / "net"), pytest.raises(AutorankError, match="another process works"):
        jobrun.main(["search", str(tmp_path / "net"), "job"])
