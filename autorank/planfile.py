"""Reading a plan that somebody hands over, and saying in one line what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autorank.errors import PlanError, describe
from autorank.types import Plan
from autorank.yamlfile import read_text


def read_plan(path: Path) -> Plan:
    """Return the plan in a JSON file.

    Raises
    ------
    PlanError
        One line: the file, and what is wrong.
    """
    text = read_text(path, PlanError, most=1 << 26)
    try:
        data = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise PlanError(f"{path} is not JSON: line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise PlanError(f"{path} is not a plan: it is nested too deeply") from None
    except ValueError as error:
        raise PlanError(f"{path} is not a plan: {error}") from None
    return plan_of(data, str(path))


def plan_of(data: object, where: str) -> Plan:
    """Return a plan from its JSON form; PlanError, naming `where`, when it is none."""
    if not isinstance(data, Mapping):
        raise PlanError(f"{where} is not a plan: it must be a mapping with the key layers")
    try:
        return Plan.from_json(data)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        said = error.args[0] if isinstance(error, KeyError) and error.args else describe(error).partition(": ")[2]
        said = f"{said!r} is missing" if said in ("layers", "format", "rank") else said
        raise PlanError(f"{where} is not a plan: {said}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if any(key == other for other, _ in pairs[:i]))
        raise ValueError(f"key {twice!r} is given twice")
    return made


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")
