"""model.safetensors of an export: written with ties kept, read back onto a rebuilt model with one-line errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from autorank.errors import ExportError, WeightsError

PLAN_ID = "autorank.plan_id"
"""Key of the file's metadata that says to which plan the weights belong."""


def write_weights(model: nn.Module, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write parameters and buffers of `model`; tensors that are one tensor under several names are stored once.

    The metadata names the dropped twins (``{twin: stored name}``), as `safetensors.torch.save_model` does, so that
    `safetensors.torch.load_model` reads the file too.

    Parameters
    ----------
    model : nn.Module
        On the CPU.
    path : Path
    metadata : mapping of str to str, optional
        Goes into the file's header.

    Raises
    ------
    ExportError
        A module keeps extra state that is not a tensor.
    OSError
        The file cannot be written.
    """
    from safetensors.torch import save_file

    header = {**(metadata or {}), "format": "pt"}
    stored: dict[str, Tensor] = {}
    first: dict[object, str] = {}
    storages: set[int] = set()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ExportError(
                f"{path.name}: {name} is extra state of type {type(value).__name__}, and safetensors holds tensors only"
            )
        identity = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and identity in first:
            header[name] = first[identity]
            continue
        first[identity] = name
        # Views of one storage are written as tensors of their own: safetensors refuses overlapping memory.
        memory = value.untyped_storage()
        alone = memory.nbytes() == value.numel() * value.element_size() and memory.data_ptr() not in storages
        storages.add(memory.data_ptr())
        value = value.detach().contiguous()
        stored[name] = value if alone else value.clone()
    save_file(stored, str(path), metadata=header)


def read_weights(model: nn.Module, path: Path, plan_id: str | None = None) -> nn.Module:
    """Load `path` onto `model`, in place; ties stay tied and the file's floating-point types are kept.

    Nothing is unpickled: a file that is not safetensors is refused whatever its name says.

    Parameters
    ----------
    model : nn.Module
        The rebuilt model, on the CPU.
    path : Path
    plan_id : str, optional
        The plan that the weights must belong to, where the file says to which it does.

    Returns
    -------
    nn.Module
        `model`.

    Raises
    ------
    WeightsError
        Missing or unreadable file, weights of another plan or of another model.
    """
    state, header = _read(path)
    if plan_id is not None and header.get(PLAN_ID, plan_id) != plan_id:
        raise WeightsError(
            f"{path} holds the weights of plan {header[PLAN_ID]}, but plan.json beside it is plan {plan_id}: "
            "one of the two was replaced or edited; export again"
        )
    own = model.state_dict(keep_vars=True)
    for twin, name in header.items():
        if twin in own and twin not in state and name in state:
            state[twin] = state[name]
    _check(own, state, path)
    types = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(types) == 1:
        model.to(types.pop())  # also the buffers that are not in the file
    for name, value in own.items():
        if value.is_floating_point() and value.dtype != state[name].dtype:
            value.data = value.data.to(state[name].dtype)
    model.load_state_dict(state, strict=True)
    return model


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise WeightsError(f"{path} does not exist; it holds the weights of the exported model")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path} is damaged or not a safetensors file: {error}") from None


def _check(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """Raise WeightsError for the first tensor that is missing, left over, or of another shape or kind."""
    missing, left_over = [n for n in own if n not in state], [n for n in state if n not in own]
    if missing or left_over:
        which, names = ("has no", missing) if missing else ("holds", left_over)
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        tail = "which the rebuilt model needs" if missing else "which the rebuilt model does not have"
        raise WeightsError(f"{path} {which} {names[0]!r}{more}, {tail}: the weights belong to another model")
    for name, value in own.items():
        if not isinstance(value, Tensor):
            raise WeightsError(f"{path}: the model keeps extra state under {name!r} that is not a tensor")
        given = state[name]
        if given.shape != value.shape:
            raise WeightsError(
                f"{path}: {name!r} has shape {_shape(given)}, and the rebuilt model wants {_shape(value)}: "
                "the weights belong to another model"
            )
        if given.is_floating_point() != value.is_floating_point():
            raise WeightsError(
                f"{path}: {name!r} is {_type(given.dtype)}, and the rebuilt model wants {_type(value.dtype)}"
            )


def _shape(value: Tensor) -> str:
    return "×".join(map(str, value.shape)) or "scalar"


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
