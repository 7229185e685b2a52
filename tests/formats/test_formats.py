"""What is particular to each shipped format, and the registry."""

import pytest
import torch
from torch import nn

from autorank import formats
from autorank.errors import FormatError
from autorank.formats import channel_svd
from autorank.formats.channel_svd import ChannelSVD
from autorank.formats.tucker2 import Tucker2
from autorank.testing.cases import make, random
from autorank.types import CallSize, LayerSpec

DEPTHWISE = make("conv2d", (8, 1, 3, 3), (6, 6), padding=1, groups=8).spec
POINTWISE = make("conv2d", (8, 6, 1, 1), (6, 6)).spec
SQUARE = make("conv2d", (8, 6, 3, 3), (6, 6), padding=1).spec
FLAT = make("conv2d", (8, 6, 1, 3), (6, 6)).spec
VOLUME = make("conv3d", (8, 6, 3, 3, 3), (6, 6, 6), padding=1).spec
SLICE = make("conv3d", (8, 6, 1, 3, 3), (6, 6, 6)).spec
SEQUENCE = make("conv1d", (8, 6, 3), (9,)).spec
LINEAR = make("linear", (8, 6), ()).spec


def test_the_registry_lists_the_formats():
    assert set(formats.names()) >= {"channel_svd", "spatial_svd", "tucker2"}
    with pytest.raises(FormatError, match=r"no format 'svd', known: .*channel_svd.*spatial_svd.*tucker2"):
        formats.get("svd")


def test_a_name_can_be_registered_again_by_its_own_class_only():
    class Other(ChannelSVD):
        pass

    before = formats.get("channel_svd")
    with pytest.raises(FormatError, match="there is a format 'channel_svd' already"):
        formats.register(Other())
    formats.register(ChannelSVD())
    assert type(formats.get("channel_svd")) is type(before)


