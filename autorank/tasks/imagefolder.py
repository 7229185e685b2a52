"""``imagefolder:``: a directory per class, in ``train``, ``val`` and ``test`` directories if there are such."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autorank.errors import DataError, describe
from autorank.tasks.encoded import EncodedImages
from autorank.tasks.naming import choose_splits, split_of

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class FolderImages(EncodedImages):
    """One split: a directory with a directory of images per class.

    Parameters
    ----------
    root : Path
    classes : tuple of str
        Names of the class directories of the training split, in order; their places are the labels.
    """

    def __init__(self, root: Path, classes: tuple[str, ...]) -> None:
        self.root, self.classes = root, classes
        self._files: list[tuple[Path, int]] | None = None
        digest = hashlib.sha256()
        for file, label in self.files:
            stat = file.stat()
            digest.update(f"{file.relative_to(root)}\0{label}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        self._digest = digest.hexdigest()[:32]

    @property
    def files(self) -> list[tuple[Path, int]]:
        """Path and label of every image, in order."""
        if self._files is None:
            self._files = [
                (file, label)
                for label, name in enumerate(self.classes)
                for file in sorted((self.root / name).rglob("*"))
                if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
            ]
        return self._files

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of every image."""
        return np.asarray([label for _, label in self.files], dtype=np.int64)

    def identity(self) -> dict[str, Any]:
        """Return a hash of the files' names, sizes and times."""
        return {"imagefolder": self._digest}

    def read(self, index: int) -> bytes:
        """Return the bytes of one file."""
        file = self.files[int(index)][0]
        try:
            return file.read_bytes()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {describe(error)}") from error

    def where(self, index: int) -> str:
        """Return the file's path."""
        return str(self.files[int(index)][0])

    def __len__(self) -> int:
        return len(self.files)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": None}


def open_imagefolder(path: str, args: Mapping[str, Any]) -> dict[str, EncodedImages]:
    """Return the splits of a directory; without split directories all of it is the training split."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"imagefolder:{path} {'is not a directory' if root.exists() else 'does not exist'}")
    names = _directories(root)
    split = any(split_of(name) == "train" for name in names) or any(args.get(key) for key in ("train",))
    chosen = choose_splits(names, args, f"imagefolder:{path}") if split else {"train": "."}
    classes = _directories(root / chosen["train"])
    if len(classes) < 2:
        raise DataError(
            f"{root / chosen['train']} must have a directory per class, two at least; it has {len(classes)}"
        )
    splits: dict[str, EncodedImages] = {}
    for name, directory in chosen.items():
        strange = [c for c in _directories(root / directory) if c not in classes]
        if strange:
            raise DataError(f"{root / directory}: class {strange[0]!r} is not among the training classes")
        splits[name] = FolderImages(root / directory, tuple(classes))
        if not len(splits[name]):
            raise DataError(f"{root / directory} has no images ({', '.join(sorted(SUFFIXES))})")
    return splits


def _directories(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
