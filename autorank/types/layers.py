"""Layers of a model, what they cost, and what is left alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Scalar = str | int | float | bool
Kind = Literal["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"]


@dataclass(frozen=True, slots=True)
class CallSize:
    """One call of a layer in the profiled forward pass.

    Attributes
    ----------
    batch : int
        Size of the batch dimension seen by the layer (1 unless the model folds other dimensions into it).
    input, output : tuple of int
        Spatial sizes before and after the layer; for a linear layer the leading dimensions after the batch.
    """

    batch: int
    input: tuple[int, ...]
    output: tuple[int, ...]

    @property
    def positions(self) -> int:
        """Number of output positions of this call."""
        return self.batch * math.prod(self.output)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Everything about one layer that a format needs to know, without the weights.

    Attributes
    ----------
    name : str
        Qualified module name in the model.
    kind : Kind
    weight_shape : tuple of int
        (T, S/groups, K1, ..., Kd) for every kind; (T, S) for a linear layer. PyTorch stores the weight of a transposed
        convolution as (S, T/groups, K1, ..., Kd): `autorank.layout` converts.
    stride, dilation : tuple of int
        One entry per spatial dimension (empty for a linear layer).
    padding : tuple of int or str
        One entry per spatial dimension, or ``"same"`` / ``"valid"``.
    padding_mode : str
        ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
    groups : int
    bias : bool
    calls : tuple of CallSize
        The calls seen in one forward pass of one example; empty when the spec was read off a module without running it.
    dtype : str
        Number type of the weight, as PyTorch names it without ``torch.``.
    output_padding : tuple of int
        Of a transposed convolution, one entry per spatial dimension; empty for all other kinds.
    """

    name: str
    kind: Kind
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    padding_mode: str = "zeros"
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = False
    calls: tuple[CallSize, ...] = ()
    dtype: str = "float32"
    output_padding: tuple[int, ...] = ()

    @property
    def transposed(self) -> bool:
        """Whether the layer is a transposed convolution."""
        return self.kind.startswith("conv_transpose")

    def pads(self, axis: int) -> tuple[int, int]:
        """Return the padding before and after a spatial axis; ``same`` pads one more after it where it is uneven."""
        if self.padding == "same":
            total = self.dilation[axis] * (self.kernel[axis] - 1)
            return total // 2, total - total // 2
        if isinstance(self.padding, str):
            return 0, 0
        return self.padding[axis], self.padding[axis]

    @property
    def out_channels(self) -> int:
        """T, the number of output channels over all groups."""
        return self.weight_shape[0]

    @property
    def in_channels(self) -> int:
        """S, the number of input channels over all groups."""
        return self.weight_shape[1] * self.groups

    @property
    def kernel(self) -> tuple[int, ...]:
        """(K1, ..., Kd), the spatial sizes of the kernel; empty for a linear layer."""
        return self.weight_shape[2:]

    @property
    def weight_count(self) -> int:
        """Number of weights, bias not counted."""
        return math.prod(self.weight_shape)

    @property
    def params(self) -> int:
        """Number of parameters of the dense layer, bias included."""
        return self.weight_count + (self.out_channels if self.bias else 0)

    @property
    def macs(self) -> int:
        """MACs of the dense layer over all its calls for one example.

        Every weight is used once per output position; by a transposed convolution, once per input position.
        """
        if self.transposed:
            return self.weight_count * sum(call.batch * math.prod(call.input) for call in self.calls)
        return self.weight_count * sum(call.positions for call in self.calls)


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """A layer that is never decomposed, and the reason in words."""

    name: str
    type: str
    reason: str
    params: int = 0
    macs: int = 0


FLOAT_BITS = 32
"""What a number in floating point counts as in bit operations."""


def bit_operations(macs: int, weight_bits: int | None, activation_bits: int | None) -> int:
    """Return the bit operations of multiply-accumulates: MACs × bits of the weight × bits of the activation."""
    return macs * (weight_bits or FLOAT_BITS) * (activation_bits or FLOAT_BITS)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What one decomposed layer costs.

    Attributes
    ----------
    macs : int
        For one example, over all calls of the layer.
    params : int
        Bias included.
    bytes : int or None
        With the bits of its choice; None without bits, where they follow the parameters.
    bops : int or None
        Bit operations with the bits of its choice; None without bits, where they follow the MACs.
    """

    macs: int
    params: int
    bytes: int | None = None
    bops: int | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model costs for one example.

    Attributes
    ----------
    macs : int
        Multiply-accumulates of convolutions, linear maps and matrix products (normalisation layers not counted).
    params : int
        Number of parameters.
    bytes : int
        Bytes of the parameters as stored; of quantized layers at their bits, with scales and ranges.
    latency_ms : float or None
        Measured or predicted milliseconds; None when latency was not asked for.
    bops : int or None
        Bit operations: MACs × bits of the weight × bits of the activation, 32 in floating point; None where neither a
        layer may have bits nor anybody asked for them.
    """

    macs: int
    params: int
    bytes: int
    latency_ms: float | None = None
    bops: int | None = None

    def kept(self, dense: Cost) -> dict[str, float]:
        """Return this cost divided by `dense`: ``macs_kept``, ``params_kept``, ``bytes_kept``, others if known."""
        kept = {
            "macs_kept": self.macs / max(dense.macs, 1),
            "params_kept": self.params / max(dense.params, 1),
            "bytes_kept": self.bytes / max(dense.bytes, 1),
        }
        if self.latency_ms is not None and dense.latency_ms:
            kept["latency_kept"] = self.latency_ms / dense.latency_ms
        if self.bops is not None and dense.bops:
            kept["bops_kept"] = self.bops / dense.bops
        return kept


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """The decomposable layers of a model in forward order, its dense cost, and what is left alone and why."""

    layers: tuple[LayerSpec, ...]
    left_alone: tuple[LeftAlone, ...]
    dense: Cost
    unsupported_ops: tuple[tuple[str, int], ...] = ()

    def layer(self, name: str) -> LayerSpec:
        """Return the spec of the layer called `name`; KeyError when there is none."""
        for spec in self.layers:
            if spec.name == name:
                return spec
        raise KeyError(name)
