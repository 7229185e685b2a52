"""What a model is made of: its decomposable layers with their calls, its cost, and what is left alone and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from autorank import formats
from autorank.copying import model_copy
from autorank.errors import ModelError, describe
from autorank.measure import analyse, batch_one, sizes, undisturbed
from autorank.modules import kind_of, read, spec_of, substitute
from autorank.types import CallSize, LayerSpec, LeftAlone, ModelProfile

__all__ = ["profile", "spec_of"]

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def profile(model: nn.Module, example_inputs: tuple[Tensor, ...], device: str | torch.device = "cpu") -> ModelProfile:
    """Read a model's layers off a forward pass of one example.

    Parameters
    ----------
    model : nn.Module
        Any device and mode; it is copied and not changed.
    example_inputs : tuple of Tensor
        Inputs of the forward pass, the batch as first dimension; only the first example is used.
    device : str or torch.device
        Where the copy is run, for models with operators that not every device has.

    Returns
    -------
    ModelProfile
        `layers` in the order of their first call, each with all its calls; a module that is registered under several
        names appears once, under the first. `left_alone` in the order of the modules, normalisation layers not listed.

    Raises
    ------
    ModelError
        The model cannot be copied or does not run on one example.
    """
    inputs = tuple(x.to(device) for x in batch_one(example_inputs))
    reading = read(model)
    copied = model_copy(model).to(device).eval()
    calls = _calls(copied, reading.layers, inputs)
    counted = analyse(copied, inputs, device)

    left = dict(reading.left_alone)
    layers: dict[str, LayerSpec] = {}
    for name, sizes_seen in calls.items():
        spec = replace(reading.layers[name], calls=tuple(sizes_seen))
        reason = _no_format(spec)
        if reason is None:
            layers[name] = spec
        else:
            left[name] = _left(spec, copied, reason)
    for name, error in _used_otherwise(copied, tuple(layers), inputs).items():
        reason = f"the model does more with it than call it, and fails when it is replaced ({error})"
        left[name] = _left(layers.pop(name), copied, reason)
    for name in reading.layers.keys() - calls.keys():
        left[name] = _left(reading.layers[name], copied, "it is never called in the forward pass of the example")

    listed = []
    for name, module in model.named_modules():
        if name in left:
            listed.append(replace(left[name], macs=counted.by_module.get(name, 0)))
        elif kind_of(module) is None:
            listed.extend(_others(name, module, counted.by_module))
    return ModelProfile(tuple(layers.values()), tuple(listed), counted.cost, counted.unsupported)


def _calls(model: nn.Module, layers: Mapping[str, LayerSpec], inputs: tuple[Tensor, ...]) -> dict[str, list[CallSize]]:
    """Run the model once and return the calls of each layer, in the order of the first calls."""
    calls: dict[str, list[CallSize]] = {}

    def hook(spec: LayerSpec) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            calls.setdefault(spec.name, []).append(_call(spec, args[0] if args else kwargs["input"], output))

        return record

    modules = dict(model.named_modules())
    hooks = [modules[n].register_forward_hook(hook(spec), with_kwargs=True) for n, spec in layers.items()]
    try:
        _run(model, inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return calls


def _call(spec: LayerSpec, x: Tensor, y: Tensor) -> CallSize:
    # PyTorch's layers also take one example without a batch dimension.
    if spec.kind == "linear":
        return CallSize(x.shape[0] if x.ndim > 1 else 1, tuple(x.shape[1:-1]), tuple(y.shape[1:-1]))
    d = len(spec.kernel)
    return CallSize(x.shape[0] if x.ndim == d + 2 else 1, tuple(x.shape[-d:]), tuple(y.shape[-d:]))


def _run(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    try:
        with undisturbed():
            model(*inputs)
    except Exception as error:  # the user's forward may raise anything
        raise ModelError(
            f"the model does not run on a batch of one example (inputs: {sizes(inputs)}): {describe(error)}"
        ) from None


def _used_otherwise(model: nn.Module, names: tuple[str, ...], inputs: tuple[Tensor, ...]) -> dict[str, str]:
    """Return the layers without whose own attributes (``layer.weight``, ``layer.in_channels``) the forward pass fails.

    All are put into Sequentials, which is what decomposed layers are; only when that fails are they tried one by one.
    """

    def fails(tried: tuple[str, ...]) -> str | None:
        modules = dict(model.named_modules())
        wrapped = {modules[name]: nn.Sequential(modules[name]) for name in tried}
        try:
            with undisturbed():
                substitute(model, wrapped)(*inputs)
        except Exception as error:  # whatever the user's forward makes of a missing attribute
            return describe(error)
        finally:
            substitute(model, {new: old for old, new in wrapped.items()})
        return None

    if not names or fails(names) is None:
        return {}
    return {name: error for name in names if (error := fails((name,))) is not None}


def _no_format(spec: LayerSpec) -> str | None:
    """Return None when some format supports the layer, else the formats' reasons, equal ones once."""
    reasons: dict[str, list[str]] = {}
    for name in formats.names():
        reason = formats.get(name).supports(spec)
        if reason is None:
            return None
        reasons.setdefault(reason, []).append(name)
    if len(reasons) == 1:
        return next(iter(reasons))
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())


def _left(spec: LayerSpec, model: nn.Module, reason: str) -> LeftAlone:
    return LeftAlone(spec.name, type(model.get_submodule(spec.name)).__name__, reason, spec.params)


def _others(name: str, module: nn.Module, macs: Mapping[str, int]) -> Iterator[LeftAlone]:
    """List a module that is no layer but holds weights of two or more dimensions itself."""
    if isinstance(module, (*_NORMS, parametrize.ParametrizationList)):
        return
    kind = type(module).__name__
    own = {k: p for k, p in module._parameters.items() if p is not None and not nn.parameter.is_lazy(p)}
    large = [key for key, parameter in own.items() if parameter.ndim >= 2]
    if parametrize.is_parametrized(module):
        yield LeftAlone(name, kind, "its parameters are computed from other tensors (parametrization)")
    elif large and any(
        c.__module__.startswith("torch.nn.modules") and c not in _CONTAINERS for c in type(module).__mro__
    ):
        inside = sum(macs.get(f"{name}.{child}" if name else child, 0) for child in module._modules)
        params = sum(parameter.numel() for parameter in own.values())
        yield LeftAlone(name, kind, f"no format supports {kind} layers", params, macs.get(name, 0) - inside)
    else:
        for key in large:
            path = f"{name}.{key}" if name else key
            reason = f"a parameter that {kind} uses in its own way, not a layer"
            yield LeftAlone(path, "Parameter", reason, own[key].numel())
