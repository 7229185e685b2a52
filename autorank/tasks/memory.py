"""Small image sets, decoded once per machine and memory-mapped by everybody who uses them."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autorank.errors import DataError
from autorank.tasks.elsewhere import here
from autorank.tasks.splits import Indices
from autorank.types import canonical_json

LAYOUT = 1  # part of the cache key: raise it when the files mean something else


class Recipe(Protocol):
    """How an image set is made, when the cache does not hold it yet."""

    def identity(self) -> dict[str, Any]:
        """Return what identifies the result, as JSON values."""

    def write(self, directory: Path) -> None:
        """Write ``images.npy`` (uint8, (N, C, H, W)) and ``labels.npy`` (int64, (N,)) into `directory`."""


class ImageArrays:
    """Images and labels in a content-addressed cache directory, memory-mapped.

    Only the recipe travels when this is pickled: a worker maps the same files, and a machine that does not have them
    makes them.

    Parameters
    ----------
    recipe : Recipe
    cache_dir : Path or None
        None is ``$AUTORANK_CACHE``, or ``~/.cache/autorank``.
    """

    def __init__(self, recipe: Recipe, cache_dir: Path | None = None) -> None:
        self.recipe = recipe
        self.cache_dir = Path(cache_dir) if cache_dir is not None else default_cache()
        self._arrays: tuple[NDArray[np.uint8], NDArray[np.int64]] | None = None
        self._key: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arrays": None}

    @property
    def directory(self) -> Path:
        """Where the files lie."""
        if self._key is None:
            text = canonical_json({"layout": LAYOUT, **self.recipe.identity()})
            self._key = hashlib.sha256(text.encode()).hexdigest()[:32]
        return self.cache_dir / "images" / self._key

    @property
    def images(self) -> NDArray[np.uint8]:
        """Images, uint8 (N, C, H, W)."""
        return self._open()[0]

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of every image."""
        return self._open()[1]

    def identity(self) -> dict[str, Any]:
        """Return the recipe's identity."""
        return self.recipe.identity()

    def batches(self, groups: Sequence[Indices], workers: int, pin: bool) -> Iterator[Tensor]:
        """Yield copies of the rows of each group."""
        for group in groups:
            yield torch.from_numpy(self.images[group])

    def _open(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        if self._arrays is None:
            self._arrays = _read(self.directory)
            if self._arrays is None:
                self._make()
                self._arrays = _read(self.directory)
            if self._arrays is None:
                raise DataError(f"the image cache {self.directory} cannot be read back; set $AUTORANK_CACHE elsewhere")
        return self._arrays

    def _make(self) -> None:
        target = self.directory
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        except OSError as error:
            raise DataError(
                f"the image cache {target.parent} cannot be written ({error.strerror}); set $AUTORANK_CACHE to a "
                "writable directory"
            ) from error
        try:
            self.recipe.write(building)
            if target.exists() and _read(target) is None:
                shutil.rmtree(target, ignore_errors=True)
            try:
                os.rename(building, target)
            except OSError:
                if _read(target) is None:  # otherwise another process was faster
                    raise
        except OSError as error:
            raise DataError(f"the image cache {target} could not be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(building, ignore_errors=True)


def default_cache() -> Path:
    """Return ``$AUTORANK_CACHE``, or ``~/.cache/autorank``."""
    return Path(os.environ.get("AUTORANK_CACHE") or Path.home() / ".cache" / "autorank")


def _read(directory: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]] | None:
    try:
        images = np.load(here(directory / "images.npy"), mmap_mode="r", allow_pickle=False)
        labels = np.load(here(directory / "labels.npy"), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if not isinstance(images, np.ndarray) or not isinstance(labels, np.ndarray):
        return None  # np.load also opens an archive of arrays, whatever its name
    sound = images.dtype == np.uint8 and images.ndim == 4 and labels.dtype == np.int64
    return (images, labels) if sound and labels.shape == images.shape[:1] else None
