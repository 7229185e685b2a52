"""The contract of a decomposition format, as a test class.

>>> from autorank.testing.formats import FormatContract
>>> class TestMyFormat(FormatContract):
...     format_name = "my_format"
...     kinds = ("conv2d", "linear")
"""

from __future__ import annotations

from autorank.testing.format_base import CONVOLUTIONS
from autorank.testing.format_fits import FitContract
from autorank.testing.format_layers import LayerContract

__all__ = ["CONVOLUTIONS", "FormatContract"]


class FormatContract(LayerContract, FitContract):
    """Subclass it in a test module and name your format; every test must pass.

    Attributes
    ----------
    format_name : str
        The registered name.
    kinds : tuple of str
        The layer kinds of which the format must take at least one layer; it must refuse those of all others.
    exact_at_max_rank : bool
        Whether the largest rank writes every weight exactly.
    slack : float
        By how much, relative to the weight, an iterative fit may miss an order of errors that the best fits have.
    every : int
        Take one case of the grid in so many (see `cases.thinned`), for formats whose steps are like another's.
    """
