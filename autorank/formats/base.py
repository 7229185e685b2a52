"""What every decomposition format owes: the rules in `Format`, and the checks they share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from autorank.errors import FormatError
from autorank.solvers import whitening
from autorank.solvers.kept import DIGESTS, KEPT, digest
from autorank.solvers.whitening import LayerStats
from autorank.types import LayerCost, LayerSpec, Scalar

Options = tuple[tuple[str, Scalar], ...]
"""Sorted (name, value) pairs, as in `Choice.options`."""

Factors = dict[str, Tensor]
"""Factors by name; the group is the leading dimension of each: (groups, out, in, K1, ..., Kd) for a step of a chain."""

WHITENINGS = ("none", "input")


def _whitens(options: Options) -> bool:
    return dict(options).get("whiten", "none") == "input"


class Format(ABC):
    """One way to write a layer's weight with fewer numbers.

    A format is stateless: every method is a function of its arguments. Ranks are per group. Options that all formats
    know: ``whiten`` (``"none"`` or ``"input"``: minimise the error of the output under the layer's input covariance)
    and ``shrink`` (0 to 1, the share of white noise mixed into that covariance).

    Attributes
    ----------
    name : str
        As it stands in plans.
    rank_names : tuple of str
        One name per entry of the rank.
    input_factor : str
        The factor that carries S (dimension 2, its merged kernel axes last).
    nested : bool
        Whether the fit of a rank is a part of the fit of the largest rank (`_part`), as it is where singular values
        are cut off. That fit is then kept, and every other rank costs next to nothing.
    """

    name: ClassVar[str]
    rank_names: ClassVar[tuple[str, ...]]
    input_factor: ClassVar[str]
    nested: ClassVar[bool] = False

    # What a format says about a layer

    def supports(self, spec: LayerSpec, options: Options = ()) -> str | None:
        """Return None when the format can write this layer, else the reason why not, in words."""
        if spec.kind.startswith("conv_transpose"):
            return f"{spec.kind}: transposed convolutions are not supported yet by {self.name}"
        if 0 in spec.weight_shape:
            return f"{spec.kind}: the weight of shape {spec.weight_shape} is empty"
        return self._wrong_option(spec, dict(options)) or self._refuse(spec, options) or self._no_gain(spec, options)

    def variants(self, spec: LayerSpec) -> tuple[Options, ...]:
        """Return the option sets that are candidates of their own for this layer, whitening left out."""
        return ((),)

    def whitenings(self, spec: LayerSpec, options: Options = ()) -> tuple[str, ...]:
        """Return the values of the option ``whiten`` that the format takes for this layer."""
        return WHITENINGS

    def input_axes(self, spec: LayerSpec, options: Options = ()) -> tuple[int, ...]:
        """Return the kernel axes that the whitened input mode merges with S, ascending."""
        return ()

    @abstractmethod
    def max_rank(self, spec: LayerSpec, options: Options = ()) -> tuple[int, ...]:
        """Return the largest useful rank per mode, per group: every weight of this shape is written exactly."""

    @abstractmethod
    def factor_shapes(
        self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape of every factor, in the order in which they are applied."""

    @abstractmethod
    def cost(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> LayerCost:
        """Return the exact MACs over all calls of the layer for one example, and its parameters, bias included."""

    @abstractmethod
    def layer(
        self,
        spec: LayerSpec,
        rank: tuple[int, ...],
        options: Options = (),
        factors: Factors | None = None,
        bias: Tensor | None = None,
    ) -> nn.Module:
        """Return the module that runs the factors without ever forming the dense weight.

        Parameters
        ----------
        spec, rank, options
            What is built.
        factors : dict of Tensor, optional
            Copied into the module; without them it gets a fresh initialisation whose outputs have the variance of those
            of a freshly initialised dense layer.
        bias : Tensor, shape (T,), optional
            Copied; when `factors` come without it, the bias of a layer that has one is zero.

        Returns
        -------
        nn.Module
            In training mode, on the device and of the type of the factors.

        Raises
        ------
        FormatError
            The layer or the rank is not supported, or a shape is wrong.
        """

    @abstractmethod
    def reconstruct(self, factors: Factors, spec: LayerSpec, options: Options = ()) -> Tensor:
        """Return the dense weight (T, S/groups, K1, ..., Kd) that the factors stand for; differentiable."""

    # Fitting

    def fit(
        self,
        weight: Tensor,
        spec: LayerSpec,
        rank: tuple[int, ...],
        options: Options = (),
        stats: LayerStats | None = None,
        seed: int = 0,
    ) -> Factors:
        """Return the factors that approximate a weight: whiten, fit, unwhiten.

        Parameters
        ----------
        weight : Tensor, shape (T, S/groups, K1, ..., Kd)
            Not changed.
        spec, rank, options
            What is fitted.
        stats : LayerStats, optional
            The layer's input statistics; needed for ``whiten=input``, not looked at otherwise.
        seed : int
            Start of whatever is random in the fit. The same arguments give the same factors, bit for bit.

        Returns
        -------
        dict of Tensor
            float32, on the device of `weight`. Computed in float64.

        Raises
        ------
        FormatError
            The layer, the rank or an option is not supported; the weight or the factors are not finite; statistics are
            missing or belong to another layer.
        """
        self.check(spec, rank, options)
        if tuple(weight.shape) != spec.weight_shape:
            raise self._error(spec, f"its weight has shape {tuple(weight.shape)}, expected {spec.weight_shape}")
        if not bool(torch.isfinite(weight).all()):
            raise self._error(spec, "its weight holds NaN or infinite values")
        if self.nested:
            top = self.max_rank(spec, options)
            largest = KEPT.get(
                self._key(weight, spec, options, stats, seed),
                lambda: self._fit_whitened(weight, spec, top, options, stats, seed),
            )
            factors = self._part(largest, rank)
        else:
            factors = self._fit_whitened(weight, spec, rank, options, stats, seed)
        factors = self._normal_form(factors, spec, options)
        # Always a copy: what is kept is nobody's to change.
        result = {k: v.to(torch.float32, copy=True).to(weight.device).contiguous() for k, v in factors.items()}
        if not all(bool(torch.isfinite(v).all()) for v in result.values()):
            raise self._error(spec, "its factors do not fit into float32 (the weight is too large)")
        return result

    def _fit_whitened(
        self,
        weight: Tensor,
        spec: LayerSpec,
        rank: tuple[int, ...],
        options: Options,
        stats: LayerStats | None,
        seed: int,
    ) -> Factors:
        """Whiten, fit and unwhiten in float64."""
        device = weight.device
        # Apple's GPUs have no float64.
        work = weight.detach().to(device="cpu" if device.type == "mps" else device).to(torch.float64)
        work = work.reshape(spec.groups, spec.out_channels // spec.groups, *spec.weight_shape[1:])
        if not _whitens(options):
            return self._fit_plain(work, spec, rank, options, seed)
        axes, root = self._root(spec, options, stats, work.device)
        factors = self._fit_plain(whitening.whiten(work, root, axes), spec, rank, options, seed)
        carrier = self._input_carrier(factors)
        factors[carrier] = whitening.unwhiten(factors[carrier], root, axes)
        return factors

    def _key(
        self, weight: Tensor, spec: LayerSpec, options: Options, stats: LayerStats | None, seed: int
    ) -> tuple[Hashable, ...]:
        """Return everything that the fit of the largest rank depends on."""
        used = (DIGESTS(stats.covariance), stats.factorised) if stats is not None and _whitens(options) else None
        geometry = replace(spec, name="", calls=(), bias=False)
        return "fit", type(self), digest(weight), str(weight.device), geometry, tuple(options), used, seed

    def _part(self, factors: Factors, rank: tuple[int, ...]) -> Factors:
        """Return the factors of a rank, given those of the largest one; for `nested` formats, without changing them."""
        raise NotImplementedError

    @abstractmethod
    def _fit_plain(
        self, weight: Tensor, spec: LayerSpec, rank: tuple[int, ...], options: Options, seed: int
    ) -> Factors:
        """Fit a float64 weight (groups, T/groups, S/groups, K1, ..., Kd), minimising the Frobenius error."""

    def _normal_form(self, factors: Factors, spec: LayerSpec, options: Options) -> Factors:
        """Remove what the factors leave undetermined (scales, bases) after unwhitening."""
        return factors

    def _input_carrier(self, factors: Factors) -> str:
        """Return the name of the factor whose dimension 2 is S."""
        return self.input_factor

    def _root(
        self, spec: LayerSpec, options: Options, stats: LayerStats | None, device: torch.device
    ) -> tuple[tuple[int, ...], Tensor]:
        """Return the kernel axes of the whitened mode and the root of its covariance."""
        if stats is None:
            raise self._error(spec, "whiten=input needs input statistics, and there are none for it")
        channels = spec.weight_shape[1]
        n = channels if stats.factorised else channels * math.prod(spec.kernel)
        found = tuple(stats.covariance.shape)
        if found not in ((spec.groups, n, n), (spec.groups, n)):
            raise self._error(spec, f"its input statistics have shape {found}, expected {(spec.groups, n, n)}")
        if not bool(torch.isfinite(stats.covariance).all()):
            raise self._error(spec, "its input statistics hold NaN or infinite values")
        # Factorised statistics are white over the kernel, so its axes need no whitening.
        axes = () if stats.factorised else self.input_axes(spec, options)
        shrink = float(dict(options).get("shrink", whitening.DEFAULT_SHRINK))
        if self.nested:  # its fits are kept, which take less room and do without the root
            return axes, stats.root(spec.kernel, axes, shrink, device)
        key = "root", DIGESTS(stats.covariance), stats.factorised, spec.kernel, axes, shrink, str(device)
        return axes, KEPT.get(key, lambda: {"root": stats.root(spec.kernel, axes, shrink, device)})["root"]

    # Checks

    def check(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> None:
        """Raise FormatError, naming the layer and what is allowed, unless `fit` and `layer` can serve this choice."""
        reason = self.supports(spec, options)
        if reason is not None:
            raise self._error(spec, reason)
        highest = self.max_rank(spec, options)
        fits = len(rank) == len(highest) and all(
            isinstance(r, int) and not isinstance(r, bool) and 1 <= r <= top
            for r, top in zip(rank, highest, strict=True)
        )
        if not fits:
            pairs = zip(self.rank_names, highest, strict=True)
            allowed = ", ".join(f"{name} from 1 to {top}" for name, top in pairs)
            raise self._error(spec, f"rank {rank} is out of range, allowed: {allowed}")

    def _error(self, spec: LayerSpec, what: str) -> FormatError:
        return FormatError(f"layer {spec.name!r}, format {self.name}: {what}")

    def _own_options(self, spec: LayerSpec) -> Mapping[str, tuple[Scalar, ...]]:
        """Return the format's own options and the values that each may have for this layer."""
        return {}

    def _wrong_option(self, spec: LayerSpec, options: Mapping[str, Scalar]) -> str | None:
        own = self._own_options(spec)
        for key, value in options.items():
            if key == "shrink":
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                    return f"option shrink must be a number from 0 to 1, not {value!r}"
                continue
            allowed = {"whiten": WHITENINGS, **own}.get(key)
            if allowed is None:
                return f"{spec.kind}: unknown option {key!r}, known: {', '.join(sorted([*own, 'shrink', 'whiten']))}"
            if value not in allowed:
                return f"{spec.kind}: option {key} must be one of {', '.join(map(str, allowed))}, not {value!r}"
        return None

    def _refuse(self, spec: LayerSpec, options: Options) -> str | None:
        """Return the format's own reason against a layer, if it has one."""
        return None

    @abstractmethod
    def _no_gain(self, spec: LayerSpec, options: Options) -> str | None:
        """Return the reason when no rank makes the layer smaller or cheaper than it is."""
