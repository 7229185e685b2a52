"""Contractions of closed loops of cores: reconstruction, Gram matrices, right-hand sides, sensitivity.

A loop of N cores G_k of shape (batch, r_k, n_k, r_{k+1}), r_N = r_0, stands for
W[a_0, ..., a_{N-1}] = trace(G_0[a_0] · G_1[a_1] ··· G_{N-1}[a_{N-1}]). The closing bond r_0 is expected to be small: no
contraction here costs more than r_0² times what it costs for a chain, and none forms the design matrix of a core.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Cores = list[Tensor]
"""Cores (batch, r_k, n_k, r_{k+1}) of a loop, float64."""


def chain(cores: Sequence[Tensor]) -> Tensor:
    """Return (batch, r_first, product of the mode sizes, r_last), the product of some cores in a row."""
    result = cores[0]
    for core in cores[1:]:
        b, r, n, m = result.shape
        result = (result.reshape(b, r * n, m) @ core.flatten(2)).reshape(b, r, n * core.shape[2], core.shape[3])
    return result


def reconstruct(cores: Sequence[Tensor]) -> Tensor:
    """Return the tensor (batch, n_0, ..., n_{N-1}) that a loop of cores stands for."""
    b = cores[0].shape[0]
    sizes = [core.shape[2] for core in cores]
    left, last = chain(cores[:-1]), cores[-1]
    rows = left.permute(0, 2, 3, 1).reshape(b, left.shape[2], -1)
    columns = last.permute(0, 1, 3, 2).reshape(b, -1, last.shape[2])
    return (rows @ columns).reshape(b, *sizes)


def left_grams(cores: Sequence[Tensor]) -> list[Tensor]:
    """Return, for k = 1 ... N-1, the Gram tensor (batch, r_0, r_0', r_k, r_k') of the cores before core k."""
    found = [first_gram(cores[0])]
    for core in cores[1:-1]:
        found.append(extend_left(found[-1], core))
    return found


def first_gram(core: Tensor) -> Tensor:
    """Return (batch, r_0, r_0', r_1, r_1'), the Gram tensor of the first core over its mode."""
    b, p, n, i = core.shape
    flat = core.permute(0, 1, 3, 2).reshape(b, p * i, n)
    return (flat @ flat.mT).reshape(b, p, i, p, i).permute(0, 1, 3, 2, 4)


def extend_left(gram: Tensor, core: Tensor) -> Tensor:
    """Take one more core to the right end of the chain of a Gram tensor (batch, r_0, r_0', r, r')."""
    b, p, _, i, _ = gram.shape
    n, j = core.shape[2:]
    half = (gram.reshape(b, p * p * i, i) @ core.flatten(2)).reshape(b, p * p, i * n, j)
    flat = core.flatten(1, 2)[:, None]
    return (flat.mT @ half).reshape(b, p, p, j, j)


def right_grams(cores: Sequence[Tensor]) -> list[Tensor]:
    """Return, for k = 0 ... N-2, the Gram tensor (batch, r_0, r_0', r_{k+1}, r_{k+1}') of the cores after core k."""
    turned = [core.transpose(1, 3) for core in reversed(cores)]
    return left_grams(turned)[::-1]


def gram_matrix(cores: Sequence[Tensor], k: int, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return the Gram matrix H (batch, r_k·r_{k+1}, r_k·r_{k+1}) of the least-squares problem of core k.

    `left` and `right` are the Gram tensors of the cores before and after it, None at the ends of the row.
    """
    b, i, _, j = cores[k].shape
    if left is None:
        assert right is not None
        return right.permute(0, 1, 3, 2, 4).reshape(b, i * j, i * j)
    if right is None:
        return left.permute(0, 3, 1, 4, 2).reshape(b, i * j, i * j)
    pairs = left.flatten(3).flatten(1, 2).mT @ right.flatten(3).flatten(1, 2)
    return pairs.reshape(b, i, i, j, j).permute(0, 1, 3, 2, 4).reshape(b, i * j, i * j)


