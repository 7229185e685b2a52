"""What every decomposition format owes: the rules in `Format`, and the checks they share."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from autorank.errors import FormatError
from autorank.formats.replacing import description, in_place_of
from autorank.layout import canonical_weight
from autorank.solvers import network, whitening
from autorank.solvers.kept import DIGESTS, KEPT, digest
from autorank.solvers.network import Operand
from autorank.solvers.whitening import LayerStats
from autorank.types import LayerCost, LayerSpec, Scalar
from autorank.types.plans import whitens

Options = tuple[tuple[str, Scalar], ...]
"""Sorted (name, value) pairs, as in `Choice.options`."""

Factors = dict[str, Tensor]
"""Factors by name; the group is the leading dimension of each: (groups, out, in, K1, ..., Kd) for a step of a chain."""

WHITENINGS = ("none", "input", "output", "both")
"""Values of the option ``whiten``: whose covariance the error is measured with, that of the layer's inputs, that of the
loss's gradients with respect to its outputs, or both."""


_SAME = ((str, str), (bool, bool), (int, int), (float, float), (int, float))
"""Type of a value that is given, and of the allowed one that it may stand for."""


def _among(value: Scalar, allowed: Iterable[Scalar]) -> bool:
    """Say whether a value is one of those allowed; 1 may stand for 1.0, but True is no 1, and 2.0 no 2."""
    return any(value == item and (type(value), type(item)) in _SAME for item in allowed)


@dataclass(frozen=True)
class Roots:
    """What a fit is weighted with: roots L of covariances L Lᵀ, lower triangular, or the diagonal alone.

    Attributes
    ----------
    axes : tuple of int
        The kernel axes that are merged with S in `input`, ascending.
    input : Tensor, shape (groups, n, n) or (groups, n), or None
        n = S/groups times the sizes of `axes`.
    output : Tensor, shape (groups, T/groups, T/groups) or (groups, T/groups), or None
    """

    axes: tuple[int, ...] = ()
    input: Tensor | None = None
    output: Tensor | None = None


@lru_cache(maxsize=1 << 12)
def _reason(fmt: Format, spec: LayerSpec, options: Options, _typed: str) -> str | None:
    """Return what `Format.supports` says, which a search space asks for every rank; 1 and True are not the same."""
    return fmt.supports(spec, options)


