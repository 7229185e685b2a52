"""Joining a Ray cluster that runs: is it there, does a trial fit, how many do; and the code that its nodes need."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autorank.config import SweepConfig
from autorank.errors import SweepError, describe
from autorank.usercode import code_files, files_named

# Before the first import: ray reads these once.
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_V2_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_SYNCER": "1",
    # The driver handles Ctrl-C itself: finish and save on the first, stop on the second.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_SLOW_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "1e9",
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}
# For a driver that joins: a cluster that refuses it says so in seconds.
BRIEF = {"RAY_NUM_REDIS_GET_RETRIES": "5"}
# What every HTTP/2 server, and so every gRPC server, answers with a settings frame of its own.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
SETTINGS_FRAME = 4
PATIENCE = 5.0
CODE_LIMIT = 50 << 20
FILES_LIMIT = 20_000


@dataclass(frozen=True)
class Joined:
    """A cluster as it was found.

    Attributes
    ----------
    trials : int
        How many trials its free resources hold, one at least.
    busy : str
        What to tell a person when not even one trial fits in now.
    """

    trials: int
    busy: str = ""


def quiet(more: Mapping[str, str] | None = None) -> None:
    """Import Ray, for the first time, with settings that keep it from printing and from catching signals."""
    for key, value in {**QUIET, **(more or {})}.items():
        os.environ.setdefault(key, value)
    import ray  # noqa: F401 (it sets the level of its logger when it is imported)

    logging.getLogger("ray").setLevel(logging.CRITICAL)  # what a user should know is said by ourselves, in one line


def check_address(address: str) -> None:
    """Raise SweepError at once when nothing that could be Ray answers at ``host:port``."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE) as link:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return  # only Ray itself can speak to it
            link.settimeout(PATIENCE)
            link.sendall(PREFACE)
            if link.recv(4)[3:] == bytes([SETTINGS_FRAME]):
                return
    except TimeoutError:
        pass
    except OSError as error:
        raise SweepError(f"no Ray cluster answers at {address}: {error.strerror or error}") from None
    raise SweepError(
        f"what answers at {address} is not the head of a Ray cluster; `ray start --head` prints the address to give"
    )


@contextmanager
def joined(config: SweepConfig, device: str, code: Path | None) -> Iterator[Joined]:
    """Be connected to the cluster of the settings; at the end only the connection is closed.

    Parameters
    ----------
    config : SweepConfig
        Its `cluster` is an address.
    device : str
        Of the trials.
    code : Path or None
        Directory whose Python code the nodes are to get.

    Raises
    ------
    SweepError
        The address does not answer, versions differ, or no node can ever hold a trial.
    """
    assert config.cluster is not None
    _use_token()
    quiet(BRIEF)
    import ray

    if ray.is_initialized():
        raise SweepError("Ray already runs in this process; call ray.shutdown() before the search")
    address = config.cluster
    with tempfile.TemporaryDirectory(prefix="autorank-code-") as folder:
        environment: dict[str, Any] = {}
        if code is not None and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # a job's code is there already
            environment["working_dir"] = str(packed(code, Path(folder)))
        with signals_kept():
            _connect(ray, address, environment)
    try:
        yield _fits(ray, config.cpus, config.gpus(device), address)
    finally:
        ray.shutdown()


@contextmanager
def signals_kept() -> Iterator[None]:
    """Put the handler of SIGTERM back: `ray.init` sets its own, which ends the driver at once."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread() and before is not None:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def on_loopback() -> Iterator[None]:
    """Let a Ray that is started inside listen on this machine's loopback alone: by default it is open to the network.

    Ray has this for systems on which it has no clusters; for any loopback address that is given it takes the network's.
    """
    from ray._private import ray_constants

    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    before, allowed = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = allowed
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _use_token() -> None:
    """Speak with a token where there is one: `ray start` asks for it by default, and `ray.init` does not send it."""
    places = (os.environ.get("RAY_AUTH_TOKEN_PATH"), Path.home() / ".ray" / "auth_token")
    if os.environ.get("RAY_AUTH_TOKEN") or any(place and Path(place).is_file() for place in places):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _connect(ray: Any, address: str, environment: Mapping[str, Any]) -> None:
    if address != "auto":
        check_address(address)
        _check_node(address)
    try:
        ray.init(
            address=address,
            runtime_env=dict(environment),
            logging_level="ERROR",
            log_to_driver=False,
            configure_logging=False,
        )
    except Exception as error:
        ray.shutdown()
        raise SweepError(f"the Ray cluster at {address} cannot be joined: {_why(error, address)}") from None


def _check_node(address: str) -> None:
    """Raise SweepError at once, not after Ray's minute of waiting, when no node of Ray runs on this machine."""
    try:
        from ray._private.services import find_node_ids
    except ImportError:
        return  # another version of Ray: it says so itself, later
    if not find_node_ids():
        raise SweepError(f"the Ray cluster at {address} cannot be joined: {_no_node(address)}")


