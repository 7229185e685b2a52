"""Tucker-2: a pointwise convolution to R_in channels, the K-convolution to R_out, a pointwise one to T."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autorank.formats.base import Factors, Options
from autorank.formats.chain import ChainFormat, Step
from autorank.solvers import hooi
from autorank.types import LayerSpec


class Tucker2(ChainFormat):
    """W ≈ core ×_T U ×_S V (Kim et al., ICLR 2016): parameters S·R_in + R_in·R_out·K + R_out·T per group.

    The factors are ``input`` (groups, R_in, S/groups, 1, ...) with orthonormal rows, ``core`` (groups, R_out, R_in, K1,
    ..., Kd) and ``output`` (groups, T/groups, R_out, 1, ...) with orthonormal columns. A mode kept at its full size
    needs no pointwise convolution: its factor is absorbed in the core and does not exist.
    """

    name = "tucker2"
    rank_names = ("R_out", "R_in")
    input_factor = "input"

    def max_rank(self, spec: LayerSpec, options: Options = ()) -> tuple[int, ...]:
        """Return the sizes of the two modes, or the rank that their unfoldings can have at most."""
        out, into, positions = spec.out_channels // spec.groups, spec.weight_shape[1], math.prod(spec.kernel)
        return min(out, into * positions), min(into, out * positions)

    def steps(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> tuple[Step, ...]:
        """Return one to three convolutions: stride, padding and dilation are on the core."""
        out, into = spec.out_channels // spec.groups, spec.weight_shape[1]
        r_out, r_in = rank
        steps = [Step("core", r_out, r_in, tuple(range(len(spec.kernel))))]
        if r_in < into:
            steps.insert(0, Step("input", r_in, into))
        if r_out < out:
            steps.append(Step("output", out, r_out))
        return tuple(steps)

    def reconstruct(self, factors: Factors, spec: LayerSpec, options: Options = ()) -> Tensor:
        """Return the core multiplied by the factors that are there, as a dense weight."""
        weight = factors["core"].flatten(3)
        if "input" in factors:
            weight = torch.einsum("goik,gis->gosk", weight, factors["input"].flatten(2))
        if "output" in factors:
            weight = torch.einsum("gto,gosk->gtsk", factors["output"].flatten(2), weight)
        return weight.reshape(spec.weight_shape)

    def _refuse(self, spec: LayerSpec, options: Options) -> str | None:
        if math.prod(spec.kernel) > 1:
            return None
        what = "linear" if spec.kind == "linear" else f"{spec.kind} with kernel {spec.kernel}"
        return f"{what}: the weight has only two modes, tucker2 would be channel_svd with a superfluous core"

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

    def _input_carrier(self, factors: Factors) -> str:
        return "input" if "input" in factors else "core"

    def _normal_form(self, factors: Factors, spec: LayerSpec, options: Options) -> Factors:
        """Make the rows of the input factor orthonormal again: unwhitening bends them and may leave extreme scales."""
        if "input" not in factors:
            return factors
        into = factors["input"]
        basis, triangle = torch.linalg.qr(into.flatten(2).mT)
        sign = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(into.dtype)
        basis, triangle = basis * sign[:, None, :], triangle * sign[:, :, None]
        core = torch.einsum("goik,gji->gojk", factors["core"].flatten(3), triangle)
        return {**factors, "input": basis.mT.reshape(into.shape), "core": core.reshape(factors["core"].shape)}
