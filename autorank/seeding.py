"""Seeding PyTorch for one purpose, without a trace in anybody's random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: str | torch.device = "cpu") -> Iterator[None]:
    """Seed PyTorch's generators of the CPU and of `device` inside, and give them back as they were.

    Other devices are left alone, which `torch.manual_seed` would seed as well.

    Parameters
    ----------
    seed : int
    device : device
    """
    device = torch.device(device)
    kind = getattr(torch, device.type, None) if device.type != "cpu" else None
    generators = [torch.default_generator]
    if kind is not None and hasattr(kind, "default_generators"):
        kind.init()
        generators.append(kind.default_generators[kind.current_device() if device.index is None else device.index])
    elif device.type == "mps":
        generators.append(torch.mps._get_default_mps_generator())
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
