"""Block term decomposition: sums of small Tucker-2 blocks, fitted by alternating least squares under a norm bound.

W ≈ Σ_p C_p ×_T U_p ×_S V_p (Phan et al., arXiv 2203.02617; De Lathauwer, SIAM J. Matrix Anal. Appl. 30, 2008). Like CP,
which it is at block size one, the problem has no best answer for some tensors: blocks grow and cancel each other.

**Sensitivity.** The expected squared error under unit noise on every entry of the factors is Σ_p T‖C_p ×_S V_p‖² +
S‖C_p ×_T U_p‖² + K‖U_p‖²‖V_p‖². With orthonormal U_p and V_p, the normal form of every fit here, that is
(T + S)·Σ_p‖W_p‖² + const with W_p the blocks: what has to stay bounded is the energy Σ_p‖W_p‖², which is ‖Ŵ‖² for
orthogonal blocks and grows without end when blocks cancel.

**One problem per mode.** Write C_p = S_p Q_p with orthonormal rows of Q_p (as ro × ri·K). Then W_p = X_p (Q_p ×_S V_p)
with X_p = U_p S_p, and ‖W_p‖ = ‖X_p‖: the sensitivity is plainly ‖X‖² for the stacked X, and the mode's problem is

    min ‖W − Σ_p X_p Y_p‖²  subject to ‖X‖² ≤ bound,   Y_p = Q_p ×_S V_p,

answered by X = W Yᵀ (Y Yᵀ + εI)⁻¹ with the least ε ≥ 0 that keeps the bound: the secular equation Σ_i q_i/(e_i + ε)² =
bound over the eigenvalues e of Y Yᵀ, monotone in ε. The polar decomposition X_p = U_p H_p gives back U_p and the core
H_p Q_p. The other mode is the same with the roles changed, and the cores together are the same again with Y made of
U_p ⊗ V_p.

In the code W is (g, T, K, S) and cores are (g, P, R_out, K, R_in): both channel modes are then at an end, and one
transposition exchanges them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from autorank.solvers import block_start as start
from autorank.solvers.block_steps import core_step, mode_step, polar

BOUND = 4.0
"""The largest energy of the blocks, Σ_p‖W_p‖²/‖W‖², that a fit may use. Orthogonal blocks need at most 1; on kernels of
ResNet-20 fits bounded by 4 ended within 3 % of the errors of fits without a bound, in part below them; without one the
energies grew to tens of thousands."""

_FLOOR = 1e-15
_REACH = 0.5
"""The share of the last change by which a sweep's start is first extrapolated; grows by a tenth with every success."""
_COMPRESS = 0.6
"""Tensors are compressed when that leaves less than this share of them."""
_POLISH = 8
"""Sweeps on the whole tensor after those on the compressed one."""


class Blocks(NamedTuple):
    """Blocks of a batch of tensors.

    Attributes
    ----------
    core : Tensor, shape (batch, P, R_out, R_in, K)
    u : Tensor, shape (batch, P, T, R_out)
    v : Tensor, shape (batch, P, S, R_in)
    """

    core: Tensor
    u: Tensor
    v: Tensor


def compose(blocks: Blocks) -> Tensor:
    """Return the sum of the blocks, (batch, T, S, K)."""
    into = torch.einsum("gpoik,gpsi->gposk", blocks.core, blocks.v)
    return torch.einsum("gpto,gposk->gtsk", blocks.u, into)


def sensitivity(blocks: Blocks) -> Tensor:
    """Return Σ_F ‖∂W/∂F‖² over all factors F, shape (batch,)."""
    core, u, v = blocks
    t, s, k = u.shape[2], v.shape[2], core.shape[4]
    on_u = torch.einsum("gpoik,gpsi->gposk", core, v).square().sum(dim=(1, 2, 3, 4))
    on_v = torch.einsum("gpoik,gpto->gptik", core, u).square().sum(dim=(1, 2, 3, 4))
    on_core = (u.square().sum(dim=(2, 3)) * v.square().sum(dim=(2, 3))).sum(1)
    return t * on_u + s * on_v + k * on_core


def energy(blocks: Blocks) -> Tensor:
    """Return Σ_p‖W_p‖², shape (batch,): what cancelling blocks drive up."""
    gram_u, gram_v = blocks.u.mT @ blocks.u, blocks.v.mT @ blocks.v
    return torch.einsum("gpoik,gpoa,gpib,gpabk->g", blocks.core, gram_u, gram_v, blocks.core)