def apply_gram(left: Tensor, right: Tensor, core: Tensor) -> Tensor:
    """Return H applied to a core between two others, (batch, r_k, n, r_{k+1}), without forming H."""
    b, i, n, j = core.shape
    p = left.shape[1]
    half = (left.reshape(b, p * p * i, i) @ core.flatten(2)).reshape(b, p * p, i * n, j)
    return (half @ right.reshape(b, p * p, j, j).mT).sum(dim=1).reshape(b, i, n, j)


def penalty_terms(
    cores: Sequence[Tensor], k: int, sizes: Sequence[int] | None = None
) -> list[tuple[float, Tensor, Tensor]]:
    """Return the sensitivity as a quadratic form of core k.

    The sensitivity is a constant plus the sum over the other cores j of n_j·Σ_n <G_k[n], X_j G_k[n] Y_j>: with the
    Jacobian of core j the loop is cut open at j, which leaves one chain on either side of core k. `sizes` are the n_j
    where they are not those of the cores, as on a tensor that was compressed to orthonormal bases.

    Returns
    -------
    list of (float, Tensor, Tensor)
        (n_j, X_j of shape (batch, r_k, r_k), Y_j of shape (batch, r_{k+1}, r_{k+1})) for every j other than k.
    """
    count = len(cores)
    terms = []
    for step in range(1, count):
        other = (k + step) % count
        # The chain from `other` to core k, around the loop, with its open left end traced.
        x = _eye(cores[other], cores[other].shape[3])
        for m in range(step + 1, count):
            x = _through(x, cores[(k + m) % count])
        y = _eye(cores[other], cores[other].shape[1])
        for m in range(step - 1, 0, -1):
            y = _through(y, cores[(k + m) % count].transpose(1, 3))
        terms.append((float(sizes[other] if sizes else cores[other].shape[2]), x, y))
    return terms


def _eye(like: Tensor, size: int) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device).expand(like.shape[0], size, size)


def _through(gram: Tensor, core: Tensor) -> Tensor:
    """Return Σ_n G[n]ᵀ · gram · G[n], (batch, right bond, right bond)."""
    b, i, n, j = core.shape
    half = (gram @ core.flatten(2)).reshape(b, i * n, j)
    return core.reshape(b, i * n, j).mT @ half


def penalty_matrix(terms: list[tuple[float, Tensor, Tensor]]) -> Tensor:
    """Return M (batch, r_k·r_{k+1}, r_k·r_{k+1}) of the sensitivity's quadratic form."""
    total: Tensor | None = None
    for size, x, y in terms:
        b, i, j = x.shape[0], x.shape[1], y.shape[1]
        term = size * (x[:, :, None, :, None] * y[:, None, :, None, :]).reshape(b, i * j, i * j)
        total = term if total is None else total + term
    assert total is not None
    return total


def apply_penalty(terms: list[tuple[float, Tensor, Tensor]], core: Tensor) -> Tensor:
    """Return M applied to a core (batch, r_k, n, r_{k+1})."""
    total = torch.zeros_like(core)
    for size, x, y in terms:
        total += size * ((x @ core.flatten(2)).reshape(core.shape) @ y[:, None])
    return total


def sensitivity(cores: Sequence[Tensor], sizes: Sequence[int] | None = None) -> Tensor:
    """Return the sensitivity of a loop, (batch,): the sum over the cores of the squared norm of the Jacobian.

    It is the expected squared change of the tensor under unit noise on every entry of the cores. For three cores it
    is I·‖B∘C‖² + J·‖C∘A‖² + K·‖A∘B‖² of Phan et al. (arXiv 2203.02617). `sizes` as in `penalty_terms`.
    """
    return shares(cores, sizes).sum(dim=0)


def shares(cores: Sequence[Tensor], sizes: Sequence[int] | None = None) -> Tensor:
    """Return what every core contributes to the sensitivity, (N, batch)."""
    found = []
    for k, core in enumerate(cores):
        gram = _eye(core, core.shape[3])  # of the chain of the others, with both ends traced
        for other in [*cores[k + 1 :], *cores[:k]]:
            gram = _through(gram, other)
        size = sizes[k] if sizes else core.shape[2]
        found.append(size * gram.diagonal(dim1=1, dim2=2).sum(dim=1))
    return torch.stack(found)


