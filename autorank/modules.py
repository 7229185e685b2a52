"""A model's modules, read without running them: which are layers, what keeps one from being replaced, replacing it."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from autorank.types import Kind, LayerSpec, LeftAlone

_KINDS: tuple[tuple[type[nn.Module], Kind], ...] = (
    (nn.Conv1d, "conv1d"),
    (nn.Conv2d, "conv2d"),
    (nn.Conv3d, "conv3d"),
    (nn.ConvTranspose1d, "conv_transpose1d"),
    (nn.ConvTranspose2d, "conv_transpose2d"),
    (nn.ConvTranspose3d, "conv_transpose3d"),
    (nn.Linear, "linear"),
)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_METHODS = ("forward", "_conv_forward", "__call__")
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_INTERNAL = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Reading:
    """The layers of a model as they stand, by name: those that can be replaced, those that cannot with the reason."""

    layers: Mapping[str, LayerSpec]
    left_alone: Mapping[str, LeftAlone]


def kind_of(module: nn.Module) -> tuple[type[nn.Module], Kind] | None:
    """Return the PyTorch class and the kind of a convolution or linear layer; None for any other module."""
    return next(((base, kind) for base, kind in _KINDS if isinstance(module, base)), None)


def spec_of(name: str, module: nn.Module) -> LayerSpec | LeftAlone:
    """Describe one module as it stands, without its calls.

    Parameters
    ----------
    name : str
        Qualified name, kept in the result.
    module : nn.Module

    Returns
    -------
    LayerSpec or LeftAlone
        LeftAlone with the reason when the module is no convolution or linear layer, or one that a plain layer with
        another weight could not stand in for.
    """
    reason = refusal(module)
    if reason is not None:
        return LeftAlone(name, type(module).__name__, reason, _own_params(module))
    found = kind_of(module)
    assert found is not None
    weight, kind = module.weight, found[1]
    assert isinstance(weight, Tensor)
    bias = module.bias is not None
    dtype = str(weight.dtype).removeprefix("torch.")
    if isinstance(module, nn.Linear):
        return LayerSpec(name, kind, tuple(weight.shape), bias=bias, dtype=dtype)
    assert isinstance(module, _ConvNd)
    shape = tuple(weight.shape)
    if isinstance(module, _ConvTransposeNd):
        shape = (shape[1] * module.groups, shape[0] // module.groups, *shape[2:])
    return LayerSpec(
        name,
        kind,
        shape,
        stride=tuple(module.stride),
        padding=module.padding if isinstance(module.padding, str) else tuple(module.padding),
        padding_mode=module.padding_mode,
        dilation=tuple(module.dilation),
        groups=module.groups,
        bias=bias,
        dtype=dtype,
        output_padding=tuple(module.output_padding) if isinstance(module, _ConvTransposeNd) else (),
    )


def read(model: nn.Module) -> Reading:
    """Describe every convolution and linear layer of a model; a shared module has its first name."""
    ties, aside = _ties(model), _plain_references(model)
    layers: dict[str, LayerSpec] = {}
    left: dict[str, LeftAlone] = {}
    for name, module in model.named_modules():
        if kind_of(module) is None:
            continue
        spec = spec_of(name, module)
        if isinstance(spec, LeftAlone):
            left[name] = spec
            continue
        reason = None
        if name in ties:
            reason = f"its {ties[name][0]} is tied to {ties[name][1]}, and decomposing one would break the tie"
        elif id(module) in aside:
            reason = f"it is also kept in {aside[id(module)]}, where it could not be replaced"
        if reason is None:
            layers[name] = spec
        else:
            left[name] = LeftAlone(name, type(module).__name__, reason, _own_params(module))
    return Reading(layers, left)


def substitute(model: nn.Module, changes: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put modules in the place of others, wherever those are registered; return the model (or what replaces it)."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and child in changes:
                parent._modules[key] = changes[child]
    return changes.get(model, model)


def refusal(module: nn.Module) -> str | None:
    """Return why a module cannot be replaced by a decomposed layer, as far as the module alone shows it."""
    found = kind_of(module)
    if found is None:
        return "only convolution and linear layers can be decomposed"
    base, _ = found
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "a part of MultiheadAttention, which reads its weight and never calls it"
    if parametrize.is_parametrized(module):
        parts = [type(part).__name__.lstrip("_") for parts in module.parametrizations.values() for part in parts]  # type: ignore[operator]
        return f"its weight is computed from other tensors ({', '.join(parts)}); remove the parametrization first"
    weight = module._parameters.get("weight")
    if weight is None:
        hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
        how = f" ({', '.join(hooks)})" if hooks else ""
        return f"its weight is computed from other tensors before every call{how}; make it a plain parameter first"
    if nn.parameter.is_lazy(weight):
        return "it is a lazy module that was never run, so it has no weight yet"
    changed = [name for name in _METHODS if getattr(type(module), name, None) is not getattr(base, name, None)]
    changed += [name for name in _METHODS if name in vars(module)]
    if changed:
        return f"{type(module).__name__} has its own {changed[0]}, so what it computes is not known"
    others = sorted({*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"})
    if others:
        return f"it holds {others[0]!r} beside its weight, which would be lost"
    if type(weight.data) is not Tensor or weight.layout is not torch.strided:
        what = type(weight.data).__name__ if type(weight.data) is not Tensor else str(weight.layout)
        return f"its weight is stored as {what}; only plain dense tensors can be decomposed"
    if weight.dtype not in _FLOATS:
        return (
            f"its weight is {str(weight.dtype).removeprefix('torch.')}; only real floating-point weights are decomposed"
        )
    if weight.is_meta:
        return "its weight is on the meta device, so it has no values"
    if any(vars(module).get(name) for name in HOOKS):
        return "it has hooks, which would be lost with the layer; remove them first"
    return None


def _own_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not nn.parameter.is_lazy(p))


def _ties(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Return layer name → (its parameter, the other parameter) for parameters that share memory."""
    by_storage: dict[object, list[tuple[str, str, Tensor]]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and not nn.parameter.is_lazy(parameter):
                by_storage[_storage(parameter)].append((name, key, parameter))
    ties: dict[str, tuple[str, str]] = {}
    for members in by_storage.values():
        for name, key, parameter in members:
            for other_name, other_key, other in members:
                if name != other_name and _overlap(parameter, other):
                    ties.setdefault(name, (key, f"{other_name}.{other_key}" if other_name else other_key))
    return ties


def _storage(parameter: Tensor) -> object:
    try:
        pointer = parameter.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # tensor subclasses without a storage of their own
        pointer = 0
    return (parameter.device, pointer) if pointer else id(parameter)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage have bytes in common (several may lie side by side in a flat buffer)."""
    if a is b:
        return True

    def span(x: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()

    if not a.numel() or not b.numel():
        return False
    (a_first, a_end), (b_first, b_end) = span(a), span(b)
    return a_first < b_end and b_first < a_end


def _plain_references(model: nn.Module) -> dict[int, str]:
    """Return id of a module → the plain attribute (list, dict, bound method …) that holds it, not being registered."""
    found: dict[int, str] = {}
    for parent in model.modules():
        for key, value in vars(parent).items():
            if key not in _INTERNAL:
                for module in _modules_in(value, 4):
                    found.setdefault(id(module), f"the plain attribute {key!r} of {type(parent).__name__}")
    return found


def _modules_in(value: Any, depth: int) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif depth:
        inner: Any = ()
        if isinstance(value, Mapping):
            inner = value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            inner = value
        elif isinstance(value, functools.partial):
            inner = (value.func, *value.args, *value.keywords.values())
        elif isinstance(getattr(value, "__self__", None), nn.Module):
            inner = (value.__self__,)
        for item in inner:
            yield from _modules_in(item, depth - 1)
