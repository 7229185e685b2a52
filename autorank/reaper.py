"""Sees to it that no process of a Ray of our own outlives the driver, however the driver ends, and says that it ended.

Ray's server and raylet end with the driver, and the workers with the raylet; but its agents, which notice only after a
minute, and what a user's code has started in a worker would stay. So a process of a few megabytes waits for the end of
the driver, which closes a pipe, and kills Ray's processes and all that carry a mark in their environment. Where there
is no ``/proc``, it kills nothing.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = "AUTORANK_RAY"

_CODE = """
import os, signal, sys, time
mark, text, me = os.fsencode(sys.argv[1]), sys.argv[2], os.getpid()
given = sys.stdin.read().split("\\n")
if given[-1] != "done":
    print(text, file=sys.stderr, flush=True)
known = dict(line.split() for line in given[:-1])
def begun(name):
    with open(f"/proc/{name}/stat") as file:
        state, *rest = file.read().rpartition(")")[2].split()
    return None if state == "Z" else rest[18]
def left():
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                marked = mark in file.read().split(b"\\0")
            if int(name) != me and (marked or known.get(name, "") == begun(name)):
                yield int(name)
        except OSError:
            pass
end = time.monotonic() + 10
while time.monotonic() < end and (found := list(left())):
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    time.sleep(0.05)
"""


class Reaper:
    """Kills processes once this process ends, or when it is closed.

    Parameters
    ----------
    text : str
        Printed on standard error when this process ends without having closed it.
    """

    def __init__(self, text: str) -> None:
        self._mark = secrets.token_hex(8)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CODE, f"{MARK}={self._mark}", text],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is not for it
            text=True,
        )

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Mark the processes that are started inside, and all that they start."""
        os.environ[MARK] = self._mark
        try:
            yield
        finally:
            del os.environ[MARK]

    def add(self, pids: Iterable[int]) -> None:
        """Also kill these processes and their children: some write their name over their environment."""
        children: dict[int, list[tuple[int, str]]] = {}
        begun: dict[int, str] = {}
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                fields = (place / "stat").read_text().rpartition(")")[2].split()
                begun[int(place.name)] = fields[19]
                children.setdefault(int(fields[1]), []).append((int(place.name), fields[19]))
        for pid in pids:
            for each, when in [(pid, begun.get(pid, "gone")), *children.get(pid, [])]:
                self._tell(f"{each} {when}\n")

    def close(self) -> None:
        """Kill what is left of the processes."""
        self._tell("done")
        with suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._process.wait()

    def _tell(self, text: str) -> None:
        with suppress(OSError):  # it was killed itself
            assert self._process.stdin is not None
            self._process.stdin.write(text)
            self._process.stdin.flush()
