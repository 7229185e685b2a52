"""Tensor networks: factors with named indices, what they multiply out to, and how sensitive that is to each of them.

An index may occur in any number of factors (the r of a CP decomposition occurs in all of them). Indices that are not
asked for in the result are summed over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Operand = tuple[Tensor, tuple[str, ...]]
"""A factor and the names of its dimensions."""


def contract(operands: Sequence[Operand], output: Sequence[str]) -> Tensor:
    """Return the sum, over all indices that are not in `output`, of the product of the operands.

    Parameters
    ----------
    operands : sequence of (Tensor, names)
        Multiplied from left to right, so neighbours in the network should stand beside each other.
    output : sequence of str
        Dimensions of the result, in order; each is an index of some operand.
    """
    numbers: dict[str, int] = {}
    arguments: list[Tensor | list[int]] = []
    for tensor, names in operands:
        arguments += [tensor, [numbers.setdefault(name, len(numbers)) for name in names]]
    return torch.einsum(*arguments, [numbers[name] for name in output])


def sensitivity(operands: Sequence[Operand], output: Sequence[str]) -> float:
    """Return the expected squared error of the contraction when every entry of every factor gets noise of variance one.

    To first order that is Σ over the factors F of ‖∂W/∂F‖² (Frobenius), and W is linear in each of them. For CP it is
    the sensitivity of Phan et al. (ECCV 2020, arXiv:2008.05441), for a loop of three cores that of Phan et al.
    (arXiv:2203.02617).

    Parameters
    ----------
    operands, output
        As for `contract`; indices of `output` occur in it once.
    """
    total = 0.0
    for i, (factor, own) in enumerate(operands):
        kept = {*own, *output}
        others = [operand for j, operand in enumerate(operands) if j != i]
        # ‖∂W/∂F‖²: two copies of the other factors, tied where the entry of F or the entry of W fixes the index.
        doubled = [
            (tensor, tuple(name if name in kept else name + mark for name in names))
            for tensor, names in others
            for mark in ("", "'")
        ]
        found = {name for _, names in others for name in names}
        free = math.prod(size for size, name in zip(factor.shape, own, strict=True) if name not in found)
        total += free * (float(contract(doubled, ())) if doubled else 1.0)
    return total
