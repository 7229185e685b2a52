"""What one traced operation costs in multiply-accumulates: the handles that fvcore is given, and what costs none.

fvcore's own handles count normalisation, interpolation and pooling, and miss convolutions with ``padding='same'``; they
are wrong for a product of which only the second operand has batch dimensions, and for einsum: rounded to four digits,
and far off for three operands or more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

Handle = Callable[[Sequence[Any], Sequence[Any]], "Counter[str]"]

# Arithmetic, activations, normalisation, pooling and resampling, and what only moves data: no product of two tensors.
_FREE = """
abs add add_ addcdiv addcmul all any argmax argmin bitwise_and bitwise_or clamp_max clamp_min clone cos cumsum div
div_ embedding erf exp exp_ fill_ floor_ frac isfinite isinf isnan le lerp log log2 logical_and logical_not
logical_or lt masked_fill_ maximum mean min minimum mul mul_ ne neg norm linalg_vector_norm pow prod reciprocal
round rsqrt rsub sign sin sqrt square std sub sub_ sum topk sort true_divide tril triu var where zero_
celu elu elu_ gelu glu hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh hardtanh_ leaky_relu leaky_relu_
log_sigmoid log_softmax mish mish_ prelu relu6 relu6_ rrelu selu selu_ sigmoid sigmoid_ silu silu_ softmax softplus
softshrink tanh tanh_ threshold
_weight_norm _weight_norm_interface batch_norm group_norm instance_norm layer_norm linalg_norm local_response_norm
native_layer_norm rms_norm
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d grid_sampler lp_pool2d max_pool1d max_pool2d
max_pool2d_with_indices max_pool3d upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
upsample_nearest2d upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact2d affine_grid_generator
alpha_dropout as_strided broadcast_to diagonal dropout_ expand_as feature_dropout feature_dropout_ flip im2col
index_select item lift_fresh masked_select meshgrid movedim numpy_T new_ones ones_like pad pixel_shuffle
pixel_unshuffle rand rand_like randn randn_like repeat repeat_interleave replication_pad1d replication_pad2d
replication_pad3d reflection_pad1d reflection_pad2d reflection_pad3d resize_as_ scalar_tensor scatter scatter_add
squeeze_ sym_size tensor tile unflatten unfold view_as channel_shuffle bernoulli bernoulli_
fake_quantize_per_channel_affine fake_quantize_per_tensor_affine
T adjoint amax amin aminmax clip clip_ concat conj eye hstack linspace log1p logsumexp mH mT nan_to_num ravel real
reshape_as swapaxes swapdims unsafe_chunk unsafe_split vstack
"""
NO_MACS: tuple[str, ...] = tuple(f"aten::{name}" for name in _FREE.split())


def shape(value: Any) -> tuple[int, ...]:
    """Return the sizes of a traced tensor; empty for what is not a tensor with known sizes."""
    return tuple(value.type().sizes()) if value.isCompleteTensor() else ()


def nothing(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    """Count no MACs."""
    return Counter()


def convolution(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    """Count a convolution: S/groups·K products per output element; transposed, T/groups·K per input element."""
    transposed = len(inputs) > 7 and bool(inputs[6].toIValue())
    elements = shape(inputs[0]) if transposed else shape(outputs[0])
    return Counter(conv=math.prod(elements) * math.prod(shape(inputs[1])[1:]))


def product(first: int) -> Handle:
    """Return the handle of a matrix product whose left operand is input number `first`; its last axis is contracted."""

    def handle(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
        return Counter(matmul=math.prod(shape(outputs[0])) * shape(inputs[first])[-1])

    return handle


def addbmm(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    """Count a batch of matrix products that are summed over the batch."""
    return Counter(matmul=math.prod(shape(inputs[1])) * shape(inputs[2])[-1])


def attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    """Count the two products of scaled dot-product attention: queries with keys, weights with values."""
    query, key = shape(inputs[0]), shape(inputs[1])
    return Counter(attention=key[-2] * (math.prod(query) + math.prod(shape(outputs[0]))))


def einsum_macs(equation: str, shapes: Sequence[tuple[int, ...]]) -> int | None:
    """Return the MACs of an einsum of at most two operands; None where the order of contraction decides.

    An index that only one operand has is summed before the product, so it does not multiply the cost.

    Parameters
    ----------
    equation : str
        With or without ``->``; an ellipsis is allowed.
    shapes : sequence of tuple of int
        Sizes of the operands.
    """
    if len(shapes) > 2:
        return None
    if len(shapes) < 2:
        return 0
    left, _, right = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    operands = []
    for labels, sizes_of in zip(left.split(","), shapes, strict=True):
        before, dots, after = labels.partition("...")
        spread = len(sizes_of) - len(before) - len(after) if dots else 0
        # Axes of the ellipsis are aligned on the right, like any broadcast.
        names = [*before, *(f"...{spread - i}" for i in range(spread)), *after]
        operands.append(set(names))
        for name, size in zip(names, sizes_of, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    if "->" in equation:
        kept = {*right.replace("...", ""), *(name for name in sizes if name.startswith("...") and "..." in right)}
    else:
        kept = {name for name in sizes if left.count(name) == 1 or name.startswith("...")}
    return math.prod(sizes[name] for name in sizes if name in kept or name in operands[0] & operands[1])


def handles(uncounted: Counter[str]) -> dict[str, Handle]:
    """Return the handle of every operation that is counted, or known to cost nothing.

    Parameters
    ----------
    uncounted : Counter
        Operations that turn out not to be countable while the graph is read are added here.
    """

    def einsum(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
        operands = [shape(value) for value in inputs[1].node().inputs()]
        macs = einsum_macs(inputs[0].toIValue(), operands)
        if macs is None:
            uncounted[f"aten::einsum with {len(operands)} operands"] += 1
        return Counter(einsum=macs or 0)

    return {
        **dict.fromkeys(NO_MACS, nothing),
        "aten::_convolution": convolution,
        "aten::_convolution_mode": convolution,
        "aten::linear": product(0),
        "aten::matmul": product(0),
        "aten::mm": product(0),
        "aten::bmm": product(0),
        "aten::mv": product(0),
        "aten::dot": product(0),
        "aten::vdot": product(0),
        "aten::addmm": product(1),
        "aten::addmv": product(1),
        "aten::baddbmm": product(1),
        "aten::addbmm": addbmm,
        "aten::scaled_dot_product_attention": attention,
        "aten::einsum": einsum,
    }
