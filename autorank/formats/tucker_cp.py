"""Tucker-CP: CP between two more pointwise convolutions, or fewer where merging two of them is cheaper."""

from __future__ import annotations

import math

from torch import Tensor

from autorank.formats.base import Factors, Options
from autorank.formats.chain import ChainFormat
from autorank.formats.cp import balanced, depthwise, two_modes
from autorank.formats.steps import Step
from autorank.solvers import cp as solver
from autorank.solvers import hooi, lowrank
from autorank.types import LayerSpec


class TuckerCP(ChainFormat):
    """W ≈ ⟦A, B, C⟧ ×_T U ×_S V: Tucker-2, then stable CP of the core (TKD-CPD-EPC of Phan et al., ECCV 2020).

    At ranks (R_out, R_in, R): pointwise S → R_in → R, depthwise with the dense layer's kernel on R channels, pointwise
    R → R_out → T. Two pointwise convolutions in a row are one, S → R or R → T, where that has no more parameters, S·R
    ≤ (S + R)·R_in; the Tucker rank then binds nothing on this side and is not used in the fit. With both sides merged
    this is ``cp``.

    The factors are ``reduce`` (groups, R_in, S/groups, 1, ...) with orthonormal rows, ``input`` (groups, R, R_in or
    S/groups, 1, ...), ``spatial`` (groups, R, 1, K1, ..., Kd), ``output`` (groups, R_out or T/groups, R, 1, ...) and
    ``expand`` (groups, T/groups, R_out, 1, ...) with orthonormal columns; merged ones do not exist.
    """

    name = "tucker_cp"
    rank_names = ("R_out", "R_in", "R")

    def max_rank(self, spec: LayerSpec, options: Options = ()) -> tuple[int, ...]:
        """Return the ranks that any weight has at most, or that have fewer parameters than the dense layer."""
        out, into, positions = spec.out_channels // spec.groups, spec.weight_shape[1], math.prod(spec.kernel)
        total = out * into * positions
        smaller = (total - 1) // (out + into + positions)
        rank = max(1, min(smaller, out * into, out * positions, into * positions))
        return min(out, into * positions), min(into, out * positions), rank

    def sizes(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> dict[str, int]:
        """Return the three ranks."""
        return {"o": rank[0], "i": rank[1], "r": rank[2]}

    def steps(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> tuple[Step, ...]:
        """Return three to five convolutions."""
        reduce, expand = self._separate(spec, rank)
        before = (Step("reduce", ("i",), ("s",)), Step("input", ("r",), ("i",)))
        after = (Step("output", ("o",), ("r",)), Step("expand", ("t",), ("o",)))
        return (
            *(before if reduce else (Step("input", ("r",), ("s",)),)),
            *depthwise((tuple(range(len(spec.kernel))),)),
            *(after if expand else (Step("output", ("t",), ("r",)),)),
        )

    def _refuse(self, spec: LayerSpec, options: Options) -> str | None:
        return two_modes(spec, self.name)

    def _fit_plain(
        self, weight: Tensor, spec: LayerSpec, rank: tuple[int, ...], options: Options, seed: int
    ) -> Factors:
        reduce, expand = self._separate(spec, rank)
        sizes = spec.out_channels // spec.groups, spec.weight_shape[1]
        tucker_rank = rank[0] if expand else sizes[0], rank[1] if reduce else sizes[1]
        core, u, v = weight.flatten(3), None, None
        if tucker_rank != sizes:
            core, u, v = hooi.tucker2(core, tucker_rank)
        output, into, spatial = solver.cp(core, rank[2], seed).factors
        named = {"input": into.mT, "spatial": spatial.mT, "output": output}
        if v is not None:
            named["reduce"] = v.mT
        if u is not None:
            named["expand"] = u
        return self._pack(named, spec, rank, options)

    def _normal_form(self, factors: Factors, spec: LayerSpec, rank: tuple[int, ...], options: Options) -> Factors:
        """Make the bases orthonormal again and the CP factors balanced."""
        found = dict(factors)
        if "reduce" in found:
            basis, triangle = lowrank.orthonormal(found["reduce"].flatten(2).mT)
            found["reduce"] = basis.mT.reshape(found["reduce"].shape)
            found["input"] = (found["input"].flatten(2) @ triangle.mT).reshape(found["input"].shape)
        if "expand" in found:
            basis, triangle = lowrank.orthonormal(found["expand"].flatten(2))
            found["expand"] = basis.reshape(found["expand"].shape)
            found["output"] = (triangle @ found["output"].flatten(2)).reshape(found["output"].shape)
        return balanced(found, {"input": False, "spatial": False, "output": True})

    @staticmethod
    def _separate(spec: LayerSpec, rank: tuple[int, ...]) -> tuple[bool, bool]:
        """Return whether the input and the output side have two pointwise convolutions of their own."""
        r_out, r_in, r = rank
        out, into = spec.out_channels // spec.groups, spec.weight_shape[1]
        return (into + r) * r_in < into * r, (out + r) * r_out < out * r


from_layer = TuckerCP().from_layer
