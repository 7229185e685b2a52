"""Which files of a directory are the user's code, for what is sent to other machines: a job or a cluster's nodes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from autorank.errors import AutorankError
from autorank.journal import FILE_NAME

SMALL = 2 << 20
"""Bytes up to which a file of data goes along: code may read tables of its own."""

_FOLDERS = ("__pycache__", "node_modules", "mlruns", "mlartifacts", "*.egg-info")
_UNLESS_CODE = ("build", "dist", "secrets", "credentials")
"""Folders that hold no code, unless Python files lie in them: then they are packages of the user."""
_NEVER = (
    *("*.pyc", "*.so", "*.o", "*.log", "*.db", "*.db-wal", "*.db-shm", "*.jpg", "*.jpeg", "*.png", "*.webp"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.ppk", "*.kdbx", "*.env", "*.kubeconfig"),
)
# Not `*token*`, `*secret*` and `id_*`: tokens.txt, secretary.csv and id_to_label.json are data that code reads.
_SECRET = re.compile(
    r"id_[^.]*|id_(rsa|dsa|ecdsa|ed25519).*|kube[-_.]?config.*|.*credential.*|.*service[-_]?account.*\.json"
    r"|(.*[-_.])?(secret|password)s?([-_.].*)?|(auth|access|api|refresh|hf)[-_]?tokens?([-_.].*)?|token(\.(txt|json))?"
)
"""Names of what gives access, in lower case; Python source so named is code that others import."""
_DATA = (
    *("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.whl", "*.bin"),
    *("*.safetensors", "*.pt", "*.pth", "*.pt2", "*.ckpt", "*.onnx", "*.h5", "*.npz", "*.npy", "*.parquet", "*.pkl"),
)


def code_files(root: Path, exclude: Sequence[str] = ()) -> Iterator[Path]:
    """Yield the files that are taken for code: all but hidden ones, caches, environments, sweeps, keys and large data.

    Directories that cannot be read and names that are not UTF-8 are left out.

    Parameters
    ----------
    root : Path
    exclude : sequence of str
        More patterns to leave out, of names or of paths below `root`.

    Raises
    ------
    OSError
        A file cannot be examined.
    """
    top = root.resolve()

    def shown(path: Path) -> bool:
        name, below = path.name, str(path.relative_to(top))
        utf8 = name.encode(errors="ignore").decode() == name
        own = any(fnmatch(name, pattern) or fnmatch(below, pattern.rstrip("/")) for pattern in exclude)
        return utf8 and not name.startswith(".") and not own

    def entered(path: Path) -> bool:
        return shown(path) and not _no_code(path)

    def taken(path: Path) -> bool:
        return shown(path) and not _stays(path)

    for place, folders, files in os.walk(top):
        here = Path(place)
        folders[:] = sorted(name for name in folders if entered(here / name))
        for path in (here / name for name in sorted(files)):
            if not os.path.isfile(path) or not taken(path):
                continue
            # A link may lead to anything; what lies outside, or is left out itself, does not go along.
            target = path.resolve()
            if target != path:
                if not target.is_relative_to(top) or not taken(target):
                    continue
                between = [folder for folder in target.parents if folder != top and folder.is_relative_to(top)]
                if not all(map(entered, between)):
                    continue
            yield root / path.relative_to(top)


@contextmanager
def files_named(kind: type[AutorankError], way_out: str) -> Iterator[None]:
    """Turn what the system says about a file into one line of `kind`, with what can be done about it."""
    try:
        yield
    except OSError as error:
        said = error.strerror or str(error)
        if error.filename is None:
            raise kind(f"what the cluster needs could not be packed: {said}") from None
        raise kind(f"{error.filename} cannot be sent to the cluster ({said}): {way_out}") from None


def _no_code(folder: Path) -> bool:
    name = folder.name
    if any(fnmatch(name, pattern) for pattern in _FOLDERS):
        return True
    if name in _UNLESS_CODE and not any(folder.glob("*.py")):
        return True
    return any(os.path.exists(folder / mark) for mark in ("pyvenv.cfg", FILE_NAME))


def _stays(path: Path) -> bool:
    name = path.name.lower()
    if any(fnmatch(name, pattern) for pattern in _NEVER):
        return True
    if _SECRET.fullmatch(name) and not name.endswith((".py", ".pyi")):
        return True
    return any(fnmatch(name, pattern) for pattern in _DATA) and path.stat().st_size > SMALL
