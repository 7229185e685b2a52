"""The SVDs and Tucker-2 against the contract; the others, run by the same chain, take a part of the grid."""

from autorank.testing.formats import CONVOLUTIONS, FormatContract


class TestChannelSVD(FormatContract):
    format_name = "channel_svd"


class TestSpatialSVD(FormatContract):
    format_name = "spatial_svd"
    kinds = ("conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d")
    every = 3


class TestTucker2(FormatContract):
    format_name = "tucker2"
    kinds = CONVOLUTIONS
