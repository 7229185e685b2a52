"""The faults: each disturbs a sweep and brings it to its end, by resuming it where it was ended."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from autorank.journal import FILE_NAME
from autorank.plan import build
from autorank.trialfiles import MODELS
from autorank.types import TrialRecord
from tests.faults import disks, net
from tests.faults.mlflow_server import Server
from tests.faults.sweeps import TRIALS, Scene, until

RAY, INLINE = "ray", "inline"

MINUTES = 130.0
"""How long "minutes" are."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes
    ----------
    name : str
        In a few words.
    disturb : callable
        ``disturb(scene, rng)`` runs the sweep from its start to its end.
    told : str
        Pattern of the one line in which the user is told; empty when there is nothing to tell.
    executors : tuple of str
        In which the fault can happen.
    settings : mapping
        Beyond those that all sweeps have.
    victim : str
        Trap for one plan, whose trial fails for good; the others must not notice.
    times : int
        How often it may be told: a fault that hits several trials is told for each.
    tracked : bool
        Whether MLflow's server has part in it.
    slow : bool
        Whether it takes minutes.
    """

    name: str
    disturb: Callable[[Scene, Random], None]
    told: str = ""
    executors: tuple[str, ...] = (RAY, INLINE)
    settings: dict[str, Any] = field(default_factory=dict)
    victim: str = ""
    times: int = 1
    tracked: bool = False
    slow: bool = False


def signature_of(record: TrialRecord) -> str:
    """Return the signature of a trial's network."""
    return net.signature(build(net.network(), record.plan))


def middle(scene: Scene, rng: Random) -> None:
    """Start the sweep, and wait until some trials are finished and others run."""
    scene.search()
    scene.after(rng.randint(1, TRIALS - 4))


def run(scene: Scene, rng: Random) -> None:
    """Let the sweep be: the trap is set."""
    scene.search()
    scene.finish()


def kill_worker(scene: Scene, rng: Random) -> None:
    middle(scene, rng)
    scene.hold()  # else the trial may be over before the signal arrives
    os.kill(rng.choice(until(scene.workers, "a worker")), signal.SIGKILL)
    scene.release()
    scene.finish()


def kill_driver(scene: Scene, rng: Random) -> None:
    middle(scene, rng)
    scene.kill()
    scene.finish()


def kill_of_ray(part: str) -> Callable[[Scene, Random], None]:
    def disturb(scene: Scene, rng: Random) -> None:
        middle(scene, rng)
        scene.hold()
        (found,) = scene.processes(f"/{part} ")
        os.kill(found, signal.SIGKILL)
        assert scene.drivers[-1].wait() != 0, scene.drivers[-1].said
        scene.release()
        scene.finish()

    return disturb


def interrupt(times: int, how: signal.Signals = signal.SIGINT) -> Callable[[Scene, Random], None]:
    def disturb(scene: Scene, rng: Random) -> None:
        middle(scene, rng)
        driver = scene.drivers[-1]
        scene.hold()
        os.killpg(driver.pid, how)  # as a terminal or `timeout` does: to all of the group
        until(lambda: "stopping once" in driver.said, "an answer to the signal")
        if times == 2:
            os.killpg(driver.pid, how)
        else:
            scene.release()
        driver.wait()
        scene.release()
        scene.finish()

    return disturb


def torn_line(scene: Scene, rng: Random) -> None:
    """The power fails while a line is written."""
    middle(scene, rng)
    scene.kill()
    path = scene.sweep / FILE_NAME
    last = path.read_bytes().splitlines()[-1]
    with path.open("ab") as file:
        file.write(last[: rng.randint(1, len(last) - 2)])
    scene.finish()


def full_disk(scene: Scene, rng: Random) -> None:
    with disks.small(scene) as disk:
        middle(scene, rng)
        disk.fill(rng.randint(0, 3000))
        assert scene.drivers[-1].wait() == 2, scene.drivers[-1].said
        disk.free()
        scene.finish()


def read_only(scene: Scene, rng: Random) -> None:
    middle(scene, rng)
    with disks.read_only(scene.sweep):
        assert scene.drivers[-1].wait() == 2, scene.drivers[-1].said
    scene.finish()


def damaged(pattern: str, live: bool = False) -> Callable[[Scene, Random], None]:
    """Damage files of the sweep while it is stopped, or while it runs."""

    def disturb(scene: Scene, rng: Random) -> None:
        middle(scene, rng)
        if live:
            scene.hold()
        else:
            scene.kill()
        files = sorted(scene.sweep.glob(pattern))
        assert files, f"there is no {pattern}"
        for path in files:
            _damage(path, rng)
        scene.release()
        scene.finish()

    return disturb


