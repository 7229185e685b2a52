"""Channels between two factors of one layer, mixed and scaled so that both sides quantize well.

Between two factors without anything but linear maps in between, any invertible matrix may be put, and its inverse
behind it: the layer stays what it is. A diagonal one gives the channels equal ranges (cross-layer equalisation, Nagel
et al., ICCV 2019); a rotation spreads what a few channels hold over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autorank.formats.running import DecomposedLayer, Pad
from autorank.quant.fake import affine
from autorank.quant.leaf import QuantizedLeaf
from autorank.quant.ranges import least_squares_range, weight_grid
from autorank.quant.rounding import rows_of, stored_rows

_POSITIONS = 1024
"""Positions of the channels' values that are looked at."""

_ROTATIONS = 2
_TINY = 1e-30
_LEAST = 1e-4
"""Smallest size of a channel, relative to the largest, that scaling looks at."""


@dataclass(frozen=True)
class Junction:
    """Two factors of a layer, one after the other; `name` is the second one's."""

    name: str
    first: QuantizedLeaf
    second: QuantizedLeaf


def junctions(model: nn.Module) -> list[Junction]:
    """Return where two leaves of one decomposed layer follow one another with at most padding between them."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, DecomposedLayer))
    return [found for name, layer in layers for found in _in(name, layer)]


def _in(name: str, layer: DecomposedLayer) -> Iterator[Junction]:
    last: QuantizedLeaf | None = None
    for key, module in layer.named_children():
        if isinstance(module, Pad):
            continue
        if isinstance(module, QuantizedLeaf):
            if last is not None:
                yield Junction(f"{name}.{key}" if name else key, last, module)
            last = module
        else:
            last = None


@dataclass(frozen=True)
class _Pair:
    """Two factors and what is between them, in float64.

    Attributes
    ----------
    first : Tensor, shape (groups, outputs of each, n)
    second : Tensor, shape (groups, outputs of each, C / groups, K)
    rows : Tensor, shape (positions, C)
    matrix : Tensor, shape (blocks, b, b)
        That has been put between the two.
    """

    first: Tensor
    second: Tensor
    rows: Tensor
    matrix: Tensor

    def mixed(self, matrix: Tensor) -> _Pair:
        """Return the pair with a block-diagonal matrix after the first factor and its inverse before the second."""
        blocks, b, _ = matrix.shape
        first = matrix @ self.first.reshape(blocks, b, -1)
        rows = torch.einsum("pci,cji->pcj", self.rows.reshape(-1, blocks, b), matrix)
        second = _before(self.second, torch.linalg.inv(matrix))
        return _Pair(first.reshape(self.first.shape), second, rows.reshape(self.rows.shape), matrix)

    def wrong(self, junction: Junction, moments: Sequence[Tensor | None], cut: bool) -> float:
        """Return the squared error of the outputs that quantizing both weights and what is between makes.

        Noise at different kernel positions of the second factor is taken for uncorrelated.
        """
        groups, _, channels, _ = self.second.shape
        wide = self.second.permute(0, 2, 1, 3).flatten(2)  # (groups, C / groups, outputs · K)
        form = wide @ wide.mT
        noise = _off(self.first, junction.first.weight_bits)
        if moments[0] is None:
            spread = torch.diag_embed(noise.square().sum(2))
        else:
            spread = noise @ moments[0].to(noise) @ noise.mT
        total = float((_blocks_of(spread, groups) * form).sum())
        noise = _off(self.second, junction.second.weight_bits)
        if moments[1] is None:
            total += float((noise.square().sum((1, 3)).flatten() * self.rows.square().mean(0)).sum())
        else:
            noise = _before(noise, self.matrix).flatten(2)  # back to what the moments are of
            total += float(((noise @ moments[1].to(noise)) * noise).sum())
        bits = junction.second.activation_bits
        if bits is not None:
            low, high = min(0.0, float(self.rows.min())), max(0.0, float(self.rows.max()))
            if cut and high > low:
                low, high = least_squares_range(self.rows, low, high, bits, form, rounds=0)
            off = (affine(low, high, bits).to(wide.device).fake(self.rows) - self.rows).reshape(-1, groups, channels)
            total += float(torch.einsum("pgi,gim->pgm", off, wide).square().sum()) / len(off)
        return total


def _before(second: Tensor, matrix: Tensor) -> Tensor:
    """Return a weight (groups, outputs, C / groups, K) that is applied after a matrix (blocks, b, b)."""
    groups, b = second.shape[0], matrix.shape[-1]
    cut = second.unflatten(2, (-1, b))
    return torch.einsum("gopik,gpij->gopjk", cut, matrix.reshape(groups, -1, b, b)).reshape(second.shape)


def _blocks_of(spread: Tensor, groups: int) -> Tensor:
    """Return the diagonal blocks (groups, c, c) of a block-diagonal matrix given by its own blocks."""
    whole = torch.block_diag(*spread)
    size = len(whole) // groups
    return torch.stack([whole[i : i + size, i : i + size] for i in range(0, len(whole), size)])


def _off(weight: Tensor, bits: int) -> Tensor:
    """Return what rounding a weight (groups, outputs, ...) to the nearest levels changes."""
    rows = weight.flatten(0, 1).flatten(1)
    return (weight_grid(rows, bits, how="max").fake(rows) - rows).reshape(weight.shape)


def equalise(
    junction: Junction, rows: Tensor, moments: Sequence[Tensor | None] = (None, None), cut: bool = True
) -> bool:
    """Put that matrix between two factors with which their quantized product errs least; say whether it is another.

    Parameters
    ----------
    junction : Junction
        Its weights are changed in place; the layer computes what it did, up to rounding.
    rows : Tensor, shape (positions, C)
        Values of the channels between the two.
    moments : pair of Tensor or None
        Second moments of what the first and the second factor are multiplied with, as `rounding.Inputs` has them.
    cut : bool
        Whether ranges of activations will be clipped where that makes the squared error smaller.
    """
    first, second = junction.first.module, junction.second.module
    weights = [module.weight.detach().double() for module in (first, second)]  # type: ignore[operator]
    made, used = rows_of(first, weights[0]), rows_of(second, weights[1])
    channels, groups = rows.shape[1], used.shape[0]
    few = rows[:: max(1, len(rows) // _POSITIONS)].double()
    wide = used.reshape(groups, used.shape[1], channels // groups, -1)
    pair = _Pair(made, wide, few, torch.ones(channels, 1, 1).to(few))
    blocks = math.lcm(made.shape[0], groups)
    matrices = _matrices(pair, blocks if channels % blocks == 0 else channels)
    best = min([pair, *map(pair.mixed, matrices)], key=lambda found: found.wrong(junction, moments, cut))
    if best is pair:
        return False
    with torch.no_grad():
        first.weight.copy_(stored_rows(first, best.first, weights[0]))  # type: ignore[operator]
        second.weight.copy_(stored_rows(second, best.second.reshape(used.shape), weights[1]))  # type: ignore[operator]
        if isinstance(first.bias, Tensor):
            bias = first.bias.double().reshape(len(best.matrix), -1, 1)
            first.bias.copy_((best.matrix @ bias).flatten())
    return True


def _matrices(pair: _Pair, blocks: int) -> list[Tensor]:
    """Return what is tried: channels scaled to equal sizes, by several measures, and rotated."""
    channels = pair.rows.shape[1]
    wide = pair.second.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)  # (C, outputs · K)
    power, largest = pair.rows.square().mean(0).sqrt(), pair.rows.abs().amax(0)
    scales = [largest, (largest / _floor(wide.abs().amax(1))).sqrt(), (power / _floor(wide.norm(dim=1))).sqrt()]
    found = [(1 / _floor(scale)).reshape(channels, 1, 1) for scale in scales]
    size = channels // blocks
    if size > 1:
        balanced = torch.diag_embed(found[-1].reshape(blocks, size))
        found += [_rotation(size, seed).to(balanced) @ balanced for seed in range(_ROTATIONS)]
    return found


def _floor(sizes: Tensor) -> Tensor:
    """Return sizes of which none is next to nothing, with a geometric mean of one."""
    found = sizes.clamp_min(float(sizes.max()) * _LEAST + _TINY)
    return found / found.log().mean().exp()


def _rotation(size: int, seed: int) -> Tensor:
    """Return a random orthogonal matrix, always the same one for a seed."""
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    return q * r.diagonal().sign()
