"""A dataclass of settings made from a mapping that a user wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from autorank.errors import ConfigError, did_you_mean

T = TypeVar("T")


def made(kind: type[T], what: str, given: object) -> T:
    """Return settings with some of the values given, and the defaults of the others.

    Parameters
    ----------
    kind : type
        A dataclass whose constructor raises ConfigError where a value is wrong.
    what : str
        The section's name, which stands before what is said.
    given : object
        What the user wrote.

    Raises
    ------
    ConfigError
        It is no mapping, a key is unknown, or a value is wrong.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"{what} must be a mapping, not {given!r}")
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in given:
        if key not in names:
            hint = did_you_mean(str(key), names)
            raise ConfigError(f"{what}: unknown key {key!r}{hint}; allowed are {', '.join(names)}")
    values: dict[str, Any] = dict(given)
    return kind(**values)
