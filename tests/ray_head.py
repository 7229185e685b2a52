"""A real Ray head with its job server and token authentication, as a process of its own."""

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
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    address: str
    token: str
    token_file: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to be let in; no address."""
        gone = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN")
        kept = {name: value for name, value in os.environ.items() if name not in gone}
        return {**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file)}


@contextmanager
def ray_head(cpus: int = 2) -> Iterator[Head]:
    """Start a head on free ports and end it, with all that it started, whatever happens."""
    with ExitStack() as stack:
        # Its sockets lie below it, and their paths must be short.
        folder = Path(tempfile.mkdtemp(prefix="arh-", dir="/tmp"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        head = Head(f"http://127.0.0.1:{_free_port()}", secrets.token_hex(32), folder / "token")
        head.token_file.touch(mode=0o600)
        head.token_file.write_text(head.token)
        ports = ("--port", "--ray-client-server-port", "--dashboard-agent-listen-port", "--dashboard-agent-grpc-port")
        command = [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", f"--num-cpus={cpus}"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={head.address.rpartition(':')[2]}"]
        command += [f"{name}={_free_port()}" for name in (*ports, "--metrics-export-port")]
        command += ["--object-store-memory=100000000", f"--temp-dir={folder}"]
        environment = {**head.environment, "PATH": f"{BIN}:{os.environ['PATH']}"}
        log = stack.enter_context((folder / "head.log").open("w+"))
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        stack.callback(_end, process)
        while not _answers(head):
            assert process.poll() is None, (folder / "head.log").read_text()
            time.sleep(0.2)
        yield head


def _answers(head: Head) -> bool:
    request = urllib.request.Request(f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a head as Ctrl-C would, then whatever of its session is still there."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
    for pid in _session(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def _session(leader: int) -> list[int]:
    found = subprocess.run(["ps", "-eo", "pid=,sid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = (line.split() for line in found.splitlines())
    return [int(pid) for pid, session, state in rows if int(session) == leader and not state.startswith("Z")]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
