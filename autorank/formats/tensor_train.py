"""Tensor train over (S, K1, ..., Kd, T): a pointwise convolution, one along each spatial axis, a pointwise one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from autorank.formats.base import Factors, Options
from autorank.formats.chain import ChainFormat
from autorank.formats.spatial_cores import SpatialCores, spatial_cores
from autorank.formats.steps import Step, pointwise, wide_axes
from autorank.solvers.train import train
from autorank.types import LayerSpec, Scalar

INNER = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


class TensorTrain(ChainFormat):
    """W[t, s, k1, ..., kd] = A[s] · G1[k1] ··· Gd[kd] · C[t] (Oseledets 2011; as a layer, Novikov et al. 2015).

    The ranks are the bonds of the ends: R_in between S and the spatial cores, R_out between these and T. The bonds
    between spatial cores follow by rule: the option ``inner`` (1 unless given) times √(R_in·R_out), see
    `spatial_cores`. Parameters, d = 2 with that bond M: S·R_in + R_in·K1·M + M·K2·R_out + R_out·T per group. Spatial
    axes share one core where that takes fewer MACs: always with one axis wider than one, where this is Tucker-2, and
    more often with strides, as the first of two cores runs at the full size of the second's axis.

    The factors are ``input``, ``spatial_0``, ..., ``output``. An end at its full size is absorbed and does not exist;
    without both the format is a spatial SVD. The fit is the TT-SVD followed by sweeps over pairs of neighbours.
    """

    name = "tensor_train"
    rank_names = ("R_in", "R_out")

    def max_rank(self, spec: LayerSpec, options: Options = ()) -> tuple[int, ...]:
        """Return the sizes of the two modes, or the rank that their unfoldings can have at most.

        Every weight is written exactly there when ``inner`` is large enough, as it is with one wide axis.
        """
        out, into, positions = spec.out_channels // spec.groups, spec.weight_shape[1], math.prod(spec.kernel)
        return min(into, out * positions), min(out, into * positions)

    def variants(self, spec: LayerSpec) -> tuple[Options, ...]:
        """Return inner bonds at the mean of the outer ones and, where there are any, at three quarters of it."""
        values = (1.0, 0.75) if len(wide_axes(spec)) > 1 else (1.0,)
        return tuple((("inner", value),) for value in values)

    def sizes(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> dict[str, int]:
        """Return the bonds from left to right."""
        return {f"b{n}": bond for n, bond in enumerate(self._cores(spec, rank, options).bonds)}

    def steps(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> tuple[Step, ...]:
        """Return pointwise, spatial and pointwise convolutions."""
        cores = self._cores(spec, rank, options)
        last = len(cores.axes)
        wide_in, wide_out = self._absorbed(spec, rank)
        spatial = [
            Step(
                f"spatial_{n}",
                ("t",) if wide_out and n == last - 1 else (f"b{n + 1}",),
                ("s",) if wide_in and n == 0 else (f"b{n}",),
                axes=axes,
            )
            for n, axes in enumerate(cores.axes)
        ]
        into = () if wide_in else (Step("input", ("b0",), ("s",)),)
        out = () if wide_out else (Step("output", ("t",), (f"b{last}",)),)
        return *into, *spatial, *out

    def _cores(self, spec: LayerSpec, rank: tuple[int, ...], options: Options) -> SpatialCores:
        return spatial_cores(spec, rank[0], rank[1], float(dict(options).get("inner", 1.0)))

    @staticmethod
    def _absorbed(spec: LayerSpec, rank: tuple[int, ...]) -> tuple[bool, bool]:
        return rank[0] == spec.weight_shape[1], rank[1] == spec.out_channels // spec.groups

    def free_options(self, spec: LayerSpec) -> tuple[str, ...]:
        """Return the bonds between spatial cores, where the layer has any."""
        return ("inner",) if len(wide_axes(spec)) > 1 else ()

    def _own_options(self, spec: LayerSpec) -> Mapping[str, tuple[Scalar, ...]]:
        return {"inner": INNER}

    def _refuse(self, spec: LayerSpec, options: Options) -> str | None:
        what = pointwise(spec)
        return what and f"{what}: a tensor train over two modes is channel_svd, over split modes kronecker"

    def _fit_plain(
        self, weight: Tensor, spec: LayerSpec, rank: tuple[int, ...], options: Options, seed: int
    ) -> Factors:
        chosen = self._cores(spec, rank, options)
        groups = weight.shape[0]
        wide_in, wide_out = self._absorbed(spec, rank)
        sizes = [math.prod(spec.kernel[a] for a in axes) for axes in chosen.axes]
        bonds = list(chosen.bonds)
        # An absorbed end is one mode with its neighbour.
        if wide_in:
            sizes[0] *= weight.shape[2]
            bonds = bonds[1:]
        else:
            sizes.insert(0, weight.shape[2])
        if wide_out:
            sizes[-1] *= weight.shape[1]
            bonds = bonds[:-1]
        else:
            sizes.append(weight.shape[1])
        tensor = weight.movedim(1, -1).reshape(groups, *sizes)
        cores = train(tensor, bonds) if len(sizes) > 1 else [tensor[:, None, :, None]]
        steps = self.steps(spec, rank, options)
        named = {}
        for step, core in zip(steps, cores, strict=True):
            left, right = core.shape[1], core.shape[3]
            kernel = [step.size(a, spec) for a in step.axes]
            into = weight.shape[2] if step.into == ("s",) else left
            out = weight.shape[1] if step.out == ("t",) else right
            # The core runs (left bond, S, kernel, T, right bond); of each pair one is there.
            moved = core.reshape(groups, into, *kernel, out)
            named[step.factor] = moved.movedim(-1, 1)
        return self._pack(named, spec, rank, options)

    def _normal_form(self, factors: Factors, spec: LayerSpec, rank: tuple[int, ...], options: Options) -> Factors:
        """Make the ends orthonormal again: unwhitening bends them and may leave extreme scales."""
        found = dict(factors)
        names = list(found)
        if "input" in found:
            basis, triangle = torch.linalg.qr(found["input"].flatten(2).mT)
            found["input"] = basis.mT.reshape(found["input"].shape)
            core = found[names[1]]
            found[names[1]] = torch.einsum("goik,gji->gojk", core.flatten(3), triangle).reshape(core.shape)
        if "output" in found:
            basis, triangle = torch.linalg.qr(found["output"].flatten(2))
            found["output"] = basis.reshape(found["output"].shape)
            core = found[names[-2]]
            found[names[-2]] = (triangle @ core.flatten(2)).reshape(core.shape)
        return self._balanced(found)

    @staticmethod
    def _balanced(factors: Factors) -> Factors:
        """Give the spatial factors the same norm, each group for itself."""
        names = [name for name in factors if name.startswith("spatial")]
        norms = torch.stack([factors[name].flatten(1).norm(dim=1) for name in names])
        live = (norms > 0).all(dim=0)
        logs = torch.where(norms > 0, norms, 1.0).log()
        scales = torch.where(live, (logs.mean(dim=0) - logs).exp(), 1.0)
        found = dict(factors)
        for name, scale in zip(names, scales, strict=True):
            found[name] = factors[name] * scale.view(-1, *[1] * (factors[name].ndim - 1))
        return found


from_layer = TensorTrain().from_layer
