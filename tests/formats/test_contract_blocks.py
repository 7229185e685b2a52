"""Block terms and grouped channel SVD against the contract."""

from autorank.testing.cases import make
from autorank.testing.format_base import CONVOLUTIONS
from autorank.testing.formats import FormatContract


class TestBlockTerm(FormatContract):
    format_name = "block_term"
    kinds = CONVOLUTIONS
    slack = 0.02
    every = 5


class TestGroupedSVD(FormatContract):
    format_name = "grouped_svd"
    every = 4

    def few(self):
        # that can be shared out
        return [*super().few(), make("linear", (9, 8), (2,))]