def _damage(path: Path, rng: Random) -> None:
    content = bytearray(path.read_bytes())
    match rng.choice(["cut", "flipped", "garbage", "empty"]):
        case "cut":
            content = content[: rng.randrange(len(content))]
        case "flipped":
            content[rng.randrange(len(content) * 3 // 4, len(content))] ^= 1 << rng.randrange(8)
        case "garbage":
            content = bytearray(rng.randbytes(len(content)))
        case "empty":
            content = bytearray()
    # In place, as a bad disk does: who maps the file sees it.
    with path.open("r+b") as file:
        file.truncate(len(content))
        file.write(content)


def second_driver(scene: Scene, rng: Random) -> None:
    middle(scene, rng)
    scene.hold()
    first = scene.drivers[-1]
    second = scene.resume()
    assert second.wait() == 2, second.said
    scene.release()
    assert first.wait() == 0, first.said


def clocks(scene: Scene, rng: Random) -> None:
    """The clocks of the driver and the workers jump, each by its own, by up to a year."""
    site = scene.place / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import random, time\n"
        f"real, rng, jump = time.time, random.Random(f'{rng.random()} ' + str(__import__('os').getpid())), [0.0]\n"
        "def jumping():\n"
        "    if rng.random() < 0.05:\n"
        "        jump[0] = rng.choice([-1, 1]) * 10 ** rng.uniform(-1, 7.5)\n"
        "    return real() + jump[0]\n"
        "time.time = jumping\n"
        "time.time_ns = lambda: int(jumping() * 1e9)\n"
    )
    scene.environment = {"PYTHONPATH": str(site), "AUTORANK_FAULTS_SITE": str(site)}
    run(scene, rng)


def server_killed(seconds: float = 0.0) -> Callable[[Scene, Random], None]:
    """MLflow's server is killed in the middle and comes back, after so many seconds in which the sweep waits."""

    def disturb(scene: Scene, rng: Random) -> None:
        server = _server(scene)
        middle(scene, rng)
        server.kill()
        driver = scene.drivers[-1]
        until(lambda: "the sweep goes on" in driver.said or driver.ended(), "a word on MLflow")
        scene.hold()
        time.sleep(seconds)
        server.start()
        scene.release()
        scene.finish()

    return disturb


def server_gone(scene: Scene, rng: Random) -> None:
    """MLflow's server is killed, and is back when the sweep is over and resumed."""
    server = _server(scene)
    middle(scene, rng)
    server.kill()
    scene.finish()
    server.start()
    scene.resume()
    scene.finish()


def database_locked(scene: Scene, rng: Random) -> None:
    server = _server(scene)
    middle(scene, rng)
    driver = scene.drivers[-1]
    with server.locked():
        until(lambda: "the sweep goes on" in driver.said or driver.ended(), "a word on MLflow")
    scene.finish()


def _server(scene: Scene) -> Server:
    assert scene.server is not None
    return scene.server


AWAY = r"^MLflow at .*; the sweep goes on"
FAILS = {"strategy": "random", "pruning": {"patience": 0}}
"""Proposals that depend on no outcome, so that a trial that fails changes no other."""

FAULTS = (
    Fault("worker killed", kill_worker, r"the worker of trial \d+ died .* started again", (RAY,)),
    Fault("driver killed", kill_driver, r"the sweep was cut off"),
    Fault("raylet killed", kill_of_ray("raylet"), r"^error: .*(Ray's raylet died|ended from outside)", (RAY,)),
    Fault(
        "Ray's server killed",
        kill_of_ray("gcs_server"),
        r"^error: .*(Ray's gcs_server died|ended from outside)",
        (RAY,),
    ),
    Fault("Ctrl-C once", interrupt(1), r"stopping once the running trials are finished"),
    Fault("Ctrl-C twice", interrupt(2), r"stopped now; everything that finished is saved"),
    Fault("terminated", interrupt(1, signal.SIGTERM), r"stopping once the running trials are finished"),
    Fault("half a line", torn_line, r"only half written and is cut off"),
    Fault("full disk", full_disk, r"^error: .*(No space left|File too large)"),
    Fault("read-only", read_only, r"^error: .*(not permitted|Read-only|Permission denied)"),
    Fault("damaged fits", damaged("cache/fits/*.safetensors"), r"a damaged fit in .* is made again"),
    Fault("damaged statistics", damaged("cache/stats-*.safetensors"), r"damaged.* statistics are collected again"),
    Fault("damaged teacher", damaged("cache/teacher.npy"), r"teacher.npy is damaged and is made again"),
    Fault("damaged teacher, live", damaged("cache/teacher.npy", True), "", (RAY,)),
    Fault("damaged weights", damaged(f"{MODELS}/*.safetensors"), r"damaged, so its trial's weights are made", times=99),
    Fault("hang", run, r"trial \d+ failed: took longer than", settings={**FAILS, "trial_timeout": 15}, victim="hang"),
    Fault(
        "hang in a library",
        run,
        r"trial \d+ failed: took longer than",
        (RAY,),
        {**FAILS, "trial_timeout": 15},
        "freeze",
    ),
    Fault("out of memory", run, r"the worker of trial \d+ died .* started again", (RAY,), {}, "once:fill"),
    Fault("always out of memory", run, r"trial \d+ failed: .*(memory|alloc)", (RAY,), FAILS, "fill"),
    Fault("NaN", run, r"trial \d+ failed: .*NaN", settings=FAILS, victim="nan"),
    Fault("raises", run, r"trial \d+ failed: KeyError in net.py:\d+: 'a bug of mine'", settings=FAILS, victim="raise"),
    Fault("exits", run, r"trial \d+ failed: SystemExit in net.py", settings=FAILS, victim="exit"),
    Fault("clock jumps", clocks),
    Fault("MLflow killed", server_killed(), AWAY, (RAY,), times=3, tracked=True),
    Fault("MLflow away for minutes", server_killed(MINUTES), AWAY, (RAY,), times=3, tracked=True, slow=True),
    Fault("MLflow gone", server_gone, AWAY, (RAY,), times=3, tracked=True),
    Fault("MLflow locked", database_locked, AWAY, (RAY,), times=3, tracked=True),
    Fault("two drivers", second_driver, r"^error: another autorank is running in"),
)
