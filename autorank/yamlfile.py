"""Reading YAML that people write, and saying in one line what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from autorank.errors import AutorankError, did_you_mean


class _Loader(yaml.SafeLoader):
    """The safe loader, but a key given twice is an error instead of the last one winning."""

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
        return cast(dict[Any, Any], super().construct_mapping(node, deep))


def read_text(path: Path, error_class: type[AutorankError], hint: str = "") -> str:
    """Read a text file; `error_class` says in one line why it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise error_class(f"{path}: no such file{hint}") from None
    except UnicodeDecodeError:
        raise error_class(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise error_class(f"{path}: cannot be read ({error.strerror})") from None


def parse(text: str, where: str, error_class: type[AutorankError]) -> Any:
    """Parse YAML with the safe loader; `error_class` names `where` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise error_class(f"{where}:{line} {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
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
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
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
