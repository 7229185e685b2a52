"""Sums of Kronecker products against torch.kron, singular values, least squares, and the formats they contain."""

import itertools
import math

import pytest
import torch

from autorank.solvers import kronecker, kronecker_steps
from autorank.solvers.kronecker import assemble, multiply, nested_svd, rank_limits, rearrange, sekron
from autorank.solvers.kronecker_weighted import weighted_sekron
from autorank.testing.cases import HARD_WEIGHTS, random

TWO = [(2, 3, 1, 3), (4, 2, 3, 1)]
THREE = [(2, 3, 1, 3), (2, 1, 3, 1), (2, 2, 1, 1)]
SHAPES = {
    "linear": [(3, 2), (2, 5)],
    "conv1d": [(2, 3, 1), (4, 1, 3)],
    "conv2d": TWO,
    "conv3d": [(2, 1, 1, 2, 1), (3, 4, 2, 1, 3)],
    "three": THREE,
    "four": [(2, 1, 1, 3), (1, 3, 1, 1), (2, 1, 3, 1), (2, 2, 1, 1)],
}


def total(shapes):
    return tuple(math.prod(shape[mode] for shape in shapes) for mode in range(len(shapes[0])))


def relative(approx, weight):
    return float((approx - weight).norm() / weight.norm())


def kron_sum(factors, shapes, ranks):
    """Return the sum of the formula, term by term, with torch.kron."""
    result = 0
    for indices in itertools.product(*map(range, ranks)):
        places, at = [], 0
        for index, rank in zip(indices, ranks, strict=True):
            at = at * rank + index
            places.append(at)
        places.append(at)  # the last factor has the indices of the one before it
        term = torch.ones([1] * len(shapes[0]), dtype=torch.float64)
        for factor, place, shape in zip(factors, places, shapes, strict=True):
            term = torch.kron(term, factor[0, place].reshape(shape))
        result = result + term
    return result


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_rearranged_kronecker_products_are_outer_products(shapes):
    ranks = (2, 3, 2)[: len(shapes) - 1]
    sizes = [math.prod(shape) for shape in shapes]
    counts = [*itertools.accumulate(ranks, lambda a, b: a * b)]
    counts.append(counts[-1])
    factors = [random((1, count, size), i) for i, (count, size) in enumerate(zip(counts, sizes, strict=True))]
    weight = assemble(multiply(factors), shapes)
    torch.testing.assert_close(weight[0], kron_sum(factors, shapes, ranks))
    assert torch.equal(assemble(rearrange(weight, shapes), shapes), weight)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_every_weight_is_exact_at_the_largest_ranks(shapes):
    weight = random((2, *total(shapes)), 0)
    found = sekron(rearrange(weight, shapes), rank_limits(shapes))
    assert relative(assemble(multiply(found), shapes), weight) < 1e-9


@pytest.mark.parametrize("rank", [1, 3, 11, 18])
def test_two_factors_leave_the_tail_of_the_singular_values(rank):
    tensor = rearrange(random((2, *total(TWO)), 0), TWO)
    left = (tensor - multiply(sekron(tensor, (rank,)))).flatten(1).norm(dim=1)
    tail = torch.linalg.svdvals(tensor)[:, rank:].norm(dim=1)
    torch.testing.assert_close(left, tail, rtol=1e-6, atol=1e-7)


def test_ranks_of_two_factors_nest():
    tensor = rearrange(random((1, *total(TWO)), 0), TWO)
    a, b = nested_svd(tensor, rank_limits(TWO))
    for rank in (1, 5, 10):
        torch.testing.assert_close(multiply([a[:, :rank], b[:, :rank]]), multiply(nested_svd(tensor, (rank,))))


# Two factors, or three with R2 = |A3| or |A2|, are one GKPD


def test_full_second_rank_is_a_gkpd():
    weight = random((1, *total(THREE)), 0)
    merged = [THREE[0], tuple(a * b for a, b in zip(THREE[1], THREE[2], strict=True))]
    for rank in (1, 4, 9):
        three = multiply(sekron(rearrange(weight, THREE), (rank, rank_limits(THREE)[1])))
        two = multiply(sekron(rearrange(weight, merged), (rank,)))
        torch.testing.assert_close(assemble(three, THREE), assemble(two, merged), rtol=1e-8, atol=1e-8)