def project_first(tensor: Tensor, core: Tensor) -> Tensor:
    """Return (batch, r_0, r_1, everything but the first mode): the tensor summed with the first core."""
    b, p, n, i = core.shape
    flat = core.permute(0, 1, 3, 2).reshape(b, p * i, n)
    return (flat @ tensor.reshape(b, n, -1)).reshape(b, p, i, -1)


def side_first(tensor: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """Return the right-hand side of the first core, (batch, r_0, n_0, r_1)."""
    rest = chain(cores[1:])  # (batch, r_1, everything else, r_0)
    b, i, m, p = rest.shape
    flat = tensor.reshape(b, -1, m) @ rest.permute(0, 2, 3, 1).reshape(b, m, p * i)
    return flat.reshape(b, -1, p, i).permute(0, 2, 1, 3)


def side_last(projected: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """Return the right-hand side of the last core, (batch, r_{N-1}, n_{N-1}, r_0), of `project_first`'s result."""
    b, p, i, _ = projected.shape
    n = cores[-1].shape[2]
    if len(cores) == 2:
        return projected.reshape(b, p, i, n).permute(0, 2, 3, 1)
    between = chain(cores[1:-1])  # (batch, r_1, middle modes, r_{N-1})
    m, j = between.shape[2:]
    flat = between.reshape(b, i * m, j).mT[:, None] @ projected.reshape(b, p, i * m, n)
    return flat.permute(0, 2, 3, 1)


def project_last(projected: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """Return (batch, r_1, middle modes, r_{N-1}) of `project_first`'s result and the last core."""
    b, p, i, _ = projected.shape
    j, n, _ = cores[-1].shape[1:]
    left = projected.reshape(b, p, -1, n).permute(0, 2, 1, 3).reshape(b, -1, p * n)
    right = cores[-1].permute(0, 3, 2, 1).reshape(b, p * n, j)
    return (left @ right).reshape(b, i, -1, j)


def side_middle(inner: Tensor, cores: Sequence[Tensor], k: int) -> Tensor:
    """Return the right-hand side of core k between the ends, (batch, r_k, n_k, r_{k+1}), of `project_last`'s result."""
    b = inner.shape[0]
    before, after = cores[1:k], cores[k + 1 : -1]
    i, n, j = cores[k].shape[1:]
    if before:
        left = chain(before)
        inner = (left.reshape(b, -1, i).mT @ inner.reshape(b, left.shape[1] * left.shape[2], -1)).reshape(
            b, i, -1, inner.shape[3]
        )
    if after:
        right = chain(after)
        flat = right.reshape(b, j, -1)
        inner = inner.reshape(b, i * n, -1) @ flat.mT
    return inner.reshape(b, i, n, j)


def balanced(cores: Sequence[Tensor], scale: Tensor) -> Cores:
    """Return the cores times `scale` (batch,), with the factors of each that make the sensitivity least.

    A factor c on a core divides its own share of the sensitivity by c² once the product is held; equal shares are the
    least.
    """
    safe = torch.where(scale > 0, scale, 1.0)
    norms = torch.stack([_log(core.flatten(1).norm(dim=1)) for core in cores])
    # Unit norms first: products of extreme ones leave the range of the type.
    even = _scaled(cores, -norms)
    logs = _log(shares(even)) / 2
    whole = (norms.sum(dim=0) + safe.log()) / len(cores)
    return _scaled(even, logs - logs.mean(dim=0) + whole)


def _log(value: Tensor) -> Tensor:
    """Return the logarithm, and 0 where a value is not positive."""
    return torch.where(value > 0, value, 1.0).log()


def _scaled(cores: Sequence[Tensor], logs: Tensor) -> Cores:
    return [core * log.exp()[:, None, None, None] for core, log in zip(cores, logs, strict=True)]
