"""The search-space file: its schema, how it is read, and what it says when something is wrong.

A file looks like this; every key but ``version`` may be left out, and rules that come later win::

    version: 1
    defaults:
      formats: [channel_svd, {name: spatial_svd, first: [h, w]}, tucker2]
      whiten: [input]                      # none, input, output (gradients) or both; several are tried side by side
      ranks: {macs_kept: [0.2, 0.4, 0.6]}  # or fractions: of the largest rank, or counts:, or modes:
      multiple_of: 1
      max_candidates: 16                   # per layer, format and option set
      weight_bits: [none, 8]               # of every factor: none (floating point), 8, 6 or 4
      activation_bits: [8]                 # of the inputs of factors with weight bits: none or 8
    dense: [conv1, "re:.*downsample.*", "type:linear"]
    rules:
      - match: {name: "layer3.*", kind: [conv2d], kernel: [[3, 3]]}
        formats: [tucker2]
        ranks: {modes: {R_out: {counts: [4, 8]}, R_in: {fractions: [0.25, 0.5]}}}
        multiple_of: 8

Names match as a glob (``layer3.*``), as a regular expression over the whole name (``re:…``), or by kind
(``type:conv*``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import regex
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from autorank import yamlfile
from autorank.errors import SpaceError, did_you_mean
from autorank.types import ACTIVATION_BITS, WEIGHT_BITS, Kind, Scalar

Whiten = Literal["none", "input", "output", "both"]


def _as_list(value: Any) -> Any:
    """Let a single value stand for a list of one."""
    return [value] if isinstance(value, str | int | float | Mapping) else value


def _distinct(value: list[Any]) -> list[Any]:
    for i, item in enumerate(value):
        if item in value[:i]:
            raise PydanticCustomError("twice", "{item} is given twice", {"item": repr(item)})
    return value


LONGEST, MOST_REPEATS = 1000, 10_000
"""Characters of a regular expression, and the product of its counts in braces."""

_REPEAT = regex.compile(r"\{(\d{0,30}),?(\d{0,30})\}")


def _is_pattern(value: str) -> str:
    kind, _, rest = value.partition(":")
    if not value or (kind in ("re", "type") and not rest):
        raise PydanticCustomError("pattern", "an empty pattern matches nothing")
    if kind == "re":
        try:
            _check_expression(rest)
        except (regex.error, ValueError, OverflowError, RecursionError) as error:
            why = {"value": value if len(value) <= 100 else f"{value[:97]}...", "error": str(error)}
            raise PydanticCustomError("pattern", "{value} is not a regular expression: {error}", why) from None
    return value


def _check_expression(text: str) -> None:
    """Refuse what is no regular expression, and what would be a gigabyte when it is compiled: repeats are spelt out."""
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text)} characters, and may have {LONGEST}")
    counts = [max(int(number or 1) for number in found) for found in _REPEAT.findall(text)]
    if math.prod(counts) > MOST_REPEATS:
        raise ValueError(f"its repeats are more than {MOST_REPEATS:,} together")
    regex.compile(text)


Pattern = Annotated[str, AfterValidator(_is_pattern)]
Patterns = Annotated[list[Pattern], Field(min_length=1), AfterValidator(_distinct), BeforeValidator(_as_list)]
Shares = Annotated[
    list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1), AfterValidator(_distinct), BeforeValidator(_as_list)
]
Counts = Annotated[
    list[Annotated[int, Field(ge=1)]], Field(min_length=1), AfterValidator(_distinct), BeforeValidator(_as_list)
]


class _Strict(BaseModel):
    """A mapping of the file: no unknown keys, no conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    open: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            raise PydanticCustomError(
                "mapping", "{value} is not a mapping with the keys {keys}", {"value": repr(data), "keys": cls._keys()}
            )
        for key in data:
            if not isinstance(key, str) or (key not in cls.model_fields and not cls.open):
                hint = did_you_mean(str(key), cls.model_fields)
                why = {"key": repr(key), "hint": hint, "keys": cls._keys()}
                raise PydanticCustomError("key", "unknown key {key}{hint}; allowed are {keys}", why)
        return dict(data)

    @classmethod
    def _keys(cls) -> str:
        return ", ".join(cls.model_fields)


