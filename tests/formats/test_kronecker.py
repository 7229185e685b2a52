"""GKPD and SeKron: the shapes that their options name, the sequences of any length, and what they have in common."""

import itertools
import math

import pytest
import torch

from autorank import formats
from autorank.errors import FormatError
from autorank.formats import kronecker
from autorank.solvers.kept import KEPT
from autorank.solvers.kronecker import nested_svd
from autorank.testing import cases
from autorank.testing.cases import dense, make, random

GKPD, SEKRON = formats.get("kronecker"), formats.get("sekron")
SQUARE = make("conv2d", (64, 64, 3, 3), (6, 6), padding=1).spec
SMALL = make("conv2d", (6, 4, 3, 2), (9, 8), padding=(2, 1), padding_mode="circular", stride=(2, 1), dilation=(1, 2))
CASES = {
    "conv2d": SMALL,
    "grouped": make("conv2d", (8, 4, 3, 3), (9, 8), padding="same", groups=2),
    "transposed": make("conv_transpose2d", (6, 4, 3, 2), (5, 4), padding=1, stride=(2, 1), output_padding=(1, 0)),
    "conv1d": make("conv1d", (6, 4, 4), (12,), stride=2, padding=3, padding_mode="reflect"),
    "conv3d": make("conv3d", (4, 2, 2, 3, 2), (5, 7, 6), padding=(1, 0, 1), stride=(1, 2, 1)),
    "linear": make("linear", (6, 8), (3,)),
}


def text(shape):
    return "x".join(map(str, shape))


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def per_group(spec):
    return spec.out_channels // spec.groups, *spec.weight_shape[1:]