# The formats that SeKron holds when T, S and K are modes of their own: factors (batch, ranks, mode)

T, S, K = 5, 4, 3
MODES = [(T, 1, 1), (1, S, 1), (1, 1, K)]


def kernel(*factors):
    return assemble(multiply([factor[None] for factor in factors]), MODES)[0]


def test_cp_is_sekron_with_one_second_rank():
    a, b, c = random((T, 6), 0), random((S, 6), 1), random((K, 6), 2)
    torch.testing.assert_close(kernel(a.mT, b.mT, c.mT), torch.einsum("tr,sr,kr->tsk", a, b, c))


def test_tucker_is_sekron_whose_second_factor_is_the_same_for_all_r1():
    p, q, r = 3, 2, 2
    core, u, v, z = random((p, q, r), 0), random((T, p), 1), random((S, q), 2), random((K, r), 3)
    second = v.mT.repeat(p, 1)  # A2[r1 r2] = V[:, r2]
    third = torch.einsum("pqr,kr->pqk", core, z).reshape(p * q, K)
    torch.testing.assert_close(kernel(u.mT, second, third), torch.einsum("pqr,tp,sq,kr->tsk", core, u, v, z))


def test_tensor_train_is_sekron_whose_third_factor_is_the_same_for_all_r1():
    p, q = 3, 2
    a, b, c = random((T, p), 0), random((p, S, q), 1), random((q, K), 2)
    second = b.transpose(1, 2).reshape(p * q, S)  # A2[r1 r2] = G2[r1, :, r2]
    torch.testing.assert_close(kernel(a.mT, second, c.repeat(p, 1)), torch.einsum("tp,psq,qk->tsk", a, b, c))


def test_tensor_ring_is_sekron_with_two_bonds_in_r1():
    o, p, q = 2, 3, 2
    a, b, c = random((o, T, p), 0), random((p, S, q), 1), random((q, K, o), 2)
    first = a.transpose(1, 2).reshape(o * p, T)  # r1 = (closing bond, first bond)
    second = b.transpose(1, 2).reshape(p * q, S).repeat(o, 1)
    third = c.permute(2, 0, 1)[:, None].expand(o, p, q, K).reshape(-1, K)
    torch.testing.assert_close(kernel(first, second, third), torch.einsum("otp,psq,qko->tsk", a, b, c))


def test_four_modes_hold_a_tensor_train():
    sizes, p, q, r = (4, 3, 2, 3), 2, 3, 2
    a, b = random((sizes[0], p), 0), random((p, sizes[1], q), 1)
    c, d = random((q, sizes[2], r), 2), random((r, sizes[3]), 3)
    factors = [
        a.mT,
        b.transpose(1, 2).reshape(p * q, -1),
        c.transpose(1, 2).reshape(1, q * r, -1).expand(p, -1, -1).flatten(0, 1),
        d.repeat(p * q, 1),
    ]
    expected = torch.einsum("ap,pbq,qcr,rd->abcd", a, b, c, d)
    torch.testing.assert_close(multiply([factor[None] for factor in factors])[0], expected)


def test_fits_find_the_formats_they_hold():
    """A tensor train of bonds (2, 2) has error zero at ranks (2, 2): nested SVDs find it without a sweep."""
    weight = torch.einsum("tp,psq,qk->tsk", random((T, 2), 0), random((2, S, 2), 1), random((2, K), 2))
    assert relative(assemble(multiply(sekron(rearrange(weight[None], MODES), (2, 2), 0)), MODES)[0], weight) < 1e-9


# Alternating least squares


@pytest.mark.parametrize("ranks", [(1, 1), (4, 1), (3, 2), (8, 3)], ids=str)
def test_sweeps_never_raise_the_error_and_help(ranks):
    tensor = rearrange(random((2, *total(THREE)), 0), THREE)
    errors = [
        kronecker.squared_error(tensor, sekron(tensor, ranks, sweeps, tolerance=0)) for sweeps in (0, 1, 2, 5, 20)
    ]
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-12)).all()
    assert (errors[-1] < errors[0] * 0.999).all()


