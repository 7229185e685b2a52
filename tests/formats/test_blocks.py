"""Block terms and grouped channel SVD: what the contract cannot know about them."""

import math

import pytest
import torch

from autorank.errors import FormatError
from autorank.formats.block_term import BlockTerm
from autorank.formats.channel_svd import ChannelSVD
from autorank.formats.grouped_svd import GroupedSVD
from autorank.formats.tucker2 import Tucker2
from autorank.solvers.grouped_svd import coupled, independent
from autorank.solvers.whitening import LayerStats, output_error
from autorank.testing.cases import make, random, real_statistics

BLOCKS, GROUPED = BlockTerm(), GroupedSVD()


def conv(out, into, **geometry):
    return make("conv2d", (out, into, 3, 3), (7, 6), padding=1, **geometry)


def error(fmt, weight, spec, rank, options=()):
    factors = fmt.fit(weight, spec, rank, options)
    return float((fmt.reconstruct(factors, spec, rank, options) - weight).norm() / weight.norm())


# Block terms


@pytest.mark.parametrize(
    ("out", "into", "expected"),
    [(32, 32, [2, 4, 8]), (16, 64, [2, 4, 8]), (8, 6, [2]), (64, 12, [2, 4])],
    ids=str,
)
def test_numbers_of_blocks_fit_the_layer(out, into, expected):
    assert [dict(options)["blocks"] for options in BLOCKS.variants(conv(out, into).spec)] == expected


@pytest.mark.parametrize(
    ("blocks", "shape", "top"),
    [(2, (32, 16), (32, 16)), (4, (32, 17), (16, 9)), (8, (33, 32), (17, 16))],
    ids=str,
)
def test_largest_block_rank_covers_the_weight(blocks, shape, top):
    spec, options = conv(*shape).spec, (("blocks", blocks),)
    assert BLOCKS.max_rank(spec, options) == top
    assert error(BLOCKS, random(spec.weight_shape, 0), spec, top, options) < 1e-6


@pytest.mark.parametrize("blocks", [2, 4, 8], ids=str)
def test_parameters_of_blocks(blocks):
    case = make("conv2d", (32, 48, 3, 2), (7, 6), groups=1, bias=False)
    cost = BLOCKS.cost(case.spec, (5, 3), (("blocks", blocks),))
    assert cost.params == blocks * (48 * 3 + 3 * 5 * 6 + 5 * 32)
    assert cost.macs == blocks * (48 * 3 * 7 * 6 + (3 * 5 * 6 + 5 * 32) * 5 * 5)


def test_blocks_beat_tucker2_at_equal_parameters_where_there_are_blocks():
    # two blocks of channels that hardly see each other, in rotated bases
    weight = 0.02 * random((24, 24, 3, 3), 3)
    for p in range(2):
        u, v = (torch.linalg.qr(random((24, 24), seed + p))[0][:, :6] for seed in (4, 6))
        weight += torch.einsum("ti,sj,ijhw->tshw", u, v, random((6, 6, 3, 3), 8 + p))
    spec, options = conv(24, 24).spec, (("blocks", 2),)
    ours = BLOCKS.cost(spec, (6, 6), options).params
    tucker = next(r for r in range(24, 0, -1) if Tucker2().cost(spec, (r, r)).params <= ours)
    assert error(BLOCKS, weight, spec, (6, 6), options) < 0.5 * error(Tucker2(), weight, spec, (tucker, tucker))


@pytest.mark.parametrize("blocks", [1, 3, "2"], ids=str)
def test_other_numbers_of_blocks_are_errors(blocks):
    spec = conv(32, 32).spec
    with pytest.raises(FormatError, match=r"block\.layer.*2, 4, 8"):
        BLOCKS.fit(random(spec.weight_shape, 0), spec, (2, 2), (("blocks", blocks),))