def same_as_dense(fmt, case, rank, options):
    spec = case.spec
    shapes = fmt.factor_shapes(spec, rank, options)
    factors = {name: random(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    bias = random((spec.out_channels,), 9)
    x = case.input(2)
    expected = dense(spec, fmt.reconstruct(factors, spec, rank, options), bias)(x)
    torch.testing.assert_close(fmt.layer(spec, rank, options, factors, bias)(x), expected, rtol=1e-9, atol=1e-9)


# Shapes


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_choice_of_divisors_is_taken_and_runs(case):
    whole = per_group(case.spec)
    taken = 0
    for shape in itertools.product(*map(divisors, whole)):
        options = (("a", text(shape)),)
        trivial = math.prod(shape) in (1, math.prod(whole))
        if trivial:
            assert "must be the shape of A" in GKPD.supports(case.spec, options)
        elif GKPD.supports(case.spec, options) is None:
            taken += 1
            same_as_dense(GKPD, case, (min(2, *GKPD.max_rank(case.spec, options)),), options)
    assert taken >= 10


@pytest.mark.parametrize(
    "wrong", ["5x4x1x1", "2x2", "2x2x1x1x1", "0x2x1x1", "two", "2X2x1x1", "-2x2x1x1", " 2x2x1x1", "2x2x1x1/1x1x3x1", 4]
)
def test_a_wrong_shape_is_told_what_would_be_right(wrong):
    options = (("a", wrong),)
    with pytest.raises(FormatError) as error:
        GKPD.fit(random(SMALL.spec.weight_shape, 0), SMALL.spec, (1,), options)
    message = str(error.value)
    assert "\n" not in message
    assert "T1xS1xa1xa2, where T1 divides 6, S1 divides 4, a1 divides 3, a2 divides 2" in message
    assert repr(wrong) in message


@pytest.mark.parametrize("wrong", ["4x2x1x1/4x1x1x1", "6x4x3x2", "2x1x1x1/1x1x1x1", "2x1x1x1/", "/", "2x1x1x1/3x1"])
def test_wrong_sequences_are_told_what_would_be_right(wrong):
    reason = SEKRON.supports(SMALL.spec, (("shapes", wrong),))
    assert "option shapes must be the shapes of all factors but the last" in reason
    assert "6x4x3x2" in reason


def test_words_stand_for_shapes_of_each_layer():
    assert GKPD.words(SQUARE) == {
        "outputs": ((64, 8, 1, 1),),
        "inputs": ((8, 1, 3, 3),),
        "rows": ((16, 1, 3, 1),),
        "columns": ((16, 1, 1, 3),),
        "balanced": ((8, 8, 1, 1),),
        "balanced_kernel": ((8, 8, 3, 3),),
    }
    assert SEKRON.words(SQUARE) == {
        "pointwise": ((64, 1, 1, 1), (1, 1, 3, 3)),
        "rows": ((64, 1, 3, 1), (1, 1, 1, 3)),
        "columns": ((64, 1, 1, 3), (1, 1, 3, 1)),
        "outputs": ((8, 1, 1, 1), (8, 1, 3, 3)),
        "blocks": ((64, 8, 1, 1), (1, 1, 3, 1)),
        "balanced": ((4, 4, 1, 1), (4, 4, 1, 1)),
    }


@pytest.mark.parametrize("fmt", [GKPD, SEKRON], ids=["kronecker", "sekron"])
def test_without_an_option_the_first_variant_is_meant(fmt):
    for case in cases.few():
        if fmt.supports(case.spec) is None:
            first = fmt.variants(case.spec)[0]
            assert fmt.max_rank(case.spec) == fmt.max_rank(case.spec, first)
            assert fmt.cost(case.spec, (1,) * len(fmt.rank_names)) == fmt.cost(
                case.spec, (1,) * len(fmt.rank_names), first
            )


def test_cost_has_the_published_closed_form():
    options = (("a", "16x8x1x3"),)
    cost = GKPD.cost(SQUARE, (5,), options)
    a, b = 16 * 8 * 3, 4 * 8 * 3
    assert cost.params == 5 * (a + b) + 64
    assert cost.macs == 6 * 6 * 5 * 4 * 8 * (8 * 3 + 16 * 3)  # per position R·T2·S1·(S2·kb + T1·ka)


# Fits


@pytest.mark.parametrize("shape", ["2x2x1x1", "3x1x3x1", "6x1x1x2", "1x4x3x1"])
def test_gkpd_leaves_the_tail_of_the_singular_values(shape):
    weight = random(SMALL.spec.weight_shape, 0)
    first = [int(size) for size in shape.split("x")]
    pairs = [(a, size // a) for a, size in zip(first, weight.shape, strict=True)]
    digits = weight.reshape(*itertools.chain.from_iterable(pairs))
    values = torch.linalg.svdvals(digits.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(math.prod(first), -1))
    options = (("a", shape),)
    for rank in range(1, GKPD.max_rank(SMALL.spec, options)[0] + 1, 2):
        factors = GKPD.fit(weight, SMALL.spec, (rank,), options)
        error = (GKPD.reconstruct(factors, SMALL.spec, (rank,), options) - weight).norm()
        assert float(error) == pytest.approx(float(values[rank:].norm()), rel=1e-4, abs=1e-5)


def test_one_decomposition_serves_every_rank(monkeypatch):
    calls = []
    monkeypatch.setattr(kronecker, "nested_svd", lambda *args: calls.append(1) or nested_svd(*args))
    KEPT.clear()
    weight = random(SMALL.spec.weight_shape, 0)
    for rank in (1, 3, 2, 4):
        GKPD.fit(weight, SMALL.spec, (rank,), (("a", "2x2x1x1"),))
    assert len(calls) == 1


def test_channel_svd_and_spatial_svd_are_gkpds():
    weight = random(SMALL.spec.weight_shape, 0)
    for name, options, shape in (
        ("channel_svd", (), "6x1x1x1"),
        ("spatial_svd", (("first", "h"),), "6x1x1x2"),
        ("spatial_svd", (("first", "w"),), "6x1x3x1"),
    ):
        other = formats.get(name)
        theirs = other.reconstruct(other.fit(weight, SMALL.spec, (3,), options), SMALL.spec, (3,), options)
        ours = GKPD.fit(weight, SMALL.spec, (3,), (("a", shape),))
        torch.testing.assert_close(GKPD.reconstruct(ours, SMALL.spec, (3,), (("a", shape),)), theirs)


# Sequences


def test_two_factors_are_a_gkpd():
    weight = random(SMALL.spec.weight_shape, 0)
    one, two = (("shapes", "2x2x3x1"),), (("a", "2x2x3x1"),)
    assert SEKRON.max_rank(SMALL.spec, one) == (*GKPD.max_rank(SMALL.spec, two), 1)
    for rank in (1, 4, 12):
        ours = SEKRON.reconstruct(SEKRON.fit(weight, SMALL.spec, (rank, 1), one), SMALL.spec, (rank, 1), one)
        gkpd = GKPD.reconstruct(GKPD.fit(weight, SMALL.spec, (rank,), two), SMALL.spec, (rank,), two)
        torch.testing.assert_close(ours, gkpd)
        assert SEKRON.cost(SMALL.spec, (rank, 1), one) == GKPD.cost(SMALL.spec, (rank,), two)


SEQUENCES = {
    "conv2d": "2x1x3x1/3x2x1x1/1x1x1x2",
    "grouped": "2x1x1x3/2x2x1x1/1x1x3x1",
    "transposed": "1x2x1x2/2x1x1x1/3x1x3x1",
    "conv1d": "2x1x2/1x2x1/3x1x2",
    "conv3d": "2x1x1x3x1/1x2x1x1x1/2x1x2x1x1",
    "linear": "2x1/1x2/3x2",
}


@pytest.mark.parametrize("kind", CASES)
def test_four_factors_run_and_are_exact_at_the_largest_rank(kind):
    case, options = CASES[kind], (("shapes", SEQUENCES[kind]),)
    top = SEKRON.max_rank(case.spec, options)
    for rank in {(1, 1), (2, 2), (1, top[1])}:
        same_as_dense(SEKRON, case, tuple(map(min, rank, top)), options)
    weight = random(case.spec.weight_shape, 0)
    found = SEKRON.reconstruct(SEKRON.fit(weight, case.spec, top, options), case.spec, top, options)
    torch.testing.assert_close(found.double(), weight, rtol=1e-4, atol=1e-4)


def test_the_second_rank_holds_for_all_deeper_levels_that_can_have_it():
    options = (("shapes", "2x1x3x1/3x2x1x1/1x1x1x2"),)  # sizes 6, 6, 2, 2: levels up to 6, 4, 2
    assert SEKRON.max_rank(SMALL.spec, options) == (6, 4)
    shapes = SEKRON.factor_shapes(SMALL.spec, (3, 4), options)
    assert [shape[1] for shape in shapes.values()] == [3 * 4 * 2, 3 * 4 * 1, 3 * 3, 2]
