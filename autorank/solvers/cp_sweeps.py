"""Sweeps over the modes of a CP approximation: two large matrix products per sweep, whatever the number of modes.

The two longest modes, a and b, are put first and last: X (groups, a, middle, b). X times the factor of b is enough to
update a and the middle modes, X times the factor of a for b and the middle modes once more (a dimension tree: Phan,
Tichavsky and Cichocki, IEEE Trans. Signal Process. 61, 2013).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autorank.solvers import cp_modes

Update = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(M, Γ, w, what of the sensitivity does not depend on the factor) -> the new factor of a mode."""


LARGE = 1_000_000
"""Entries from which a copy of the tensor in float32 is kept for the sweeps that need no more."""


class Problem:
    """A tensor (groups, a, middle modes, b) and the sweeps over it; its modes are numbered 0 to d − 1 in this order.

    Parameters
    ----------
    tensor : Tensor, shape (groups, n1, ..., nd)
        d ≥ 2.
    sizes : sequence of int, optional
        Mode sizes in the sensitivity; those of the tensor unless it is in compressed coordinates.
    """

    def __init__(self, tensor: Tensor, sizes: Sequence[int] | None = None) -> None:
        self.tensor = tensor.contiguous()
        self._single = tensor.to(torch.float32).contiguous() if tensor.numel() >= LARGE else None
        self.shape = tuple(tensor.shape[1:])
        self.sizes = tuple(sizes or self.shape)
        self.energy = tensor.square().sum(tuple(range(1, tensor.ndim)))

    def sweep(self, factors: Sequence[Tensor], update: Update, single: bool = False) -> tuple[list[Tensor], Tensor]:
        """Update every mode, the middle ones twice.

        Parameters
        ----------
        factors : sequence of Tensor, shape (groups, n, R)
        update : Update
        single : bool
            Multiply a large tensor in float32, in half the time; everything else stays in float64.

        Returns
        -------
        list of Tensor, shape (groups, n, R)
        Tensor, shape (groups,)
            The squared error after the last update.
        """
        tensor = self._single if single and self._single is not None else self.tensor
        state = _State(factors, self.sizes, update, tensor.dtype)
        groups, a, b = len(tensor), self.shape[0], self.shape[-1]
        middle = self.shape[1:-1]
        last = len(self.shape) - 1
        product = tensor.reshape(groups, -1, b) @ state.typed(last)
        product = product.reshape(groups, a, -1, product.shape[-1])
        state.set(0, (product * state.between(product)[:, None]).sum(2))
        self._middle(state, (product * state.typed(0)[:, :, None]).sum(1), middle)
        product = tensor.reshape(groups, a, -1).mT @ state.typed(0)
        product = product.reshape(groups, -1, b, product.shape[-1])
        state.set(last, (product * state.between(product)[:, :, None]).sum(1))
        self._middle(state, (product * state.typed(last)[:, None]).sum(2), middle)
        return state.factors, state.squared_error(self.energy)

    @staticmethod
    def _middle(state: _State, product: Tensor, sizes: tuple[int, ...]) -> None:
        """Update the middle modes from the tensor times the two outer factors, (groups, middle, R)."""
        groups, _, rank = product.shape
        for j in range(len(sizes)):
            part = product.reshape(groups, *sizes, rank)
            for i in reversed(range(len(sizes))):
                if i != j:
                    shape = [groups] + [1] * (part.ndim - 2) + [rank]
                    shape[1 + i] = sizes[i]
                    part = (part * state.typed(1 + i).reshape(shape)).sum(1 + i)
            state.set(1 + j, part)

    def squared_error(self, factors: Sequence[Tensor]) -> Tensor:
        """Return the squared error (groups,) from the residual itself, exact where it is tiny."""
        groups, b = len(self.tensor), self.shape[-1]
        left = factors[0]
        for factor in factors[1:-1]:
            left = (left[:, :, None] * factor[:, None]).flatten(1, 2)
        residual = torch.baddbmm(self.tensor.reshape(groups, -1, b), left, factors[-1].mT, alpha=-1)
        return residual.square().sum((1, 2))

    def sensitivity(self, factors: Sequence[Tensor]) -> Tensor:
        """Return the sensitivity per group."""
        return cp_modes.sensitivity(factors, self.sizes)

    def unit(self, rank: int) -> float:
        """Return the sensitivity of `rank` orthogonal components of equal norm and of energy one together."""
        d = len(self.sizes)
        return float(d * (math.prod(self.sizes) * rank) ** (1 / d))


class _State:
    """The factors during a sweep, with their Gram matrices."""

    def __init__(self, factors: Sequence[Tensor], sizes: Sequence[int], update: Update, dtype: torch.dtype) -> None:
        self.factors = list(factors)
        self.sizes, self.update, self.dtype = sizes, update, dtype
        self._grams = [factor.mT @ factor for factor in factors]
        self._last = (0, factors[0], self._grams[0])

    def set(self, mode: int, right: Tensor) -> None:
        """Replace the factor of a mode, given its MTTKRP (groups, n, R)."""
        right = right.to(torch.float64)
        others = [g for m, g in enumerate(self._grams) if m != mode]
        gram = math.prod(others[1:], start=others[0])
        squares = [g.diagonal(dim1=-2, dim2=-1) for g in self._grams]
        weight = cp_modes.weights(squares, self.sizes, mode)
        factor = self.update(right, gram, weight, self.sizes[mode] * gram.diagonal(dim1=-2, dim2=-1).sum(-1))
        self.factors[mode] = factor
        self._grams[mode] = factor.mT @ factor
        self._last = (mode, right, gram)

    def squared_error(self, energy: Tensor) -> Tensor:
        """Return ‖X‖² − 2⟨M, F⟩ + ⟨Γ, FᵀF⟩ for the mode that was updated last, not below zero."""
        mode, right, gram = self._last
        fit = (right * self.factors[mode]).sum((1, 2))
        return (energy - 2 * fit + (gram * self._grams[mode]).sum((1, 2))).clamp_min(0)

    def typed(self, mode: int) -> Tensor:
        """Return the factor of a mode in the type of the tensor's products."""
        return self.factors[mode].to(self.dtype)

    def between(self, like: Tensor) -> Tensor:
        """Return the Khatri-Rao product of the middle factors (groups, product of their sizes, R), or ones."""
        middle = [self.typed(m) for m in range(1, len(self.factors) - 1)]
        if not middle:
            return torch.ones_like(like[:, :1, 0])
        result = middle[0]
        for factor in middle[1:]:
            result = (result[:, :, None] * factor[:, None]).flatten(1, 2)
        return result