@pytest.mark.parametrize("i", range(3))
def test_a_step_is_the_least_squares_solution(i):
    tensor = rearrange(random((1, *total(THREE)), 0), THREE)
    factors = nested_svd(tensor, (3, 2))
    unfolding = tensor.movedim(i + 1, 1).flatten(2)
    design = kronecker.environment(factors, i)[0].mT
    expected = torch.linalg.lstsq(design, unfolding[0].mT, driver="gelsd").solution
    torch.testing.assert_close(kronecker._best(factors, i, unfolding)[0], expected, rtol=1e-6, atol=1e-6)


def test_terms_that_cancel_stay_bounded():
    # x⊗x⊗y + x⊗y⊗x + y⊗x⊗x has border rank two: without a bound the terms of rank two grow without end.
    x, y = torch.eye(2, dtype=torch.float64)
    modes = ("i,j,k->ijk",)
    tensor = sum(torch.einsum(*modes, *term) for term in ((x, x, y), (x, y, x), (y, x, x)))[None]
    found = sekron(tensor, (2, 1), 2000, tolerance=0)
    assert float(kronecker.term_energy(found)[0]) <= kronecker.BOUND * 3 * (1 + 1e-9)


@pytest.mark.parametrize("hard", HARD_WEIGHTS)
def test_hard_weights(hard):
    weight = HARD_WEIGHTS[hard](total(THREE)).double()[None]
    into, out = root(54, 1, 1), root(8, 2, 1)
    for found in (
        sekron(rearrange(weight, THREE), (4, 2)),
        weighted_sekron(weight, THREE, (4, 2), into, out),
        weighted_sekron(weight, TWO, (3,), into * 1e-30, None),
    ):
        assert all(torch.isfinite(factor).all() for factor in found)


# Weighted fits


def root(n, seed, batch=2, power=2):
    mix = random((batch, n, n), seed) * torch.logspace(0, -power, n, dtype=torch.float64)[:, None]
    return torch.linalg.cholesky(mix @ mix.mT + 1e-3 * torch.eye(n, dtype=torch.float64))


WEIGHTS = {
    "patch": (root(54, 1), None),
    "channels": (root(6, 1), None),
    "patch variances": (random((2, 54), 1).abs() + 0.1, None),
    "channel variances": (random((2, 6), 1).abs() + 0.1, None),
    "output": (None, root(8, 2)),
    "output variances": (None, random((2, 8), 2).abs() + 0.1),
    "both": (root(54, 1), root(8, 2)),
    "channels and output": (root(6, 1), root(8, 2)),
    "variances of both": (random((2, 6), 1).abs() + 0.1, random((2, 8), 2).abs() + 0.1),
}


def weighted(delta, into, out):
    """Return the squared norms of M^T delta L, with whole matrices."""
    matrix = delta.flatten(2)
    if into is not None:
        full = (into.diag_embed() if into.ndim == 2 else into).contiguous()
        positions = matrix.shape[2] // full.shape[1]
        matrix = matrix @ torch.stack([torch.kron(one, torch.eye(positions, dtype=torch.float64)) for one in full])
    if out is not None:
        matrix = (out.diag_embed() if out.ndim == 2 else out).mT @ matrix
    return matrix.flatten(1).square().sum(1)


def test_channel_statistics_are_those_of_white_positions():
    """Also where the sizes of channels and positions are the same, and only their order tells them apart."""
    shapes, weight, channels = [(2, 3, 3), (2, 1, 1)], random((2, 4, 3, 3), 0), root(3, 1)
    patch = torch.stack([torch.kron(one.contiguous(), torch.eye(3, dtype=torch.float64)) for one in channels])
    one, two = (multiply(weighted_sekron(weight, shapes, (1,), into, None)) for into in (channels, patch))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shapes", [TWO, THREE], ids=["two", "three"])
@pytest.mark.parametrize(("into", "out"), WEIGHTS.values(), ids=WEIGHTS)
def test_weighted_fit_is_better_than_the_plain_one_and_falls(into, out, shapes):
    weight = random((2, 8, 6, 3, 3), 0)
    ranks = (3, 2)[: len(shapes) - 1]

    def error(found):
        return weighted(weight - assemble(multiply(found), shapes), into, out)

    errors = [error(sekron(rearrange(weight, shapes), ranks))]
    errors += [error(weighted_sekron(weight, shapes, ranks, into, out, 0, sweeps)) for sweeps in (0, 1, 3, 8)]
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-9)).all()
    assert (errors[-1] < 0.95 * errors[0]).all()


