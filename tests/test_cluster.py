"""Sweeps on a real cluster whose nodes see neither the sweep directory, nor the user's code, nor the driver's cache."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from autorank import cluster
from autorank.config import make_config
from autorank.errors import ConfigError, SweepError
from autorank.journal import read
from autorank.remotefiles import CHUNK, FileServer, NodeFiles, sees, write_token
from autorank.types import TrialRecord
from tests.ray_nodes import Nodes, ray_nodes, until

CODE = '''
import time
import torch
from torch import nn
from tables import CLASSES


class Slow(nn.Sequential):
    seconds = 0.0

    def forward(self, x):
        time.sleep(self.seconds if self.training else 0.0)
        return super().forward(x)


def network(seconds=0.0):
    torch.manual_seed(0)
    made = Slow(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES),
    )
    made.seconds = seconds
    return made


def data(size=24):
    """Large enough to travel as a file of its own."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(240) % CLASSES
    images = torch.randn(240, 3, size, size, generator=generator) + targets.view(-1, 1, 1, 1) * 0.4
    return {"train": (images, targets)}
'''
SETTINGS = """
model: python:usernet:network
data: python:usernet:data
validation: 0.25
space: small
recovery: {steps: 6, batch_size: 16, calibration: 32}
calibration: 32
tracking: false
seed: 3
"""


@dataclass
class Place:
    """Where sweeps are started; the nodes do not see it."""

    nodes: Nodes

    @property
    def code(self) -> Path:
        return self.nodes.hidden / "code"

    def sweep(self, name: str) -> Path:
        return self.nodes.hidden / "sweeps" / name

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start `autorank …` as a process of its own, in the directory of the code."""
        return subprocess.Popen(
            [sys.executable, "-m", "autorank.cli", *arguments],
            cwd=self.code,
            env={**self.nodes.environment, "AUTORANK_CACHE": str(self.nodes.hidden / "cache"), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def search(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        return self.start("search", "sweep.yaml", "-q", "--sweep-dir", str(self.sweep(name)), *arguments)

    def records(self, name: str) -> tuple[TrialRecord, ...]:
        return read(self.sweep(name)).records if self.sweep(name).exists() else ()


def ended(process: subprocess.Popen[str]) -> str:
    """Wait for a driver and return what it said; it must have ended well."""
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return said


@contextmanager
def killed_at_the_end(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with ray_nodes() as nodes:
        found = Place(nodes)
        found.code.mkdir()
        (found.code / "usernet.py").write_text(CODE)
        (found.code / "tables.py").write_text("CLASSES = 2\n")
        (found.code / "sweep.yaml").write_text(SETTINGS)
        yield found


def essence(records: tuple[TrialRecord, ...]) -> dict[int, tuple[Any, ...]]:
    """What must not depend on where a trial ran."""
    return {
        r.number: (r.plan_id, r.lineage, r.status, r.score, r.score_before, r.loss, r.cost, r.curve, r.measured)
        for r in records
    }


def test_nodes_that_share_nothing_give_the_same_sweep_as_one_process(place: Place) -> None:
    """The strategy trains from the weights of earlier trials, which other nodes have left."""
    flags = ["--strategy", "learned-rank", "--trials", "2", "--option", "points=2", "--option", "iterations=2"]
    alone = place.search("alone", *flags, "--executor", "inline")
    joined = place.search("joined", *flags, "--address", place.nodes.address, "--cpus-per-trial", "0.5")
    for process in (alone, joined):
        with killed_at_the_end(process):
            ended(process)
    records = place.records("joined")
    assert essence(records) == essence(place.records("alone"))
    assert any(record.parent is not None for record in records)

    def weights(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (place.sweep(name) / "models").iterdir()}

    assert weights("joined") == weights("alone")
    left = {path.name for path in place.sweep("joined").iterdir()}
    assert not left & {"ray", "shared.token"}
    until(lambda: not place.nodes.scratch(), "the nodes are as they were")


def test_a_driver_that_is_killed_leaves_other_sweeps_and_the_cluster_alone(place: Place) -> None:
    """The other sweep was begun in one process and goes on in the cluster."""
    flags = ["--strategy", "random", "--trials"]
    with killed_at_the_end(place.search("begun", *flags, "2", "--executor", "inline")) as process:
        ended(process)
    with killed_at_the_end(
        place.search("endless", *flags, "400", "--address", place.nodes.address, "--workers", "1")
    ) as endless:
        until(lambda: place.records("endless"), "a trial of the first sweep")
        onward = ["--executor", "ray", "--address", place.nodes.address, "--workers", "1", "--trials", "6", "-q"]
        with killed_at_the_end(place.start("resume", str(place.sweep("begun")), *onward)) as other:
            until(lambda: len(place.records("begun")) > 2, "a trial of the second sweep")
            assert len(place.nodes.scratch()) == 2
            assert endless.poll() is None
            endless.send_signal(signal.SIGKILL)
            ended(other)
    kept = essence(place.records("endless"))
    assert {number: kept[number] for number in range(min(len(kept), 6))} == {
        number: found for number, found in essence(place.records("begun")).items() if number < len(kept)
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cpus-per-trial", "2"], r"a trial needs 2 CPUs, and no node .* \(the most are 1 CPUs\)"),
        (["--gpus-per-trial", "0.5"], r"a trial needs 1 CPUs and 0\.5 GPUs, and no node"),
    ],
    ids=["too few CPUs", "no GPU"],
)
def test_a_trial_that_no_node_can_hold_is_refused(place: Place, arguments: list[str], said: str) -> None:
    with killed_at_the_end(place.search("large", "--address", place.nodes.address, *arguments)) as process:
        output = process.communicate()[0]
    assert process.returncode == 2
    assert len(output.splitlines()) == 1
    assert re.search(said, output)
    assert not place.sweep("large").exists()


def test_code_that_does_not_reach_the_nodes_is_told_and_costs_no_trial(place: Place, tmp_path: Path) -> None:
    elsewhere = place.nodes.hidden / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "othernet.py").write_text("from usernet import network\n")
    path = os.pathsep.join(filter(None, [str(elsewhere), os.environ.get("PYTHONPATH")]))
    flags = ["--model", "python:othernet:network", "--strategy", "random", "--address", place.nodes.address]
    target = place.sweep("unknown")
    arguments = ["search", "sweep.yaml", "-q", "--sweep-dir", str(target), "--trials", "3", *flags]
    with killed_at_the_end(place.start(*arguments, PYTHONPATH=path)) as process:
        output = process.communicate()[0]
    assert process.returncode == 2
    assert "there is no module 'othernet'" in output.splitlines()[-1]
    assert not place.records("unknown")


def test_a_node_that_leaves_in_the_middle_costs_no_trial(place: Place) -> None:
    """The last of the tests with this cluster, which has one node less after it."""
    with killed_at_the_end(
        place.search("calm", "--strategy", "random", "--trials", "8", "--executor", "inline")
    ) as process:
        ended(process)
    slow = ["--strategy", "random", "--trials", "8", "--address", place.nodes.address, "--workers", "2"]
    with killed_at_the_end(place.search("halved", *slow)) as process:
        until(lambda: len(place.records("halved")) >= 2 and len(place.nodes.scratch()) == 2, "both nodes work")
        place.nodes.end(place.nodes.processes.pop())
        ended(process)
    assert essence(place.records("halved")) == essence(place.records("calm"))


@pytest.fixture
def listener(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a port that speaks something else, or that nobody listens to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if request.param is None:
            server.close()
            yield address
            return

        def answer() -> None:
            link, _ = server.accept()
            with link:
                link.sendall(request.param)

        thread = threading.Thread(target=answer)
        thread.start()
        yield address
        thread.join()


@pytest.mark.parametrize(
    ("listener", "said"),
    [(None, "no Ray cluster answers at .*refused"), (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not the head of a Ray")],
    ids=["nobody", "a web server"],
    indirect=["listener"],
)
def test_an_address_without_a_cluster_is_told_at_once(listener: str, said: str) -> None:
    with pytest.raises(SweepError, match=said):
        cluster.check_address(listener)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"address": "ray://head:10001"}, "host:port|HOST:PORT"),
        ({"address": "head"}, "host:port"),
        ({"address": "head:0"}, "host:port"),
        ({"cpus_per_trial": 0}, "cpus_per_trial"),
        ({"gpus_per_trial": 1.5}, "a fraction of one GPU, or a whole number"),
    ],
    ids=["Ray client", "no port", "port 0", "no CPU", "one and a half GPUs"],
)
def test_wrong_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_config(settings)


@pytest.mark.parametrize(
    ("settings", "threads", "cpus", "gpus"),
    [
        ({}, 1, 1.0, 0.0),
        ({"cpus_per_trial": 4}, 4, 4.0, 0.0),
        ({"cpus_per_trial": 2.5}, 2, 2.5, 0.0),
        ({"cpus_per_trial": 0.25}, 1, 0.25, 0.0),
        ({"threads": 3}, 3, 3.0, 0.0),
        ({"cpus_per_trial": 4, "threads": 1}, 1, 4.0, 0.0),
        ({"address": "auto"}, 1, 1.0, 1.0),
        ({"address": "auto", "gpus_per_trial": 0.5}, 1, 1.0, 0.5),
        ({"address": "local"}, 1, 1.0, 0.0),
    ],
)
def test_threads_and_resources_follow_from_each_other(
    settings: dict[str, Any], threads: int, cpus: float, gpus: float
) -> None:
    config = make_config(settings)
    assert (config.threads, config.cpus, config.gpus("cuda")) == (threads, cpus, gpus)


def test_versions_that_differ_are_named() -> None:
    from ray._private.utils import check_version_info

    with pytest.raises(RuntimeError) as raised:
        check_version_info({"ray_version": "2.1.0", "python_version": "3.8.1"}, "node 10.0.0.2")
    said = cluster._why(raised.value, "head:6379")
    assert "it runs Ray 2.1.0 on Python 3.8.1, and here is Ray" in said


def test_too_much_code_is_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CODE_LIMIT", 10)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "net.py").write_text("import torch\n")
    with pytest.raises(SweepError, match="start the sweep in a directory that holds the code alone"):
        cluster.packed(tmp_path / "code", tmp_path)


@pytest.fixture
def server(tmp_path: Path) -> FileServer:
    for name in ("sweep/cache/stats.safetensors", "data/images/a.npy", "secret"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "sweep" / "link").symlink_to(tmp_path / "secret")
    return FileServer(str(tmp_path / "sweep"), str(tmp_path / "data"))


OUTSIDE = ["../secret", "cache/../../secret", "/etc/passwd", "link", ".", ""]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leads_out_of_the_sweep_directory(server: FileServer, name: str) -> None:
    with pytest.raises(ValueError, match="leads out"):
        server.size("sweep", name)
    with pytest.raises(ValueError, match="leads out"):
        server.read("sweep", name, 0)
    with pytest.raises(ValueError, match="leads out"):
        server.write(name, "a1", 0, b"x", True)


@pytest.mark.parametrize(
    ("name", "upload"),
    [("journal.jsonl", "a"), ("models/x.py", "a"), ("cache/x.safetensors", "a"), ("models/x.safetensors", "../a")],
)
def test_nodes_write_weights_and_nothing_else(server: FileServer, tmp_path: Path, name: str, upload: str) -> None:
    with pytest.raises(ValueError, match="not a file of weights"):
        server.write(name, upload, 0, b"x", True)
    assert not (tmp_path / "sweep" / name).exists()


def test_weights_appear_when_they_are_whole(server: FileServer, tmp_path: Path) -> None:
    target = tmp_path / "sweep" / "models" / "w.safetensors"
    server.write("models/w.safetensors", "a1", 0, b"abc", False)
    assert not target.exists()
    server.write("models/w.safetensors", "a1", 3, b"def", True)
    assert target.read_bytes() == b"abcdef"
    assert server.size("sweep", "models/w.safetensors") == 6
    assert server.read("sweep", "models/w.safetensors", 2) == b"cdef"
    assert server.size("data", "images/a.npy") == len("data/images/a.npy")
    assert server.size("sweep", "models/gone.safetensors") is None
    assert server.read("sweep", "models/gone.safetensors", 0) == b""


def test_large_files_are_read_in_parts(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "data" / "large").write_bytes(bytes(CHUNK) + b"end")
    assert len(server.read("data", "large", 0)) == CHUNK
    assert server.read("data", "large", CHUNK) == b"end"


def test_a_shared_directory_is_known_by_its_token(tmp_path: Path) -> None:
    token = write_token(tmp_path)
    assert sees(tmp_path, token)
    assert not sees(tmp_path, "another")
    assert not sees(tmp_path / "gone", token)


def test_the_last_worker_of_a_node_cleans_up_after_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first, second = (NodeFiles(None, "sweep1", tmp_path / "s", tmp_path / "d") for _ in range(2))
    child = os.fork()
    if not child:
        NodeFiles(None, "killed", tmp_path / "s", tmp_path / "d")
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / "autorank-node-killed").exists()
    other = NodeFiles(None, "sweep2", tmp_path / "s", tmp_path / "d")
    assert not (tmp_path / "autorank-node-killed").exists()
    first.close()
    assert second.directory.exists()
    second.close()
    assert not second.directory.exists()
    assert other.directory.exists()


def test_tensors_of_the_task_are_found_where_the_driver_left_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pickle

    from autorank.tasks import elsewhere, travel

    monkeypatch.setenv("AUTORANK_CACHE", str(tmp_path / "there"))
    values = torch.arange(1 << 19)
    sent = travel.dumps({"x": values})
    (tmp_path / "there").rename(tmp_path / "here")
    monkeypatch.setattr(elsewhere, "_fetch", lambda path: tmp_path / "here" / path.relative_to(tmp_path / "there"))
    assert torch.equal(pickle.loads(sent)["x"], values)