def _no_node(address: str) -> str:
    return (
        "this machine is not one of its nodes; make it one, with `ray start "
        f"--address={address} --num-cpus=0`, or run the sweep in the cluster with `autorank submit`"
    )


def _why(error: BaseException, address: str) -> str:
    """Return in one line why a cluster cannot be joined."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    text = " ".join(" ".join(str(each).split()) for each in chain)
    if "Version mismatch" in text:
        versions = text.partition("The cluster was started with:")[2].split("This process", 1)
        here = versions[-1].partition("was started with:")[2].split("Ray: ")[-1].split(" Python: ")
        there = versions[0].split("Ray: ")[-1].split(" Python: ")
        return (
            f"it runs Ray {there[0].strip()} on Python {there[-1].split()[0]}, and here is Ray {here[0].strip()} on "
            f"Python {here[-1].split()[0]}; the same versions are needed on all machines"
        )
    if "InvalidAuthToken" in text or "AuthenticationError" in text:
        return "it asks for a token; put the cluster's into ~/.ray/auth_token, or name its file in RAY_AUTH_TOKEN_PATH"
    if "Could not find any running Ray instance" in text:
        return "no Ray runs on this machine (`ray start --head` starts one); give the host:port of one elsewhere"
    if "No node info found" in text:
        return _no_node(address)
    return describe(error)


def _fits(ray: Any, cpus: float, gpus: float, address: str) -> Joined:
    """Return how many trials fit into what is free; SweepError when no node is large enough for one."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = [max((node.get(name, 0.0) for node in nodes), default=0.0) for name in ("CPU", "GPU")]
    if not any(node.get("CPU", 0.0) >= cpus and node.get("GPU", 0.0) >= gpus for node in nodes):
        raise SweepError(
            f"a trial needs {_amount(cpus, gpus)}, and no node of the Ray cluster at {address} has that (the most are "
            f"{_amount(*most)}); lower cpus_per_trial or gpus_per_trial, or add a node"
        )
    free = ray.available_resources()
    trials = int(free.get("CPU", 0.0) / cpus + 1e-6)
    if gpus:
        trials = min(trials, int(free.get("GPU", 0.0) / gpus + 1e-6))
    busy = "" if trials else "the Ray cluster is busy: the first trial starts when others leave room for it"
    return Joined(max(1, trials), busy)


def _amount(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs and {gpus:g} GPUs" if gpus else f"{cpus:g} CPUs"


def code_directory(names: tuple[str | None, ...], started_in: str) -> Path | None:
    """Return the directory whose code a task needs, or None when installed packages are all it does.

    Parameters
    ----------
    names : tuple of str or None
        Model and data, as the settings name them.
    started_in : str
        Where the sweep was started, and its own modules are looked for.
    """
    root = Path(started_in or os.getcwd()).resolve()
    if any(name is not None and name.startswith("python:") for name in names):
        return root
    if None not in names:
        return None
    installed = [Path(place).resolve() for place in (sys.prefix, sys.base_prefix)]
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file is None or module.__name__.partition(".")[0] in ("autorank", "__main__"):
            continue
        place = Path(file).resolve()
        if place.is_relative_to(root) and not any(place.is_relative_to(other) for other in installed):
            return root
    return None


@files_named(SweepError, "make it readable, or leave it out: move it elsewhere, or let its name begin with a dot")
def packed(root: Path, folder: Path) -> Path:
    """Write the code below `root` (see `code_files`) into a zip file in `folder` and return its path.

    Raises
    ------
    SweepError
        There is too much of it, or a file cannot be read.
    """
    target = folder / "code.zip"
    size = count = 0
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for path in code_files(root):
            size, count = size + path.stat().st_size, count + 1
            if size > CODE_LIMIT or count > FILES_LIMIT:
                raise SweepError(
                    f"{root} holds too much to be sent to the nodes as the code of your model and data (more than "
                    f"{CODE_LIMIT >> 20} MiB or {FILES_LIMIT:,} files); start the sweep in a directory that holds "
                    "the code alone, or install it on the nodes as a package and start the sweep elsewhere"
                )
            archive.write(path, path.relative_to(root))
    return target