@pytest.mark.parametrize("i", range(2), ids=["a", "b"])
@pytest.mark.parametrize("method", ["direct", "gradient"])
def test_a_weighted_step_is_the_weighted_least_squares_solution(method, i):
    """The step equals the solution of the whole design matrix, one column per entry of the factor."""
    sizes = ((2, 1, 4), (3, 1, 6))
    modes = kronecker_steps.Modes(sizes)
    into, out = root(24, 1, 1, 1), root(6, 2, 1, 1) if method == "gradient" else None
    metric = kronecker_steps.Metric(modes, into, out)
    tensor = random((1, 8, 18), 3)
    factors = nested_svd(tensor, (2,))
    around = kronecker.environment(factors, i)
    if method == "direct":
        target = metric.apply(tensor).movedim(i + 1, -1).flatten(1, -2)
        step, gain = kronecker_steps.direct_step(metric, around, target, factors[i], i)
    else:
        residual = metric.apply(tensor - multiply(factors)).movedim(i + 1, -1).flatten(1, -2)
        step, gain = kronecker_steps.gradient_step(metric, around, residual, i, 400, 1e-14)

    def seen(values):
        changed = [values if j == i else factor for j, factor in enumerate(factors)]
        matrix = modes.to_matrix(multiply(changed))[0, :, 0]
        return ((matrix if out is None else out[0].mT @ matrix) @ into[0]).flatten()

    size = factors[i].numel()
    design = torch.stack([seen(e.reshape(factors[i].shape)) for e in torch.eye(size, dtype=torch.float64)], 1)
    matrix = modes.to_matrix(tensor)[0, :, 0]
    wanted = ((matrix if out is None else out[0].mT @ matrix) @ into[0]).flatten()
    best = torch.linalg.lstsq(design, wanted[:, None], driver="gelsd").solution
    torch.testing.assert_close((factors[i] + step).flatten(), best[:, 0], rtol=1e-5, atol=1e-5)
    fall = (wanted - seen(factors[i])).square().sum() - (wanted - design @ best[:, 0]).square().sum()
    assert float(gain[0]) == pytest.approx(float(fall), rel=1e-8)


def test_kronecker_statistics_have_a_closed_form():
    """Where the covariances are Kronecker products of the digits, the start is the optimum: a truncated SVD."""
    one, two = root(9, 1, 1, 1), root(6, 2, 1, 1)
    a, b = root(2, 3, 1, 1), root(4, 4, 1, 1)
    shapes = [(2, 3, 3), (4, 2, 3)]
    weight = random((1, 8, 6, 9), 0)
    # (s1, k1, s2, k2) in the order of (S, K)
    order = rearrange(torch.arange(54).reshape(1, 6, 9), [(3, 3), (2, 3)]).flatten().argsort()
    into = torch.linalg.cholesky((torch.kron(one[0] @ one[0].mT, two[0] @ two[0].mT))[order][:, order])[None]
    out = torch.kron(a[0], b[0])[None]
    start = weighted_sekron(weight, shapes, (3,), into, out, max_sweeps=0)
    white = torch.kron(a[0], one[0]).mT @ rearrange(weight, shapes)[0] @ torch.kron(b[0], two[0])
    tail = torch.linalg.svdvals(white)[3:].square().sum()
    found = weighted(weight - assemble(multiply(start), shapes), into, out)
    assert float(found[0]) == pytest.approx(float(tail), rel=1e-8)


def test_members_of_a_batch_do_not_touch_each_other():
    weight = torch.cat([random((1, 8, 6, 3, 3), 0), 1e6 * random((1, 8, 6, 3, 3), 1)])
    into = root(54, 1)
    together = weighted_sekron(weight, TWO, (3,), into, None, 0, 3)
    for i in range(2):
        alone = weighted_sekron(weight[i : i + 1], TWO, (3,), into[i : i + 1], None, 0, 3)
        torch.testing.assert_close(multiply(together)[i], multiply(alone)[0], rtol=1e-6, atol=1e-6 * 10 ** (6 * i))
