"""Which files of a directory are the user's code, for what is sent to other machines: a job or a cluster's nodes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from autorank.journal import FILE_NAME

SMALL = 2 << 20
"""Bytes up to which a file of data goes along: code may read tables of its own."""

_FOLDERS = ("__pycache__", "node_modules", "mlruns", "mlartifacts", "build", "dist", "*.egg-info")
_NEVER = (
    *("*.pyc", "*.so", "*.o", "*.log", "*.db", "*.db-wal", "*.db-shm", "*.jpg", "*.jpeg", "*.png", "*.webp"),
    *("*.pem", "*.key", "*.p12", "id_rsa*", "auth_token*", "kubeconfig*"),
)
_DATA = (
    *("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.whl", "*.bin"),
    *("*.safetensors", "*.pt", "*.pth", "*.pt2", "*.ckpt", "*.onnx", "*.h5", "*.npz", "*.npy", "*.parquet", "*.pkl"),
)


def code_files(root: Path, exclude: Sequence[str] = ()) -> Iterator[Path]:
    """Yield the files that are taken for code: all but hidden ones, caches, environments, sweeps, keys and large data.

    Parameters
    ----------
    root : Path
    exclude : sequence of str
        More patterns to leave out, of names or of paths below `root`.
    """
    inside = root.resolve()

    def fits(path: Path, patterns: Sequence[str]) -> bool:
        below = str(path.relative_to(root))
        return any(fnmatch(path.name, pattern) or fnmatch(below, pattern.rstrip("/")) for pattern in patterns)

    for place, folders, files in os.walk(root):
        here = Path(place)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and not fits(here / name, (*_FOLDERS, *exclude))
            and not any((here / name / mark).exists() for mark in ("pyvenv.cfg", FILE_NAME))
        )
        for name in sorted(files):
            path = here / name
            # A link may lead to anything; what lies outside is not the user's code.
            if name.startswith(".") or not path.is_file() or not path.resolve().is_relative_to(inside):
                continue
            if fits(path, (*_NEVER, *exclude)) or (fits(path, _DATA) and path.stat().st_size > SMALL):
                continue
            yield path
