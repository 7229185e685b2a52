"""What channel SVD and spatial SVD share: the weight as a matrix whose columns are S and some kernel axes."""

from __future__ import annotations

import math
from abc import abstractmethod

from torch import Tensor

from autorank.formats.base import Factors, Options
from autorank.formats.chain import ChainFormat
from autorank.formats.steps import Step
from autorank.solvers import lowrank
from autorank.types import LayerSpec


class TwoStepSVD(ChainFormat):
    """W as a (T · other axes) × (S · first axes) matrix of rank R: two convolutions, over the first and the other axes.

    Parameters R·(S·K_first + T·K_other) per group. The factors are ``first`` (groups, R, S/groups, kernel on the first
    axes) and ``second`` (groups, T/groups, R, kernel on the others); component r has the same norm in both.
    """

    rank_names = ("R",)
    nested = True

    @abstractmethod
    def first_axes(self, spec: LayerSpec, options: Options = ()) -> tuple[int, ...]:
        """Return the spatial axes that the first convolution covers, ascending."""

    def input_axes(self, spec: LayerSpec, options: Options = ()) -> tuple[int, ...]:
        """Return the axes of the first convolution: with S they are the columns of the matrix."""
        return self.first_axes(spec, options)

    def max_rank(self, spec: LayerSpec, options: Options = ()) -> tuple[int, ...]:
        """Return the shorter side of the matrix."""
        first, other = self._split(spec, options)
        rows = spec.out_channels // spec.groups * math.prod(spec.kernel[a] for a in other)
        columns = spec.weight_shape[1] * math.prod(spec.kernel[a] for a in first)
        return (min(rows, columns),)

    def sizes(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> dict[str, int]:
        """Return the rank."""
        return {"r": rank[0]}

    def steps(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> tuple[Step, ...]:
        """Return the two convolutions."""
        first, other = self._split(spec, options)
        return Step("first", ("r",), ("s",), axes=first), Step("second", ("t",), ("r",), axes=other)

    def _fit_plain(
        self, weight: Tensor, spec: LayerSpec, rank: tuple[int, ...], options: Options, seed: int
    ) -> Factors:
        first, other = self._split(spec, options)
        moved = weight.permute(self._order(first, other))
        rows = math.prod(moved.shape[1 : 2 + len(other)])
        left, right = lowrank.truncated_product(moved.reshape(spec.groups, rows, -1), rank[0])
        return self._from_matrices(left, right, self._shapes(spec, rank, options))

    def _normal_form(self, factors: Factors, spec: LayerSpec, rank: tuple[int, ...], options: Options) -> Factors:
        shapes = {name: tuple(factor.shape) for name, factor in factors.items()}
        return self._from_matrices(*lowrank.balance(*self._matrices(factors)), shapes)

    def _split(self, spec: LayerSpec, options: Options) -> tuple[tuple[int, ...], tuple[int, ...]]:
        first = self.first_axes(spec, options)
        return first, tuple(a for a in range(len(spec.kernel)) if a not in first)

    @staticmethod
    def _order(first: tuple[int, ...], other: tuple[int, ...]) -> list[int]:
        """Return the order of the axes of (groups, T, S, K1, ..., Kd) in the matrix."""
        return [0, 1, *(3 + a for a in other), 2, *(3 + a for a in first)]

    @staticmethod
    def _matrices(factors: Factors) -> tuple[Tensor, Tensor]:
        """Return (groups, T · other axes, R) and (groups, R, S · first axes)."""
        left, right = factors["second"], factors["first"]
        groups, _, rank = left.shape[:3]
        return left.movedim(2, -1).reshape(groups, -1, rank), right.reshape(groups, rank, -1)

    @staticmethod
    def _from_matrices(left: Tensor, right: Tensor, shapes: dict[str, tuple[int, ...]]) -> Factors:
        groups, out, rank, *kernel = shapes["second"]
        second = left.reshape(groups, out, *kernel, rank).movedim(-1, 2)
        return {"first": right.reshape(shapes["first"]), "second": second}
