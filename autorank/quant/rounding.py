"""Weights rounded up or down by what it does to a factor's outputs, not each to its nearest level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from autorank.formats.running import GroupedLinear
from autorank.layout import swapped
from autorank.modules import kind_of
from autorank.quant.fake import QParams
from autorank.quant.ranges import clipped
from autorank.solvers.moments import Accumulator
from autorank.types import LayerSpec

MAX_PATCH = 2304
"""Most weights of an output for which rounding looks at all of them together; above it goes to the nearest level."""

_SHRINK = 0.01
"""Share of the mean variance that is added to every input's, against a sample that is too small."""

_SWEEPS = 4
_SMALL = 1e-12


class Inputs:
    """Second moments of what a module's weight is multiplied with.

    Parameters
    ----------
    module : nn.Module
        That `can_be_quantized`.
    batches : int
        How many are to come.
    """

    def __init__(self, module: nn.Module, batches: int) -> None:
        self._module = module
        self._sums = Accumulator(_spec(module), MAX_PATCH, float(batches))

    def add(self, x: Tensor) -> None:
        """Look at one batch."""
        self._sums.add(x.reshape(-1, x.shape[-1], 1) if isinstance(self._module, GroupedLinear) else x)

    def moment(self) -> Tensor | None:
        """Return the mean of x xᵀ, (groups, n, n), float64; None where there is none, or n is above `MAX_PATCH`."""
        return self._sums.moment() if self._sums.count and not self._sums.factorised | self._sums.diagonal else None


