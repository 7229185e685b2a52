"""Tensor trains of batches of tensors: truncated singular values mode after mode, then sweeps over pairs of cores.

TensorLy's ``tensor_train`` is the first pass alone, one tensor at a time, with a singular value decomposition of whole
unfoldings. Here every basis comes from the Gram matrix of the short side, and sweeps in turn from right to left and
from left to right fit each pair of neighbours to the tensor that the others leave. `tests/solvers/test_train.py` holds
it to TensorLy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autorank.solvers.lowrank import leading_basis


def train(tensor: Tensor, rank: Sequence[int], sweeps: int = 4, tolerance: float = 1e-4) -> list[Tensor]:
    """Approximate a batch of tensors by tensor trains (Oseledets, SIAM J. Sci. Comput. 33, 2011).

    Parameters
    ----------
    tensor : Tensor, shape (batch, n_0, ..., n_{N-1}), float64
        At least two modes.
    rank : sequence of int
        (r_1, ..., r_{N-1}). What a bond has beyond the sizes and bonds on its left is zero.
    sweeps : int
        At most so many passes after the first; none is plain TT-SVD. The error never rises.
    tolerance : float
        Stop when a pass adds less than this share to the energy that the train holds, in every batch member.

    Returns
    -------
    list of Tensor
        Core k has shape (batch, r_k, n_k, r_{k+1}), r_0 = r_N = 1. All but one at an end are orthonormal.
    """
    scale = tensor.abs().flatten(1).amax(dim=1).view(-1, *[1] * (tensor.ndim - 1))
    scale = torch.where(scale > 0, scale, 1.0)
    work, bonds = tensor / scale, list(rank)
    cores = _pass(work, bonds, None)
    energy = cores[-1].flatten(1).square().sum(dim=1)
    turned = False
    # With one bond, or none cut short, the first pass is the optimum.
    for _ in range(sweeps if len(bonds) > 1 else 0):
        work = work.permute(0, *range(work.ndim - 1, 0, -1))
        bonds = bonds[::-1]
        cores = _pass(work, bonds, _turn(cores))
        turned = not turned
        held = cores[-1].flatten(1).square().sum(dim=1)
        if bool((held - energy <= tolerance * held).all()):
            break
        energy = held
    if turned:
        cores = _turn(cores)
    # The scale goes to the core that is not orthonormal.
    free = 0 if turned else -1
    cores[free] = cores[free] * scale.view(-1, 1, 1, 1)
    return cores


def _turn(cores: Sequence[Tensor]) -> list[Tensor]:
    """Return the cores of the tensor with its modes in reverse order."""
    return [core.transpose(1, 3) for core in reversed(cores)]


def _pass(tensor: Tensor, bonds: Sequence[int], rights: Sequence[Tensor] | None) -> list[Tensor]:
    """Return left-orthonormal cores, each from the tensor projected on the cores before it and behind its neighbour.

    Parameters
    ----------
    tensor : Tensor, shape (batch, n_0, ..., n_{N-1})
    bonds : sequence of int
        (r_1, ..., r_{N-1}).
    rights : sequence of Tensor, optional
        Right-orthonormal cores; without them nothing is projected away on the right, as in TT-SVD.
    """
    b, sizes = tensor.shape[0], tensor.shape[1:]
    count = len(sizes)
    # behind[k]: the tensor summed with the right cores k, k+1, ...; (batch, n_0 ··· n_{k-1}, r_k)
    behind = {count: tensor.reshape(b, -1, 1)}
    if rights is not None:
        for k in range(count - 1, 1, -1):
            r, n, _ = rights[k].shape[1:]
            held = behind[k + 1]
            behind[k] = held.reshape(b, -1, n * held.shape[2]) @ rights[k].reshape(b, r, -1).mT
    cores: list[Tensor] = []
    left = 1
    projected = behind[count] if rights is None else behind[2]
    for k in range(count - 1):
        rows = left * sizes[k]
        if rights is not None:
            projected = behind[k + 2]
            for core in cores:
                r, n, j = core.shape[1:]
                projected = core.reshape(b, r * n, j).mT @ projected.reshape(b, r * n, -1)
        basis = _basis(projected.reshape(b, rows, -1), bonds[k])
        cores.append(basis.reshape(b, left, sizes[k], bonds[k]))
        if rights is None or k == count - 2:
            projected = basis.mT @ projected.reshape(b, rows, -1)
        left = bonds[k]
    cores.append(projected.reshape(b, left, sizes[-1], 1))
    return cores


def _basis(matrix: Tensor, rank: int) -> Tensor:
    """Return an orthonormal basis (batch, m, rank) of the leading columns; columns of zeros beyond m."""
    b, m = matrix.shape[:2]
    basis = leading_basis(matrix, min(rank, m))
    return basis if rank <= m else torch.cat([basis, basis.new_zeros(b, m, rank - m)], dim=2)