class Grid(_Strict):
    """Ranks of one mode: fractions of its largest rank, or counts."""

    fractions: Shares | None = None
    counts: Counts | None = None

    @model_validator(mode="after")
    def _one(self) -> Grid:
        if (self.fractions is None) == (self.counts is None):
            raise PydanticCustomError("one", "give either fractions or counts")
        return self


class Ranks(_Strict):
    """Ranks of one layer: a grid that all modes share, or one grid per mode.

    Attributes
    ----------
    fractions : list of float, optional
        Shares of the largest useful rank of each mode, in (0, 1].
    counts : list of int, optional
        Ranks as they are, clipped to the largest.
    macs_kept : list of float, optional
        Shares of the dense layer's MACs; the rank that comes nearest is taken, the modes in proportion.
    combine : {"equal", "product"}
        With a shared grid and several modes: the same entry for all modes, or every combination of entries.
    modes : mapping, optional
        Mode name (``R``, ``R_out``, ``R_in``) → its own grid; all combinations are candidates.
    """

    fractions: Shares | None = None
    counts: Counts | None = None
    macs_kept: Shares | None = None
    combine: Literal["equal", "product"] = "equal"
    modes: dict[str, Grid] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one(self) -> Ranks:
        given = [name for name in ("fractions", "counts", "macs_kept", "modes") if getattr(self, name) is not None]
        if len(given) != 1:
            said = "none of them is given" if not given else f"{' and '.join(given)} are given together"
            raise PydanticCustomError("one", "give one of fractions, counts, macs_kept, modes; {said}", {"said": said})
        if self.combine == "product" and given[0] in ("macs_kept", "modes"):
            why = {"given": given[0]}
            raise PydanticCustomError(
                "product", "combine: product goes with fractions or counts, not with {given}", why
            )
        return self


Formats = Annotated[
    list[Annotated["FormatEntry", BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)]],
    Field(min_length=1),
    BeforeValidator(_as_list),
]
Whitens = Annotated[list[Whiten], Field(min_length=1), AfterValidator(_distinct), BeforeValidator(_as_list)]


def _bits(*allowed: int) -> Any:
    """Return the type of a list of numbers of bits, ``none`` standing for floating point."""

    def known(value: Any) -> Any:
        if value != "none" and (type(value) is not int or value not in allowed):
            why = {"value": repr(value), "allowed": ", ".join(map(str, ("none", *allowed)))}
            raise PydanticCustomError("bits", "{value} bits are not among {allowed}", why)
        return value

    entry = Annotated[int | Literal["none"], BeforeValidator(known)]
    return Annotated[list[entry], Field(min_length=1), AfterValidator(_distinct), BeforeValidator(_as_list)]


WeightBits = _bits(*WEIGHT_BITS)
ActivationBits = _bits(*ACTIVATION_BITS)


class Settings(_Strict):
    """What defaults, a rule or a single format can set; None leaves it to what came before."""

    ranks: Ranks | None = None
    whiten: Whitens | None = None
    multiple_of: int | None = Field(default=None, ge=1)
    max_candidates: int | None = Field(default=None, ge=1)
    weight_bits: WeightBits | None = None  # type: ignore[valid-type]
    activation_bits: ActivationBits | None = None  # type: ignore[valid-type]


