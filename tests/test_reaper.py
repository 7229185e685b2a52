"""A process that waits for the end of another: what it kills, what it spares, and what it says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CODE = """
import subprocess, sys, time
from autorank.reaper import Reaper
reaper = Reaper("ended from outside")
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
with reaper.marking():
    marked = subprocess.Popen(sleeper, **quiet)
agent = "import os, time; os.execvp(sys.executable, ['ray::Agent', '-c', 'import time; time.sleep(600)'])"
named = subprocess.Popen([sys.executable, "-c", "import sys; " + agent], process_group=reaper.group, **quiet)
spared = subprocess.Popen(sleeper, **quiet)
while not open(f"/proc/{named.pid}/cmdline").read().startswith("ray::"):
    time.sleep(0.01)
print(marked.pid, named.pid, spared.pid, flush=True)
if sys.argv[1] == "closed":
    reaper.close()
else:
    time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the reaper needs /proc")
@pytest.mark.parametrize("how", ["killed", "closed"])
def test_what_was_started_ends_with_the_process_and_nothing_else_does(how: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, how],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    marked, named, spared = map(int, process.stdout.readline().split())
    try:
        if how == "killed":
            process.kill()
        _, said = process.communicate()  # the reaper has it open as well, so it is over by then
        while alive(marked) or alive(named):
            time.sleep(0.01)
        assert alive(spared)
        assert said.strip() == ("ended from outside" if how == "killed" else "")
    finally:
        for pid in (marked, named, spared):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
