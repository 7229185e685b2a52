"""How the spatial axes of a kernel are shared out over the cores of a tensor train or ring."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from autorank.types import LayerSpec

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class SpatialCores:
    """The spatial axes of each core, in run order, and the bonds from the first core's left to the last one's right."""

    axes: Groups
    bonds: tuple[int, ...]


def spatial_cores(spec: LayerSpec, left: int, right: int, inner: float) -> SpatialCores:
    """Choose how many cores the spatial axes get between a bond on the left and one on the right.

    The bonds between spatial cores are ``inner`` times the geometric mean of the outer ones, but large enough to use
    these up and no larger than needed. Neighbouring axes share one core where that takes fewer MACs, counted over a
    large image (at the same MACs: fewer parameters); it never fits worse. Nothing depends on the size of the input.

    Parameters
    ----------
    spec : LayerSpec
    left, right : int
    inner : float
    """
    return min(_choices(spec, left, right, inner), key=lambda cores: (_work(spec, cores), _entries(spec, cores)))


def _choices(spec: LayerSpec, left: int, right: int, inner: float) -> Iterator[SpatialCores]:
    d = len(spec.kernel)
    # An axis of size one has a stride, so it must be somewhere: with its neighbour.
    cuts = [a for a in range(1, d) if spec.kernel[a] > 1 and any(k > 1 for k in spec.kernel[:a])]
    for chosen in itertools.product((False, True), repeat=len(cuts)):
        at = [0, *(cut for cut, taken in zip(cuts, chosen, strict=True) if taken), d]
        axes = tuple(tuple(range(a, b)) for a, b in itertools.pairwise(at))
        yield SpatialCores(axes, (left, *(_bond(spec, left, right, inner, cut) for cut in at[1:-1]), right))


def _bond(spec: LayerSpec, left: int, right: int, inner: float, cut: int) -> int:
    """Return the bond between the axes before `cut` and those from it on."""
    before, after = math.prod(spec.kernel[:cut]), math.prod(spec.kernel[cut:])
    wanted = max(round(inner * math.sqrt(left * right)), -(-left // before), -(-right // after))
    return min(wanted, left * before, right * after)


def _entries(spec: LayerSpec, cores: SpatialCores) -> int:
    """Return the number of parameters."""
    sizes = (math.prod(spec.kernel[a] for a in axes) for axes in cores.axes)
    return sum(left * size * right for (left, right), size in zip(itertools.pairwise(cores.bonds), sizes, strict=True))


def _work(spec: LayerSpec, cores: SpatialCores) -> int:
    """Return the MACs per position of the output (of the input, for a transposed convolution)."""
    total = 0
    for n, axes in enumerate(cores.axes):
        others = cores.axes[:n] if spec.transposed else cores.axes[n + 1 :]
        positions = math.prod(spec.stride[a] for group in others for a in group)
        total += cores.bonds[n] * math.prod(spec.kernel[a] for a in axes) * cores.bonds[n + 1] * positions
    return total