class FormatEntry(Settings):
    """A format by name, with settings of its own; any other key restricts the format's option of that name."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    open: ClassVar[bool] = True
    name: str

    @model_validator(mode="after")
    def _known(self) -> FormatEntry:
        from autorank import formats

        if self.name not in formats.names():
            why = {"name": repr(self.name), "hint": did_you_mean(self.name, formats.names())}
            allowed = ", ".join(formats.names())
            raise PydanticCustomError(
                "format", "unknown format {name}{hint}; allowed are {all}", {**why, "all": allowed}
            )
        for key, values in self.options.items():
            if not values or not all(isinstance(value, str | int | float | bool) for value in values):
                why = {"key": key, "value": repr((self.model_extra or {})[key])}
                raise PydanticCustomError("option", "{key}: {value} is not a value or a list of values", why)
        return self

    @property
    def options(self) -> dict[str, list[Scalar]]:
        """Option name → the values allowed for it."""
        return {key: value if isinstance(value, list) else [value] for key, value in (self.model_extra or {}).items()}


def _as_kernels(value: Any) -> Any:
    """Let ``[3, 3]`` stand for ``[[3, 3]]``."""
    return [value] if isinstance(value, list) and value and not isinstance(value[0], list) else value


Kernels = Annotated[
    list[Annotated[list[Annotated[int, Field(ge=1)]], Field(max_length=3)]],
    Field(min_length=1),
    AfterValidator(_distinct),
    BeforeValidator(_as_kernels),
]


class Match(_Strict):
    """Which layers a rule is for; all conditions that are given must hold, within one list any entry will do."""

    name: Patterns | None = None
    kind: Annotated[list[Kind], Field(min_length=1), AfterValidator(_distinct), BeforeValidator(_as_list)] | None = None
    kernel: Kernels | None = None

    @model_validator(mode="after")
    def _some(self) -> Match:
        if self.name is None and self.kind is None and self.kernel is None:
            raise PydanticCustomError("empty", "give at least one of name, kind, kernel; for all layers use defaults")
        return self


class Defaults(Settings):
    """What holds for every layer until a rule says otherwise."""

    formats: Formats | None = None


class Rule(Defaults):
    """Settings for the layers that match."""

    match: Match


class SpaceFile(_Strict):
    """A whole search-space file; see the module's docstring for an example."""

    version: Literal[1]
    defaults: Defaults = Field(default_factory=Defaults)
    dense: Annotated[list[Pattern], AfterValidator(_distinct), BeforeValidator(_as_list)] = Field(default_factory=list)
    rules: list[Rule] = Field(default_factory=list)
    _source: str = PrivateAttr(default="search space")

    @property
    def source(self) -> str:
        """Where it was read from, for error messages."""
        return self._source


def shipped() -> tuple[str, ...]:
    """Return the names of the search spaces that come with the package."""
    names = (entry.name for entry in files("autorank.search_spaces").iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def shipped_text(name: str) -> str:
    """Return the text of a shipped search space; its first line is a comment that says what it is for.

    Raises
    ------
    SpaceError
        There is none of that name; the message lists them.
    """
    if name not in shipped():
        raise SpaceError(
            f"no shipped search space {name!r}{did_you_mean(name, shipped())}; there are {', '.join(shipped())}"
        )
    return (files("autorank.search_spaces") / f"{name}.yaml").read_text(encoding="utf-8")


def read_space(source: str | Path | Mapping[str, Any]) -> SpaceFile:
    """Read and check a search space.

    Parameters
    ----------
    source : str, Path or mapping
        The name of a shipped space (see `shipped`), the path of a YAML file, or what such a file would hold.

    Returns
    -------
    SpaceFile

    Raises
    ------
    SpaceError
        One line with file, key path, what is wrong and what is allowed.
    """
    if isinstance(source, Mapping):
        return _check(source, "search space")
    path = Path(source)
    if isinstance(source, str) and source in shipped():
        return _parse(shipped_text(source), f"{source}.yaml")
    if isinstance(source, str) and len(path.parts) <= 1 and not path.suffix and not path.exists():
        hint = did_you_mean(source, shipped())
        raise SpaceError(f"no search space {source!r}{hint}; shipped are {', '.join(shipped())}, or give a YAML file")
    hint = f"; shipped search spaces are {', '.join(shipped())}"
    text = yamlfile.read_text(path, SpaceError, hint)
    return _parse(text, str(path))


def _parse(text: str, where: str) -> SpaceFile:
    data = yamlfile.parse(text, where, SpaceError)
    if data is None:
        raise SpaceError(f"{where}: the file is empty; it needs at least version: 1 and formats")
    return _check(data, where)


def _check(data: Any, where: str) -> SpaceFile:
    if not isinstance(data, Mapping):
        raise SpaceError(f"{where}: a search space is a mapping with the keys {', '.join(SpaceFile.model_fields)}")
    try:
        space = SpaceFile.model_validate(data)
    except ValidationError as error:
        raise SpaceError(f"{where}: {yamlfile.explain(error, SpaceFile)}") from None
    space._source = where
    return space
