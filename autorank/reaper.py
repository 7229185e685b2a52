"""Sees to it that no process of a Ray of our own outlives the driver, however the driver ends, and says that it ended.

Ray's server and raylet end with the driver, and the workers with the raylet; but its agents, which notice only after a
minute, and what a user's code has started in a worker would stay. So a process of a few megabytes waits for the end of
the driver, which closes a pipe, and kills all that carry a mark in their environment, and all of its own process group.
Ray is started in that group (its agents write their name over the mark): so a signal to the driver's group, as a
terminal or `timeout` sends it, leaves Ray alone, and the driver can finish. Where there is no ``/proc``, nothing is
killed.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

MARK = "AUTORANK_RAY"

_CODE = """
import os, signal, sys, time
mark, text, me = os.fsencode(sys.argv[1]), sys.argv[2], os.getpid()
if sys.stdin.read() != "done":
    print(text, file=sys.stderr, flush=True)
def read(name, what):
    with open(f"/proc/{name}/{what}", "rb") as file:
        return file.read()
def ours(name):
    state, parent, group, *rest = read(name, "stat").rpartition(b")")[2].split()
    return state != b"Z" and (int(group) == me or mark in read(name, "environ").split(b"\\0"))
def left():
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        try:
            if int(name) != me and ours(name):
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
            process_group=0,  # a Ctrl-C is not for it
            text=True,
        )

    @property
    def group(self) -> int:
        """The process group whose members are killed."""
        return self._process.pid

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Mark the processes that are started inside, and all that they start."""
        os.environ[MARK] = self._mark
        try:
            yield
        finally:
            del os.environ[MARK]

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
