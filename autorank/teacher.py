"""The dense model's outputs for the training batches: computed once per sweep, memory-mapped by every worker."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autorank.memoryformat import lay_out
from autorank.tasks.base import Task
from autorank.tasks.batch import Batch, Device
from autorank.trouble import tell
from autorank.types import canonical_json

if TYPE_CHECKING:
    from autorank.recover import Recovery

LIMIT_BYTES = 1 << 30
Progress = Callable[[int, int], None]
Lesson = Callable[[int, Batch], Any]


@dataclass(frozen=True)
class Teacher:
    """Outputs of the dense model for the batches of one (seed, batch size), as far as they were stored.

    Attributes
    ----------
    seed, batch_size : int
        The batches that the outputs belong to.
    rows : array of float32, (examples, ...) or None
        Outputs of all batches, one after the other; None when they are computed on the fly.
    offsets : tuple of int
        Row at which each batch begins, and the end of the last one.
    path : Path or None
        The file that `rows` maps.
    sums : tuple of str
        The hash of each batch, by which a file that is damaged while it is mapped is noticed.
    """

    seed: int
    batch_size: int
    rows: NDArray[np.float32] | None = None
    offsets: tuple[int, ...] = (0,)
    path: Path | None = None
    sums: tuple[str, ...] = ()

    @classmethod
    def build(
        cls,
        task: Task,
        recovery: Recovery,
        seed: int,
        device: Device = "cpu",
        path: Path | None = None,
        progress: Progress | None = None,
        limit_bytes: int = LIMIT_BYTES,
    ) -> Teacher:
        """Return the teacher of a sweep; computed only if `path` does not hold it already.

        Parameters
        ----------
        task : Task
        recovery : Recovery
            Its steps, batch size and distillation weight.
        seed : int
            Of the training batches.
        device : device
        path : Path, optional
            An ``.npy`` file; beside it goes a ``.json`` that says what the outputs belong to, with their hash. A file
            that is damaged or belongs to something else is computed again. None keeps the outputs in memory.
        progress : callable, optional
            ``progress(done, total)`` in batches.
        limit_bytes : int
            Outputs beyond this size are not stored but computed on the fly.
        """
        fresh = cls(seed, recovery.batch_size)
        if not recovery.steps or not recovery.distill or recovery.features:
            return fresh  # the dense model runs at every step anyway where its features are matched
        key = _key(task, recovery, seed)
        if path is not None and (found := _read(path, key, fresh)) is not None:
            return found
        made = _compute(task, recovery, seed, device, progress, limit_bytes)
        if made is None:
            return fresh
        rows, offsets = made
        if path is None:
            return cls(seed, recovery.batch_size, rows, offsets)
        try:
            _write(path, key, rows, offsets)
        except OSError:  # a full disk costs the file, not the sweep
            return cls(seed, recovery.batch_size, rows, offsets)
        return _read(path, key, fresh) or cls(seed, recovery.batch_size, rows, offsets)

    @property
    def steps(self) -> int:
        """Number of batches whose outputs are stored."""
        return len(self.offsets) - 1

    def lesson(self, task: Task, batch_size: int, seed: int, device: Device) -> Lesson:
        """Return a function of (step, batch) that gives the dense model's outputs on `device`.

        What is not stored is computed by a copy of the dense model, which is made when it is first needed.
        """
        dense: list[torch.nn.Module] = []

        def outputs(step: int, batch: Batch) -> Any:
            stored = self._stored(step, len(batch)) if (batch_size, seed) == (self.batch_size, self.seed) else None
            if stored is not None:
                return stored.to(device, non_blocking=True)
            if not dense:
                dense.append(lay_out(task.model().to(device).eval(), task.channels_last(device)))
            with torch.no_grad():
                return dense[0](*batch.inputs)

        return outputs

    def _stored(self, step: int, examples: int) -> Tensor | None:
        if self.rows is None or step >= self.steps:
            return None
        start, stop = self.offsets[step : step + 2]
        if stop - start != examples:
            return None
        found = np.array(self.rows[start:stop])
        if self.sums and _sum(found) != self.sums[step]:  # the file has changed below the map: computed on the fly
            tell(f"{self.path} is damaged; the dense model's outputs are computed where they are needed")
            return None
        return torch.from_numpy(found)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"rows": None} if self.path is not None else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows = state["rows"]
        if state["path"] is not None:
            try:
                rows = np.load(state["path"], mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError):
                rows = None  # not on this machine: computed on the fly
        self.__dict__.update(state | {"rows": rows})


def _compute(
    task: Task, recovery: Recovery, seed: int, device: Device, progress: Progress | None, limit_bytes: int
) -> tuple[NDArray[np.float32], tuple[int, ...]] | None:
    model = lay_out(task.model().to(device).eval(), task.channels_last(device))
    parts: list[NDArray[np.float32]] = []
    offsets = [0]
    size = 0
    with torch.no_grad():
        for step, batch in enumerate(task.train_batches(recovery.steps, recovery.batch_size, seed, device)):
            outputs = model(*batch.inputs)
            if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or len(outputs) != len(batch):
                return None
            size += outputs.numel() * 4
            # The batches are about equal, so the first one tells what is coming.
            if size > limit_bytes or (step == 0 and size * recovery.steps > limit_bytes):
                return None
            parts.append(outputs.float().cpu().numpy())
            offsets.append(offsets[-1] + len(batch))
            if progress is not None:
                progress(step + 1, recovery.steps)
    if len({part.shape[1:] for part in parts}) != 1:
        return None
    return np.concatenate(parts), tuple(offsets)


def _key(task: Task, recovery: Recovery, seed: int) -> str:
    what = {
        "model": task.fingerprint_of("model"),
        "train": task.fingerprint_of("train"),
        "steps": recovery.steps,
        "batch_size": recovery.batch_size,
        "seed": seed,
        "torch": str(torch.__version__),
    }
    return hashlib.sha256(canonical_json(what).encode()).hexdigest()


def note_of(path: Path) -> Path:
    """Return the file that says to what the outputs in `path` belong."""
    return path.with_suffix(".json")


def _read(path: Path, key: str, fresh: Teacher) -> Teacher | None:
    try:
        note = json.loads(note_of(path).read_text())
        if note["key"] != key:
            return None
        if note["sha256"] != _file_hash(path):
            tell(f"{path} is damaged and is made again")
            return None
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        offsets = tuple(int(offset) for offset in note["offsets"])
        sums = tuple(map(str, note["sums"]))
        # np.load also opens an archive of arrays, whatever its name.
        sound = isinstance(rows, np.ndarray) and rows.dtype == np.float32 and list(offsets) == sorted(offsets)
    except (OSError, ValueError, EOFError, KeyError, TypeError, RecursionError):
        return None
    whole = sound and offsets[:1] == (0,) and offsets[-1] == len(rows) and len(sums) == len(offsets) - 1
    return Teacher(fresh.seed, fresh.batch_size, rows, offsets, path, sums) if whole else None


def _write(path: Path, key: str, rows: NDArray[np.float32], offsets: tuple[int, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as directory:
        part = Path(directory) / "rows.npy"
        np.save(part, rows, allow_pickle=False)
        sums = [_sum(rows[start:stop]) for start, stop in pairwise(offsets)]
        note = {"key": key, "sha256": _file_hash(part), "offsets": offsets, "sums": sums}
        (Path(directory) / "note.json").write_text(json.dumps(note))
        os.replace(part, path)
        os.replace(Path(directory) / "note.json", note_of(path))


def _sum(rows: NDArray[np.float32]) -> str:
    return hashlib.sha256(rows.tobytes()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
