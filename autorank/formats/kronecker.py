"""Generalised Kronecker product decomposition (GKPD): W ≈ Σ_r A_r ⊗ B_r."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from autorank.formats.base import Factors, Options
from autorank.formats.kronecker_chain import KroneckerChain, fits, near, whole
from autorank.solvers.kept import KEPT, digest
from autorank.solvers.kronecker import Shape, nested_svd, rank_limits, rearrange
from autorank.types import LayerSpec


class Kronecker(KroneckerChain):
    """W ≈ Σ_{r≤R} A_r ⊗ B_r (Hameed et al., AAAI 2022, arXiv:2109.14710): parameters R·(|A| + |B|) per group.

    A_r has the shape (T1, S1, a1, ..., ad), B_r the shape (T/T1, S/S1, K1/a1, ..., Kd/ad). Rearranged, the sum is a
    matrix |A| × |B| of rank R: one singular value decomposition gives the best approximation of every rank. MACs per
    position, at stride one: R·T2·S1·(S2·kb + T1·ka).

    The option ``a`` is the shape of A, as ``T1xS1xa1x…xad`` per group. Words for it in a search space (√n is the
    divisor of n that is nearest to it):

    - ``outputs``: A (T, √S, 1…), B (1, S/√S, K…): filters on blocks of the input, mixed pointwise; few MACs.
    - ``inputs``: A (√T, 1, K…), B (T/√T, S, 1…): a pointwise step, then filters that blocks of the output share.
    - ``rows``, ``columns``: A (T/4, 1, …), B (4, S, …), A with the first (last) axis of the kernel, B with the others.
    - ``balanced``, ``balanced_kernel``: A (√T, √S, …), the kernel in B or in A: few parameters, but many MACs.

    With A (T, 1, 1…) it is channel SVD, with A (T, 1, 1, K2) spatial SVD. With statistics the fit is by alternating
    weighted least squares, as Kronecker products are not closed under maps of the channels.
    """

    name = "kronecker"
    rank_names = ("R",)
    shape_option = "a"

    def max_rank(self, spec: LayerSpec, options: Options = ()) -> tuple[int, ...]:
        """Return the shorter side of the rearranged weight."""
        return rank_limits(self.shapes(spec, options))

    def words(self, spec: LayerSpec) -> dict[str, tuple[Shape, ...]]:
        """Return the shape of A for each word that this layer has one for."""
        out, into, *kernel = total = whole(spec)
        ones = (1,) * len(kernel)
        root_out, root_in, quarter = near(out, math.sqrt(out)), near(into, math.sqrt(into)), near(out, out / 4)
        found: dict[str, Shape] = {
            "outputs": (out, root_in, *ones),
            "inputs": (root_out, 1, *kernel),
            "balanced": (root_out, root_in, *ones),
            "balanced_kernel": (root_out, root_in, *kernel),
        }
        if len(kernel) > 1:
            found["rows"] = (quarter, 1, kernel[0], *ones[1:])
            found["columns"] = (quarter, 1, *ones[1:], kernel[-1])
        return {word: (found[word],) for word in self.all_words() if word in found and fits([found[word]], total)}

    @classmethod
    def all_words(cls) -> tuple[str, ...]:
        """Return the words that stand for shapes of A."""
        return "outputs", "inputs", "rows", "columns", "balanced", "balanced_kernel"

    def factor_names(self, count: int) -> tuple[str, ...]:
        """Return a and b."""
        return "a", "b"

    def level_ranks(self, shapes: Sequence[Shape], rank: tuple[int, ...]) -> tuple[int, ...]:
        """Return R."""
        return rank

    def _fit_plain(
        self, weight: Tensor, spec: LayerSpec, rank: tuple[int, ...], options: Options, seed: int
    ) -> Factors:
        shapes = self.shapes(spec, options)

        def every_rank() -> dict[str, Tensor]:
            a, b = nested_svd(rearrange(weight, shapes), self.max_rank(spec, options))
            return {"a": a, "b": b}

        found = KEPT.get(("gkpd", digest(weight), str(weight.device), tuple(weight.shape), shapes), every_rank)
        return self._from_solver([found["a"][:, : rank[0]], found["b"][:, : rank[0]]], spec, rank, options)

    def _allowed_count(self, given: int) -> bool:
        return given == 1

    def _rule(self, spec: LayerSpec) -> str:
        sizes = whole(spec)
        names = ["T1", "S1", *(f"a{i}" for i in range(1, len(sizes) - 1))]
        divisors = ", ".join(f"{name} divides {size}" for name, size in zip(names, sizes, strict=True))
        return f"the shape of A as {'x'.join(names)}, where {divisors}, neither all ones nor the whole weight"


from_layer = Kronecker().from_layer
