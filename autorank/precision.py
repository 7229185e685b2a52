"""Training of models that are stored in 16 bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autorank.pytrees import map_tensors

NARROW = (torch.float16, torch.bfloat16)


@contextmanager
def full_precision(model: nn.Module) -> Iterator[bool]:
    """Hold the 16-bit parameters and buffers of `model` in float32 inside, and round them back afterwards.

    In bfloat16 an update below 1/256 of a weight is lost, and with it nearly all of a fine-tune. The parameters stay
    the same objects; their gradients do not outlive the context.

    Yields
    ------
    bool
        Whether there are any.
    """
    parameters = [(p, p.dtype) for p in model.parameters() if p.dtype in NARROW]
    buffers = [
        (module, name, buffer.dtype)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.dtype in NARROW
    ]
    for parameter, _ in parameters:
        parameter.grad = None
        parameter.data = parameter.data.float()
    _cast_buffers((module, name, torch.float32) for module, name, _ in buffers)
    try:
        yield bool(parameters or buffers)
    finally:
        for parameter, dtype in parameters:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
        _cast_buffers(buffers)


def _cast_buffers(wanted: Iterable[tuple[nn.Module, str, torch.dtype]]) -> None:
    done: dict[Tensor, Tensor] = {}  # a buffer that two modules share stays shared
    for module, name, dtype in wanted:
        buffer = module._buffers[name]
        assert buffer is not None
        module._buffers[name] = done.setdefault(buffer, buffer.to(dtype))


def widened(value: Any) -> Any:
    """Return `value` with every 16-bit floating-point tensor inside it in float32."""
    return map_tensors(value, lambda x: x.float() if x.dtype in NARROW else x)
