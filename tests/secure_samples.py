"""Something malicious for every place where a file is read, and the small models and tasks to read it with."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from tests.tiny import network

TRACE = "attacked"


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def malicious(trace: Path) -> dict[str, bytes]:
    """Return files, by kind, each of which makes `trace` when it is unpickled by whatever would do so."""
    attack = Attack(trace)
    found = {f"pickle {protocol}": pickle.dumps(attack, protocol) for protocol in (0, 5)}
    buffers = {name: io.BytesIO() for name in ("torch", "torch of old", "npy", "npz")}
    torch.save({"0.weight": attack}, buffers["torch"])
    torch.save({"0.weight": attack}, buffers["torch of old"], _use_new_zipfile_serialization=False)
    np.save(buffers["npy"], np.array([attack], dtype=object), allow_pickle=True)
    np.savez(buffers["npz"], images=np.array([attack], dtype=object))
    found |= {name: buffer.getvalue() for name, buffer in buffers.items()}
    call = f"!!python/object/apply:os.system ['touch {trace}']"
    return found | {"yaml": f"model: {call}\nversion: {call}\nlayers: {call}\n".encode()}


UNSAFE: tuple[Callable[[bytes], Any], ...] = (
    pickle.loads,
    lambda data: torch.load(io.BytesIO(data), weights_only=False),
    lambda data: np.load(io.BytesIO(data), allow_pickle=True)["images"],
    yaml.unsafe_load,
)
"""Each of the files above is run by one of these."""


class Talkative(nn.Module):
    """A network that tells its secret as soon as it is trained."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self.net, self.token = network(), token

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise RuntimeError(f"the server refused the token {self.token}")
        return self.net(x)


def images(password: str) -> dict[str, Any]:
    """Return a data set, as a factory that has to log in somewhere."""
    assert password
    targets = torch.arange(96) % 2
    pixels = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"train": (pixels + targets.view(-1, 1, 1, 1) * 0.4, targets)}
