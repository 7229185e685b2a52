"""The least-squares problem of one core of a loop, alone, with a price on the sensitivity or at a bounded error.

With H the Gram matrix of the rest of the loop, B the right-hand side and M the matrix of the sensitivity's quadratic
form, the squared error of a core g is energy − 2<B, g> + <g, H g>. Small problems are factorised; large ones are solved
by preconditioned conjugate gradients from the present core, which never make it worse.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from autorank.solvers import ring_algebra as algebra
from autorank.solvers.ring_algebra import Cores

DENSE = 300
"""Largest product of a core's bonds for which its Gram matrix is formed."""
SPECTRAL = 400
"""Largest one for which the correction takes eigenvalues; above it, it tries prices one by one."""
_STEPS, _REST = 4, 1e-2
"""Conjugate gradient steps at most, and the share of the squared residual at which they stop: sweeps do the rest."""
_RIDGE = 1e-13


class Block:
    """One core's problem; shapes (batch, r_k, n_k, r_{k+1}) outside, (batch, r_k·r_{k+1}, n_k) inside."""

    def __init__(
        self,
        cores: Cores,
        k: int,
        left: Tensor | None,
        right: Tensor | None,
        terms: list[tuple[float, Tensor, Tensor]],
        side: Tensor,
        energy: Tensor,
    ) -> None:
        self.core, self.left, self.right, self.terms, self.side, self.energy = (
            cores[k],
            left,
            right,
            terms,
            side,
            energy,
        )
        _, i, _, j = self.core.shape
        ends = left is None or right is None
        self.dense = i * j <= DENSE or ends
        if self.dense:
            self.h = algebra.gram_matrix(cores, k, left, right)
        self.size = i * j

    def penalised(self, price: Tensor) -> tuple[Tensor, Tensor]:
        """Return the core that minimises error² + price·sensitivity, and its squared error."""
        found = self._solve(price, self.core)
        return found, self._error(found)

    def corrected(self, bound: Tensor) -> tuple[Tensor, Tensor]:
        """Return the core of least sensitivity with squared error at most `bound`, and its squared error.

        The answer is the penalised core at the largest price that the bound allows: the error grows with the price.
        Where even the least error is above the bound, the core of least error is returned.
        """
        if self.dense and self.size <= SPECTRAL:
            found = self._secular(bound)
        else:
            found = self._bisected(bound)
        # Rounding near a perfect fit must not cost what is there already.
        error, before = self._error(found), self._error(self.core)
        keep = (error > torch.maximum(bound * (1 + 1e-9) + 1e-15, before)) | ~torch.isfinite(error)
        found = torch.where(keep[:, None, None, None], self.core, found)
        return found, torch.where(keep, before, error)

    # The quadratic forms

    def _flat(self, core: Tensor) -> Tensor:
        return core.permute(0, 1, 3, 2).flatten(1, 2)

    def _core(self, flat: Tensor) -> Tensor:
        b, i, n, j = self.core.shape
        return flat.reshape(b, i, j, n).permute(0, 1, 3, 2)

    def _h(self, core: Tensor) -> Tensor:
        if self.dense:
            return self._core(self.h @ self._flat(core))
        assert self.left is not None
        assert self.right is not None
        return algebra.apply_gram(self.left, self.right, core)

    def _error(self, core: Tensor) -> Tensor:
        value = self.energy - 2 * _dot(self.side, core) + _dot(core, self._h(core))
        return value.clamp(min=0)

    # Solving

    def _solve(self, price: Tensor, near: Tensor) -> Tensor:
        if self.dense:
            return self._cholesky(price, near)
        return self._conjugate(price, near)

    def _matrix(self, price: Tensor) -> Tensor:
        if bool((price == 0).all()):
            return self.h
        return self.h + price[:, None, None] * algebra.penalty_matrix(self.terms)

    def _cholesky(self, price: Tensor, near: Tensor) -> Tensor:
        """Solve for the change, with a ridge on the change alone: it does not move the answer, only steadies it."""
        matrix = self._matrix(price)
        wanted = self._flat(self.side) - matrix @ self._flat(near)
        ridge = _RIDGE
        level = matrix.diagonal(dim1=1, dim2=2).mean(dim=1)
        level = torch.where(level > 0, level, 1.0)
        while True:
            shifted = matrix.clone()
            shifted.diagonal(dim1=1, dim2=2).add_((ridge * level)[:, None])
            factor, info = torch.linalg.cholesky_ex(shifted)
            if not bool(info.any()) or ridge > 1:  # beyond one it is not positive definite for being not finite
                break
            ridge *= 100
        return near + self._core(torch.cholesky_solve(wanted, factor))

    def _conjugate(self, price: Tensor, near: Tensor) -> Tensor:
        """Take some conjugate gradient steps in the basis in which the marginals of H are diagonal."""
        assert self.left is not None
        assert self.right is not None
        rows = torch.linalg.eigh(torch.einsum("bppij,bqqkk->bij", self.left, self.right))[1]
        columns = torch.linalg.eigh(torch.einsum("bppii,bqqkl->bkl", self.left, self.right))[1]
        diagonal = torch.einsum(
            "bpqi,bpqj->bij",
            torch.einsum("bki,bpqkl,bli->bpqi", rows, self.left, rows),
            torch.einsum("bki,bpqkl,bli->bpqi", columns, self.right, columns),
        )
        for size, x, y in self.terms:
            a = torch.einsum("bki,bkl,bli->bi", rows, x, rows)
            c = torch.einsum("bki,bkl,bli->bi", columns, y, columns)
            diagonal = diagonal + (price * size)[:, None, None] * a[:, :, None] * c[:, None, :]
        top = diagonal.flatten(1).amax(dim=1)[:, None, None]
        diagonal = diagonal.clamp(min=0) + 1e-10 * torch.where(top > 0, top, 1.0)

        def precondition(residual: Tensor) -> Tensor:
            turned = (rows.mT @ residual.flatten(2)).reshape(residual.shape) @ columns[:, None]
            turned = turned / diagonal[:, :, None, :]
            return (rows @ turned.flatten(2)).reshape(residual.shape) @ columns.mT[:, None]

        priced = bool((price > 0).any())

        def apply(core: Tensor) -> Tensor:
            result = self._h(core)
            if priced:
                result = result + price[:, None, None, None] * algebra.apply_penalty(self.terms, core)
            return result

        found = near
        residual = self.side - apply(found)
        direction = preconditioned = precondition(residual)
        product = first = _dot(residual, preconditioned)
        for _ in range(_STEPS):
            image = apply(direction)
            length = _ratio(product, _dot(direction, image))
            found = found + length[:, None, None, None] * direction
            residual = residual - length[:, None, None, None] * image
            preconditioned = precondition(residual)
            last, product = product, _dot(residual, preconditioned)
            if bool((product <= _REST * first).all()):
                break
            direction = preconditioned + _ratio(product, last)[:, None, None, None] * direction
        return found

    # The correction

    def _secular(self, bound: Tensor) -> Tensor:
        """Whiten by the Cholesky factor of M, then solve the ridge problem along its secular equation."""
        m = algebra.penalty_matrix(self.terms)
        level = m.diagonal(dim1=1, dim2=2).mean(dim=1)
        level = torch.where(level > 0, level, 1.0)
        m.diagonal(dim1=1, dim2=2).add_((1e-12 * level)[:, None])
        root, info = torch.linalg.cholesky_ex(m)
        if bool(info.any()):
            return self.core
        half = torch.linalg.solve_triangular(root, self.h, upper=False)
        whitened = torch.linalg.solve_triangular(root, half.mT, upper=False)
        values, vectors = torch.linalg.eigh((whitened + whitened.mT) / 2)
        values = values.clamp(min=0)
        # Directions that H does not see carry nothing.
        floor = 1e-13 * values[:, -1:]
        live = values > torch.where(floor > 0, floor, 1.0)
        safe = torch.where(live, values, 1.0)
        side = vectors.mT @ torch.linalg.solve_triangular(root, self._flat(self.side), upper=False)
        power = torch.where(live, side.square().sum(dim=2) / safe, 0.0)
        rest = self.energy - power.sum(dim=1)  # the least squared error that this core can reach

        def excess(log_prices: Tensor) -> Tensor:
            prices = log_prices.exp()[:, :, None]
            share = prices / (safe[:, None] + prices)
            return (power[:, None] * share.square()).sum(dim=2) + (rest - bound)[:, None]

        price = _largest(excess, values[:, -1])
        weights = torch.where(live, 1 / (safe + price[:, None]), 0.0)
        flat = torch.linalg.solve_triangular(root.mT, vectors @ (weights[:, :, None] * side), upper=True)
        return self._core(flat)

    def _bisected(self, bound: Tensor) -> Tensor:
        """Try prices one by one, keeping the dearest that the bound allows."""
        level = _dot(self.core, self._h(self.core)) / _ratio_floor(
            _dot(self.core, algebra.apply_penalty(self.terms, self.core))
        )
        low, high = torch.log(level.clamp(min=1e-290)) - 30, torch.log(level.clamp(min=1e-290))
        best = self.core
        for _ in range(8):
            middle = (low + high) / 2
            found = self._solve(middle.exp(), best)
            good = self._error(found) <= bound
            low, high = torch.where(good, middle, low), torch.where(good, high, middle)
            best = torch.where(good[:, None, None, None], found, best)
        return best


def _largest(excess: Callable[[Tensor], Tensor], scale: Tensor) -> Tensor:
    """Return, per batch member, the largest price with excess ≤ 0, by ever finer grids of its logarithm; 0 without any.

    `excess` takes logarithms (batch, points) and rises with them.
    """
    low = torch.log(torch.where(scale > 0, scale, 1.0)) - 45
    none = excess(low[:, None])[:, 0] > 0
    points = torch.arange(1, 64, dtype=scale.dtype, device=scale.device)
    width = 90.0 / 64
    for _ in range(4):
        good = (excess(low[:, None] + width * points) <= 0).sum(dim=1)
        low, width = low + width * good, width / 64
    return torch.where(none, 0.0, low.exp())


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(dim=1)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is not positive."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)


def _ratio_floor(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, 1.0)
