"""``python:package.module:factory``: the user's own functions, found from the current directory."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from autorank.errors import AutorankError, describe


def extend_path(directory: str) -> None:
    """Put `directory` on the module search path, once, before everything else."""
    if directory not in sys.path:
        sys.path.insert(0, directory)


def resolve(target: str, error: type[AutorankError]) -> Callable[..., Any]:
    """Return the callable that ``package.module:name`` names.

    Parameters
    ----------
    target : str
    error : type
        Class of the error that is raised when there is no such callable; its message tells the cases apart.
    """
    module_name, colon, path = target.partition(":")
    if not colon or not module_name or not path:
        raise error(f"'python:{target}' must be python:package.module:function")
    extend_path(os.getcwd())
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as failure:
        if failure.name and (module_name == failure.name or module_name.startswith(failure.name + ".")):
            raise error(
                f"'python:{target}': there is no module {failure.name!r} (looked in {os.getcwd()} and among the "
                "installed packages)"
            ) from failure
        raise error(f"'python:{target}': importing {module_name} failed: {describe(failure)}") from failure
    except Exception as failure:
        raise error(f"'python:{target}': importing {module_name} failed: {describe(failure)}") from failure
    for name in path.split("."):
        if not hasattr(found, name):
            raise error(f"'python:{target}': {module_name} has no {path!r}{near(path, _callables(found))}")
        found = getattr(found, name)
    if not callable(found):
        raise error(f"'python:{target}': {path} is a {type(found).__name__}, not a function")
    return found


def call(name: str, function: Callable[..., Any], args: Mapping[str, Any], error: type[AutorankError]) -> Any:
    """Call the user's function; whatever it raises becomes one line that names it."""
    try:
        return function(**args)
    except AutorankError:
        raise
    except Exception as failure:
        given = ", ".join(f"{key}={value!r}" for key, value in args.items())
        raise error(f"{name}({given}) failed: {describe(failure)}") from failure


def near(name: str, names: list[str], limit: int = 3) -> str:
    """Return ``"; near: a, b"`` for the names that resemble `name`, else the first few of them, else nothing."""
    close = difflib.get_close_matches(name, names, limit, 0.5)
    if close:
        return f"; near: {', '.join(close)}"
    return f"; it has {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else ""


def _callables(owner: Any) -> list[str]:
    return sorted(name for name in vars(owner) if not name.startswith("_") and callable(getattr(owner, name)))
