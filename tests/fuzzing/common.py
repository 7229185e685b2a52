"""Strange values and broken bytes for files, and the rules that hold whatever is in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from autorank import AutorankError


class BrokenError(AssertionError):
    """A rule does not hold for an input."""


@dataclass(frozen=True)
class Target:
    """A kind of file: what is tried with whether it is valid for sure, and the check of one in an empty directory."""

    name: str
    inputs: st.SearchStrategy[tuple[bytes, bool]]
    check: Callable[[bytes, bool, Path], bool]


ODD_TEXTS = ["", " ", "\n", "\0", "\x1b[31m", "é", "🦋", "\u202e", "\ud800", "\u2028", "a\tb", "../x", "/", "null"]
ODD_TEXTS += ["1e5", "${HOME}", "re:(", "re:a{99999999999999999999}", "re:" + "(" * 200, "type:", "*", "[", "x" * 300]
ODD_NUMBERS = [0, -1, 1, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, math.inf, -math.inf, math.nan]
TEXTS = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=12))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-5, 50), st.sampled_from(ODD_NUMBERS), st.floats(), TEXTS)
WILD = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)


def near(known: Mapping[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings with known keys whose values mostly fit, and now and then a strange value or a strange key."""
    fitting = st.fixed_dictionaries({}, optional=dict(known))
    strange = st.one_of(
        st.dictionaries(st.sampled_from(sorted(known)), WILD, max_size=1), st.dictionaries(TEXTS, WILD, max_size=1)
    )
    return st.builds(lambda a, b: {**a, **b}, fitting, st.one_of(st.just({}), st.just({}), strange))


def as_yaml(value: Any) -> bytes:
    try:
        return bytes(yaml.dump(value, Dumper=yaml.CSafeDumper, allow_unicode=True, encoding="utf-8"))
    except UnicodeEncodeError:
        return str(yaml.safe_dump(value, allow_unicode=True)).encode("utf-8", "surrogatepass")


def as_json(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except ValueError:  # a number of more digits than Python prints
        return b'{"layers": {}, "seed": ' + b"9" * 5000 + b"}"


Mutation = Callable[[bytes], bytes]


def _at(data: bytes, share: float) -> int:
    return min(int(share * (len(data) + 1)), len(data))


def _flip(place: float, bit: int) -> Mutation:
    def change(data: bytes) -> bytes:
        if not data:
            return data
        i = min(_at(data, place), len(data) - 1)
        return data[:i] + bytes([data[i] ^ (1 << bit)]) + data[i + 1 :]

    return change


def _cut(begin: float, length: int) -> Mutation:
    return lambda data: data[: _at(data, begin)] + data[_at(data, begin) + length :]


def _end(place: float) -> Mutation:
    return lambda data: data[: _at(data, place)]


def _insert(place: float, what: bytes) -> Mutation:
    return lambda data: data[: _at(data, place)] + what + data[_at(data, place) :]


def _lines(first: float, second: float, swap: bool) -> Mutation:
    def change(data: bytes) -> bytes:
        lines = data.split(b"\n")
        i, j = (min(int(share * len(lines)), len(lines) - 1) for share in (first, second))
        if swap:
            lines[i], lines[j] = lines[j], lines[i]
        else:
            lines.insert(j, lines[i])
        return b"\n".join(lines)

    return change


def _token(place: float, what: bytes) -> Mutation:
    """Put something in the place of the number or word that stands at a place."""

    def change(data: bytes) -> bytes:
        inside = b"0123456789.+-eE" if data[_at(data, place) : _at(data, place) + 1].isdigit() else b""
        i = j = _at(data, place)
        while i > 0 and data[i - 1 : i] in inside:
            i -= 1
        while j < len(data) and data[j : j + 1] in inside:
            j += 1
        return data[:i] + what + data[j:]

    return change


PLACES = st.floats(0, 1)
PIECES = [b"\0", b"\xff", b"\xed\xa0\x80", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000]
PIECES += [
    b"null",
    b"true",
    b'""',
    b"{}",
    b"[]",
    b"-1",
    b'"extra":1,',
    b"\n",
    b"\r",
    b"\x1b[2J",
    "\u202e".encode(),
    b"&a",
]
PIECES += [
    b"*a",
    b"!!python/object/apply:os.getcwd []",
    b"!!binary x",
    b"<<: ",
    b"- ",
    b": ",
    b"0x" + b"f" * 5000,
    b"'",
]
MUTATIONS = st.one_of(
    st.builds(_flip, PLACES, st.integers(0, 7)),
    st.builds(_cut, PLACES, st.integers(1, 40)),
    st.builds(_end, PLACES),
    st.builds(_insert, PLACES, st.one_of(st.sampled_from(PIECES), st.binary(max_size=4))),
    st.builds(_lines, PLACES, PLACES, st.booleans()),
    st.builds(_token, PLACES, st.sampled_from(PIECES)),
)


def mutated(valid: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    def changed(data: bytes, changes: list[Mutation]) -> bytes:
        for change in changes:
            data = change(data)
        return data

    return st.builds(changed, valid, st.lists(MUTATIONS, min_size=1, max_size=4))


def tried(valid: st.SearchStrategy[bytes], closely: st.SearchStrategy[bytes], wild: st.SearchStrategy[bytes]) -> Any:
    """Valid files, nearly valid ones, both changed byte by byte, wild values, and no files at all."""
    others = st.one_of(closely, mutated(valid), mutated(closely), wild, st.binary(max_size=200))
    return st.one_of(st.tuples(valid, st.just(True)), *[st.tuples(others, st.just(False))] * 4)


def attempt(read_it: Callable[[], Any]) -> Any:
    """Return what reading gives, None when it is refused as it should be; raise BrokenError for any other end."""
    try:
        return read_it()
    except AutorankError as error:
        line = str(error)
        if not line or not line.isprintable() or len(line) > 2000:
            raise BrokenError(f"not one printable line: {line[:300]!r}") from error
        return None
    except Exception as error:
        raise BrokenError(f"{type(error).__name__}: {str(error)[:300]}") from error


def alike(said: Any, kept: Any) -> bool:
    """Say whether all that was said is kept: numbers by value, mappings may have more keys (defaults) afterwards."""
    if isinstance(said, Mapping):
        return isinstance(kept, Mapping) and all(key in kept and alike(value, kept[key]) for key, value in said.items())
    if isinstance(said, list | tuple):
        same = isinstance(kept, list | tuple) and len(said) == len(kept)
        return same and all(alike(a, b) for a, b in zip(said, kept, strict=True))
    if isinstance(said, bool) or isinstance(kept, bool):
        return said is kept
    if said is None and isinstance(kept, float):
        return math.isnan(kept)
    return bool(said == kept)


def held(what: bool, words: str) -> None:
    if not what:
        raise BrokenError(words)
