"""Tensor ring over (S, K1, ..., Kd, T): a tensor train whose ends are joined by one more bond."""

from __future__ import annotations

from collections.abc import Mapping

from autorank.formats.base import Options
from autorank.formats.loop import Loop
from autorank.formats.spatial_cores import SpatialCores, spatial_cores
from autorank.formats.steps import wide_axes
from autorank.formats.tensor_train import INNER
from autorank.types import LayerSpec, Scalar


class TensorRing(Loop):
    """W[t, s, k1, ..., kd] = trace(A[s] · G1[k1] ··· Gd[kd] · C[t]) (Zhao et al., arXiv 1606.05535; Wang et al. 2018).

    See `Loop` for the closing bond, and `TensorTrain` for the option ``inner`` and for when spatial axes share a core.
    With all of them in one core the ring is the tensor chain, so it takes kernels with two wide axes or more.
    """

    name = "tensor_ring"

    def cores(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> SpatialCores:
        """Return a core for every spatial axis, or shared ones where that is no dearer."""
        return spatial_cores(spec, rank[0], rank[1], float(dict(options).get("inner", 1.0)))

    def free_options(self, spec: LayerSpec) -> tuple[str, ...]:
        """Return the closing bond and the bonds between spatial cores."""
        return (*super().free_options(spec), "inner")

    def _own_options(self, spec: LayerSpec) -> Mapping[str, tuple[Scalar, ...]]:
        return {**super()._own_options(spec), "inner": INNER}

    def _refuse(self, spec: LayerSpec, options: Options) -> str | None:
        wide = len(wide_axes(spec))
        if wide > 1:
            return None
        other = "tensor_chain" if wide else "channel_svd, or kronecker over split modes"
        kernel = f" with kernel {spec.kernel}" if spec.kernel else ""
        return f"{spec.kind}{kernel}: fewer than two spatial axes to split, a tensor ring would be {other}"


from_layer = TensorRing().from_layer