def _spec(module: nn.Module) -> LayerSpec:
    weight = module.weight
    assert isinstance(weight, Tensor)
    shape = tuple(weight.shape)
    if isinstance(module, GroupedLinear):
        return LayerSpec("factor", "conv1d", (*shape, 1), (1,), (0,), dilation=(1,), groups=module.blocks)
    if not isinstance(module, _ConvNd):
        return LayerSpec("factor", "linear", shape)
    transposed = isinstance(module, _ConvTransposeNd)
    if transposed:
        shape = (shape[1] * module.groups, shape[0] // module.groups, *shape[2:])
    known = kind_of(module)
    return LayerSpec(
        "factor",
        known[1] if known else f"conv{len(shape) - 2}d",  # type: ignore[arg-type]
        shape,
        tuple(module.stride),
        module.padding if isinstance(module.padding, str) else tuple(module.padding),
        module.padding_mode,
        tuple(module.dilation),
        module.groups,
        output_padding=tuple(module.output_padding) if transposed else (),
    )


def groups_of(module: nn.Module) -> int:
    """Return the number of groups of a module's channels."""
    return int(getattr(module, "groups", 1) if not isinstance(module, GroupedLinear) else module.blocks)


def spatial_axes(module: nn.Module) -> int:
    """Return the number of axes after the channels of a module's input."""
    return len(module.kernel_size) if isinstance(module, _ConvNd) else 0


def rows_of(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight as (groups, outputs of each, n), n in the order of the patches."""
    plain = swapped(weight, groups_of(module)) if isinstance(module, _ConvTransposeNd) else weight
    return plain.reshape(groups_of(module), -1, plain[0].numel())


def column_form(module: nn.Module, weight: Tensor) -> Tensor:
    """Return WᵀW of a module's input channels, summed over the kernel: (groups, channels of each, channels of each)."""
    channels = weight.shape[0] // module.groups if isinstance(module, _ConvTransposeNd) else weight.shape[1]
    rows = rows_of(module, weight)
    parts = rows.reshape(*rows.shape[:2], channels, -1).movedim(2, 1).flatten(2)
    return parts @ parts.mT


def stored_rows(module: nn.Module, rows: Tensor, like: Tensor) -> Tensor:
    """Return rows in the layout of the module's weight `like`: undo `rows_of`."""
    if not isinstance(module, _ConvTransposeNd):
        return rows.reshape(like.shape)
    shape = (like.shape[1] * module.groups, like.shape[0] // module.groups, *like.shape[2:])
    return swapped(rows.reshape(shape), module.groups)


def output_grid(module: nn.Module, bits: int, axis: int, moment: Tensor) -> QParams:
    """Return the grid of a module's weight whose nearest levels keep the module's outputs best.

    Parameters
    ----------
    module : nn.Module
    bits, axis : int
        Of the grid.
    moment : Tensor, shape (groups, n, n)
        Of the inputs.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows = rows_of(module, weight.detach().float())
    shape, form = rows.shape, moment.float()
    if axis == 1:  # the groups of a transposed convolution share their scales
        rows = rows.transpose(0, 1)

    def measure(off: Tensor) -> Tensor:
        parts = off.reshape(shape[1], shape[0], -1).transpose(0, 1) if axis == 1 else off.reshape(shape)
        errors = ((parts @ form) * parts).sum(-1)
        return errors.sum(0) if axis == 1 else errors.flatten()

    flat = rows.flatten(1) if axis == 1 else rows.flatten(0, 1)
    return clipped(flat, bits, axis, measure)


def rounded(module: nn.Module, grid: QParams, moment: Tensor) -> Tensor:
    """Return a weight on its grid that keeps the module's outputs; never farther from them than the nearest levels.

    Minimises (w − ŵ)ᵀ H (w − ŵ) for each output, H the second moment of the inputs: one entry after the other, those
    to come making up for those done, and then one entry at a time to its best level as long as that helps.

    Parameters
    ----------
    module : nn.Module
    grid : QParams
        Of its weight.
    moment : Tensor, shape (groups, n, n)

    Returns
    -------
    Tensor
        In the layout and type of the module's weight.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    plain = weight.detach().double()
    scale = rows_of(module, grid.spread(grid.scale.double(), plain).expand_as(plain).contiguous())[..., :1]
    wanted = rows_of(module, plain) / scale
    nearest = rows_of(module, grid.levels(weight).double())
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    mean = moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    held = moment + (_SHRINK * mean + _SMALL) * eye
    found = _descend(_fed_back(wanted, held, grid), wanted, held, grid)
    kept = error(found, wanted, moment) <= error(nearest, wanted, moment)
    return stored_rows(module, torch.where(kept[..., None], found, nearest) * scale, weight).to(weight.dtype)


def best_rounded(module: nn.Module, grids: Sequence[QParams], moment: Tensor) -> tuple[QParams, Tensor]:
    """Return the grid, channel by channel, and the weight rounded on it with which the outputs err least.

    Parameters
    ----------
    module : nn.Module
    grids : sequence of QParams
        That differ in their scales.
    moment : Tensor, shape (groups, n, n)
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    plain, axis = weight.detach(), grids[0].axis
    best, scale, least = plain, grids[0].scale, torch.full_like(grids[0].scale, torch.inf, dtype=torch.float64)
    for grid in grids:
        found = rounded(module, grid, moment)
        off = rows_of(module, (found - plain).double())
        errors = ((off @ moment) * off).sum(-1)
        errors = errors.sum(0) if axis == 1 else errors.flatten()
        better = errors < least
        best = torch.where(grid.spread(better, plain), found, best)
        scale, least = torch.where(better, grid.scale, scale), torch.where(better, errors, least)
    return replace(grids[0], scale=scale), best


def error(levels: Tensor, wanted: Tensor, moment: Tensor) -> Tensor:
    """Return (w − ŵ)ᵀ H (w − ŵ) of every row, (groups, rows), in units of the squared scale."""
    off = levels - wanted
    return ((off @ moment) * off).sum(-1)


def _fed_back(wanted: Tensor, moment: Tensor, grid: QParams) -> Tensor:
    """Round entry by entry, each time moving those to come to where they make up best (Frantar et al. 2023)."""
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)
    left = wanted.clone()
    for j in range(left.shape[-1]):
        level = torch.round(left[..., j]).clamp(grid.low, grid.high)
        off = (left[..., j] - level) / upper[:, j, j, None]
        left[..., j] = level
        left[..., j + 1 :] -= off[..., None] * upper[:, None, j, j + 1 :]
    return left


def _descend(levels: Tensor, wanted: Tensor, moment: Tensor, grid: QParams) -> Tensor:
    """Move one entry after the other to its best level, until none moves."""
    found = levels.clone()
    slope = (found - wanted) @ moment
    size = moment.diagonal(dim1=1, dim2=2)[:, None]
    for _ in range(_SWEEPS):
        moved = False
        for j in range(found.shape[-1]):
            best = torch.round(found[..., j] - slope[..., j] / size[..., j]).clamp(grid.low, grid.high)
            change = best - found[..., j]
            if bool(change.any()):
                moved = True
                found[..., j] = best
                slope += change[..., None] * moment[:, None, j]
        if not moved:
            break
    return found