def block_term(
    tensor: Tensor,
    blocks: int,
    rank: tuple[int, int],
    bound: float = BOUND,
    max_sweeps: int = 60,
    tolerance: float = 1e-4,
) -> Blocks:
    """Approximate a batch of 3-way tensors by sums of Tucker-2 blocks of bounded energy.

    The start takes the best Tucker-2 block of what is left, `blocks` times, or shares out one large Tucker-2 where
    that is better (which is exact when the shares cover both modes). Sweeps over the two modes and the cores follow,
    extrapolated along the last change and taken back where the error rises, first on the tensor compressed by Tucker-2
    to the P·R channels that the stacked bases can span, then on the tensor itself. No random number is drawn.

    Parameters
    ----------
    tensor : Tensor, shape (batch, T, S, K), float64
    blocks : int
        P, at least 1; one block is Tucker-2.
    rank : tuple of int
        (R_out, R_in) of every block, at most (T, S).
    bound : float
        Largest Σ_p‖W_p‖²/‖W‖²; at least 1. Infinite for plain least squares, which may diverge.
    max_sweeps : int
    tolerance : float
        Stop when a sweep lowers the squared error by less than this share of it, in every batch member.

    Returns
    -------
    Blocks
        With orthonormal columns in every u and v.
    """
    _, t, s, k = tensor.shape
    scale = tensor.abs().amax(dim=(1, 2, 3), keepdim=True)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    work = tensor / scale
    norm = work.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    norm = torch.where(norm > 0, norm, torch.ones_like(norm))
    work = (work / norm).transpose(2, 3).contiguous()
    # A block cannot have more channels in one mode than the other mode and the kernel give it.
    r_out = min(rank[0], rank[1] * k, t)
    r_in = min(rank[1], r_out * k, s)
    wide = min(t, blocks * r_out), min(s, blocks * r_in)
    if blocks > 1 and wide[0] * wide[1] < _COMPRESS * t * s:
        small, u, v = start.compress(work, wide)
        inner, _ = start.blocks_of(small, blocks, r_out, r_in)
        inner = _sweeps(small, inner, bound, max_sweeps, tolerance)
        found = start.Terms(inner.core, u[:, None] @ inner.u, v[:, None] @ inner.v)
        found = _sweeps(work, found, bound, min(max_sweeps, _POLISH), tolerance)
    else:
        found, exact = start.blocks_of(work, blocks, r_out, r_in)
        if not exact:
            found = _sweeps(work, found, bound, max_sweeps, tolerance)
    core, u, v = found
    core = core.transpose(3, 4) * (scale * norm)[:, None]
    return _orthonormal(core, u, v, rank)


def _sweeps(work: Tensor, found: start.Terms, bound: float, max_sweeps: int, tolerance: float) -> start.Terms:
    """Return the terms after alternating least squares with extrapolation; `work` (g, T, K, S) of unit norm."""
    other = work.transpose(1, 3).contiguous()
    norm = work.square().sum(dim=(1, 2, 3))
    limit = bound * norm
    best: start.Terms | None = None
    error = torch.full_like(norm, float("inf"))
    reach = torch.full_like(norm, _REACH)
    ahead = found.core, found.u
    for _ in range(max_sweeps):
        turned = mode_step(other, ahead[0].transpose(2, 4), ahead[1], limit)
        step = mode_step(work, turned.core.transpose(2, 4), turned.basis, limit)
        core, reached = core_step(step, turned.basis, norm, limit)
        if best is None:
            best, error = start.Terms(core, step.basis, turned.basis), reached
            ahead = best.core, best.u
            continue
        better = reached <= error
        done = better & (error - reached <= tolerance * error)
        take = better[:, None, None, None]
        new_core, new_u = torch.where(take[..., None], core, best.core), torch.where(take, step.basis, best.u)
        # Where the error rose the last answer is kept and the next sweep starts from it, without extrapolation.
        length = torch.where(better, reach, torch.zeros_like(reach))[:, None, None, None]
        ahead = (
            new_core + length[..., None] * (new_core - best.core),
            polar(new_u + length * (new_u - best.u))[0] if bool(better.any()) else new_u,
        )
        best = start.Terms(new_core, new_u, torch.where(take, turned.basis, best.v))
        reach = torch.where(better, (reach * 1.1).clamp_max(2.0), reach / 2)
        error = torch.where(better, reached, error)
        if bool((done | (error <= _FLOOR * norm)).all()):
            break
    return found if best is None else best


def _orthonormal(core: Tensor, u: Tensor, v: Tensor, rank: tuple[int, int]) -> Blocks:
    """Return the terms padded to `rank`, with orthonormal bases; core (g, P, R_out, R_in, K)."""
    u = torch.nn.functional.pad(u, (0, rank[0] - u.shape[3]))
    v = torch.nn.functional.pad(v, (0, rank[1] - v.shape[3]))
    core = torch.nn.functional.pad(core, (0, 0, 0, rank[1] - core.shape[3], 0, rank[0] - core.shape[2]))
    u, left = torch.linalg.qr(u)
    v, right = torch.linalg.qr(v)
    core = torch.einsum("gpao,gpbi,gpoik->gpabk", left, right, core)
    return Blocks(core, u, v)
