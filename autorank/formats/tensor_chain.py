"""Tensor chain (block terms that share their core): a loop over (S, K, T) with one K-convolution."""

from __future__ import annotations

from autorank.formats.base import Options
from autorank.formats.loop import Loop
from autorank.formats.spatial_cores import SpatialCores
from autorank.formats.steps import pointwise
from autorank.types import LayerSpec


class TensorChain(Loop):
    """W[t, s, k] = Σ_p C_p[t]·B[k]·A_p[s], B shared by R0 block terms (Phan et al., arXiv 2203.02617).

    See `Loop`: parameters R0·(S·R_in + R_out·T) + R_in·R_out·K per group, with the K-convolution run R0 times.
    """

    name = "tensor_chain"

    def cores(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> SpatialCores:
        """Return one core for all spatial axes."""
        return SpatialCores((tuple(range(len(spec.kernel))),), (rank[0], rank[1]))

    def _refuse(self, spec: LayerSpec, options: Options) -> str | None:
        why = "the weight has only two modes, tensor_chain would be channel_svd with a superfluous core"
        return (what := pointwise(spec)) and f"{what}: {why}"


from_layer = TensorChain().from_layer
