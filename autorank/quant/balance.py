"""Channels between two factors of one layer, mixed and scaled so that both sides quantize well.

Between two factors without anything but linear maps in between, any invertible matrix may be put, and its inverse
behind it: the layer stays what it is. A diagonal one gives the channels equal ranges (cross-layer equalisation, Nagel
et al., ICCV 2019); a rotation spreads what a few channels hold over all of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from autorank.formats.running import DecomposedLayer, Pad
from autorank.quant.fake import affine
from autorank.quant.leaf import QuantizedLeaf, with_weight
from autorank.quant.ranges import weight_grid
from autorank.quant.rounding import rows_of, spatial_axes, stored_rows

VALUES = 1 << 18
"""Values of a first factor's input, about, on which matrices are tried."""

_EXAMPLES = 8
_ROTATIONS = 2
_TINY = 1e-30
_LEAST = 1e-4
"""Smallest size of a channel, relative to the largest, that scaling looks at."""


class Junction:
    """Two factors of a layer, one after the other, and the padding between them; `name` is the second one's."""

    def __init__(self, name: str, first: QuantizedLeaf, pads: tuple[Pad, ...], second: QuantizedLeaf) -> None:
        self.name, self.first, self.pads, self.second = name, first, pads, second
        self.seen: Tensor | None = None

    def see(self, x: Tensor) -> None:
        """Keep some examples of the first factor's input, of the first batch that comes."""
        if self.seen is None and x.numel():
            each = max(1, x[0].numel())
            self.seen = x[: max(_EXAMPLES, VALUES // each)].detach() if x.ndim > 1 else x.detach()

    def between(self, x: Tensor) -> Tensor:
        """Return what the second factor gets of what the first one makes."""
        for pad in self.pads:
            x = pad(x)
        return x


def junctions(model: nn.Module) -> list[Junction]:
    """Return where two leaves of one decomposed layer follow one another with at most padding between them."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, DecomposedLayer))
    return [found for name, layer in layers for found in _in(name, layer)]


def _in(name: str, layer: DecomposedLayer) -> Iterator[Junction]:
    last: QuantizedLeaf | None = None
    pads: tuple[Pad, ...] = ()
    for key, module in layer.named_children():
        if isinstance(module, Pad):
            pads = (*pads, module)
            continue
        leaf = module if isinstance(module, QuantizedLeaf) else None
        if last is not None and leaf is not None:
            yield Junction(f"{name}.{key}" if name else key, last, pads, leaf)
        last, pads = leaf, ()


def equalise(junction: Junction, centred: bool = True) -> bool:
    """Put that matrix between two factors with which they err least when quantized; say whether it is another.

    Each of a few is tried on the inputs that `junction` has seen, with weights at their nearest levels.

    Parameters
    ----------
    junction : Junction
        Its weights are changed in place; the layer computes what it did, up to rounding.
    centred : bool
        Whether an error that is the same for all examples counts nothing: where weights are rounded for the outputs it
        is rounded away.
    """
    if junction.seen is None:
        return False
    first, second = junction.first.module, junction.second.module
    h = first(junction.seen)
    wanted = second(junction.between(h))
    found = _matrices(first, second, h)
    best, least = None, _wrong(junction, first, second, wanted, centred)
    for matrix in found:
        tried = copy.deepcopy(first), copy.deepcopy(second)
        put(*tried, matrix)
        wrong = _wrong(junction, *tried, wanted, centred)
        if wrong < least:
            best, least = matrix, wrong
    if best is None:
        return False
    put(first, second, best)
    return True


def put(first: nn.Module, second: nn.Module, matrix: Tensor) -> None:
    """Put a block-diagonal matrix (blocks, b, b), float64, after one module and its inverse before the next."""
    blocks, b, _ = matrix.shape
    with torch.no_grad():
        weight: Tensor = first.weight  # type: ignore[assignment]
        rows = rows_of(first, weight.double())
        mixed = matrix @ rows.reshape(blocks, b, -1)
        weight.copy_(stored_rows(first, mixed.reshape(rows.shape), weight))
        if isinstance(first.bias, Tensor):
            first.bias.copy_((matrix @ first.bias.double().reshape(blocks, b, 1)).flatten())
        weight = second.weight  # type: ignore[assignment]
        rows = rows_of(second, weight.double())
        cut = rows.reshape(rows.shape[0], rows.shape[1], -1, b, rows.shape[2] * rows.shape[0] // (blocks * b))
        inverse = torch.linalg.inv(matrix).reshape(rows.shape[0], -1, b, b)
        mixed = torch.einsum("gopik,gpij->gopjk", cut, inverse)
        weight.copy_(stored_rows(second, mixed.reshape(rows.shape), weight))


def _wrong(junction: Junction, first: nn.Module, second: nn.Module, wanted: Tensor, centred: bool) -> float:
    """Return the squared error of the outputs with both weights, and what is between them, at their nearest levels."""
    assert junction.seen is not None
    h = with_weight(first, junction.seen, _nearest(junction.first, first))
    bits = junction.second.activation_bits
    if bits is not None:
        low, high = torch.aminmax(h)
        h = affine(float(low), float(high), bits).to(h.device).fake(h)
    off = with_weight(second, junction.between(h), _nearest(junction.second, second)) - wanted
    if centred:
        axis = off.ndim - 1 - spatial_axes(second)
        off = off - off.mean([i for i in range(off.ndim) if i != axis], keepdim=True)
    return float(off.double().square().sum())


def _nearest(leaf: QuantizedLeaf, module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight_grid(weight, leaf.weight_bits, leaf.axis, "max").fake(weight)


def _matrices(first: nn.Module, second: nn.Module, h: Tensor) -> list[Tensor]:
    """Return what is tried: channels scaled to equal sizes, by several measures, and rotated."""
    values = h.movedim(-1 - spatial_axes(second), -1).flatten(0, -2).double()
    channels = values.shape[1]
    rows = rows_of(second, second.weight.double())  # type: ignore[arg-type]
    wide = rows.reshape(*rows.shape[:2], channels // rows.shape[0], -1).transpose(1, 2).flatten(2).flatten(0, 1)
    power, largest = values.square().mean(0).sqrt(), values.abs().amax(0)
    scales = [largest, (largest / _floor(wide.abs().amax(1))).sqrt(), (power / _floor(wide.norm(dim=1))).sqrt()]
    found = [(1 / _floor(scale)).reshape(channels, 1, 1) for scale in scales]
    blocks = math.lcm(rows_of(first, first.weight.detach()).shape[0], rows.shape[0])  # type: ignore[operator]
    size = channels // blocks if channels % blocks == 0 else 1
    if size > 1:
        balanced = torch.diag_embed(found[-1].reshape(-1, size))
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
