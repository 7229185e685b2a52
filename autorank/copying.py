"""Copying a model whatever its author hung on it, so that the model itself is never changed."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from autorank.errors import ModelError, describe


def model_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy; ModelError when the model cannot be copied or holds TorchScript.

    Tensors that modules keep as plain attributes are copied without their history: PyTorch's older ``weight_norm``
    leaves a computed weight there, which it computes anew before every call, and `copy.deepcopy` alone refuses it.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"its module {name!r}" if name else "it"
            raise ModelError(f"the model cannot be read: {what} is TorchScript; build it from its Python classes")
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(model, computed)
    except Exception as error:  # any object that the user hung on the model may refuse
        raise ModelError(f"the model cannot be deep-copied: {describe(error)}") from None
