"""Weights files: safetensors, or PyTorch files read without unpickling anything but tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autorank.errors import WeightsError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
NESTING = ("state_dict", "model_state_dict", "model", "net", "weights")
PREFIXES = ("module.", "_orig_mod.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict.

    A training checkpoint that holds it under ``state_dict``, ``model`` or the like is looked into, and the prefixes of
    DataParallel and torch.compile are taken off.

    Raises
    ------
    WeightsError
        If the file is missing, unreadable, of another kind, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise WeightsError(f"weights file {path} {what}")
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"weights file {path} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            data: Any = load_file(path)
        else:
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:160]
        if "Unsupported" in str(error) or "weights_only" in str(error).lower():
            reason = "it holds more than tensors, and nothing else is unpickled; save model.state_dict()"
        raise WeightsError(f"weights file {path} cannot be read: {reason or type(error).__name__}") from error
    return _state_dict(data, path)


def _state_dict(data: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(len(NESTING)):
        inner = (
            next((data[key] for key in NESTING if isinstance(data.get(key), Mapping)), None) if _nested(data) else None
        )
        if inner is None:
            break
        data = inner
    if not isinstance(data, Mapping) or not data or not all(isinstance(value, Tensor) for value in data.values()):
        kind = type(data).__name__
        what = f"keys {', '.join(map(repr, list(data)[:4]))}" if isinstance(data, Mapping) else f"a {kind}"
        raise WeightsError(f"weights file {path} holds {what}, not a state dict of tensors")
    state = {str(key): value for key, value in data.items()}
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _nested(data: Any) -> bool:
    return isinstance(data, Mapping) and not all(isinstance(value, Tensor) for value in data.values())


def load_into(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state` into `model`, in place, all of it and nothing else.

    Raises
    ------
    WeightsError
        If keys or shapes differ, naming the first of each kind, or a weight is not finite.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, the model has {tuple(own[key].shape)}"
        for key in own
        if key in state and isinstance(own[key], Tensor) and state[key].shape != own[key].shape
    ]
    parts = [
        f"{title} {_few(names, separator)}"
        for title, names, separator in (
            ("missing", missing, ", "),
            ("unexpected", unexpected, ", "),
            ("of another shape", shapes, "; "),
        )
        if names
    ]
    if parts:
        raise WeightsError(f"{source} are weights of another model: {'; '.join(parts)}")
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise WeightsError(f"{source} has values that are not finite in {_few(broken, ', ')}")
    model.load_state_dict(dict(state), strict=False)


def hash_weights(model: nn.Module) -> str:
    """Return 32 hexadecimal digits of the SHA-256 of the model's state dict, names and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):
            continue
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _few(names: list[str], separator: str, limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + more
