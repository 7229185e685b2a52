"""SeKron: sums of Kronecker products whose right-hand factors are sums of Kronecker products again."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from autorank.formats.base import Factors, Options
from autorank.formats.kronecker_chain import KroneckerChain, fits, near, whole
from autorank.solvers.kronecker import Shape, rank_limits, rearrange, sekron
from autorank.types import LayerSpec


class SeKron(KroneckerChain):
    """W ≈ Σ_{r1} A1_{r1} ⊗ (Σ_{r2} A2_{r1r2} ⊗ (… ⊗ AN_{r1…rN-1})) (Hameed et al., arXiv:2210.06299).

    Factor i has all the rank indices r1 … ri before it: parameters R1·|A1| + R1·R2·|A2| + … per group, where the last
    factor has as many indices as the one before it. The fit is by nested singular value decompositions and alternating
    least squares.

    The option ``shapes`` has the shapes of all factors but the last, as ``4x4x1x1/4x4x3x3`` (T1xS1xK1x… per group); two
    of them make three factors, one makes a GKPD. The rank is (R1, R2); with more than three factors R2 holds for every
    level from the second on, as far as the level's factors can have it. Words for the shapes of three factors in a
    search space (√n is the divisor of n that is nearest to it):

    - ``pointwise``: (T, 1, 1…), (1, 1, K…), (1, S, 1…): pointwise, depthwise, pointwise, as CP is.
    - ``rows``, ``columns``: (T, 1, …), (1, 1, …), (1, S, 1…), the first factor with the first (last) axis of the
      kernel, the second one with the others.
    - ``outputs``: (√T, 1, 1…), (T/√T, 1, K…), (1, S, 1…).
    - ``blocks``: (T, √S, 1…), (1, 1, K1, 1…), (1, S/√S, 1, K2…).
    - ``balanced``: near (∛T, ∛S, 1…), (∛T, ∛S, 1…), (∛T, ∛S, K…): fewest parameters, but many MACs.

    With one mode per factor and R2 = 1 it is CP; Tucker, tensor train and tensor ring are special cases.
    """

    name = "sekron"
    rank_names = ("R1", "R2")
    shape_option = "shapes"

    def max_rank(self, spec: LayerSpec, options: Options = ()) -> tuple[int, ...]:
        """Return the largest rank of the first level, and that of the others (1 where there are none)."""
        first, *others = rank_limits(self.shapes(spec, options))
        return first, max(others, default=1)

    def words(self, spec: LayerSpec) -> dict[str, tuple[Shape, ...]]:
        """Return the shapes of the first two factors for each word that this layer has them for."""
        out, into, *kernel = total = whole(spec)
        ones = (1,) * len(kernel)
        root_out, root_in = near(out, math.sqrt(out)), near(into, math.sqrt(into))
        first = near(out, out ** (1 / 3)), near(into, into ** (1 / 3))
        left = out // first[0], into // first[1]
        second = near(left[0], math.sqrt(left[0])), near(left[1], math.sqrt(left[1]))
        found: dict[str, tuple[Shape, ...]] = {
            "pointwise": ((out, 1, *ones), (1, 1, *kernel)),
            "outputs": ((root_out, 1, *ones), (out // root_out, 1, *kernel)),
            "balanced": ((*first, *ones), (*second, *ones)),
        }
        if len(kernel) > 1:
            found["rows"] = (out, 1, kernel[0], *ones[1:]), (1, 1, 1, *kernel[1:])
            found["columns"] = (out, 1, *ones[1:], kernel[-1]), (1, 1, *kernel[:-1], 1)
            found["blocks"] = (out, root_in, *ones), (1, 1, kernel[0], *ones[1:])
        return {word: found[word] for word in self.all_words() if word in found and fits(found[word], total)}

    @classmethod
    def all_words(cls) -> tuple[str, ...]:
        """Return the words that stand for shapes."""
        return "pointwise", "rows", "columns", "outputs", "blocks", "balanced"

    def factor_names(self, count: int) -> tuple[str, ...]:
        """Return a1, a2 and so on."""
        return tuple(f"a{i}" for i in range(1, count + 1))

    def level_ranks(self, shapes: Sequence[Shape], rank: tuple[int, ...]) -> tuple[int, ...]:
        """Return R1, and R2 as far as each of the other levels can have it."""
        first, *others = rank_limits(shapes)
        return min(rank[0], first), *(min(rank[1], limit) for limit in others)

    def _fit_plain(
        self, weight: Tensor, spec: LayerSpec, rank: tuple[int, ...], options: Options, seed: int
    ) -> Factors:
        shapes = self.shapes(spec, options)
        found = sekron(rearrange(weight, shapes), self.level_ranks(shapes, rank))
        return self._from_solver(found, spec, rank, options)

    def _allowed_count(self, given: int) -> bool:
        return given >= 1

    def _rule(self, spec: LayerSpec) -> str:
        sizes = whole(spec)
        names = "x".join(["T1", "S1", *(f"K{i}" for i in range(1, len(sizes) - 1))])
        return (
            f"the shapes of all factors but the last, each as {names} with a / between them, which together divide "
            f"{'x'.join(map(str, sizes))} and leave no factor, the last one included, with all sizes one"
        )


from_layer = SeKron().from_layer
