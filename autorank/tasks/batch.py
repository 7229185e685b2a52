"""What a task hands to a model: inputs and targets of a few examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autorank.errors import DataError
from autorank.pytrees import map_tensors

Unpack = Callable[[Any], tuple[Any, Any]]
Device = str | torch.device


@dataclass(frozen=True)
class Batch:
    """Some examples.

    Attributes
    ----------
    inputs : tuple of Tensor
        What the model is called with, batch dimension first; an input without dimensions is shared by all examples.
    targets : object
        What loss and metric are given beside the outputs; tensors inside tuples, lists, mappings and dataclasses are
        moved along.
    """

    inputs: tuple[Tensor, ...]
    targets: Any

    def __len__(self) -> int:
        return next((int(x.shape[0]) for x in self.inputs if x.dim()), 1)

    def to(self, device: Device) -> Batch:
        """Return the batch with all its tensors on `device`."""
        return Batch(tuple(move(x, device) for x in self.inputs), move(self.targets, device))


def wide(device: torch.device) -> torch.dtype:
    """Return the widest floating-point type of a device (Apple's has no float64)."""
    return torch.float32 if device.type == "mps" else torch.float64


def move(value: Any, device: Device) -> Any:
    """Return `value` with every tensor inside it on `device`."""
    return map_tensors(value, lambda x: x.to(device, non_blocking=True))


def unpack_batch(item: Any, unpack: Unpack | None = None) -> Batch:
    """Turn what a data set or loader gives into a `Batch`.

    Parameters
    ----------
    item : object
        Without `unpack`: ``(x1, x2, ..., target)`` or ``((x1, x2, ...), target)``.
    unpack : callable, optional
        ``unpack(item) -> (inputs, targets)``, inputs being a tensor or a tuple of them.
    """
    if isinstance(item, Batch):
        return item
    if unpack is not None:
        parts = unpack(item)
        if not isinstance(parts, list | tuple) or len(parts) != 2:
            raise DataError(f"unpack must return (inputs, targets), not {type(parts).__name__}")
        inputs, targets = parts
    elif isinstance(item, list | tuple) and len(item) >= 2:
        *inputs, targets = item
        if len(inputs) == 1 and isinstance(inputs[0], list | tuple):
            inputs = inputs[0]
    else:
        keys = f" with keys {', '.join(map(repr, item))}" if isinstance(item, Mapping) else ""
        raise DataError(
            f"a batch must be (x1, ..., target), not a {type(item).__name__}{keys}: "
            "pass unpack=lambda batch: ((inputs, ...), targets)"
        )
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    for position, value in enumerate(given):
        if not isinstance(value, Tensor):
            raise DataError(f"input {position} of a batch is a {type(value).__name__}, not a tensor")
    if not given:
        raise DataError("a batch has no inputs")
    return Batch(given, targets)
