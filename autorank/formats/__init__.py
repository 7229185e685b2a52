"""The decomposition formats by name.

`get` returns a format, `names` lists them, `register` adds one of your own (which should pass
`autorank.testing.formats.FormatContract`).
"""

from __future__ import annotations

from autorank.errors import FormatError
from autorank.formats.base import Factors, Format, Options
from autorank.formats.block_term import BlockTerm
from autorank.formats.channel_svd import ChannelSVD
from autorank.formats.cp import CP
from autorank.formats.grouped_svd import GroupedSVD
from autorank.formats.kronecker import Kronecker
from autorank.formats.sekron import SeKron
from autorank.formats.spatial_svd import SpatialSVD
from autorank.formats.tensor_chain import TensorChain
from autorank.formats.tensor_ring import TensorRing
from autorank.formats.tensor_train import TensorTrain
from autorank.formats.tucker2 import Tucker2
from autorank.formats.tucker_cp import TuckerCP

__all__ = ["Factors", "Format", "Options", "get", "names", "register"]

_FORMATS: dict[str, Format] = {}


def register(fmt: Format) -> None:
    """Add a format under its name.

    Raises
    ------
    FormatError
        The name is taken by a format of another class.
    """
    present = _FORMATS.get(fmt.name)
    if present is not None and type(present) is not type(fmt):
        raise FormatError(f"there is a format {fmt.name!r} already ({type(present).__name__}), choose another name")
    _FORMATS[fmt.name] = fmt


def get(name: str) -> Format:
    """Return the format called `name`; FormatError, listing the names, when there is none."""
    try:
        return _FORMATS[name]
    except KeyError:
        raise FormatError(f"there is no format {name!r}, known: {', '.join(names())}") from None


def names() -> tuple[str, ...]:
    """Return the names of all formats, in the order in which they were registered."""
    return tuple(_FORMATS)


for _format in (
    ChannelSVD(),
    SpatialSVD(),
    Tucker2(),
    CP(),
    TuckerCP(),
    Kronecker(),
    SeKron(),
    GroupedSVD(),
    BlockTerm(),
    TensorTrain(),
    TensorRing(),
    TensorChain(),
):
    register(_format)
