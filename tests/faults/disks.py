"""Disks that fill up and directories that may not be written any more: for real, by whatever way this machine has."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autorank.journal import FILE_NAME
from tests.faults import net
from tests.faults.sweeps import Scene, until

SIZE = 24 << 20
GROUP = 1 << 30


def _did(*command: str) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Small:
    """A disk with room for one sweep: a mounted one, else a limit on the journal of the driver."""

    def __init__(self, scene: Scene, mounted: bool) -> None:
        self.scene, self.mounted = scene, mounted
        self.how = "tmpfs" if mounted else "limit on the size of the journal"

    @property
    def _ballast(self) -> Path:
        return self.scene.sweep / "ballast"

    def fill(self, left: int) -> None:
        """Leave `left` bytes or fewer."""
        if not self.mounted:
            size = (self.scene.sweep / FILE_NAME).stat().st_size + left
            resource.prlimit(self.scene.drivers[-1].pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            return
        with self._ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 4096):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass
            file.truncate(max(0, file.tell() - left))

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)


@contextmanager
def memory_group(scene: Scene, wanted: bool) -> Iterator[None]:
    """Offer trials a group of little memory, in which the kernel kills who uses more, where one can be made."""
    group = Path("/sys/fs/cgroup/memory") / f"autorank-faults-{os.getpid()}"
    limit = group / "memory.limit_in_bytes"
    try:
        if wanted:
            group.mkdir()
            limit.write_text(str(GROUP))
            (scene.place / net.CGROUP).write_text(str(group / "cgroup.procs"))
            scene.how = "killed by the kernel"
    except OSError:
        scene.how = "refused by the kernel"
    try:
        yield
    finally:
        if wanted and group.exists():
            until(lambda: not (group / "cgroup.procs").read_text(), "the end of a trial's process")
            group.rmdir()


@contextmanager
def small(scene: Scene) -> Iterator[Small]:
    """Put the sweep of a scene on a small disk."""
    scene.sweep.mkdir(parents=True)
    mounted = _did("mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(scene.sweep))
    disk = Small(scene, mounted)
    scene.how = disk.how
    try:
        yield disk
        if mounted:
            kept = scene.place / "kept"
            shutil.copytree(scene.sweep, kept)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(scene.sweep)], check=True)
    if mounted:
        scene.sweep.rmdir()
        kept.rename(scene.sweep)


@contextmanager
def read_only(directory: Path) -> Iterator[str]:
    """Let nothing in a directory be written, by a process that has files open there neither, root included."""
    folders = [directory, *(path for path in directory.rglob("*") if path.is_dir())]
    places = [*folders, directory / FILE_NAME]
    if all(_did("chattr", "+i", str(place)) for place in places):
        try:
            yield "chattr +i"
        finally:
            for place in places:
                _did("chattr", "-i", str(place))
        return
    for place in places:
        _did("chattr", "-i", str(place))
    modes = {place: place.stat().st_mode for place in places}
    for place, mode in modes.items():
        place.chmod(mode & 0o555)
    try:
        yield "permission bits"
    finally:
        for place, mode in modes.items():
            place.chmod(mode)
