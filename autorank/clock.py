"""How long the phases of a trial take, and with how many threads it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Wall time by phase."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what runs inside towards a phase."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._phases[phase] = self._phases.get(phase, 0.0) + time.perf_counter() - begun

    def seconds(self) -> dict[str, float]:
        """Return the phases, with what none of them covers added to ``other``."""
        total = time.perf_counter() - self._begun
        rest = total - sum(self._phases.values())
        phases = {**self._phases, "other": self._phases.get("other", 0.0) + rest}
        return {name: round(value, 4) for name, value in phases.items()}


@contextmanager
def threads_fixed(count: int) -> Iterator[None]:
    """Fix the number of PyTorch threads, on which sums in floating point depend."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
