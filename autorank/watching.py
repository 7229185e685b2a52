"""Looks after a Ray of our own: its process group, what it prints, and whether a part of it has died."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_PARTS = ("raylet", "gcs_server")


@contextmanager
def unheard() -> Iterator[None]:
    """Keep Ray from printing the tail of its logs when a part of it dies: we say so in one line."""
    from ray._private import worker as module

    worker: Any = module
    printed = getattr(worker, "print_to_stdstream", None)
    worker.print_to_stdstream = lambda *given, **more: None
    try:
        yield
    finally:
        worker.print_to_stdstream = printed


@contextmanager
def grouped(group: int) -> Iterator[None]:
    """Put the processes of a Ray that is started inside into a process group."""
    from ray._private import services

    module: Any = services
    popen = module.ConsolePopen
    module.ConsolePopen = lambda *given, **more: popen(*given, process_group=group, **more)
    try:
        yield
    finally:
        module.ConsolePopen = popen


def gone(ray: Any) -> str:
    """Return which part of a Ray that this process has started is no more; empty when all is well."""
    node = ray._private.worker.global_worker.node
    for part in _PARTS:
        for started in node.all_processes.get(part, ()) if node is not None else ():
            if started.process.poll() is not None:
                return part
    return ""
