"""Sums of Kronecker products that minimise the error of a layer's output instead of that of its weight.

With the roots L of the input covariance Σ = L Lᵀ and M of the output-gradient covariance Γ = M Mᵀ the error is
‖Mᵀ (W − Ŵ) L‖². It is quadratic in each factor, but Σ and Γ mix the digits of the channels that the factors share out:
no change of basis turns it into the plain problem. What the digits explain one by one (partial traces of Σ and Γ) is
taken out first. In these coordinates the plain fit is a good start, and the best where Σ and Γ are Kronecker products
themselves; alternating least squares do the rest, and never raise the error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from autorank.solvers.kronecker import EXACT, Shape, balance, environment, multiply, norm_scale, rearrange, sekron
from autorank.solvers.kronecker_steps import Metric, Modes, direct_step, gradient_step, share_out

BUDGET = 4e9
"""Multiplications that are spent on sweeps, roughly: it bounds their number."""

SWEEPS = 3, 20
"""Fewest and most sweeps."""


def weighted_sekron(
    weight: Tensor,
    shapes: Sequence[Shape],
    ranks: Sequence[int],
    into: Tensor | None,
    out: Tensor | None,
    tolerance: float = 1e-3,
    max_sweeps: int | None = None,
) -> list[Tensor]:
    """Return the factors of a sum of Kronecker products, fitted to a layer's output.

    Parameters
    ----------
    weight : Tensor, shape (batch, T, S, K1, ..., Kd), float64
    shapes : sequence of tuple of int
        (t_i, s_i, k_i1, ..., k_id) of each factor, multiplying to the weight's.
    ranks : sequence of int
        R_1, ..., R_{N-1}.
    into : Tensor or None
        Root of the input covariance: (batch, n, n) lower triangular or (batch, n), n = S·K or S.
    out : Tensor or None
        Root of the output-gradient covariance: (batch, T, T) or (batch, T).
    tolerance : float
        Stop when a sweep lowers the squared error by less than this share in every batch member.
    max_sweeps : int, optional
        Rounds over all factors; by default what `BUDGET` allows. 0 for the better start alone.

    Returns
    -------
    list of Tensor, shapes (batch, R_1·…·R_i, m_i)
        As those of `autorank.solvers.kronecker.sekron`. Their weighted error is at most that of `sekron`'s.
    """
    positions = math.prod(weight.shape[3:])
    columns: list[Shape]
    apart = into is not None and into.shape[1] == weight.shape[2] and positions > 1
    if apart:
        # A covariance of channels alone leaves the kernel positions as they are, like output channels without one.
        order = [(shape[0], *shape[2:], shape[1]) for shape in shapes]
        sizes = [(shape[0], math.prod(shape[2:]), shape[1]) for shape in shapes]
        columns = [(shape[1],) for shape in shapes]
        tensor = rearrange(weight.movedim(2, -1), order)
    else:
        sizes = [(shape[0], 1, math.prod(shape[1:])) for shape in shapes]
        columns = [shape[1:] for shape in shapes]
        tensor = rearrange(weight, shapes)
    if into is not None:
        whole = [math.prod(column[mode] for column in columns) for mode in range(len(columns[0]))]
        numbers = torch.arange(into.shape[1], device=into.device).reshape(1, *whole)
        into = into[:, rearrange(numbers, columns).flatten()]
    found = _fit(tensor, Modes(tuple(sizes)), ranks, into, out, tolerance, max_sweeps)
    if not apart:
        return found
    return [
        factor.reshape(*factor.shape[:2], *size).movedim(-1, 3).flatten(2)
        for factor, size in zip(found, order, strict=True)
    ]


def _fit(
    tensor: Tensor,
    modes: Modes,
    ranks: Sequence[int],
    into: Tensor | None,
    out: Tensor | None,
    tolerance: float,
    max_sweeps: int | None,
) -> list[Tensor]:
    scale = norm_scale(tensor)
    tensor = tensor / scale
    plain = sekron(tensor, ranks)
    into, columns = share_out(into, [u for _, _, u in modes.sizes])
    out, rows = share_out(out, [t for t, _, _ in modes.sizes])
    white = tensor
    for i in range(len(modes.sizes)):
        white = modes.mix(white.movedim(i + 1, -1), i, rows, columns).movedim(-1, i + 1)
    metric = Metric(modes, into, out)
    target = metric.apply(white)
    full = (white * target).flatten(1).sum(1)
    starts = [[modes.mix(factor, i, rows, columns) for i, factor in enumerate(plain)], sekron(white, ranks, 3)]
    errors = [metric.squared(white - multiply(start)) for start in starts]
    second = errors[1] < errors[0]
    factors = [torch.where(second[:, None, None], b, a) for a, b in zip(*starts, strict=True)]
    error = torch.where(second, errors[1], errors[0])

    cost = sum(metric.work(factor.shape[1], i) for i, factor in enumerate(factors))
    sweeps = min(max(int(BUDGET / cost), SWEEPS[0]), SWEEPS[1]) if max_sweeps is None else max_sweeps
    unfolded = [target.movedim(i + 1, -1).flatten(1, -2) for i in range(len(factors))]
    for _ in range(sweeps):
        if bool((error <= EXACT**2 * full).all()):
            break
        before = error
        factors = balance(factors)
        for i in range(len(factors)):
            around = environment(factors, i)
            if metric.direct(factors[i].shape[1], i):
                step, gain = direct_step(metric, around, unfolded[i], factors[i], i)
            else:
                residual = metric.apply(white - multiply(factors)).movedim(i + 1, -1).flatten(1, -2)
                step, gain = gradient_step(metric, around, residual, i)
            # Rounding can turn the last, tiny steps around.
            useful = (gain > 0) & (error > EXACT**2 * full)
            factors[i] = torch.where(useful[:, None, None], factors[i] + step, factors[i])
            error = torch.where(useful, error - gain, error)
        if bool((before - error <= tolerance * before).all()):
            break
    found = [modes.unmix(factor, i, rows, columns) for i, factor in enumerate(factors)]
    found[-1] = found[-1] * scale.reshape(-1, 1, 1)
    return balance(found)
