"""A real Ray cluster on one machine: a head without CPUs, and nodes to which a part of the file system is hidden."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
# Of its own, whoever runs the tests: what is mounted is seen by the node alone and goes with it.
PRIVATE = ["unshare", "--mount", "--propagation", "private", *([] if os.geteuid() == 0 else ["--map-root-user"])]
NODE = 'mount -t tmpfs none "$HIDDEN" && cd / && exec "$@"'
PATIENCE = 180.0


def until(there: Callable[[], Any], what: str) -> Any:
    """Return what `there` returns once it is true."""
    end = time.monotonic() + PATIENCE
    while not (found := there()):
        assert time.monotonic() < end, f"not within {PATIENCE:g} s: {what}"
        time.sleep(0.05)
    return found


@dataclass
class Nodes:
    """Attributes: where drivers may write what the nodes do not see, the nodes' own directories, their processes."""

    folder: Path
    port: int
    environment: dict[str, str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def hidden(self) -> Path:
        return self.folder / "hidden"

    def scratch(self) -> list[Path]:
        """What sweeps have on the nodes at this moment."""
        return sorted(self.folder.glob("node*/tmp/autorank-node-*"))

    def start(self, name: str, *arguments: str, private: bool = False) -> None:
        own = self.folder / name / "tmp"
        own.mkdir(parents=True)
        command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", "--object-store-memory=100000000"]
        command += arguments
        command = [*PRIVATE, "sh", "-c", NODE, "sh", *command] if private else command
        environment = {**self.environment, "TMPDIR": str(own), "HIDDEN": str(self.hidden)}
        with (self.folder / f"{name}.log").open("w") as log:
            self.processes.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            )

    def await_started(self, name: str, process: subprocess.Popen[bytes]) -> None:
        log = self.folder / f"{name}.log"
        until(lambda: "Ray runtime started" in log.read_text() or process.poll() is not None, f"{name} starts")
        assert process.poll() is None, log.read_text()

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Kill a node with all its processes, as when its machine loses power."""
        for pid in _descendants(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as link:
        link.bind(("127.0.0.1", 0))
        return int(link.getsockname()[1])


def _descendants(pid: int) -> list[int]:
    """Return a process and all below it; Ray's daemons stay children of the command that started them."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(entry.parent.name))
    found = [pid]
    for each in found:
        found.extend(children.get(each, []))
    return found


@contextmanager
def ray_nodes(count: int = 2) -> Iterator[Nodes]:
    """Start a head and nodes with one CPU each, and end them whatever happens."""
    with ExitStack() as stack:
        # Sockets lie below it, and their paths must be short.
        folder = Path(tempfile.mkdtemp(prefix="arn-", dir="/tmp"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        (folder / "hidden").mkdir()
        (folder / "token").write_text(secrets.token_hex(32))
        gone = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN")
        environment = {name: value for name, value in os.environ.items() if name not in gone}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        nodes = Nodes(folder, _free_port(), environment)
        stack.callback(lambda: [nodes.end(process) for process in nodes.processes])
        ports = [f"--port={nodes.port}", f"--ray-client-server-port={_free_port()}"]
        nodes.start("head", "--head", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={folder}", *ports)
        nodes.await_started("head", nodes.processes[0])
        for number in range(count):
            # A session directory each: two nodes that start at once in one take the same socket.
            own = [f"--address={nodes.address}", "--num-cpus=1", f"--temp-dir={folder}/{number}"]
            nodes.start(f"node{number}", *own, private=True)
        for number in range(count):
            nodes.await_started(f"node{number}", nodes.processes[1 + number])
        yield nodes
