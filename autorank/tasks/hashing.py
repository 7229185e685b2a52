"""Hashes of arrays and tensors, by which data are told apart."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def hash_arrays(*arrays: NDArray[Any]) -> str:
    """Return a hash of number types, shapes and contents."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def hash_tensors(*tensors: Tensor) -> str:
    """Return a hash of number types, shapes and contents, whatever the number types are."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
        plain = dense.detach().cpu().resolve_conj().resolve_neg().contiguous()
        # As bytes: NumPy has no bfloat16.
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
