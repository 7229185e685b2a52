"""Every shipped format against the contract."""

from autorank.testing.formats import FormatContract


class TestChannelSVD(FormatContract):
    format_name = "channel_svd"


class TestSpatialSVD(FormatContract):
    format_name = "spatial_svd"
    kinds = ("conv2d", "conv3d")


class TestTucker2(FormatContract):
    format_name = "tucker2"
    kinds = ("conv1d", "conv2d", "conv3d")
