"""What runs on the cluster: ``python -m autorank.jobrun``, started by a job of `autorank.jobs`."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from autorank.errors import AutorankError, SweepError

UPLOAD = "job"
"""What was uploaded, below the sweep directory: Ray deletes its own copy, and a resume needs it."""

_POLL = 1.0
_OWN_DISKS = ("overlay", "tmpfs", "ramfs")


def main(arguments: list[str]) -> None:
    """Run a sweep (``search``), go on with one (``resume``), or ask one to finish (``stop``).

    Parameters
    ----------
    arguments : list of str
        What to do, the sweep directory, the job's id, then arguments of `autorank search` or `resume`.
    """
    # What only asks a job to stop needs none of the heavy libraries.
    what, directory, job, *more = arguments
    sweep = Path(directory)
    try:
        if what == "stop":
            stop_file(sweep, job).touch()
            return
        if what == "search":
            _settle(sweep)
        os.chdir(sweep / UPLOAD)
    except OSError as error:
        raise SweepError(f"{error.filename or sweep}: {error.strerror}") from None
    from autorank import cli
    from autorank.jobfiles import SETTINGS

    if kind := own_disk(sweep):
        print(f"note: {sweep} lies on {kind}, this node's own: it is lost with the node", flush=True)
    threading.Thread(target=obey, args=(stop_file(sweep, job),), daemon=True).start()
    named = [SETTINGS, "--sweep-dir", directory] if what == "search" else [directory]
    sys.argv = ["autorank", what, *named, *more]
    cli.main()


def stop_file(sweep: Path, job: str) -> Path:
    """Return the file whose appearance asks a job to finish and save."""
    return sweep / f"stop-{job}"


def obey(asked: Path, pause: Callable[[float], None] = time.sleep) -> None:
    """Wait until a file appears, then stop this process as one Ctrl-C would: the sweep finishes and saves."""
    # Before the sweep listens, the signal would end the process.
    while not asked.exists() or not callable(signal.getsignal(signal.SIGTERM)):
        pause(_POLL)
    asked.unlink(missing_ok=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _settle(sweep: Path) -> None:
    """Copy what was uploaded from where the job was started to the sweep directory."""
    from autorank.journal import FILE_NAME, is_running, read

    if is_running(sweep):
        raise SweepError(f"{sweep}: another process works on this sweep")
    if (sweep / FILE_NAME).exists() and read(sweep).header is not None:
        raise SweepError(
            f"{sweep} already holds a sweep; `autorank submit --resume --sweep-dir {sweep}` goes on with it"
        )
    sweep.mkdir(parents=True, exist_ok=True)
    target = sweep / UPLOAD
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(Path.cwd(), target)


def own_disk(path: Path) -> str:
    """Return the kind of file system of a path when it is a container's or in memory; else nothing."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
        above = {str(path.resolve()), *map(str, path.resolve().parents)}
        nearest = max((fields for fields in mounts if fields[1] in above), key=lambda fields: len(fields[1]))
    except (OSError, ValueError, IndexError):
        return ""
    return nearest[2] if nearest[2] in _OWN_DISKS else ""


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AutorankError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
