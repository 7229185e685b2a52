"""The layout of a layer's weight: as PyTorch stores it, and the one that formats work on, equal for every kind."""

from __future__ import annotations

from torch import Tensor

from autorank.types import LayerSpec


def canonical_weight(weight: Tensor, spec: LayerSpec) -> Tensor:
    """Return a module's weight in the layout of `LayerSpec.weight_shape`.

    Parameters
    ----------
    weight : Tensor, shape (T, S/groups, K1, ..., Kd), or (S, T/groups, K1, ..., Kd) of a transposed convolution
    spec : LayerSpec

    Returns
    -------
    Tensor, shape (T, S/groups, K1, ..., Kd)
        `weight` itself, or for a transposed convolution a view of it where one exists (a copy with several groups).
    """
    return swapped(weight, spec.groups) if spec.transposed else weight


def stored_weight(weight: Tensor, spec: LayerSpec) -> Tensor:
    """Return a weight of shape `LayerSpec.weight_shape` in the layout of PyTorch's module: undo `canonical_weight`.

    Parameters
    ----------
    weight : Tensor, shape (T, S/groups, K1, ..., Kd)
    spec : LayerSpec

    Returns
    -------
    Tensor, shape (T, S/groups, K1, ..., Kd), or (S, T/groups, K1, ..., Kd) for a transposed convolution
        `weight` itself, or for a transposed convolution a view of it where one exists (a copy with several groups).
    """
    return swapped(weight, spec.groups) if spec.transposed else weight


def swapped(weight: Tensor, groups: int) -> Tensor:
    """Exchange the channel modes in each group: (g·A, B, ...) → (g·B, A, ...), which is its own inverse."""
    return weight.unflatten(0, (groups, weight.shape[0] // groups)).transpose(1, 2).flatten(0, 1)
