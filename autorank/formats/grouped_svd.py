"""Grouped channel SVD: a grouped K-convolution to j channels for each of k input groups, then a pointwise one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from autorank.formats.base import Factors, Options, Roots
from autorank.formats.chain import ChainFormat
from autorank.formats.steps import Step
from autorank.solvers import grouped_svd, lowrank, whitening
from autorank.types import LayerSpec, Scalar

GROUPS = (2, 4, 8)
"""The values of the option ``groups``; one group is channel_svd."""


class GroupedSVD(ChainFormat):
    """W = [M_1 ... M_k] by groups of input channels, every M_p (T × S/k·K) of rank j: parameters j·(T·k + S·K).

    ALDS (Liebenwein et al., NeurIPS 2021, arXiv 2107.11442). The option ``groups`` is k, 2, 4 or 8, and divides the
    input channels of a group of the layer. The factors are ``first`` (groups, k·j, S/(groups·k), K1, ..., Kd), a
    grouped convolution that carries stride, padding and dilation, and ``second`` (groups, T/groups, k·j, 1, ...).

    An input covariance couples the groups, so whitening is no change of basis here: `solvers.grouped_svd` minimises the
    output error group by group, from the truncation of each group by its own part of the covariance on.
    """

    name = "grouped_svd"
    rank_names = ("R",)

    def variants(self, spec: LayerSpec) -> tuple[Options, ...]:
        """Return one option set per number of groups that divides the input channels."""
        return tuple((("groups", k),) for k in GROUPS if spec.weight_shape[1] % k == 0)

    def input_axes(self, spec: LayerSpec, options: Options = ()) -> tuple[int, ...]:
        """Return all spatial axes: the fit is under the full patch covariance."""
        return tuple(range(len(spec.kernel)))

    def max_rank(self, spec: LayerSpec, options: Options = ()) -> tuple[int, ...]:
        """Return the shorter side of a group's matrix."""
        columns = spec.weight_shape[1] // self._groups(spec, options) * math.prod(spec.kernel)
        return (max(1, min(spec.out_channels // spec.groups, columns)),)

    def input_names(self, spec: LayerSpec, options: Options = ()) -> tuple[str, ...]:
        """Return the group and the channel in it."""
        return ("k", "s")

    def sizes(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> dict[str, int]:
        """Return the number of groups, the channels in each, and the rank."""
        k = self._groups(spec, options)
        return {"k": k, "s": spec.weight_shape[1] // k, "r": rank[0]}

    def steps(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> tuple[Step, ...]:
        """Return the two convolutions."""
        axes = tuple(range(len(spec.kernel)))
        return Step("first", ("r",), ("s",), along=("k",), axes=axes), Step("second", ("t",), ("k", "r"))

    def _groups(self, spec: LayerSpec, options: Options) -> int:
        default = next((k for k in GROUPS if spec.weight_shape[1] % k == 0), 1)
        return int(dict(options).get("groups", default))

    def _own_options(self, spec: LayerSpec) -> Mapping[str, tuple[Scalar, ...]]:
        return {"groups": GROUPS}

    def _refuse(self, spec: LayerSpec, options: Options) -> str | None:
        channels, k = spec.weight_shape[1], self._groups(spec, options)
        if k > 1 and channels % k == 0:
            return None
        wanted = f"{k}" if k > 1 else f"{', '.join(map(str, GROUPS[:-1]))} or {GROUPS[-1]}"
        return f"{spec.kind}: {channels} input channels per group cannot be shared out to {wanted} groups"

    def _fit_plain(
        self, weight: Tensor, spec: LayerSpec, rank: tuple[int, ...], options: Options, seed: int
    ) -> Factors:
        work = weight.reshape(*weight.shape[:3], -1)
        found = grouped_svd.independent(work, *self._of(spec, rank, options))
        return self._factors(*found, spec, rank, options)

    def _fit_weighted(
        self, weight: Tensor, roots: Roots, spec: LayerSpec, rank: tuple[int, ...], options: Options, seed: int
    ) -> Factors:
        """Fit under the covariance of all groups together; the output side is a change of basis as for every format."""
        if roots.output is not None:
            weight = whitening.whiten_output(weight, roots.output)
        if roots.input is None:
            factors = self._fit_plain(weight, spec, rank, options, seed)
        else:
            channels, positions = spec.weight_shape[1], math.prod(spec.kernel)
            # With channel statistics alone the kernel positions are white.
            merged = roots.input.shape[1] == channels * positions
            work = weight.reshape(*weight.shape[:2], -1, 1 if merged else positions)
            found = grouped_svd.coupled(work, roots.input, *self._of(spec, rank, options))
            factors = self._factors(*found, spec, rank, options)
        if roots.output is not None:
            factors["second"] = whitening.unwhiten_output(factors["second"], roots.output)
        return factors

    def _normal_form(self, factors: Factors, spec: LayerSpec, rank: tuple[int, ...], options: Options) -> Factors:
        """Give every component the same norm in both factors."""
        named = self._named(factors, spec, rank, options)
        first, second = named["first"], named["second"]
        left, right = lowrank.balance(second.movedim(2, 1), first.flatten(3))
        return self._factors(left, right, spec, rank, options)

    def _of(self, spec: LayerSpec, rank: tuple[int, ...], options: Options) -> tuple[int, int]:
        return self._groups(spec, options), rank[0]

    def _factors(
        self, left: Tensor, right: Tensor, spec: LayerSpec, rank: tuple[int, ...], options: Options
    ) -> Factors:
        """Return the factors of (groups, k, T, j) and (groups, k, j, columns)."""
        return self._pack({"first": right, "second": left.movedim(1, 2)}, spec, rank, options)


from_layer = GroupedSVD().from_layer
