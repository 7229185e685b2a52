"""Ranks of matrices by empirical variational Bayesian matrix factorisation (EVBMF), from their singular values alone.

Nakajima, Sugiyama, Babacan and Tomioka, "Global analytic solution of fully-observed variational Bayesian matrix
factorization" (JMLR 14, 2013): with a Gaussian prior of its own variance on every column of the two factors, the global
minimum of the variational free energy keeps exactly the singular values above a threshold, and the noise variance is
the minimum of a function of one variable. Nothing is tuned and nothing is random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autorank.errors import FormatError
from autorank.types import Spectrum

Values = NDArray[np.float64]

_EXACT = 1e-5
"""Singular values below this share of the largest are rounding: float32 factors multiplied out leave a few 1e-7."""
_POINTS = 512
"""Points at which the free energy is looked at before the best of them are refined."""
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def evbmf_rank(
    singular_values: Sequence[float] | Values | Tensor, rows: int, columns: int, noise: float | None = None
) -> int:
    """Return how many components of a matrix empirical variational Bayes tells from noise.

    Parameters
    ----------
    singular_values : sequence of float
        In any order; those that are left out are taken to be zero.
    rows, columns : int
        Of the matrix.
    noise : float, optional
        Variance of the noise on every entry. By default the one that minimises the free energy.

    Returns
    -------
    int
        From 0 (nothing but noise) to min(rows, columns). A matrix has to be of lower rank than that by some margin for
        its noise to be seen at all: without a `noise`, at most about min / (1 + min / max) components are found.

    Raises
    ------
    FormatError
        A singular value is not finite or negative.
    ValueError
        Sizes below one, more singular values than the matrix can have, or a noise that is no variance.
    """
    if isinstance(singular_values, Tensor):
        singular_values = singular_values.detach().cpu().double().numpy()
    values = np.asarray(singular_values, dtype=np.float64).reshape(-1)
    if min(rows, columns) < 1 or len(values) > min(rows, columns):
        raise ValueError(f"a {rows} × {columns} matrix has no {len(values)} singular values")
    if noise is not None and not (noise >= 0 and math.isfinite(noise)):
        raise ValueError(f"the variance of the noise must be a number ≥ 0, not {noise}")
    if not np.isfinite(values).all() or (values < 0).any():
        raise FormatError("the singular values of a matrix must be finite and not negative")
    top = float(values.max(initial=0.0))
    if top == 0.0:
        return 0
    short, long = min(rows, columns), max(rows, columns)
    energies = np.zeros(short)
    energies[: len(values)] = np.square(-np.sort(-values) / top) / long
    alpha = short / long
    threshold = _threshold(alpha)
    variance = _noise(energies, alpha, threshold) if noise is None else noise / top / top
    # Singular values are no more exact than this, so that what is smaller cannot be signal.
    rounding = (long * float(np.finfo(np.float64).eps)) ** 2 / long
    return int((energies > max(threshold * variance, rounding)).sum())


def spectrum(weight: Tensor, groups: int = 1) -> Spectrum:
    """Return the relative energies of the two unfoldings of a kernel, and their EVBMF ranks.

    The EVBMF ranks are those of the kernel's *core*: the kernel written in bases of the channels that it uses, which
    has the same singular values but fewer rows and columns. For a dense kernel that is the kernel itself. A kernel
    multiplied out of trained factors (or one with dead channels) is exactly of lower rank, and everything beyond that
    rank would pass for a perfect absence of noise: all that is left would count as signal, for ever. MUSCO (arXiv
    1903.09973) decomposes the cores of decomposed layers again; this is the same, read off the whole kernel. Where the
    core shows nothing but noise although the kernel is exactly of lower rank, that exact rank is returned.

    Parameters
    ----------
    weight : Tensor, shape (T, S/groups, K1, ..., Kd)
        Any floating-point type and device; computed in float64 on the CPU.
    groups : int
        A grouped kernel is a block per group, and all blocks share a rank, as in Tucker-2: tails add up over the blocks
        (each truncated at r), and the EVBMF rank is the largest that any block has in noise of its own.

    Returns
    -------
    Spectrum
        ``out_tail`` has T/groups + 1 entries, ``in_tail`` S/groups + 1; of a kernel of zeros nothing is left beyond
        rank 0, and its ranks are 0.

    Raises
    ------
    FormatError
        The kernel has entries that are not finite.
    ValueError
        T is not divisible by `groups`.
    """
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"{weight.shape[0]} output channels cannot be divided into {groups} groups")
    if not bool(torch.isfinite(weight).all()):
        raise FormatError("the spectrum of a kernel with entries that are not finite cannot be computed")
    rounding = max(_EXACT, torch.finfo(weight.dtype).eps)
    kernel = weight.detach().cpu().double()
    kernel = kernel.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    # A scale of one keeps the squares of tiny and huge entries inside the range of the type.
    scale = float(kernel.abs().max())
    kernel = kernel / scale if scale > 0 else kernel
    out = _singular_values(kernel.flatten(2))
    # Of a matrix, the other unfolding is its transpose.
    values = [out, out if kernel.shape[3] == 1 else _singular_values(kernel.transpose(1, 2).flatten(2))]
    tails = [_tail(found, size) for found, size in zip(values, kernel.shape[1:3], strict=True)]
    blocks = [_core_ranks(out, into, kernel.shape[1:], rounding) for out, into in zip(*values, strict=True)]
    return Spectrum(tails[0], tails[1], (max(out for out, _ in blocks), max(into for _, into in blocks)))


def _core_ranks(out: Values, into: Values, shape: Sequence[int], rounding: float) -> tuple[int, int]:
    """Return the EVBMF ranks of a kernel (T, S, K) without the channels that it does not use."""
    exact = [int((found > rounding * found[0]).sum()) for found in (out, into)]
    if 0 in exact:
        return 0, 0
    ranks = []
    for found, rows, others, full in zip((out, into), exact, exact[::-1], shape[:2], strict=True):
        columns = others * shape[2]
        kept = evbmf_rank(found[: min(rows, columns)], rows, columns)
        ranks.append(kept or (rows if rows < full else 0))
    return ranks[0], ranks[1]


def _singular_values(matrices: Tensor) -> Values:
    """Return the singular values (batch, min(m, n)) of (batch, m, n), largest first, by the smaller Gram matrix."""
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mT
    squares = torch.linalg.eigvalsh(matrices @ matrices.mT).flip(-1).clamp(min=0)
    return np.sqrt(squares.numpy())


def _tail(values: Values, size: int) -> tuple[float, ...]:
    """Return for r = 0..size the share of the energy beyond the r largest singular values of every batch member."""
    energies = np.square(values).sum(0)
    beyond = np.append(np.cumsum(energies[::-1])[::-1], 0.0)
    total = beyond[0]
    shares = beyond / total if total > 0 else np.append(1.0, np.zeros(len(energies)))
    return (*map(float, shares), *[0.0] * (size - len(energies)))


def _threshold(alpha: float) -> float:
    """Return the least γ²/(M σ²) at which a component lowers the free energy: (1 + τ)(1 + α/τ).

    τ is the zero of log(1 + τ) + α log(1 + τ/α) − τ beyond √α (2.5129 for α = 1); α is L/M, L ≤ M.
    """

    def gain(tau: float) -> float:
        return math.log1p(tau) + alpha * math.log1p(tau / alpha) - tau

    low = high = math.sqrt(alpha)
    while gain(high) > 0:
        high *= 2.0
    for _ in range(80):
        middle = (low + high) / 2.0
        low, high = (middle, high) if gain(middle) > 0 else (low, middle)
    return (1.0 + high) * (1.0 + alpha / high)


def _noise(energies: Values, alpha: float, threshold: float) -> float:
    """Return the noise variance that minimises the free energy.

    Parameters
    ----------
    energies : ndarray, shape (L,)
        γ²/M, largest first, scaled to at most 1/M.
    alpha, threshold : float
        L/M, and the threshold that belongs to it.

    Returns
    -------
    float
        In units of `energies`. The paper bounds it (theorem 2): from above by the mean energy, from below by what the
        components that cannot be signal leave as noise. Between these bounds the free energy may have several minima,
        most of them near variances at which a component crosses the threshold, so these are all looked at.
    """
    most = math.ceil(len(energies) / (1.0 + alpha)) - 1
    low = max(float(energies[most]) / threshold, float(energies[most:].mean()))
    high = float(energies.mean())
    low = min(max(low, high * 1e-30), high)
    crossings = np.unique(energies[energies > 0])
    crossings = crossings[np.linspace(0, len(crossings) - 1, min(_POINTS, len(crossings))).round().astype(int)]
    even = np.linspace(math.log(low), math.log(high), 64)
    grid = np.unique(np.concatenate([even, np.log(crossings / threshold), np.log(crossings)]).clip(even[0], even[-1]))
    heights = np.array([_free_energy(energies, alpha, threshold, float(s)) for s in grid])
    beside = np.pad(heights, 1, constant_values=math.inf)
    minima = np.flatnonzero((heights <= beside[:-2]) & (heights <= beside[2:]))
    best = (math.inf, float(grid[0]))
    for i in minima[np.argsort(heights[minima], kind="stable")][:8]:
        ends = float(grid[max(i - 1, 0)]), float(grid[min(i + 1, len(grid) - 1)])
        found = _golden(energies, alpha, threshold, *ends)
        best = min(best, found, (float(heights[i]), float(grid[i])))
    return math.exp(best[1])


def _golden(energies: Values, alpha: float, threshold: float, low: float, high: float) -> tuple[float, float]:
    """Return (height, place) of a minimum of the free energy between two log variances, by golden sections."""

    def height(s: float) -> float:
        return _free_energy(energies, alpha, threshold, s)

    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = height(left), height(right)
    for _ in range(48):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = height(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = height(right)
    return min((at_left, left), (at_right, right))


def _free_energy(energies: Values, alpha: float, threshold: float, log_variance: float) -> float:
    """Return 2F/M of the best factorisation at a noise variance, less what does not depend on it.

    Every component adds x + log σ², x = γ²/(M σ²); one above the threshold also what it gains as signal,
    log(1 + τ) + α log(1 + τ/α) − τ with τ the larger zero of τ² − (x − 1 − α) τ + α.
    """
    x = energies * math.exp(-log_variance)
    signal = x[x > threshold]
    shifted = signal - (1.0 + alpha)
    tau = (shifted + np.sqrt(shifted * shifted - 4.0 * alpha)) / 2.0
    # x − τ is 1 + α + α/τ; both are huge where there is next to no noise.
    kept = 1.0 + alpha + alpha / tau + np.log1p(tau) + alpha * np.log1p(tau / alpha)
    return float(x[x <= threshold].sum() + kept.sum()) + energies.size * log_variance
