"""One step of the weighted fit of Kronecker products: the quadratic form of the error, and one factor's best value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autorank.solvers.kronecker import ridged

CHUNK = 1 << 24
"""Numbers of an intermediate result that are held at once."""

CHEAP = 5 * 10**7
"""Multiplications that are no reason to do without the exact step."""

SHORT = 512
"""Longest diagonal that is taken for a full matrix, so that the exact step can be made."""

ITERATIONS = 4
"""Conjugate gradient steps for one factor in one sweep; more buy nothing, as the others change next."""

RESIDUAL = 1e-1
"""Conjugate gradients stop when the preconditioned gradient has fallen to this share."""


@dataclass(frozen=True)
class Modes:
    """The parts of the mode m_i = t_i · k_i · u_i of each factor.

    Attributes
    ----------
    sizes : tuple of (int, int, int)
        Output channels t_i; positions k_i on which the error does not mix; weighted columns u_i.
    """

    sizes: tuple[tuple[int, int, int], ...]

    def to_matrix(self, tensor: Tensor, skip: int | None = None) -> Tensor:
        """Return (batch, t_1·…, k_1·…, u_1·…) of (batch, m_1 · … · m_N in one or many), factor `skip` left out."""
        sizes = [size for i, size in enumerate(self.sizes) if i != skip]
        n = len(sizes)
        parts = tensor.reshape(-1, *(part for size in sizes for part in size))
        parts = parts.permute(0, *(1 + 3 * i + part for part in range(3) for i in range(n)))
        return parts.reshape(-1, *(math.prod(size[part] for size in sizes) for part in range(3)))

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Return (batch, m_1, ..., m_N): the inverse of `to_matrix`."""
        n = len(self.sizes)
        parts = matrix.reshape(matrix.shape[0], *(size[part] for part in range(3) for size in self.sizes))
        order = [1 + part * n + i for i in range(n) for part in range(3)]
        return parts.permute(0, *order).reshape(matrix.shape[0], *map(math.prod, self.sizes))

    def mix(self, tensor: Tensor, i: int, rows: Sequence[Tensor] | None, columns: Sequence[Tensor] | None) -> Tensor:
        """Return a tensor (batch, ..., m_i) with its last mode multiplied by the transposed roots of its digits."""
        return self._mixed(tensor, i, rows, columns, lambda root, flat: root.mT @ flat)

    def unmix(self, tensor: Tensor, i: int, rows: Sequence[Tensor] | None, columns: Sequence[Tensor] | None) -> Tensor:
        """Undo `mix`."""
        return self._mixed(
            tensor, i, rows, columns, lambda root, flat: torch.linalg.solve_triangular(root.mT, flat, upper=True)
        )

    def _mixed(
        self,
        tensor: Tensor,
        i: int,
        rows: Sequence[Tensor] | None,
        columns: Sequence[Tensor] | None,
        multiply: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        parts = tensor.reshape(tensor.shape[0], -1, *self.sizes[i])
        for roots, place in ((rows, 2), (columns, 4)):
            if roots is not None:
                moved = parts.movedim(place, 1)
                parts = multiply(roots[i], moved.flatten(2)).reshape(moved.shape).movedim(1, place)
        return parts.reshape(tensor.shape)


class Metric:
    """The quadratic form ‖Mᵀ X L‖² of a tensor (batch, m_1, ..., m_N).

    Parameters
    ----------
    modes : Modes
    into : Tensor or None
        L, (batch, n, n) or its diagonal (batch, n), n = u_1·…·u_N.
    out : Tensor or None
        M, (batch, T, T) or its diagonal (batch, T), T = t_1·…·t_N.
    """

    def __init__(self, modes: Modes, into: Tensor | None, out: Tensor | None) -> None:
        self.modes = modes
        self.into, self.out = _square(into), _square(out)
        if self.into is not None and self.into.ndim == 2 and self.into.shape[1] <= SHORT:
            self.into = self.into.diag_embed()
        self._blocks: dict[int, Tensor] = {}

    def apply(self, tensor: Tensor) -> Tensor:
        """Return Γ X Σ, shaped as `tensor`."""
        matrix = self.modes.to_matrix(tensor)
        if self.out is not None:
            flat = matrix.flatten(2)
            matrix = (self.out @ flat if self.out.ndim == 3 else self.out[:, :, None] * flat).reshape(matrix.shape)
        if self.into is not None:
            flat = matrix.flatten(1, 2)
            matrix = (flat @ self.into if self.into.ndim == 3 else flat * self.into[:, None]).reshape(matrix.shape)
        return self.modes.from_matrix(matrix)

    def squared(self, tensor: Tensor) -> Tensor:
        """Return the value (batch,) of the form."""
        return (tensor * self.apply(tensor)).flatten(1).sum(1).clamp_min(0)

    def direct(self, ranks: int, i: int) -> bool:
        """Say whether the normal matrix of factor i is block diagonal, and cheaper formed than multiplied with."""
        separate = self.out is None and (self.into is None or self.into.ndim == 3)
        return separate and self._direct_work(ranks, i) <= max(self._gradient_work(ranks), CHEAP)

    def work(self, ranks: int, i: int) -> int:
        """Return the multiplications of one step for factor i, roughly."""
        return self._direct_work(ranks, i) if self.direct(ranks, i) else self._gradient_work(ranks)

    def _direct_work(self, ranks: int, i: int) -> int:
        if self.into is None:
            return ranks**2 * (math.prod(math.prod(size) for size in self.modes.sizes) + ranks)
        own, columns = self.modes.sizes[i], math.prod(size[2] for size in self.modes.sizes)
        rows = math.prod(size[0] * size[1] for size in self.modes.sizes) // (own[0] * own[1])
        return ranks**2 * (columns**2 + rows * (columns // own[2]) ** 2) + (ranks * own[2]) ** 3

    def _gradient_work(self, ranks: int) -> int:
        t, k, n = (math.prod(size[part] for size in self.modes.sizes) for part in range(3))
        each = 2 * ranks
        for side, size in ((self.out, t), (self.into, n)):
            each += 0 if side is None else size if side.ndim == 3 else 1
        return ITERATIONS * t * k * n * each

    def normal(self, around: Tensor, i: int) -> Tensor:
        """Return the normal matrix (batch, P·u_i, P·u_i) of factor i, given its surroundings (batch, P, rest)."""
        batch, ranks = around.shape[:2]
        if self.into is None:
            return around @ around.mT
        inner = self.modes.to_matrix(around.flatten(0, 1), skip=i)
        inner = inner.reshape(batch, ranks, -1, inner.shape[-1]).transpose(1, 2)  # (batch, rows, P, c)
        blocks = self._block(i)
        own, others = self.modes.sizes[i][2], inner.shape[-1]
        rows = max(1, CHUNK // (batch * ranks * others**2))
        pieces = []
        for part in inner.split(rows, dim=2):
            gram = torch.einsum("gxqc,gxpd->gqpcd", part, inner).reshape(batch, -1, others**2)
            pieces.append((gram @ blocks).reshape(batch, -1, ranks, own, own))
        return torch.cat(pieces, 1).transpose(2, 3).reshape(batch, ranks * own, ranks * own)

    def _block(self, i: int) -> Tensor:
        """Return Σ as (batch, (c, c'), (b, b')), c the columns of the other factors and b those of factor i."""
        if i not in self._blocks:
            assert self.into is not None
            sizes = [size[2] for size in self.modes.sizes]
            n = len(sizes)
            rest = [j for j in range(n) if j != i]
            digits = self.into.reshape(-1, *sizes, *sizes)
            order = [*(1 + j for j in rest), *(1 + n + j for j in rest), 1 + i, 1 + n + i]
            self._blocks[i] = digits.permute(0, *order).reshape(digits.shape[0], -1, sizes[i] ** 2)
        return self._blocks[i]


def direct_step(metric: Metric, around: Tensor, target: Tensor, factor: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """Return the step of one factor to its best value, and by how much the squared error falls.

    Parameters
    ----------
    metric : Metric
        Without output side.
    around : Tensor, shape (batch, P, rest)
        What the factor is multiplied with.
    target : Tensor, shape (batch, rest, m_i)
        The metric applied to the tensor that is approximated.
    factor : Tensor, shape (batch, P, m_i)
    i : int
        Its place.

    Returns
    -------
    step : Tensor, shape (batch, P, m_i)
    gain : Tensor, shape (batch,)
    """
    batch, ranks, size = factor.shape
    own = 1 if metric.into is None else metric.modes.sizes[i][2]

    def columns(tensor: Tensor) -> Tensor:  # (batch, P·u_i, t_i·k_i)
        return tensor.reshape(batch, ranks, size // own, own).transpose(2, 3).reshape(batch, ranks * own, -1)

    normal = metric.normal(around, i)
    slope = columns(around @ target) - normal @ columns(factor)
    step = torch.cholesky_solve(slope, torch.linalg.cholesky(ridged(normal)))
    gain = (step * (2 * slope - normal @ step)).flatten(1).sum(1)
    return step.reshape(batch, ranks, own, size // own).transpose(2, 3).reshape(factor.shape), gain


def gradient_step(
    metric: Metric, around: Tensor, residual: Tensor, i: int, iterations: int = ITERATIONS, tolerance: float = RESIDUAL
) -> tuple[Tensor, Tensor]:
    """Return a step towards the best value of one factor by preconditioned conjugate gradients, and its gain.

    The normal matrix is only multiplied with. The preconditioner is what it were if the metric were the identity, which
    the coordinates of the fit bring it near to. Every step lowers the error.

    Parameters
    ----------
    metric, around, i
        As for `direct_step`.
    residual : Tensor, shape (batch, rest, m_i)
        The metric applied to what is not approximated yet.
    iterations : int
    tolerance : float
        Stop when the norm of the preconditioned gradient has fallen to this share in every batch member.
    """
    root = torch.linalg.cholesky(ridged(around @ around.mT))
    sizes = [math.prod(size) for size in metric.modes.sizes]
    rest = [size for j, size in enumerate(sizes) if j != i]

    def times(step: Tensor) -> Tensor:
        change = (around.mT @ step).reshape(-1, *rest, sizes[i]).movedim(-1, i + 1)
        return around @ metric.apply(change).movedim(i + 1, -1).flatten(1, -2)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1)

    slope = around @ residual
    step, gain = torch.zeros_like(slope), slope.new_zeros(slope.shape[0])
    ahead = direction = torch.cholesky_solve(slope, root)
    power = first = dot(slope, ahead)
    for _ in range(iterations):
        if bool((power <= tolerance**2 * first).all()):
            break
        bent = times(direction)
        curvature = dot(direction, bent)
        usable = (curvature > 0) & (power > 0)
        length = torch.where(usable, power / torch.where(usable, curvature, torch.ones_like(power)), 0.0)
        step = step + length[:, None, None] * direction
        gain = gain + length * power
        slope = slope - length[:, None, None] * bent
        ahead = torch.cholesky_solve(slope, root)
        after = dot(slope, ahead)
        ratio = torch.where(usable, after / torch.where(usable, power, torch.ones_like(power)), 0.0)
        direction, power = ahead + ratio[:, None, None] * direction, after
    return step, gain


def share_out(root: Tensor | None, sizes: Sequence[int]) -> tuple[Tensor | None, list[Tensor] | None]:
    """Split a root into what its digits explain one by one, and the root of what is left.

    Parameters
    ----------
    root : Tensor or None
        R of C = R Rᵀ, (batch, n, n) or its diagonal (batch, n).
    sizes : sequence of int
        Sizes of the digits; they multiply to n, the first counts slowest.

    Returns
    -------
    left : Tensor or None
        R' with R = (F_1 ⊗ … ⊗ F_N) R', shaped as `root`, scaled so that its mean square on the diagonal of C is 1.
    roots : list of Tensor, or None
        F_i, (batch, size, size) lower triangular: the root of the partial trace of C.
    """
    if root is None:
        return None, None
    batch = root.shape[0]
    peak = root.flatten(1).abs().amax(1)
    root = root / torch.where(peak > 0, peak, torch.ones_like(peak)).reshape(-1, *[1] * (root.ndim - 1))
    diagonal = root.ndim == 2
    digits = root.reshape(batch, *sizes, -1)
    roots = []
    for i in range(len(sizes)):
        flat = digits.movedim(i + 1, 1).flatten(2)
        trace = flat.square().sum(2).diag_embed() if diagonal else flat @ flat.mT
        mean = trace.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        roots.append(torch.linalg.cholesky(ridged(trace / torch.where(mean > 0, mean, torch.ones_like(mean)))))
    for i, lower in enumerate(roots):
        moved = digits.movedim(i + 1, 1)
        flat = torch.linalg.solve_triangular(lower, moved.flatten(2), upper=False)
        digits = flat.reshape(moved.shape).movedim(1, i + 1)
    left = digits.reshape(root.shape)
    mean = left.square().flatten(1).sum(1) / math.prod(sizes)
    return left / torch.where(mean > 0, mean, torch.ones_like(mean)).sqrt().reshape(-1, *[1] * (left.ndim - 1)), roots


def _square(root: Tensor | None) -> Tensor | None:
    if root is None:
        return None
    return root.square() if root.ndim == 2 else root @ root.mT
