"""The directory of an export: fixed file names, written beside the target and renamed when whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autorank.errors import ExportError

FORMATS = ("safetensors", "pt2", "onnx")
FILES = {name: f"model.{name}" for name in FORMATS}
PLAN, REPORT, RERUN, ONNX_DATA = "plan.json", "report.md", "report.json", "model.onnx.data"
_OWN = {PLAN, REPORT, RERUN, ONNX_DATA, *FILES.values()}


def check_target(directory: Path, overwrite: bool) -> Path:
    """Return the resolved target of an export.

    Raises
    ------
    ExportError
        It is a file, or not empty; with `overwrite`: it is not an earlier export, or holds other files as well.
    """
    try:
        target = directory.expanduser().resolve()
        there = next(path for path in (target, *target.parents) if path.exists())
        if not there.is_dir():
            raise ExportError(
                f"cannot export to {directory}: {there} is a file; give a directory that does not exist yet"
            )
        if there != target:
            return target
        held = {entry.name for entry in target.iterdir()}
    except (OSError, RuntimeError) as error:
        raise ExportError(f"{directory} cannot be used: {_said(error)}") from None
    if not held:
        return target
    earlier = {PLAN, REPORT} <= held
    if not overwrite:
        hint = "overwrite=True (--overwrite) replaces the export in it" if earlier else "give another directory"
        raise ExportError(f"{directory} is not empty; {hint}")
    if not earlier:
        raise ExportError(
            f"{directory} is not an earlier export ({PLAN} and {REPORT} are not both in it) and is not overwritten"
        )
    if foreign := sorted(held - _OWN):
        raise ExportError(
            f"{directory} holds {foreign[0]!r}, which no export wrote, and is not overwritten; move it first"
        )
    return target


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """Give an empty directory on the target's own disk; it is removed whatever happens, unless it was moved away."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move(folder: Path, target: Path) -> None:
    """Put `folder` in the place of `target`; what was there is put back when that fails."""
    # mkdtemp and safetensors let only the owner read what they make; an export gets what any new file gets.
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)
    folder.chmod(0o777 & ~umask)
    if not target.exists():
        folder.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn what the file system raises into one line."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"cannot export to {target}: {_said(error)}") from error


def _said(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
