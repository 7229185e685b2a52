"""Files of a sweep on nodes that do not see its directory: fetched once per node, sent back when a trial has ended."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TOKEN_FILE = "shared.token"
CHUNK = 16 << 20
PREFIX = "autorank-node-"
FETCHED_MODELS = 8
"""Weights of earlier trials that a node keeps, the latest ones."""


class FileServer:
    """Reads and writes named files below the sweep directory, and reads those of the data cache.

    It runs as a Ray actor on the driver's node. No name can lead out of the two directories, and only weights are
    written.

    Parameters
    ----------
    sweep, data : str
        The two directories.
    """

    def __init__(self, sweep: str, data: str) -> None:
        self._roots = {"sweep": Path(sweep).resolve(), "data": Path(data).resolve()}

    def size(self, root: str, name: str) -> int | None:
        """Return the size of a file in bytes, or None when there is none."""
        try:
            return self._path(root, name).stat().st_size
        except OSError:
            return None

    def read(self, root: str, name: str, offset: int) -> bytes:
        """Return up to 16 MiB of a file from `offset` on; nothing when it is gone."""
        try:
            with self._path(root, name).open("rb") as file:
                file.seek(offset)
                return file.read(CHUNK)
        except OSError:
            return b""

    def write(self, name: str, upload: str, offset: int, data: bytes, last: bool) -> None:
        """Write a part of a weights file; it appears under its name when the last part is there."""
        path = self._path("sweep", name)
        if path.parent.name != "models" or path.suffix != ".safetensors" or not upload.isalnum():
            raise ValueError(f"{name!r} is not a file of weights")
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(f"{path.name}.{upload}.part")
        try:
            with part.open("r+b" if offset else "wb") as file:
                file.seek(offset)
                file.write(data)
            if last:
                part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise

    def _path(self, root: str, name: str) -> Path:
        base = self._roots[root]
        path = (base / name).resolve()
        if not path.is_relative_to(base) or path == base:
            raise ValueError(f"{name!r} leads out of its directory")
        return path


def write_token(directory: Path) -> str:
    """Write a random text into the sweep directory, by which a worker knows it, and return it."""
    token = secrets.token_hex(16)
    (directory / TOKEN_FILE).write_text(token)
    return token


def sees(directory: Path, token: str) -> bool:
    """Say whether this machine sees the sweep directory itself, and may write into it."""
    try:
        found = (directory / TOKEN_FILE).read_text()
    except (OSError, UnicodeDecodeError):
        return False
    return found == token and os.access(directory, os.W_OK)


def serve(sweep: Path, data: Path) -> Any:
    """Start a file server beside the driver and return its handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(FileServer)
    return actor.options(num_cpus=0, scheduling_strategy=here).remote(str(sweep), str(data))


class NodeFiles:
    """A directory of a node for one sweep; all workers of the node use it, and the last one removes it.

    Parameters
    ----------
    server : actor handle of `FileServer`
    token : str
        Of the sweep.
    sweep, data : Path
        The directories on the driver's machine.
    """

    def __init__(self, server: Any, token: str, sweep: Path, data: Path) -> None:
        self._server = server
        self._there = {"sweep": sweep, "data": data}
        self.directory = Path(tempfile.gettempdir()) / f"{PREFIX}{token}"
        _remove_deserted(self.directory)
        self._in_use = _entered(self.directory)

    def fetch(self, path: Path) -> Path | None:
        """Return where a file of the driver's machine lies on this one, or None when the driver has none.

        `path` is either the file's place there, below the sweep directory or the data cache, or its place here.
        """
        for root, there in self._there.items():
            for base in (self.directory / root, there):
                if path.is_relative_to(base):
                    return self._fetched(root, path.relative_to(base))
        return None

    def _fetched(self, root: str, name: Path) -> Path | None:
        import ray

        target = self.directory / root / name
        with _locked(self.directory / "fetch.lock"):
            if target.exists():
                return target
            size = ray.get(self._server.size.remote(root, str(name)))
            if size is None:
                return None
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f"{target.name}.part")
            with part.open("wb") as file:
                while file.tell() < size:
                    data = ray.get(self._server.read.remote(root, str(name), file.tell()))
                    if not data:
                        break  # deleted meanwhile
                    file.write(data)
            if part.stat().st_size != size:
                part.unlink()
                return None
            if target.parent.name == "models":
                self._make_room(target.parent)
            part.replace(target)
        return target

    def send(self, path: Path) -> None:
        """Take a finished trial's weights to the sweep directory; they can be made again, so a failure is no matter."""
        import ray

        name, upload, size = path.relative_to(self.directory / "sweep"), secrets.token_hex(8), path.stat().st_size
        with suppress(ray.exceptions.RayError), path.open("rb") as file:
            while True:
                offset, data = file.tell(), file.read(CHUNK)
                last = file.tell() == size
                ray.get(self._server.write.remote(str(name), upload, offset, data, last))
                if last or not data:
                    break
        path.unlink(missing_ok=True)

    @staticmethod
    def _make_room(models: Path) -> None:
        kept = sorted(models.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in kept[FETCHED_MODELS - 1 :]:
            old.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the directory; who is last removes it."""
        os.close(self._in_use)
        _remove_if_deserted(self.directory)


def _entered(directory: Path) -> int:
    """Return an open file that marks the directory as in use for as long as this process lives."""
    while True:
        directory.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):
            handle = os.open(directory / "in-use", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(handle, fcntl.LOCK_SH)
            with suppress(FileNotFoundError):
                if os.stat(directory / "in-use").st_ino == os.fstat(handle).st_ino:
                    return handle
            os.close(handle)  # removed in between


def _remove_deserted(own: Path) -> None:
    """Remove what killed workers left behind."""
    for directory in own.parent.glob(f"{PREFIX}*"):
        if directory != own:
            _remove_if_deserted(directory)


def _remove_if_deserted(directory: Path) -> None:
    with suppress(OSError):  # gone, in use, or another person's
        handle = os.open(directory / "in-use", os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(handle)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
