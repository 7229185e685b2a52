"""The least squares problems of one sweep over block terms, with a bound on the energy of the blocks.

The mathematics is in `autorank.solvers.block_term`. Tensors are (g, T, K, S), cores (g, P, R_out, K, R_in).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_FLOOR = 1e-12
_TINY = 1e-300
_DIRECT = 192
"""Up to this many unknowns per kernel position the cores are solved for directly, above it by conjugate gradients."""
_ITERATIONS = 6


class Step(NamedTuple):
    """What a mode's step gives: its bases, the cores, the tensor projected on the other bases, and the ridge ε."""

    basis: Tensor
    core: Tensor
    projected: Tensor
    ridge: Tensor


def polar(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q with orthonormal columns, nearest to `x` (..., m, n), m ≥ n, and the symmetric H with x = Q H."""
    q, r = torch.linalg.qr(x)
    a, s, b = torch.linalg.svd(r)
    return q @ (a @ b), b.mT @ (s[..., :, None] * b)


def bounded(gram: Tensor, rhs: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Return X = rhs (gram + εI)⁻¹ with the least ε ≥ 0 that keeps ‖X‖² within the bound, and ε.

    Parameters
    ----------
    gram : Tensor, shape (g, n, n)
        Y Yᵀ, with a diagonal of about one.
    rhs : Tensor, shape (g, m, n)
        W Yᵀ.
    bound : Tensor, shape (g,)
    """
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    root, info = torch.linalg.cholesky_ex(gram + _FLOOR * eye)
    if not bool(info.any()):
        x = torch.cholesky_solve(rhs.mT, root).mT
        if bool((x.square().sum(dim=(1, 2)) <= bound).all()):
            return x, torch.zeros_like(bound)
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(_FLOOR)
    turned = rhs @ vectors
    ridge = _ridge(values, turned.square().sum(1), bound)
    return turned / (values + ridge[:, None])[:, None] @ vectors.mT, ridge


def _ridge(values: Tensor, weights: Tensor, bound: Tensor) -> Tensor:
    """Solve Σ w/(e + ε)² = bound by Newton steps on ‖X‖⁻¹ (Hebden), which rise to ε from below."""
    ridge = torch.zeros_like(bound)
    for _ in range(40):
        shifted = values + ridge[:, None]
        square = (weights / shifted**2).sum(1)
        cube = (weights / shifted**3).sum(1).clamp_min(_TINY)
        step = square / cube * ((square / bound.clamp_min(_TINY)).sqrt() - 1)
        new = (ridge + step).clamp_min(0)
        if bool((new - ridge <= 1e-12 * new).all()):
            return new
        ridge = new
    return ridge


def mode_step(work: Tensor, core: Tensor, other: Tensor, bound: Tensor) -> Step:
    """Return the bases (g, P, T, R_out) of the first mode, given the last one, and the cores that go with them.

    Parameters
    ----------
    work : Tensor, shape (g, T, K, S)
    core : Tensor, shape (g, P, R_out, K, R_in)
        Only its row spaces matter.
    other : Tensor, shape (g, P, S, R_in)
        Orthonormal columns.
    bound : Tensor, shape (g,)
        The largest energy.
    """
    g, p, r_out, k, r_in = core.shape
    t = work.shape[1]
    q = polar(core.reshape(g, p, r_out, k * r_in).mT)[0].mT
    stacked = _stack(other)
    projected = (work.reshape(g, t * k, -1) @ stacked).reshape(g, t, k, p, r_in).permute(0, 3, 1, 2, 4)
    projected = projected.reshape(g, p, t, k * r_in)
    rhs = (projected @ q.mT).permute(0, 2, 1, 3).reshape(g, t, p * r_out)
    spread = _spread(q.reshape(core.shape), stacked.mT @ stacked)
    gram = (spread @ q.mT).permute(0, 2, 1, 3).reshape(g, p * r_out, p * r_out)
    x, ridge = bounded(gram, rhs, bound)
    basis, symmetric = polar(x.reshape(g, t, p, r_out).permute(0, 2, 1, 3))
    return Step(basis, (symmetric @ q).reshape(core.shape), projected, ridge)


def core_step(step: Step, v: Tensor, norm: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cores, solved for together, and the squared error that they reach.

    Parameters
    ----------
    step : Step
        Of the first mode.
    v : Tensor, shape (g, P, S, R_in)
    norm, bound : Tensor, shape (g,)
        ‖W‖², and the largest energy.
    """
    core, u = step.core, step.basis
    g, p, r_out, k, r_in = core.shape
    us, vs = _stack(u), _stack(v)
    gram_u, gram_v = us.mT @ us, vs.mT @ vs
    rhs = (u.mT @ step.projected).reshape(core.shape)
    n = p * r_out * r_in

    def apply(x: Tensor) -> Tensor:
        return (gram_u.reshape(g, p, r_out, p * r_out) @ _spread(x, gram_v)).reshape(x.shape)

    if n <= _DIRECT:
        parts = gram_u.reshape(g, p, r_out, p, r_out), gram_v.reshape(g, p, r_in, p, r_in)
        gram = torch.einsum("gpoqa,gpiqb->gpoiqab", *parts).reshape(g, n, n)
        x, _ = bounded(gram, rhs.permute(0, 3, 1, 2, 4).reshape(g, k, n), bound)
        new = x.reshape(g, k, p, r_out, r_in).permute(0, 2, 3, 1, 4).contiguous()
        return new, _error(norm, new, rhs, apply(new))
    # All modes share the bound, so they share its multiplier where it is met: the ridge of the step before.
    ridge = step.ridge[:, None, None, None, None]
    x = core
    rest = rhs - apply(x) - ridge * x
    direction, size = rest, _dot(rest, rest)
    for _ in range(_ITERATIONS):
        image = apply(direction) + ridge * direction
        length = size / _dot(direction, image).clamp_min(_TINY)
        x = x + _wide(length) * direction
        rest = rest - _wide(length) * image
        now = _dot(rest, rest)
        direction = rest + _wide(now / size.clamp_min(_TINY)) * direction
        size = now
        if bool((size <= 1e-20 * norm).all()):
            break
    image = apply(x)
    if bool((_dot(x, x) <= bound).all()):
        return x, _error(norm, x, rhs, image)
    return _within(torch.stack([core, x, rhs], 1), torch.stack([apply(core), image, apply(rhs)], 1), rhs, norm, bound)


def _within(basis: Tensor, images: Tensor, rhs: Tensor, norm: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best cores within the bound among the combinations of three, given their images, and their error."""
    shape = rhs.shape
    basis, images, flat = basis.flatten(2), images.flatten(2), rhs.flatten(1)
    values, vectors = torch.linalg.eigh(basis @ basis.mT)
    usable = values > _FLOOR * values[:, -1:]
    turn = torch.where(usable[:, None], vectors / values.clamp_min(_TINY).sqrt()[:, None], torch.zeros_like(vectors))
    gram = turn.mT @ (basis @ images.mT) @ turn
    gram = (gram + gram.mT) / 2 + torch.diag_embed((~usable).to(gram.dtype))
    found, _ = bounded(gram, (basis @ flat[:, :, None]).mT @ turn, bound)
    combination = found @ turn.mT
    core = (combination @ basis).reshape(shape)
    return core, _error(norm, core, rhs, (combination @ images).reshape(shape))


def _stack(bases: Tensor) -> Tensor:
    """Return (g, n, P·R) from (g, P, n, R)."""
    return bases.permute(0, 2, 1, 3).flatten(2)


def _spread(x: Tensor, gram: Tensor) -> Tensor:
    """Return (g, Q, P·R_out, K·R_in): x_p times block (p, q) of the Gram matrix of the last mode's bases."""
    g, p, r_out, k, r_in = x.shape
    spread = x.reshape(g, p, r_out * k, r_in) @ gram.reshape(g, p, r_in, p * r_in)
    return spread.reshape(g, p, r_out, k, p, r_in).permute(0, 4, 1, 2, 3, 5).reshape(g, p, p * r_out, k * r_in)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None, None]


def _error(norm: Tensor, x: Tensor, rhs: Tensor, image: Tensor) -> Tensor:
    """Return ‖W − Ŵ‖² from the products of the cores with the right-hand side and their image."""
    return (norm - 2 * _dot(x, rhs) + _dot(x, image)).clamp_min(0)
