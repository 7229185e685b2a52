"""Tensors inside what models return and data sets give: tuples, lists, mappings and dataclasses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield every tensor inside tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors(getattr(value, field.name, None))


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply `function` to every tensor that `tensors` yields, in that order, and return the same structure around it.

    Other leaves stay as they are.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return _mapping(value, {key: map_tensors(item, function) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[map_tensors(item, function) for item in value])
    if isinstance(value, list | tuple):
        return type(value)([map_tensors(item, function) for item in value])
    if is_dataclass(value) and not isinstance(value, type):
        copied = copy.copy(value)
        for field in fields(value):
            if hasattr(value, field.name):
                # Not `replace`: it would run __post_init__, and frozen classes refuse plain assignment.
                object.__setattr__(copied, field.name, map_tensors(getattr(value, field.name), function))
        return copied
    return value


def _mapping(value: Mapping[Any, Any], changed: dict[Any, Any]) -> Any:
    kind: Any = type(value)
    if kind is dict:
        return changed
    if hasattr(kind, "__dataclass_fields__"):  # outputs of model libraries are often mappings and dataclasses at once
        return kind(**changed)
    if isinstance(value, MutableMapping):
        copied = copy.copy(value)
        copied.update(changed)
        return copied
    return kind(changed)
