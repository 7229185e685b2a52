"""Tucker-2: a pointwise convolution to R_in channels, the K-convolution to R_out, a pointwise one to T."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autorank.formats.base import Factors, Options
from autorank.formats.chain import ChainFormat
from autorank.formats.steps import Step, pointwise
from autorank.solvers import hooi, lowrank
from autorank.types import LayerSpec


class Tucker2(ChainFormat):
    """W ≈ core ×_T U ×_S V (Kim et al., ICLR 2016): parameters S·R_in + R_in·R_out·K + R_out·T per group.

    The factors are ``input`` (groups, R_in, S/groups, 1, ...) with orthonormal rows, ``core`` (groups, R_out, R_in, K1,
    ..., Kd) and ``output`` (groups, T/groups, R_out, 1, ...) with orthonormal columns. A mode kept at its full size
    needs no pointwise convolution: its factor is absorbed in the core and does not exist.
    """

    name = "tucker2"
    rank_names = ("R_out", "R_in")

    def max_rank(self, spec: LayerSpec, options: Options = ()) -> tuple[int, ...]:
        """Return the sizes of the two modes, or the rank that their unfoldings can have at most."""
        out, into, positions = spec.out_channels // spec.groups, spec.weight_shape[1], math.prod(spec.kernel)
        return min(out, into * positions), min(into, out * positions)

    def sizes(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> dict[str, int]:
        """Return the two ranks."""
        return {"o": rank[0], "i": rank[1]}

    def steps(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> tuple[Step, ...]:
        """Return one to three convolutions: stride, padding and dilation are on the core."""
        wide_in, wide_out = rank[1] == spec.weight_shape[1], rank[0] == spec.out_channels // spec.groups
        core = Step(
            "core",
            ("t",) if wide_out else ("o",),
            ("s",) if wide_in else ("i",),
            axes=tuple(range(len(spec.kernel))),
        )
        into = () if wide_in else (Step("input", ("i",), ("s",)),)
        out = () if wide_out else (Step("output", ("t",), ("o",)),)
        return *into, core, *out

    def _refuse(self, spec: LayerSpec, options: Options) -> str | None:
        why = "the weight has only two modes, tucker2 would be channel_svd with a superfluous core"
        return (what := pointwise(spec)) and f"{what}: {why}"

    def _fit_plain(
        self, weight: Tensor, spec: LayerSpec, rank: tuple[int, ...], options: Options, seed: int
    ) -> Factors:
        r_out, r_in = rank
        core, u, v = hooi.tucker2(weight.flatten(3), (r_out, r_in))
        shapes = self._shapes(spec, rank, options)
        factors = {"core": core.reshape(shapes["core"])}
        if v is not None:
            factors["input"] = v.mT.reshape(shapes["input"])
        if u is not None:
            factors["output"] = u.reshape(shapes["output"])
        return {name: factors[name] for name in shapes}

    def _normal_form(self, factors: Factors, spec: LayerSpec, rank: tuple[int, ...], options: Options) -> Factors:
        """Make the bases orthonormal again: unwhitening bends them and may leave extreme scales."""
        found = dict(factors)
        core = found["core"].flatten(3)
        if "input" in found:
            basis, triangle = lowrank.orthonormal(found["input"].flatten(2).mT)
            found["input"] = basis.mT.reshape(found["input"].shape)
            core = torch.einsum("goik,gji->gojk", core, triangle)
        if "output" in found:
            basis, triangle = lowrank.orthonormal(found["output"].flatten(2))
            found["output"] = basis.reshape(found["output"].shape)
            core = torch.einsum("gpo,goik->gpik", triangle, core)
        found["core"] = core.reshape(found["core"].shape)
        return found


from_layer = Tucker2().from_layer
