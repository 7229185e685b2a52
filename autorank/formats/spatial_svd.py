"""Spatial SVD: a convolution over some of the spatial axes to R channels, then one over the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from autorank.formats.base import Options
from autorank.formats.svd import TwoStepSVD
from autorank.types import LayerSpec, Scalar

_AXES = {"conv2d": "hw", "conv3d": "dhw", "conv_transpose2d": "hw", "conv_transpose3d": "dhw"}


class SpatialSVD(TwoStepSVD):
    """W as a (T·K_other) × (S·K_first) matrix of rank R (per group): parameters R·(S·K_first + T·K_other).

    The option ``first`` names the axes of the first convolution: ``h`` ((K1 × 1) first, then (1 × K2)) or ``w`` in two
    dimensions; ``d``, ``h``, ``w`` and their pairs in three. Each convolution has the stride, padding and dilation of
    its own axes. Which order fits better differs from layer to layer, so each is a candidate of its own.
    """

    name = "spatial_svd"

    def variants(self, spec: LayerSpec) -> tuple[Options, ...]:
        """Return one option set per split of the axes whose kernel is larger than one."""
        return tuple((("first", first),) for first in self._splits(spec))

    def first_axes(self, spec: LayerSpec, options: Options = ()) -> tuple[int, ...]:
        """Return the axes that ``first`` names, or those of the first variant."""
        letters = _AXES[spec.kind]
        first = dict(options).get("first")
        if first is None:
            first = next(iter(self._splits(spec)), letters[0])
        return tuple(letters.index(letter) for letter in str(first))

    def _own_options(self, spec: LayerSpec) -> Mapping[str, tuple[Scalar, ...]]:
        letters = _AXES.get(spec.kind, "")
        return {"first": _subsets(letters)} if letters else {}

    def _refuse(self, spec: LayerSpec, options: Options) -> str | None:
        if spec.kind not in _AXES:
            return f"{spec.kind}: spatial_svd splits the kernel between spatial axes and needs at least two of them"
        first, other = self._split(spec, options)
        sides = [math.prod(spec.kernel[a] for a in axes) for axes in (first, other)]
        if 1 not in sides:
            return None
        named = ["".join(_AXES[spec.kind][a] for a in axes) for axes in (first, other)]
        flat = named[sides.index(1)]
        return f"{spec.kind} with kernel {spec.kernel}: nothing to split, the kernel has size 1 on {flat}"

    @staticmethod
    def _splits(spec: LayerSpec) -> tuple[str, ...]:
        """Return the subsets of the axes with a kernel larger than one that leave one of those for the other side."""
        letters = _AXES.get(spec.kind)
        if letters is None:
            return ()
        return _subsets("".join(letter for letter, size in zip(letters, spec.kernel, strict=True) if size > 1))


def _subsets(letters: str) -> tuple[str, ...]:
    """Return the proper subsets of `letters` that are not empty, small ones first."""
    sizes = range(1, len(letters))
    return tuple("".join(subset) for n in sizes for subset in itertools.combinations(letters, n))


from_layer = SpatialSVD().from_layer