@pytest.mark.parametrize(
    ("name", "spec", "options", "reason"),
    [
        ("channel_svd", DEPTHWISE, (), "depthwise conv2d"),
        ("tucker2", DEPTHWISE, (), "depthwise conv2d"),
        ("channel_svd", make("linear", (1, 5), ()).spec, (), "cannot make it smaller"),
        ("tucker2", LINEAR, (), "only two modes"),
        ("tucker2", POINTWISE, (), "only two modes"),
        ("spatial_svd", LINEAR, (), "at least two"),
        ("spatial_svd", SEQUENCE, (), "at least two"),
        ("spatial_svd", POINTWISE, (), "size 1 on h"),
        ("spatial_svd", FLAT, (("first", "h"),), "size 1 on h"),
        ("spatial_svd", FLAT, (("first", "w"),), "size 1 on h"),
        ("spatial_svd", SLICE, (("first", "d"),), "size 1 on d"),
        ("spatial_svd", SLICE, (("first", "hw"),), "size 1 on d"),
        ("spatial_svd", SQUARE, (("first", "d"),), "one of h, w"),
        ("spatial_svd", SQUARE, (("first", "hw"),), "one of h, w"),
        ("channel_svd", SQUARE, (("first", "h"),), "unknown option 'first'"),
        ("block_term", SQUARE, (("blocks", 2.0),), "option blocks must be one of 2, 4, 8, not 2.0"),
        ("block_term", SQUARE, (("blocks", "2"),), "option blocks must be one of 2, 4, 8, not '2'"),
        ("tensor_train", SQUARE, (("inner", True),), "option inner must be one of"),
        ("tensor_train", SQUARE, (("inner", [1.0]),), "option inner must be one of"),
        ("channel_svd", SQUARE, (("whiten", ["input"]),), "option whiten must be one of"),
        ("kronecker", SQUARE, (("a", ["2x2x1x1"]),), "option a must be"),
        ("kronecker", SQUARE, (("a", True),), "option a must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refusals(name, spec, options, reason):
    assert reason in formats.get(name).supports(spec, options)


def test_a_whole_number_may_stand_for_a_float_option():
    assert formats.get("tensor_train").supports(SQUARE, (("inner", 1),)) is None


@pytest.mark.parametrize("rank", [None, 2.0, "2", True, [2, 2], (), torch.tensor(2)], ids=str)
def test_from_layer_refuses_a_wrong_rank_with_the_range(rank):
    with pytest.raises(FormatError, match="R from 1 to 8"):
        channel_svd.from_layer(nn.Conv2d(6, 8, 3), rank)


@pytest.mark.parametrize("options", [None, 5, "whiten", ["whiten", "input"]], ids=str)
def test_from_layer_refuses_options_that_are_no_mapping(options):
    with pytest.raises(FormatError, match="mapping"):
        channel_svd.from_layer(nn.Conv2d(6, 8, 3), 2, options)


@pytest.mark.parametrize(
    "layer", [None, torch.ones(8, 6), nn.ReLU(), nn.Linear(6, 8, device="meta")], ids=lambda v: type(v).__name__
)
def test_from_layer_refuses_what_is_no_layer(layer):
    with pytest.raises(FormatError, match="decomposed"):
        channel_svd.from_layer(layer, 2)


def test_spatial_svd_of_a_depthwise_convolution_is_the_separable_filter():
    fmt = formats.get("spatial_svd")
    assert fmt.supports(DEPTHWISE) is None
    outer = random((8, 1, 3, 1), 0) * random((8, 1, 1, 3), 1)
    factors = fmt.fit(outer, DEPTHWISE, (1,))
    torch.testing.assert_close(fmt.reconstruct(factors, DEPTHWISE, (1,)), outer.float())
    assert fmt.cost(DEPTHWISE, (1,)).params == 8 * (3 + 3) + 8


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (SQUARE, ["h", "w"]),
        (FLAT, []),
        (VOLUME, ["d", "h", "w", "dh", "dw", "hw"]),
        (SLICE, ["h", "w"]),
        (SEQUENCE, []),
        (LINEAR, []),
    ],
    ids=["conv2d", "conv2d-1x3", "conv3d", "conv3d-1x3x3", "conv1d", "linear"],
)
def test_spatial_variants(spec, expected):
    fmt = formats.get("spatial_svd")
    variants = fmt.variants(spec)
    assert [dict(options)["first"] for options in variants] == expected
    assert all(fmt.supports(spec, options) is None for options in variants)


@pytest.mark.parametrize(
    ("first", "kernels", "strides", "paddings", "dilations"),
    [
        ("h", [(3, 1), (1, 5)], [(2, 1), (1, 3)], [(1, 0), (0, 2)], [(2, 1), (1, 1)]),
        ("w", [(1, 5), (3, 1)], [(1, 3), (2, 1)], [(0, 2), (1, 0)], [(1, 1), (2, 1)]),
    ],
)
def test_spatial_svd_gives_each_axis_its_own_geometry(first, kernels, strides, paddings, dilations):
    spec = make(
        "conv2d", (8, 6, 3, 5), (12, 13), stride=(2, 3), padding=(1, 2), padding_mode="reflect", dilation=(2, 1)
    ).spec
    layer = formats.get("spatial_svd").layer(spec, (4,), (("first", first),))
    assert [m.kernel_size for m in layer] == kernels
    assert [m.stride for m in layer] == strides
    assert [m.padding for m in layer] == paddings
    assert [m.dilation for m in layer] == dilations
    assert [m.padding_mode for m in layer] == ["reflect", "reflect"]
    assert [m.bias is not None for m in layer] == [False, True]


@pytest.mark.parametrize(
    ("rank", "names"),
    [
        ((4, 3), ["input", "core", "output"]),
        ((8, 3), ["input", "core"]),
        ((4, 6), ["core", "output"]),
        ((8, 6), ["core"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("whiten", ["none", "input"])
def test_tucker_mode_at_full_rank_needs_no_pointwise_convolution(rank, names, whiten):
    from autorank.testing.cases import separable_statistics

    fmt = formats.get("tucker2")
    options = (("whiten", whiten),)
    factors = fmt.fit(random(SQUARE.weight_shape, 0), SQUARE, rank, options, separable_statistics(SQUARE))
    assert list(factors) == names
    layer = fmt.layer(SQUARE, rank, options, factors, torch.ones(8))
    assert [name for name, _ in layer.named_children()] == names
    assert layer[-1].bias is not None
    if "input" in factors:
        rows = factors["input"].flatten(2)
        torch.testing.assert_close(rows @ rows.mT, torch.eye(rank[1])[None], atol=1e-5, rtol=0)


def test_tucker_with_both_modes_full_costs_what_the_dense_layer_costs():
    cost = formats.get("tucker2").cost(SQUARE, (8, 6))
    assert (cost.macs, cost.params) == (SQUARE.macs, SQUARE.params)


def test_channel_svd_error_is_the_tail_of_the_singular_values():
    weight = random((10, 7), 0)
    spec = make("linear", (10, 7), ()).spec
    values = torch.linalg.svdvals(weight)
    for rank in range(1, 8):
        factors = ChannelSVD().fit(weight, spec, (rank,))
        error = (ChannelSVD().reconstruct(factors, spec, (rank,)) - weight).norm()
        assert float(error) == pytest.approx(float(values[rank:].square().sum().sqrt()), abs=1e-5)


def test_svd_factors_are_balanced():
    factors = ChannelSVD().fit(1e6 * random(SQUARE.weight_shape, 0), SQUARE, (5,))
    torch.testing.assert_close(factors["first"].flatten(2).norm(dim=2), factors["second"].flatten(2).norm(dim=1))


def test_weights_beyond_float32_are_refused():
    spec = make("linear", (8, 6), ()).spec
    with pytest.raises(FormatError, match=r"'block\.layer'.*float32"):
        ChannelSVD().fit(1e200 * random((8, 6), 0), spec, (3,))


def test_cost_counts_every_call_with_its_own_size():
    spec = LayerSpec(
        "c",
        "conv2d",
        (8, 6, 3, 3),
        (2, 2),
        (1, 1),
        "zeros",
        (1, 1),
        1,
        True,
        (CallSize(1, (8, 8), (4, 4)), CallSize(3, (16, 8), (8, 4))),
    )
    cost = Tucker2().cost(spec, (4, 3))
    by_hand = sum(n * (i * 3 * 6 + o * (4 * 3 * 9 + 8 * 4)) for n, i, o in ((1, 64, 16), (3, 128, 32)))
    assert cost.macs == by_hand
    assert cost.params == 6 * 3 + 3 * 4 * 9 + 4 * 8 + 8


def test_a_spec_without_calls_costs_no_macs():
    spec = LayerSpec("c", "conv2d", (8, 6, 3, 3), (1, 1), (1, 1), "zeros", (1, 1))
    assert formats.get("channel_svd").cost(spec, (2,)).macs == 0


def test_layer_follows_the_factors_in_type_and_leaves_the_bias_zero():
    factors = ChannelSVD().fit(random(SQUARE.weight_shape, 0), SQUARE, (3,))
    layer = ChannelSVD().layer(SQUARE, (3,), factors={k: v.to(torch.bfloat16) for k, v in factors.items()})
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert not layer[-1].bias.any()
    assert all(p.requires_grad for p in layer.parameters())


def test_building_from_factors_draws_no_random_numbers():
    factors = ChannelSVD().fit(random(SQUARE.weight_shape, 0), SQUARE, (3,))
    state = torch.random.get_rng_state()
    ChannelSVD().layer(SQUARE, (3,), factors=factors)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_decomposed_layer_trains():
    torch.manual_seed(0)
    layer = formats.get("tucker2").layer(SQUARE, (4, 3))
    x, y = random((4, 6, 6, 6), 1).float(), random((4, 8, 6, 6), 2).float()
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = nn.functional.mse_loss(layer(x), y)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
