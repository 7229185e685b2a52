"""What tensor chain and tensor ring share: cores in a closed loop, with a small closing bond."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from autorank.formats.base import Factors, Options
from autorank.formats.chain import ChainFormat
from autorank.formats.spatial_cores import SpatialCores
from autorank.formats.steps import Step
from autorank.solvers import ring
from autorank.solvers.ring_algebra import balanced
from autorank.types import LayerSpec, Scalar

CLOSING = (1, 2, 3, 4, 6, 8)


class Loop(ChainFormat):
    """W[t, s, k] = trace(A[s] · G1[k1] ··· · C[t]): the closing bond R0 runs from C back to A.

    R0 is the option ``closing`` (2 unless given); with 1 the loop is open, which other formats write. The input factor
    makes R0·R_in channels, the spatial cores serve the R0 blocks one by one from the batch, the output factor takes
    R0·R_out channels. MACs per position R0·(S·R_in + spatial + R_out·T), parameters R0·(S·R_in + R_out·T) + spatial.
    The fit keeps the sensitivity down, see `autorank.solvers.ring`.
    """

    rank_names = ("R_in", "R_out")

    @abstractmethod
    def cores(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> SpatialCores:
        """Return the spatial cores."""

    def max_rank(self, spec: LayerSpec, options: Options = ()) -> tuple[int, ...]:
        """Return the sizes of the two modes, or the rank that their unfoldings can have at most."""
        out, into, positions = spec.out_channels // spec.groups, spec.weight_shape[1], math.prod(spec.kernel)
        return min(into, out * positions), min(out, into * positions)

    def variants(self, spec: LayerSpec) -> tuple[Options, ...]:
        """Return closing bonds of two and three."""
        return tuple((("closing", value),) for value in (2, 3))

    def sizes(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> dict[str, int]:
        """Return the closing bond and the others from left to right."""
        bonds = self.cores(spec, rank, options).bonds
        return {"p": self._closing(options), **{f"b{n}": bond for n, bond in enumerate(bonds)}}

    def steps(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> tuple[Step, ...]:
        """Return pointwise, spatial and pointwise convolutions; the closing bond waits in the batch."""
        axes = self.cores(spec, rank, options).axes
        spatial = (Step(f"spatial_{n}", (f"b{n + 1}",), (f"b{n}",), axes=group) for n, group in enumerate(axes))
        return Step("input", ("p", "b0"), ("s",)), *spatial, Step("output", ("t",), ("p", f"b{len(axes)}"))

    @staticmethod
    def _closing(options: Options) -> int:
        return int(dict(options).get("closing", 2))

    def free_options(self, spec: LayerSpec) -> tuple[str, ...]:
        """Return the closing bond."""
        return ("closing",)

    def _own_options(self, spec: LayerSpec) -> Mapping[str, tuple[Scalar, ...]]:
        return {"closing": CLOSING}

    def _fit_plain(
        self, weight: Tensor, spec: LayerSpec, rank: tuple[int, ...], options: Options, seed: int
    ) -> Factors:
        chosen = self.cores(spec, rank, options)
        groups, out, into = weight.shape[:3]
        sizes = [into, *(math.prod(spec.kernel[a] for a in axes) for axes in chosen.axes), out]
        tensor = weight.movedim(1, -1).reshape(groups, *sizes)
        cores = ring.fit(tensor, (self._closing(options), *chosen.bonds), seed=seed)
        return self._from_cores(cores, spec, rank, options)

    def _normal_form(self, factors: Factors, spec: LayerSpec, rank: tuple[int, ...], options: Options) -> Factors:
        """Scale the factors to the least sensitivity again, each group for itself."""
        steps = self.steps(spec, rank, options)
        named = self._named(factors, spec, rank, options)
        cores = [named["input"].permute(0, 1, 3, 2)]
        cores += [named[step.factor].flatten(3).permute(0, 2, 3, 1) for step in steps[1:-1]]
        cores.append(named["output"].permute(0, 3, 1, 2))
        return self._from_cores(balanced(cores, torch.ones_like(cores[0][:, 0, 0, 0])), spec, rank, options)

    def _from_cores(self, cores: list[Tensor], spec: LayerSpec, rank: tuple[int, ...], options: Options) -> Factors:
        """Return the factors of cores (groups, bond, mode, bond)."""
        steps = self.steps(spec, rank, options)
        named = {"input": cores[0].permute(0, 1, 3, 2)}  # (groups, p, b0, s)
        for step, core in zip(steps[1:-1], cores[1:-1], strict=True):
            kernel = [step.size(a, spec) for a in step.axes]
            named[step.factor] = core.permute(0, 3, 1, 2).reshape(core.shape[0], core.shape[3], core.shape[1], *kernel)
        named["output"] = cores[-1].permute(0, 2, 3, 1)  # (groups, t, p, b)
        return self._pack(named, spec, rank, options)
