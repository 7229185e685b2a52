"""What is known about candidates and layers before any trial."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Errors:
    """What a candidate does to its layer, before any training.

    Attributes
    ----------
    weight : float
        ‖W − Ŵ‖ / ‖W‖ (Frobenius).
    output : float or None
        Relative root-mean-square error of the layer's output under the input covariance Σ:
        √(tr(ΔΣΔᵀ) / tr(WΣWᵀ)) with Δ = W − Ŵ. None without statistics.
    loss : float or None
        Predicted rise of the loss, ½·tr(GΔΣΔᵀ), in the loss's own unit; None without gradients.
    sensitivity : float or None
        Of the weight to noise on the factors, as in `LayerResult`.
    """

    weight: float
    output: float | None = None
    loss: float | None = None
    sensitivity: float | None = None


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The spectra of a kernel's two unfoldings.

    Attributes
    ----------
    out_tail : tuple of float
        Entry r is the share of ‖W‖² beyond the r largest singular values of the T × (S·K) unfolding, r = 0 to T per
        group; the first entry is 1.
    in_tail : tuple of float
        The same for the S × (T·K) unfolding.
    vbmf : (int, int)
        Their ranks by empirical variational Bayesian matrix factorisation; 0 where it finds nothing but noise.
    """

    out_tail: tuple[float, ...]
    in_tail: tuple[float, ...]
    vbmf: tuple[int, int]
