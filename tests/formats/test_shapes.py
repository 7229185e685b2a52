"""Random shapes and geometries: the layer equals the dense convolution, the cost equals what runs."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from autorank import formats
from autorank.testing.cases import dense, make, random

bounded = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def layers(draw):
    d = draw(st.integers(0, 3))
    channels = st.integers(1, 7)
    groups = draw(st.integers(1, 3)) if d else 1
    shape = [draw(channels) * groups, draw(channels)]
    if d == 0:
        return make(
            "linear", tuple(shape), tuple(draw(st.lists(st.integers(1, 4), max_size=2))), bias=draw(st.booleans())
        )
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(d))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(d))
    reach = [e * (k - 1) + 1 for e, k in zip(dilation, kernel, strict=True)]
    if draw(st.booleans()):
        return transposed(draw, (*shape, *kernel), dilation, reach, groups)
    size = tuple(draw(st.integers(r, r + 4)) for r in reach)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(d))
    # reflection needs less padding than there is input, and 'same' pads by up to half the reach
    padding = draw(st.sampled_from(["own", "same", "valid"]))
    if padding == "own":
        padding = tuple(draw(st.integers(0, min(2, n - 1))) for n in size)
    if padding == "same":
        stride = (1,) * d
    return make(
        f"conv{d}d",
        (*shape, *kernel),
        size,
        stride=stride,
        padding=padding,
        padding_mode=mode,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
    )


def transposed(draw, shape, dilation, reach, groups):
    d = len(reach)
    size = tuple(draw(st.integers(1, 4)) for _ in range(d))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(d))
    more = tuple(draw(st.integers(0, max(s, e) - 1)) for s, e in zip(stride, dilation, strict=True))
    whole = [(n - 1) * s + r + o for n, s, r, o in zip(size, stride, reach, more, strict=True)]
    # at least one output is left when both ends are cropped
    padding = tuple(draw(st.integers(0, min(3, (w - 1) // 2))) for w in whole)
    return make(
        f"conv_transpose{d}d",
        shape,
        size,
        stride=stride,
        padding=padding,
        output_padding=more,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
    )


@pytest.mark.parametrize("name", formats.names())
@bounded
@given(case=layers(), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_layer_and_cost(name, case, share, seed):
    fmt, spec = formats.get(name), case.spec
    for options in fmt.variants(spec):
        if fmt.supports(spec, options) is not None:
            continue
        rank = tuple(1 + int(share * (top - 1)) for top in fmt.max_rank(spec, options))
        weight = random(spec.weight_shape, seed)
        bias = random((spec.out_channels,), seed + 1) if spec.bias else None
        factors = {k: v.double() for k, v in fmt.fit(weight, spec, rank, options).items()}
        layer = fmt.layer(spec, rank, options, factors, bias)
        x = case.input(2, seed + 2)
        reference = dense(spec, fmt.reconstruct(factors, spec, rank, options), bias)
        torch.testing.assert_close(layer(x), reference(x), rtol=1e-9, atol=1e-9)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x[:1])
        cost = fmt.cost(spec, rank, options)
        assert (cost.macs, cost.params) == (counter.get_total_flops() // 2, sum(p.numel() for p in layer.parameters()))
