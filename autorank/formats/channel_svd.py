"""Channel SVD: a K-convolution to R channels, then a pointwise one; for a linear layer, two linear layers."""

from __future__ import annotations

from autorank.formats.base import Options
from autorank.formats.svd import TwoStepSVD
from autorank.types import LayerSpec


class ChannelSVD(TwoStepSVD):
    """W as a T × (S·K) matrix of rank R (per group): parameters R·(S·K + T).

    The first convolution carries stride, padding and dilation. With whitening by the full patch covariance the fit is
    the closed-form optimum of the output error (Eckart and Young on W·L).
    """

    name = "channel_svd"

    def first_axes(self, spec: LayerSpec, options: Options = ()) -> tuple[int, ...]:
        """Return all spatial axes."""
        return tuple(range(len(spec.kernel)))


from_layer = ChannelSVD().from_layer
