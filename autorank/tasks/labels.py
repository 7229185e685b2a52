"""The class labels that data show without being gone through."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset


def labels_of(data: Any) -> NDArray[np.int64] | None:
    """Return one whole number per example of `data`, or None when it does not show any.

    Looks at a tensor or array itself, at ``targets`` and ``labels`` (as torchvision's data sets have them), and through
    TensorDataset, Subset and ConcatDataset.
    """
    if isinstance(data, Subset):
        whole = labels_of(data.dataset)
        return None if whole is None else whole[np.asarray(data.indices, dtype=np.int64)]
    if isinstance(data, ConcatDataset):
        parts = [labels_of(part) for part in data.datasets]
        known = [part for part in parts if part is not None]
        return np.concatenate(known) if known and len(known) == len(parts) else None
    if isinstance(data, TensorDataset):
        return labels_of(data.tensors[-1])
    if isinstance(data, Tensor):
        whole_numbers = not (data.is_floating_point() or data.is_complex() or data.dtype == torch.bool)
        return data.cpu().numpy().astype(np.int64) if data.dim() == 1 and whole_numbers else None
    if isinstance(data, np.ndarray):
        return data.astype(np.int64) if data.ndim == 1 and data.dtype.kind in "iu" else None
    for name in ("targets", "labels"):
        found = getattr(data, name, None)
        if isinstance(found, list | tuple) and found and all(isinstance(x, int | np.integer) for x in found):
            found = np.asarray(found, dtype=np.int64)
        if isinstance(found, Tensor | np.ndarray) and (labels := labels_of(found)) is not None:
            return labels if len(labels) == len(data) else None
    return None
