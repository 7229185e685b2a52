"""How data travel to other processes: large tensors and arrays as files that everybody maps, the rest by value."""

from __future__ import annotations

import io
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autorank.errors import DataError, describe
from autorank.tasks.elsewhere import here
from autorank.tasks.hashing import hash_arrays
from autorank.tasks.memory import default_cache

LEAST_BYTES = 1 << 20  # smaller ones are not worth a file

# NumPy does not know all of torch's number types: values are stored as whole numbers of their width.
WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dumps(value: Any) -> bytes:
    """Pickle `value`; its large tensors and arrays go into the cache directory, once for equal contents.

    A tensor that is a small view of a large one takes only its own part along. Where the cache directory cannot be
    written, everything travels by value. Read by `pickle.loads`.
    """
    with io.BytesIO() as file:
        _Pickler(file).dump(value)
        return file.getvalue()


class _Pickler(cloudpickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        """Return how a tensor or array is made again; whatever else is left to cloudpickle."""
        if type(obj) is np.ndarray and not obj.dtype.hasobject and obj.nbytes >= LEAST_BYTES:
            path = _stored(obj)
            return super().reducer_override(obj) if path is None else (_mapped, (path,))
        if type(obj) is Tensor and obj.layout is torch.strided and obj.device.type == "cpu" and not obj.requires_grad:
            plain = obj.resolve_conj().resolve_neg()
            width = WIDTHS.get(obj.element_size())
            if width is not None and obj.numel() * obj.element_size() >= LEAST_BYTES:
                path = _stored(plain.contiguous().view(width).numpy())
                if path is not None:
                    return _mapped_tensor, (path, obj.dtype)
            if obj.untyped_storage().nbytes() > obj.numel() * obj.element_size():
                return plain.clone(memory_format=torch.contiguous_format).__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return super().reducer_override(obj)


def _stored(array: NDArray[Any]) -> str | None:
    """Return the file that holds `array`, written unless it is there; None when it cannot be written."""
    path = default_cache().absolute() / "tensors" / f"{hash_arrays(array)}.npy"
    try:
        if not _holds(path, array):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(prefix=f".{path.stem}-", dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    np.save(file, array, allow_pickle=False)
                os.replace(part, path)
            except BaseException:
                Path(part).unlink(missing_ok=True)
                raise
    except OSError:
        return None
    return str(path)


def _holds(path: Path, array: NDArray[Any]) -> bool:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return found.dtype == array.dtype and found.shape == array.shape


def _mapped(path: str) -> NDArray[Any]:
    try:
        # Copy on write: the pages are shared, and whoever writes into the array changes nobody else's.
        return np.asarray(np.load(here(Path(path)), mmap_mode="c", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"the data of the task cannot be read from {path} ({describe(error)}); set $AUTORANK_CACHE to a directory "
            "that all machines of the sweep share"
        ) from None


def _mapped_tensor(path: str, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(_mapped(path)).view(dtype)
