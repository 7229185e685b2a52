"""CP: a pointwise convolution to R channels, depthwise convolutions over the spatial axes, a pointwise one to T."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from autorank.formats.base import Factors, Options
from autorank.formats.chain import ChainFormat
from autorank.formats.steps import Step, pointwise, wide_axes
from autorank.solvers import cp as solver
from autorank.solvers import cp_modes
from autorank.types import LayerSpec, Scalar

SPATIAL = ("whole", "split")


class CP(ChainFormat):
    """W[t, s, k] ≈ Σ_r a[t, r] b[s, r] c[k, r] (Lebedev et al., ICLR 2015): parameters R·(S + K + T) per group.

    The option ``spatial`` is ``whole`` (one depthwise convolution with the dense layer's kernel; the weight has three
    modes T, S and K) or ``split`` (one depthwise convolution per axis, c[k, r] = Π_i c_i[k_i, r]: R·(S + ΣK_i + T)
    parameters). The fit is the stable one of `autorank.solvers.cp` (Phan et al., ECCV 2020, arXiv 2008.05441): its
    components do not grow and cancel.

    The factors are ``input`` (groups, R, S/groups, 1, ...), ``spatial`` (groups, R, 1, K1, ..., Kd) or ``spatial1``,
    ``spatial2``, ... with a kernel on one axis each, and ``output`` (groups, T/groups, R, 1, ...). The entries of a
    component are equally large in all factors.
    """

    name = "cp"
    rank_names = ("R",)

    def variants(self, spec: LayerSpec) -> tuple[Options, ...]:
        """Return the two forms, or the whole one alone where fewer than two axes have a kernel."""
        forms = SPATIAL if len(wide_axes(spec)) > 1 else SPATIAL[:1]
        return tuple((("spatial", form),) for form in forms)

    def max_rank(self, spec: LayerSpec, options: Options = ()) -> tuple[int, ...]:
        """Return the rank that any weight has at most, or the largest with fewer parameters than the dense layer."""
        sizes = self._modes(spec, options)
        total = math.prod(sizes)
        smaller = (total - 1) // sum(sizes)
        return (max(1, min(smaller, *(total // n for n in sizes))),)

    def sizes(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> dict[str, int]:
        """Return R."""
        return {"r": rank[0]}

    def steps(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> tuple[Step, ...]:
        """Return the pointwise convolutions with the depthwise ones between them."""
        spatial = depthwise(self._axes(spec, options))
        return Step("input", ("r",), ("s",)), *spatial, Step("output", ("t",), ("r",))

    def _own_options(self, spec: LayerSpec) -> Mapping[str, tuple[Scalar, ...]]:
        return {"spatial": SPATIAL} if spec.kernel else {}

    def _refuse(self, spec: LayerSpec, options: Options) -> str | None:
        reason = two_modes(spec, self.name)
        if reason is None and self._is_split(options) and len(wide_axes(spec)) < 2:
            return (
                f"{spec.kind} with kernel {spec.kernel}: one spatial axis alone, spatial=split would be spatial=whole"
            )
        return reason

    def _fit_plain(
        self, weight: Tensor, spec: LayerSpec, rank: tuple[int, ...], options: Options, seed: int
    ) -> Factors:
        tensor = weight.reshape(spec.groups, *self._modes(spec, options))
        output, into, *spatial = solver.cp(tensor, rank[0], seed).factors
        names = [step.factor for step in self.steps(spec, rank, options)][1:-1]
        middle = {name: factor.mT for name, factor in zip(names, spatial, strict=True)}
        return self._pack({"input": into.mT, **middle, "output": output}, spec, rank, options)

    def _normal_form(self, factors: Factors, spec: LayerSpec, rank: tuple[int, ...], options: Options) -> Factors:
        return balanced(factors, {name: name == "output" for name in factors})

    def _axes(self, spec: LayerSpec, options: Options) -> tuple[tuple[int, ...], ...]:
        """Return the axes of each depthwise convolution."""
        every = tuple(range(len(spec.kernel)))
        if not self._is_split(options):
            return (every,)
        others = wide_axes(spec)[1:]
        return tuple(sorted({*every} - {*others})), *((axis,) for axis in others)

    def _modes(self, spec: LayerSpec, options: Options) -> tuple[int, ...]:
        """Return the sizes of the modes of one group's tensor: T, S, and what each depthwise convolution covers."""
        covered = (math.prod(spec.kernel[a] for a in axes) for axes in self._axes(spec, options))
        return spec.out_channels // spec.groups, spec.weight_shape[1], *covered

    @staticmethod
    def _is_split(options: Options) -> bool:
        return dict(options).get("spatial", "whole") == "split"


def depthwise(axes: tuple[tuple[int, ...], ...]) -> tuple[Step, ...]:
    """Return depthwise convolutions over the R channels, one for each tuple of spatial axes."""
    names = ("spatial",) if len(axes) == 1 else tuple(f"spatial{i + 1}" for i in range(len(axes)))
    return tuple(Step(name, (), (), along=("r",), axes=of) for name, of in zip(names, axes, strict=True))


def two_modes(spec: LayerSpec, name: str) -> str | None:
    """Return the reason against a layer without a kernel: for two modes CP is an SVD."""
    what = pointwise(spec)
    return what and f"{what}: the weight has only two modes, {name} would be channel_svd"


def balanced(factors: Factors, by_column: Mapping[str, bool]) -> Factors:
    """Give a component entries of the same size in all the named factors; their product stays.

    Parameters
    ----------
    factors : dict of Tensor
        As they are stored.
    by_column : mapping of str to bool
        The factors that share the index r: True where r is its dimension 2, False where it is dimension 1.
    """
    columns = [
        (factors[name].movedim(2, -1) if last else factors[name].movedim(1, -1)).flatten(1, -2)
        for name, last in by_column.items()
    ]
    found = dict(factors)
    for (name, last), column in zip(by_column.items(), cp_modes.balanced(columns), strict=True):
        shape = factors[name].shape
        if last:
            moved = column.reshape(shape[0], shape[1], *shape[3:], shape[2]).movedim(-1, 2)
        else:
            moved = column.mT.reshape(shape)
        found[name] = moved
    return found


from_layer = CP().from_layer
