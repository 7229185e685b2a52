"""How much a change of a layer's weight raises the loss, from statistics alone."""

from __future__ import annotations

import torch
from torch import Tensor

from autorank.solvers.whitening import LayerStats


def predicted_loss_increase(weight: Tensor, approx: Tensor, stats: LayerStats) -> float | None:
    """Return ½·tr(G Δ Σ Δᵀ), by how much the mean loss of an example rises when `approx` replaces `weight`.

    The second-order term of the loss with its K-FAC approximation for the Hessian (see `LayerStats`); there is no
    first-order term at the end of training. Groups add up. Good for comparing candidates; for convolutions the size
    tends to be too small by a factor of a few, as positions are correlated after all.

    Parameters
    ----------
    weight, approx : Tensor, shape (T, S/groups, K1, ..., Kd)
    stats : LayerStats
        Σ and G; variances alone stand for diagonal matrices, and `factorised` inputs for Σ ⊗ identity.

    Returns
    -------
    float or None
        In units of the loss, at least 0. None when `stats` has no gradients.
    """
    if stats.gradient is None:
        return None
    groups = stats.covariance.shape[0]
    inputs, outputs = (x.to(device=weight.device, dtype=torch.float64) for x in (stats.covariance, stats.gradient))
    delta = weight.detach().to(torch.float64) - approx.detach().to(device=weight.device, dtype=torch.float64)
    delta = delta.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    if stats.factorised:
        moved = delta.transpose(2, 3)  # (groups, T/groups, K, S/groups)
        image = moved * inputs[:, None, None] if stats.diagonal else moved @ inputs[:, None]
    else:
        moved = delta.flatten(2)
        image = moved * inputs[:, None] if stats.diagonal else moved @ inputs
    product = image.flatten(2) @ moved.flatten(2).mT  # Δ Σ Δᵀ
    diagonal = outputs.ndim == 2
    trace = (outputs * product.diagonal(dim1=1, dim2=2)).sum() if diagonal else (outputs * product.mT).sum()
    return max(0.0, float(trace) / 2)
