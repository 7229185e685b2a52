"""From JSON values to the types that a dataclass names, strictly: what does not fit is refused, never taken along."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Hashable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

Decoder = Callable[[Any], Any]
_LARGEST, _HUGE = 2**63, math.inf


def decoded(kind: type[Any], data: Any, ready: Mapping[str, Any] | None = None) -> Any:
    """Return the dataclass `kind` made of a JSON object.

    Whole numbers must fit into 64 bits. Where a number is wanted, null stands for one that is not finite, as the
    journal writes it, and is read as NaN, or as None where that is allowed.

    Parameters
    ----------
    kind : type
        A dataclass.
    data : mapping
    ready : mapping, optional
        Fields that are made already.

    Raises
    ------
    ValueError
        Says which key is wrong, missing or unknown.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{_shown(data)} is not a mapping")
    known, needed = _fields(cast(Hashable, kind))
    values = dict(ready or {})
    key = ""
    try:
        for key, value in data.items():
            if key not in values:
                values[key] = known[key](value)
    except (ValueError, TypeError, KeyError) as error:
        if key not in known:
            raise ValueError(f"unknown key {_shown(key)}") from None
        raise ValueError(f"{key}: {error.args[0] if error.args else error}") from None
    if not needed <= values.keys():
        raise ValueError(f"{min(needed - values.keys())!r} is missing")
    return kind(**values)


@cache
def _fields(kind: type[Any]) -> tuple[dict[str, Decoder], frozenset[str]]:
    hints = get_type_hints(kind)

    def optional(one: Field[Any]) -> bool:
        return one.default is not MISSING or one.default_factory is not MISSING

    known = {one.name: decoder(hints[one.name]) for one in fields(kind)}
    return known, frozenset(one.name for one in fields(kind) if not optional(one))


@cache
def decoder(hint: Any) -> Decoder:
    """Return the function that checks a JSON value against a type and makes it of that type."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _either([part for part in parts if part is not type(None)], type(None) in parts)
    if origin is Literal:
        return lambda value: value if value in parts else _refuse(value, " or ".join(map(repr, parts)))
    if origin is tuple:
        return _list_of(decoder(parts[0])) if parts[1:] == (...,) else _row_of([decoder(part) for part in parts])
    if origin is Mapping or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return _mapping_of(decoder(parts[1]))
    if hasattr(hint, "from_json"):
        made: Decoder = hint.from_json
        return made
    if is_dataclass(hint) and isinstance(hint, type):
        return lambda value: decoded(hint, value)
    raise TypeError(f"no decoder for {hint}")


def _either(parts: list[Any], nothing: bool) -> Decoder:
    if len(parts) > 1:  # plain values alone
        kinds = tuple(parts)
        return lambda value: value if isinstance(value, kinds) else _refuse(value, "a plain value")
    inner = decoder(parts[0])
    if not nothing:
        return inner
    if inner is _number:  # most of a journal
        return lambda value: value if type(value) is float and -_HUGE < value < _HUGE else _none_or(inner, value)
    return lambda value: _none_or(inner, value)


def _none_or(inner: Decoder, value: Any) -> Any:
    return None if value is None else inner(value)


def _list_of(item: Decoder) -> Decoder:
    def decode(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            _refuse(value, "a list")
        return tuple(map(item, value))

    return decode


def _row_of(items: list[Decoder]) -> Decoder:
    def decode(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or len(value) != len(items):
            _refuse(value, f"a list of {len(items)}")
        return tuple(one(part) for one, part in zip(items, value, strict=True))

    return decode


def _mapping_of(item: Decoder) -> Decoder:
    def decode(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            _refuse(value, "a mapping")
        return {key: item(part) for key, part in value.items()}

    return decode


def _whole(value: Any) -> int:
    if type(value) is int and -_LARGEST <= value < _LARGEST:
        return value
    return int(_refuse(value, "a whole number"))


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if type(value) is float and -_HUGE < value < _HUGE:
        return value
    if type(value) is not int or not -_LARGEST <= value < _LARGEST:
        _refuse(value, "a number")
    return float(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else _refuse(value, "a text")


def _truth(value: Any) -> bool:
    return value if isinstance(value, bool) else _refuse(value, "true or false")


def _refuse(value: Any, wanted: str) -> Any:
    raise ValueError(f"{_shown(value)} is not {wanted}")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # thousands of digits
        text = "a very large number"
    return text if len(text) <= 60 else f"{text[:57]}..."


_PLAIN: dict[Any, Decoder] = {int: _whole, float: _number, str: _text, bool: _truth, Any: lambda value: value}


def finite(value: Any) -> Any:
    """Return nested values with null in the place of NaN and infinities, which JSON does not have."""
    kind = type(value)  # exact types first: a record has a thousand values
    if value is None or kind is str or kind is int or kind is bool:
        return value
    if kind is float or isinstance(value, float):
        return value if value == value and abs(value) != _HUGE else None
    if kind is dict or isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
