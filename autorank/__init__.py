"""autorank: smaller and faster copies of a trained PyTorch network, found by search.

The public names::

    task = autorank.ClassificationTask(model, train=..., test=...)
    result = autorank.search(task, trials=40)
    result.front                       # a DataFrame
    result.best(max_drop=1.0)          # one point of it
    result.export("out/")              # safetensors, .pt2, ONNX, each checked
    autorank.compress(model, plan)     # apply a plan to a model of your own
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autorank.errors import AutorankError
from autorank.types import Choice, Plan

if TYPE_CHECKING:
    from autorank import formats
    from autorank.compression import compress
    from autorank.export import load
    from autorank.profiling import profile
    from autorank.sweep import SearchResult, open_sweep, resume, search
    from autorank.tasks import ClassificationTask, CustomTask, Task, load_task

# Public name → module that defines it; imported on first use, so that `import autorank` stays quick.
_LAZY = {
    "ClassificationTask": "autorank.tasks",
    "CustomTask": "autorank.tasks",
    "SearchResult": "autorank.sweep",
    "Task": "autorank.tasks",
    "compress": "autorank.compression",
    "formats": "autorank.formats",
    "load": "autorank.export",
    "load_task": "autorank.tasks",
    "open_sweep": "autorank.sweep",
    "profile": "autorank.profiling",
    "resume": "autorank.sweep",
    "search": "autorank.sweep",
}

__all__ = [
    "AutorankError",
    "Choice",
    "ClassificationTask",
    "CustomTask",
    "Plan",
    "SearchResult",
    "Task",
    "compress",
    "formats",
    "load",
    "load_task",
    "open_sweep",
    "profile",
    "resume",
    "search",
]


def __dir__() -> list[str]:
    """Return the public names, those not imported yet included."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'autorank' has no attribute {name!r}")
    from importlib import import_module

    module = import_module(_LAZY[name])
    value = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value
    return value
