"""Reading YAML that people write, and saying in one line what is wrong with it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from autorank.errors import AutorankError, did_you_mean

_LARGEST, _DEEPEST = 100_000, 100
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


class _Loader(yaml.SafeLoader):
    """The safe loader for values that JSON can hold, as settings go through the journal; a date stays the text it is.

    A key given twice is an error instead of the last one winning.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (as in the base class)
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_data(self) -> Any:
        """Read the document; what its aliases and merges come to is counted before it is made."""
        node = self.get_single_node()
        if node is None:
            return None
        self._sizes: dict[yaml.Node, int] = {}
        self._count(node)
        return self.construct_document(node)

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """Begin a list or mapping in brackets; the time that PyYAML takes grows with the square of their depth."""
        if self.flow_level >= _DEEPEST:
            raise yaml.scanner.ScannerError(None, None, "brackets are nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def _count(self, node: yaml.Node) -> int:
        """Return how many values a node comes to."""
        if node.tag not in _TAGS:
            raise _problem(f"a value of type {node.tag.rpartition(':')[2]} has no place here", node)
        expected = {"seq": yaml.SequenceNode, "map": yaml.MappingNode}.get(node.tag.rpartition(":")[2], yaml.ScalarNode)
        if not isinstance(node, expected):
            raise _problem(f"the tag {node.tag.rpartition(':')[2]} does not fit its value", node)
        if isinstance(node, yaml.ScalarNode):
            if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in node.value):
                raise _problem("a text holds a character that no file can have", node)
            return 1
        size = self._sizes.get(node)
        if size == 0:
            raise _problem("an alias stands inside of what it stands for", node)
        if size is None:
            self._sizes[node] = 0
            inner = node.value if isinstance(node, yaml.SequenceNode) else chain.from_iterable(node.value)
            size = self._sizes[node] = 1 + sum(map(self._count, inner))
            if size > _LARGEST:
                raise _problem(f"there are more than {_LARGEST:,} values, aliases spelt out", node)
        return size

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return a whole number of 64 bits."""
        value = _plain(super().construct_yaml_int, node)
        if not -(2**63) <= value < 2**63:
            raise _problem("a whole number has at most 64 bits", node)
        return int(value)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """Return a finite number."""
        value = _plain(super().construct_yaml_float, node)
        if not math.isfinite(value):
            raise _problem(f"{node.value} is no number that can be used here", node)
        return float(value)

    def construct_yaml_bool(self, node: yaml.ScalarNode) -> bool:
        """Return a truth value."""
        return bool(_plain(super().construct_yaml_bool, node))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; the keys of a merge (``<<``) may be overridden, those written out may not."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        made = cast(dict[Any, Any], super().construct_mapping(node, deep))
        for key in made:
            if not isinstance(key, str):
                raise _problem(f"the key {key!r} is not a text; put it in quotes if it is meant to be one", node)
        return made


# PyYAML takes 1e-3 for a text, as YAML 1.1 has it.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
for _kind in ("int", "float", "bool"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", getattr(_Loader, f"construct_yaml_{_kind}"))


def _problem(text: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


def _plain(construct: Callable[[Any], Any], node: yaml.ScalarNode) -> Any:
    """Construct a value; PyYAML raises anything for what has a number's tag and is none."""
    try:
        return construct(node)
    except (ValueError, LookupError, OverflowError):
        raise _problem(f"{node.value[:40]!r} is not what its tag says", node) from None


def read_text(path: Path, error_class: type[AutorankError], hint: str = "", most: int = 1 << 20) -> str:
    """Read a text file of `most` bytes at most; `error_class` says in one line why it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise error_class(f"{path}: larger than {most / 2**20:g} MB, which no such file is")
        return data.decode("utf-8")
    except FileNotFoundError:
        raise error_class(f"{path}: no such file{hint}") from None
    except UnicodeDecodeError:
        raise error_class(f"{path}: not a text file in UTF-8") from None
    except (OSError, ValueError) as error:
        raise error_class(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def parse(text: str, where: str, error_class: type[AutorankError]) -> Any:
    """Parse YAML with the safe loader; `error_class` names `where` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # a subclass of the safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise error_class(f"{where}:{line} {error.problem or error.context}") from None
    except RecursionError:
        raise error_class(f"{where}: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise error_class(f"{where}: not YAML ({error})") from None


def key_path(location: Iterable[str | int]) -> str:
    """Return ``rules[2].ranks.fractions[0]: `` for a pydantic location; nothing for the top."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f"{'.' if path else ''}{part}"
    return f"{path}: " if path else ""


def explain(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """Return one line for a pydantic error: key, what is wrong, what is allowed."""
    first, *more = error.errors(include_url=False)
    rest = f" (and {len(more)} more)" if more else ""
    return f"{key_path(first['loc'])}{_words(first, model)}{rest}"


_BOUNDS = {
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
}
_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}


def _words(error: Any, model: type[BaseModel] | None) -> str:
    """Say what one pydantic error means to a person."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    if kind == "missing":
        return "this key is missing"
    if kind == "extra_forbidden" and model is not None:
        keys = _keys_at(model, error["loc"][:-1])
        return f"unknown key{did_you_mean(str(error['loc'][-1]), keys)}; allowed are {', '.join(keys)}"
    if kind == "literal_error":
        allowed = str(context["expected"])
        hint = did_you_mean(value, re.findall(r"'([^']+)'", allowed)) if isinstance(value, str) else ""
        return f"{shown} is not known{hint}; allowed are {allowed}"
    if kind in _BOUNDS:
        return f"{shown} must be {_BOUNDS[kind].format(**{k: f'{v:g}' for k, v in context.items()})}"
    if kind in ("too_short", "too_long"):
        return f"{shown} is too {kind[4:]}"
    if kind in _WANTED:
        return f"{shown} is not {_WANTED[kind]}"
    if kind == "value_error":
        return f"{shown} is not {context.get('error', error['msg'])}"
    return str(error["msg"])


def _keys_at(model: type[BaseModel], location: Iterable[str | int]) -> list[str]:
    """Return the keys of the section of `model` that `location` leads to."""
    current: Any = model
    for part in location:
        field = current.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        current = field.annotation
    return list(current.model_fields)
