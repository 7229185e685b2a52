"""What a job takes along to its cluster: the settings, local weights and small local data, the user's own code."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from autorank.config import FILE_SCHEMES, SweepConfig, parts_of
from autorank.errors import ConfigError
from autorank.privacy import lost, to_keep
from autorank.remotestore import is_url
from autorank.usercode import code_files, files_named

SETTINGS = "sweep.yaml"
FILES = "files"
"""Directory of weights, space and data among what is uploaded."""
MOST_BYTES = 200 * 2**20
"""Ray takes half a gigabyte packed, and sends it to every node."""


@files_named(ConfigError, "make it readable; code that is not needed is left out with --exclude")
def pack(
    config: SweepConfig, folder: Path, code: Path, *, exclude: Sequence[str] = (), paths_are_there: bool = False
) -> list[str]:
    """Write into `folder` all that a sweep needs on another machine.

    Parameters
    ----------
    config : SweepConfig
        Its `sweep_dir` is left out: the job names it.
    folder : Path
        Empty.
    code : Path
        Where the modules of ``python:`` names lie; see `autorank.usercode.code_files` for what is taken.
    exclude : sequence of str
        More patterns to leave out, of names or of paths below `code`.
    paths_are_there : bool
        All paths in the settings are paths on the cluster: only the settings and the code are taken.

    Returns
    -------
    list of str
        What a person should know.

    Raises
    ------
    ConfigError
        A setting holds a secret, a file is not there or cannot be read, or all together is too large.
    """
    settings = config.model_dump(mode="json", exclude_unset=True)
    refuse_secrets(settings)
    settings.pop("sweep_dir", None)
    if "address" in SweepConfig.model_fields and config.executor == "ray":
        settings["address"] = "auto"
    sizes: dict[str, int] = {}
    notes: list[str] = []
    if not paths_are_there:
        for key in ("weights", "space", "data"):
            notes += _take(settings, key, folder, sizes)
        if (reused := settings.get("reuse")) is not None and not is_url(reused):
            notes.append(f"reuse: {reused} is taken for a path on the cluster; sweeps are not uploaded")
    for name in ("model", "data"):
        value = settings.get(name)
        if isinstance(value, str) and value.startswith("python:") and _lies_in(value, code):
            _take_code(code, folder, exclude, sizes)
            break
    _check(sizes)
    (folder / SETTINGS).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return notes


def refuse_secrets(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError when a setting that the cluster would keep, and show to its users, holds a secret."""
    if secret := lost(to_keep(settings)):
        raise ConfigError(
            f"{secret} holds a secret, which would be stored on the cluster: write ${{NAME}} in its place, and set "
            "NAME in the environment of the cluster's nodes"
        )


def _take(settings: dict[str, Any], key: str, folder: Path, sizes: dict[str, int]) -> list[str]:
    """Copy the files or directories that a setting names, and make the setting point to the copies."""
    value = settings.get(key)
    if not isinstance(value, str):
        return []
    scheme, colon, path = value.partition(":") if key == "data" else ("", "", value)
    if key == "data" and scheme not in FILE_SCHEMES:
        return []
    parts, taken, notes = parts_of(scheme, path), [], []
    for number, part in enumerate(parts):
        found = _found(scheme, part)
        if not found and key == "space" and os.sep not in part:
            return []  # a shipped name
        if not found and not Path(part).is_absolute():
            raise ConfigError(f"{key}: there is no {part} here; give an absolute path if it lies on the cluster")
        if not found:
            notes.append(f"{key}: {part} is not on this machine; it is taken for a path on the cluster")
            taken.append(part)
        for source in found:
            # Which split a file belongs to may stand in the name of its directory.
            apart = () if found == [Path(part)] == [Path(path)] else (str(number), source.absolute().parent.name)
            taken.append(str(_copied(source, key, Path(FILES, key, *apart), folder, sizes)))
    settings[key] = f"{scheme}{colon}{','.join(taken)}"
    return notes


def _found(scheme: str, place: str) -> list[Path]:
    """Return what is at a place: a file, a directory, or all that a pattern of ``parquet:`` matches."""
    if Path(place).exists():
        return [Path(place)]
    return sorted(map(Path, glob.glob(place))) if scheme == "parquet" else []


def _copied(source: Path, key: str, under: Path, folder: Path, sizes: dict[str, int]) -> Path:
    """Copy a file or a directory to `under`, below `folder`, and return where it lies there."""
    found = [source] if source.is_file() else [part for part in sorted(source.rglob("*")) if part.is_file()]
    sizes.update({f"{key}: {part}": part.stat().st_size for part in found})
    _check(sizes)
    for part in found:
        target = folder / under / part.relative_to(source.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(part, target)
    return under / source.name


def _lies_in(name: str, code: Path) -> bool:
    """Say whether the module of a ``python:`` name lies in a directory; else it must be installed on the cluster."""
    top = name.removeprefix("python:").partition(":")[0].partition(".")[0]
    return (code / top).is_dir() or (code / f"{top}.py").is_file()


def _take_code(code: Path, folder: Path, exclude: Sequence[str], sizes: dict[str, int]) -> None:
    found = list(code_files(code, (FILES, *exclude)))
    sizes.update({str(path): path.stat().st_size for path in found})
    _check(sizes)
    for path in found:
        target = folder / path.relative_to(code)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _check(sizes: Mapping[str, int]) -> None:
    total = sum(sizes.values())
    if total > MOST_BYTES:
        largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
        said = ", ".join(f"{name} ({size / 2**20:.0f} MB)" for name, size in largest)
        raise ConfigError(
            f"{total / 2**20:.0f} MB would be uploaded, more than {MOST_BYTES / 2**20:.0f} MB; the largest: {said}. "
            "Leave code out with --exclude; put weights and data on the cluster's storage and give their paths there, "
            "with --paths-on-cluster"
        )