class Format(ABC):
    """One way to write a layer's weight with fewer numbers.

    A format is stateless: every method is a function of its arguments. Ranks are per group. Options that all formats
    know: ``whiten`` (see `WHITENINGS`: minimise the error of the output, or the rise of the loss) and ``shrink`` (0 to
    1, the share of white noise mixed into the covariances).

    Attributes
    ----------
    name : str
        As it stands in plans.
    rank_names : tuple of str
        One name per entry of the rank.
    nested : bool
        Whether the fit of a rank is a part of the fit of the largest rank (`_part`), as it is where singular values
        are cut off. That fit is then kept, and every other rank costs next to nothing.
    """

    name: ClassVar[str]
    rank_names: ClassVar[tuple[str, ...]]
    nested: ClassVar[bool] = False

    # What a format says about a layer

    def supports(self, spec: LayerSpec, options: Options = ()) -> str | None:
        """Return None when the format can write this layer, else the reason why not, in words."""
        if 0 in spec.weight_shape:
            return f"{spec.kind}: the weight of shape {spec.weight_shape} is empty"
        return self._wrong_option(spec, dict(options)) or self._refuse(spec, options) or self._no_gain(spec, options)

    def variants(self, spec: LayerSpec) -> tuple[Options, ...]:
        """Return the option sets that are candidates of their own for this layer, whitening left out."""
        return ((),)

    def option_sets(self, spec: LayerSpec, wanted: Mapping[str, Sequence[Scalar]]) -> tuple[Options, ...]:
        """Return the option sets that a search space allows for this layer, whitening left out.

        Parameters
        ----------
        spec : LayerSpec
        wanted : mapping of str to sequence of Scalar
            Option name → the values asked for, none of which `wrong_value` objects to; options that are not named may
            have every value that `variants` offers, and `free_options` that are named every value asked for.
        """
        own = self._own_options(spec)  # which has 1.0 where the space may say 1
        free = {
            key: [known for known in own[key] if known in wanted[key]]
            for key in self.free_options(spec)
            if key in wanted
        }
        found: dict[Options, None] = {}
        for variant in self.variants(spec) or ((),):
            if all(key not in wanted or key in free or value in wanted[key] for key, value in variant):
                for values in itertools.product(*free.values()):
                    found[tuple(sorted({**dict(variant), **dict(zip(free, values, strict=True))}.items()))] = None
        return tuple(found)

    def free_options(self, spec: LayerSpec) -> tuple[str, ...]:
        """Return the options of which a space may ask for every known value, offered by `variants` or not."""
        return ()

    def wrong_value(self, spec: LayerSpec, key: str, value: Scalar) -> str | None:
        """Return None when a search space may ask for this value of an option, else what it may ask for, in words.

        It may ask for all that the format knows, also where this layer has no use for it and gets no candidate from it.
        """
        known = [found for variant in self.variants(spec) for name, found in variant if name == key]
        known += [found for found in self._own_options(spec).get(key, ()) if found not in known]
        return None if _among(value, known) else f"allowed are {', '.join(map(str, dict.fromkeys(known)))}"

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

    def factors_of(self, layer: nn.Module, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> Factors:
        """Return the factors that a module made by `layer` holds now, which may have been trained since.

        Raises
        ------
        FormatError
            The format cannot read its modules, so that what it wrote cannot be decomposed again.
        """
        raise self._error(spec, "it is written in a format that cannot read its trained factors back")

    @abstractmethod
    def network(
        self, factors: Factors, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()
    ) -> tuple[list[Operand], tuple[str, ...]]:
        """Return the factors with named indices, and the order of indices in which their contraction is the weight."""

    def reconstruct(self, factors: Factors, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> Tensor:
        """Return the dense weight (T, S/groups, K1, ..., Kd) that the factors stand for; differentiable."""
        return network.contract(*self.network(factors, spec, rank, options)).reshape(spec.weight_shape)

    def sensitivity(self, factors: Factors, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> float:
        """Return the expected squared error of the weight under noise of variance one on every entry of the factors.

        A fit whose sensitivity is out of proportion to its weight has components that cancel; training and rounding
        then disturb it (Phan et al., ECCV 2020).
        """
        doubled = {name: factor.detach().to("cpu", torch.float64) for name, factor in factors.items()}
        return network.sensitivity(*self.network(doubled, spec, rank, options))

    def from_layer(
        self,
        layer: nn.Module,
        rank: int | tuple[int, ...],
        options: Options | Mapping[str, Scalar] = (),
        *,
        fresh: bool = False,
        stats: LayerStats | None = None,
        seed: int = 0,
    ) -> nn.Module:
        """Return what takes the place of a convolution or linear layer, to be used or trained on its own.

        Parameters
        ----------
        layer : nn.Module
            A convolution, transposed convolution or linear layer; not changed.
        rank : int or tuple of int
            One number serves a format with one rank, and all ranks of the others.
        options : mapping or pairs
            Options of the format.
        fresh : bool
            Do not fit the layer's weight; initialise for training from scratch, with the outputs' variance of the dense
            layer's own initialisation. Draws from PyTorch's random state; `seed` is not looked at.
        stats : LayerStats, optional
            For options that whiten.
        seed : int
            Of the fit.

        Returns
        -------
        nn.Module
            On the layer's device, in its number type and mode.

        Raises
        ------
        FormatError
            The layer is of another kind, or `fit` refuses it.
        """
        spec = description(layer)
        try:
            chosen = tuple(sorted(dict(options).items()))
        except (TypeError, ValueError):
            raise self._error(
                spec, f"options must be a mapping or pairs of names and values, not {options!r}"
            ) from None
        ranks = tuple(rank) if isinstance(rank, list | tuple) else (rank,) * len(self.rank_names)
        self.check(spec, ranks, chosen)
        if fresh:
            return in_place_of(layer, self.layer(spec, ranks, chosen), bias=False)
        weight: Tensor = layer.weight.detach()  # type: ignore[operator]
        with torch.no_grad():
            factors = self.fit(canonical_weight(weight, spec), spec, ranks, chosen, stats, seed)
            return in_place_of(layer, self.layer(spec, ranks, chosen, factors))

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
            The layer's statistics; needed for what the option ``whiten`` names, not looked at otherwise.
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
            factors = self._part(largest, spec, rank, options)
        else:
            factors = self._fit_whitened(weight, spec, rank, options, stats, seed)
        factors = self._normal_form(factors, spec, rank, options)
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
        roots = self._roots(spec, options, stats, work.device)
        if roots.input is None and roots.output is None:
            return self._fit_plain(work, spec, rank, options, seed)
        return self._fit_weighted(work, roots, spec, rank, options, seed)

    @abstractmethod
    def _fit_weighted(
        self, weight: Tensor, roots: Roots, spec: LayerSpec, rank: tuple[int, ...], options: Options, seed: int
    ) -> Factors:
        """Fit a float64 weight like `_fit_plain`, minimising ‖L_outᵀ (W − Ŵ) L_in‖; a root that is None is one."""

    def _key(
        self, weight: Tensor, spec: LayerSpec, options: Options, stats: LayerStats | None, seed: int
    ) -> tuple[Hashable, ...]:
        """Return everything that the fit of the largest rank depends on."""
        used: list[Hashable] = []
        if stats is not None and whitens(options, "input"):
            used += [DIGESTS(stats.covariance), stats.factorised]
        if stats is not None and stats.gradient is not None and whitens(options, "output"):
            used += [DIGESTS(stats.gradient)]
        geometry = replace(spec, name="", calls=(), bias=False)
        return "fit", type(self), digest(weight), str(weight.device), geometry, tuple(options), tuple(used), seed

    @abstractmethod
    def _part(self, factors: Factors, spec: LayerSpec, rank: tuple[int, ...], options: Options) -> Factors:
        """Return the factors of a rank, given those of the largest one, without changing them; for `nested` formats."""

    @abstractmethod
    def _fit_plain(
        self, weight: Tensor, spec: LayerSpec, rank: tuple[int, ...], options: Options, seed: int
    ) -> Factors:
        """Fit a float64 weight (groups, T/groups, S/groups, K1, ..., Kd), minimising the Frobenius error."""

    def _normal_form(self, factors: Factors, spec: LayerSpec, rank: tuple[int, ...], options: Options) -> Factors:
        """Remove what the factors leave undetermined (scales, bases) after unwhitening."""
        return factors

    def _roots(self, spec: LayerSpec, options: Options, stats: LayerStats | None, device: torch.device) -> Roots:
        """Return the roots of the covariances that the options ask for."""
        axes: tuple[int, ...] = ()
        into = out = None
        if whitens(options, "input"):
            if stats is None:
                why = f"whiten={dict(options)['whiten']} needs input statistics, and there are none for it"
                raise self._error(spec, why)
            channels = spec.weight_shape[1]
            n = channels if stats.factorised else channels * math.prod(spec.kernel)
            self._checked(spec, "input statistics", stats.covariance, n)
            # Factorised statistics are white over the kernel, so its axes need no whitening.
            axes = () if stats.factorised else self.input_axes(spec, options)
            shrink = self._shrink(options)
            key = "root", DIGESTS(stats.covariance), stats.factorised, spec.kernel, axes, shrink, str(device)
            known = stats
            into = self._kept(key, lambda: known.root(spec.kernel, axes, shrink, device))
        if whitens(options, "output"):
            if stats is None or stats.gradient is None:
                why = f"whiten={dict(options)['whiten']} needs gradient statistics, and there are none for it"
                raise self._error(spec, why)
            gradient = stats.gradient
            self._checked(spec, "gradient statistics", gradient, spec.out_channels // spec.groups)
            shrink = self._shrink(options)
            form = whitening.deviations if gradient.ndim == 2 else whitening.square_root
            output_key = "output root", DIGESTS(gradient), shrink, str(device)
            out = self._kept(output_key, lambda: form(gradient.to(device), shrink))
        return Roots(axes, into, out)

    def _kept(self, key: tuple[Hashable, ...], make: Callable[[], Tensor]) -> Tensor:
        if self.nested:  # its fits are kept, which take less room and do without the root
            return make()
        return KEPT.get(key, lambda: {"root": make()})["root"]

    @staticmethod
    def _shrink(options: Options) -> float:
        return float(dict(options).get("shrink", whitening.DEFAULT_SHRINK))

    def _checked(self, spec: LayerSpec, what: str, covariance: Tensor, n: int) -> None:
        found = tuple(covariance.shape)
        if found not in ((spec.groups, n, n), (spec.groups, n)):
            raise self._error(spec, f"its {what} have shape {found}, expected {(spec.groups, n, n)}")
        if not bool(torch.isfinite(covariance).all()):
            raise self._error(spec, f"its {what} hold NaN or infinite values")

    # Checks

    def check(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> None:
        """Raise FormatError, naming the layer and what is allowed, unless `fit` and `layer` can serve this choice."""
        try:
            reason = _reason(self, spec, options, repr(options))
        except TypeError:  # a plan may hold a list where a value should be
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
            if not _among(value, allowed):
                return f"{spec.kind}: option {key} must be one of {', '.join(map(str, allowed))}, not {value!r}"
        return None

    def _refuse(self, spec: LayerSpec, options: Options) -> str | None:
        """Return the format's own reason against a layer, if it has one."""
        return None

    @abstractmethod
    def _no_gain(self, spec: LayerSpec, options: Options) -> str | None:
        """Return the reason when no rank makes the layer smaller or cheaper than it is."""
