"""What a layer or a model with bits takes to store: exact, from sizes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from autorank.quant.leaf import QuantizedLeaf, can_be_quantized

SCALE_BYTES = 4
"""Of a float32 scale."""
RANGE_BYTES = SCALE_BYTES + 1
"""Of an activation's scale and zero point."""


@dataclass(frozen=True)
class LayerSize:
    """The sizes of a layer on which its bytes depend.

    Attributes
    ----------
    weights : tuple of (entries, channels)
        Of each factor.
    rest : int
        Bytes of its other parameters, as stored.
    """

    weights: tuple[tuple[int, int], ...]
    rest: int

    @classmethod
    def of(cls, layer: nn.Module) -> LayerSize:
        """Return the sizes of a layer without bits; it may be on the meta device."""
        found = [module for module in layer.modules() if can_be_quantized(module)]
        weights = [_weight(module) for module in found]
        sizes = tuple(
            (weight.numel(), weight.shape[int(isinstance(module, _ConvTransposeNd))])
            for module, weight in zip(found, weights, strict=True)
        )
        total = sum(p.numel() * p.element_size() for p in layer.parameters())
        return cls(sizes, total - sum(weight.numel() * weight.element_size() for weight in weights))

    def bytes(self, weight_bits: int, activation_bits: int | None) -> int:
        """Return the bytes of the layer with these bits: its weights, their scales, ranges of inputs, and the rest."""
        return self.rest + sum(
            _bytes(entries, channels, weight_bits, activation_bits) for entries, channels in self.weights
        )


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters, those of quantized leaves at their bits; what is shared counts once."""
    leaves = list(_leaves(model))
    quantized = {id(leaf.weight) for leaf in leaves}
    parameters = [p for p in model.parameters() if not nn.parameter.is_lazy(p)]
    plain = sum(p.numel() * p.element_size() for p in parameters if id(p) not in quantized)
    return plain + sum(
        _bytes(leaf.weight.numel(), leaf.weight.shape[leaf.axis], leaf.weight_bits, leaf.activation_bits)
        for leaf in leaves
    )


def _leaves(model: nn.Module) -> Iterator[QuantizedLeaf]:
    yield from (module for module in model.modules() if isinstance(module, QuantizedLeaf))


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _bytes(entries: int, channels: int, weight_bits: int, activation_bits: int | None) -> int:
    whole = -(-entries * weight_bits // 8)
    return whole + SCALE_BYTES * channels + (RANGE_BYTES if activation_bits is not None else 0)