def test_bases_of_blocks_are_orthonormal_after_whitening():
    case = conv(18, 16)
    options = (("blocks", 4), ("whiten", "input"))
    factors = BLOCKS.fit(random(case.spec.weight_shape, 0), case.spec, (4, 3), options, real_statistics(case))
    v = factors["input"].reshape(4, 3, 16)
    u = factors["output"].reshape(18, 4, 4).transpose(0, 1)
    torch.testing.assert_close(v @ v.mT, torch.eye(3).expand(4, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(u.mT @ u, torch.eye(4).expand(4, 4, 4), atol=1e-5, rtol=0)


# Grouped channel SVD


@pytest.mark.parametrize("k", [2, 4], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 8], ids=str)
def test_every_group_is_a_truncated_svd(k, rank):
    spec = conv(10, 16, groups=2).spec
    rank = min(rank, 5)
    weight = random(spec.weight_shape, 0)
    lost = 0.0
    for group in weight.reshape(2, 5, k, 16 // k, 9).permute(0, 2, 1, 3, 4).reshape(2 * k, 5, -1):
        lost += float(torch.linalg.svdvals(group)[rank:].square().sum())
    expected = math.sqrt(lost) / float(weight.norm())
    assert error(GROUPED, weight, spec, (rank,), (("groups", k),)) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_parameters_of_groups():
    case = make("conv2d", (12, 16, 3, 2), (7, 6), bias=False)
    cost = GROUPED.cost(case.spec, (5,), (("groups", 4),))
    assert cost.params == 5 * (12 * 4 + 16 * 6)
    assert cost.macs == cost.params * 5 * 5


def test_channels_that_cannot_be_shared_out_are_refused():
    spec = conv(10, 6).spec
    assert [dict(options)["groups"] for options in GROUPED.variants(spec)] == [2]
    with pytest.raises(FormatError, match=r"6 input channels per group cannot be shared out to 4 groups"):
        GROUPED.layer(spec, (2,), (("groups", 4),))
    assert "5 input channels per group cannot be shared out to 2, 4 or 8" in GROUPED.supports(conv(10, 5).spec)


def lost(weight, left, right, root):
    approx = torch.einsum("bptr,bprsm->btpsm", left, right).reshape(weight.shape)
    return float(torch.einsum("btnm,bnq->btqm", weight - approx, root).square().sum())


def blockwise(weight, root, blocks, rank):
    """Truncate every group under its own block of the covariance."""
    size = weight.shape[2] // blocks
    cov = root @ root.mT
    found = []
    for p in range(blocks):
        part = slice(p * size, (p + 1) * size)
        own = torch.linalg.cholesky(cov[:, part, part])
        rows = torch.einsum("btnm,bnq->btqm", weight[:, :, part], own).flatten(2)
        u, s, vh = torch.linalg.svd(rows, full_matrices=False)
        right = (s[:, :rank, None] * vh[:, :rank]).reshape(len(weight), rank, size, -1)
        found.append((u[..., :rank], torch.einsum("brnm,bnq->brqm", right, torch.linalg.inv(own))))
    return tuple(torch.stack(parts, 1) for parts in zip(*found, strict=True))


@pytest.mark.parametrize("m", [1, 3], ids=["full", "factorised"])
@pytest.mark.parametrize("blocks", [1, 2, 4], ids=str)
def test_coupled_groups_are_better_than_their_own_blocks(blocks, m):
    weight, mix = random((2, 6, 12, m), 0), random((2, 12, 12), 1) + 1
    root = torch.linalg.cholesky(mix @ mix.mT + 0.1 * torch.eye(12, dtype=torch.float64))
    found = coupled(weight, root, blocks, 2, max_rounds=500, tolerance=1e-14)
    start = lost(weight, *blockwise(weight, root, blocks, 2), root)
    reached = lost(weight, *found, root)
    if blocks == 1:
        assert reached == pytest.approx(start, rel=1e-9)
        return
    assert reached < 0.95 * start
    # and it is a minimum: a general minimiser that starts there finds nothing below
    factors = [factor.clone().requires_grad_() for factor in found]
    approx = torch.einsum("bptr,bprsm->btpsm", *factors).reshape(weight.shape)
    gradients = torch.autograd.grad(torch.einsum("btnm,bnq->btqm", weight - approx, root).square().sum(), factors)
    scale = torch.einsum("btnm,bnq->btqm", weight, root @ root.mT).norm()
    assert all(float(gradient.norm()) < 1e-3 * float(scale) for gradient in gradients)


def test_coupled_groups_without_coupling_are_independent():
    weight = random((2, 6, 12, 1), 0)
    eye = torch.eye(12, dtype=torch.float64).expand(2, 12, 12)
    for root in (eye, torch.ones(2, 12, dtype=torch.float64)):
        for ours, theirs in zip(coupled(weight, root, 3, 2), independent(weight, 3, 2), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_one_group_is_channel_svd_under_the_same_covariance():
    case = conv(10, 6)
    stats, weight = real_statistics(case), random(case.spec.weight_shape, 0)
    options = (("shrink", 1e-3), ("whiten", "input"))
    channel = ChannelSVD()
    expected = channel.reconstruct(channel.fit(weight, case.spec, (4,), options, stats), case.spec, (4,))
    root = stats.root(case.spec.kernel, (0, 1), 1e-3, torch.device("cpu"))
    left, right = coupled(weight.reshape(1, 10, 54, 1), root, 1, 4)
    torch.testing.assert_close((left @ right.flatten(3)).reshape(weight.shape).float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [2, 4], ids=str)
def test_whitened_groups_have_the_smaller_output_error_on_real_patches(k):
    case = conv(16, 8)
    stats: LayerStats = real_statistics(case)
    weight = random(case.spec.weight_shape, 0)
    errors = {}
    for whiten in ("none", "input"):
        options = (("groups", k), ("shrink", 0.0), ("whiten", whiten))
        factors = GROUPED.fit(weight, case.spec, (5,), options, stats)
        errors[whiten] = output_error(weight, GROUPED.reconstruct(factors, case.spec, (5,), options), stats)
    assert errors["input"] < 0.9 * errors["none"]
