"""Random numbers that belong to one purpose and leave the caller's generators as they were."""

from __future__ import annotations

import random
from types import TracebackType
from typing import Any

import numpy as np
import torch


def derive(*parts: int) -> int:
    """Return a 63-bit seed that depends on all of `parts`, and on their order."""
    entropy = [part & 0xFFFFFFFFFFFFFFFF for part in parts]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


class PrivateRandom:
    """The global CPU generators (torch, NumPy, Python) of one purpose, swapped in inside ``with``.

    User data sets draw from the global generators. Each entry continues where the last one stopped, and each exit gives
    the caller's state back, so a data stream is a function of its seed, whatever happens between two batches.

    Parameters
    ----------
    seed : int
    """

    def __init__(self, seed: int) -> None:
        self._states: tuple[Any, Any, Any] | None = None
        self._outside: tuple[Any, Any, Any] | None = None
        self._seed = seed

    def __enter__(self) -> PrivateRandom:
        self._outside = _states()
        if self._states is None:
            # default_generator and not torch.manual_seed, which would also re-seed every accelerator.
            torch.default_generator.manual_seed(derive(self._seed))
            np.random.seed(derive(self._seed, 1) & 0xFFFFFFFF)
            random.seed(derive(self._seed, 2))
        else:
            _set_states(self._states)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._states = _states()
        assert self._outside is not None
        _set_states(self._outside)


def _states() -> tuple[Any, Any, Any]:
    return torch.default_generator.get_state(), np.random.get_state(), random.getstate()


def _set_states(states: tuple[Any, Any, Any]) -> None:
    torch.default_generator.set_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
