"""EVBMF against the variational free energy itself, minimised step by step, and on matrices whose rank is known."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from autorank.errors import FormatError
from autorank.solvers.vbmf import evbmf_rank, spectrum
from autorank.testing.cases import HARD_WEIGHTS, random


def planted(rows, columns, rank, snr, seed=0):
    """Return a matrix of `rank` equal components in noise of variance one; `snr` 1 is where noise alone reaches."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((rows, columns))
    u = np.linalg.qr(rng.standard_normal((rows, max(rank, 1))))[0][:, :rank]
    v = np.linalg.qr(rng.standard_normal((columns, max(rank, 1))))[0][:, :rank]
    return snr * (math.sqrt(rows) + math.sqrt(columns)) * u @ v.T + noise


def values(matrix):
    return np.linalg.svd(matrix, compute_uv=False)


def rank_of(matrix, noise=None):
    return evbmf_rank(values(matrix), *matrix.shape, noise)


def component(gamma, rows, columns, variance):
    """Twice what keeping one component adds to the free energy, by coordinate descent over all its parameters.

    The factors a and b have Gaussian posteriors (means along the singular vectors, one variance each) and Gaussian
    priors whose variances are free, too.
    """
    a = b = math.sqrt(gamma)
    va = vb = variance / gamma
    ca, cb = a * a / columns + va, b * b / rows + vb
    for _ in range(3000):
        va = variance / (b * b + rows * vb + variance / ca)
        a = gamma * b * va / variance
        vb = variance / (a * a + columns * va + variance / cb)
        b = gamma * a * vb / variance
        before = ca, cb
        ca, cb = a * a / columns + va, b * b / rows + vb
        if a * b < 1e-9 * gamma:
            return math.inf
        if abs(ca - before[0]) < 1e-12 * ca and abs(cb - before[1]) < 1e-12 * cb:
            break
    both = (a * a + columns * va) * (b * b + rows * vb)
    fit = (both - 2 * gamma * a * b) / variance
    return columns * math.log(ca / va) + rows * math.log(cb / vb) + fit


def free_energy(gammas, rows, columns, variance):
    """Twice the free energy at a noise variance (but for a constant), and the number of components worth keeping."""
    gains = [component(g, rows, columns, variance) if g > 0 else math.inf for g in gammas]
    total = rows * columns * math.log(variance) + float(np.square(gammas).sum()) / variance
    return total + sum(min(g, 0.0) for g in gains), sum(g < 0 for g in gains)


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.1])
def test_the_threshold_is_where_a_component_starts_to_lower_the_free_energy(ratio):
    rows, columns, variance = round(40 * ratio), 40, 0.3

    def kept(gamma):
        return evbmf_rank([gamma], rows, columns, variance) == 1

    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if kept(middle) else (middle, high)
    assert component(high * 1.0005, rows, columns, variance) < 0
    assert component(high * 0.9995, rows, columns, variance) > 0
    # Two and a half: the only number that the paper gives.
    tau = 2.5129 * math.sqrt(ratio)
    assert high == pytest.approx(math.sqrt(columns * variance * (1 + tau) * (1 + ratio / tau)), rel=0.03)


@pytest.mark.parametrize("shape", [(6, 6), (5, 12), (8, 20)], ids=str)
@pytest.mark.parametrize(("rank", "snr"), [(0, 0), (1, 1.2), (2, 2.0), (2, 8.0)])
def test_noise_and_rank_minimise_the_free_energy(shape, rank, snr):
    gammas = values(planted(*shape, rank, snr, seed=3))
    mean = float(np.square(gammas).sum()) / math.prod(shape)
    grid = mean * np.geomspace(1e-3, 1.0, 400)
    best = min((free_energy(gammas, *shape, v) for v in grid), key=lambda found: found[0])
    assert evbmf_rank(gammas, *shape) == best[1]


@pytest.mark.parametrize("decay", [0.2, 0.7, 1.5, 4.0])
def test_falling_spectra_as_of_trained_kernels(decay):
    rows, columns = 10, 24
    gammas = np.arange(1, rows + 1.0) ** -decay
    grid = float(np.square(gammas).mean() / columns) * np.geomspace(1e-6, 1.0, 400)
    best = min((free_energy(gammas, rows, columns, v) for v in grid), key=lambda found: found[0])
    assert evbmf_rank(gammas, rows, columns) == best[1]


def test_as_variational_bayes_on_the_matrix_itself():
    """Coordinate descent over whole matrices of means and covariances, nothing taken from their singular vectors."""
    rows, columns, rank = 12, 30, 3
    v = planted(rows, columns, rank, 2.5, seed=1)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((columns, rows)), rng.standard_normal((rows, rows))
    sa, sb, ca, cb, variance = np.eye(rows), np.eye(rows), np.ones(rows), np.ones(rows), 1.0
    for _ in range(1500):
        sa = variance * np.linalg.inv(b.T @ b + rows * sb + variance * np.diag(1 / ca))
        a = v.T @ b @ sa / variance
        sb = variance * np.linalg.inv(a.T @ a + columns * sa + variance * np.diag(1 / cb))
        b = v @ a @ sb / variance
        ca = np.square(a).sum(0) / columns + np.diag(sa)
        cb = np.square(b).sum(0) / rows + np.diag(sb)
        misfit = np.square(v).sum() - 2 * np.trace(v.T @ b @ a.T)
        misfit += np.trace((a.T @ a + columns * sa) @ (b.T @ b + rows * sb))
        variance = misfit / (rows * columns)
    kept = values(b @ a.T)
    assert int((kept > 1e-3 * kept[0]).sum()) == rank == rank_of(v)
    assert rank_of(v, variance) == rank


@pytest.mark.parametrize("shape", [(20, 20), (16, 144), (64, 64), (300, 40), (64, 576)], ids=str)
@pytest.mark.parametrize(("share", "snr"), [(0.0, 1.0), (0.1, 2.0), (0.1, 100.0), (0.3, 4.0), (0.3, 100.0)])
def test_planted_ranks_are_found_in_noise(shape, snr, share):
    rank = round(share * min(shape))
    for seed in range(3):
        matrix = planted(*shape, rank, snr, seed)
        assert rank_of(matrix) == rank
        assert rank_of(matrix, 1.0) == rank


@pytest.mark.parametrize("rank", [1, 4, 7, 9])
def test_without_noise_all_is_found(rank):
    signal = random((16, rank), 0).double().numpy() @ random((rank, 40), 1).double().numpy()
    exact = [*values(signal)[:rank], *[0.0] * (16 - rank)]
    assert evbmf_rank(exact, 16, 40) == evbmf_rank(exact[:rank], 16, 40) == rank
    assert rank_of(signal) == rank
    assert rank_of(signal, 0.0) == rank


def test_weak_components_drown_and_the_found_rank_grows_with_their_strength():
    found = [rank_of(planted(48, 100, 10, snr)) for snr in (0.2, 0.9, 1.1, 1.5, 3.0)]
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] == 10


def test_of_every_given_noise_at_least_as_much_is_found_as_of_a_larger_one():
    gammas = values(planted(24, 60, 6, 1.5) * np.linspace(0.3, 2.0, 24)[:, None])
    found = [evbmf_rank(gammas, 24, 60, noise) for noise in np.geomspace(1e-6, 1e3, 40)]
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (24, 0)


@pytest.mark.parametrize("scale", [1e-150, 1e-20, 1e-3, 1e5, 1e150])
def test_scale_changes_nothing(scale):
    matrix = planted(20, 50, 4, 2.0)
    assert evbmf_rank(values(matrix) * scale, 20, 50) == rank_of(matrix) == 4
    assert evbmf_rank(values(matrix) * 1e-3, 20, 50, 1e-6) == 4


def test_order_transpose_and_type_change_nothing():
    gammas = values(planted(20, 50, 4, 2.0))
    expected = evbmf_rank(gammas, 20, 50)
    assert evbmf_rank(gammas, 50, 20) == expected
    assert evbmf_rank(gammas[::-1].copy(), 20, 50) == expected
    assert evbmf_rank(torch.from_numpy(gammas).float(), 20, 50) == expected
    assert evbmf_rank([float(g) for g in gammas], 20, 50) == expected


@pytest.mark.parametrize(
    ("gammas", "rows", "columns", "expected"),
    [([], 3, 4, 0), ([0.0, 0.0], 2, 2, 0), ([5.0], 1, 1, 0), ([5.0], 1, 30, 0), ([3.0, 3.0, 3.0], 3, 9, 0)],
    ids=["none", "zeros", "one-number", "one-row", "all-alike"],
)
def test_where_there_is_nothing_to_tell_noise_by(gammas, rows, columns, expected):
    assert evbmf_rank(gammas, rows, columns) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_wrong_singular_values(bad):
    with pytest.raises(FormatError, match="finite and not negative"):
        evbmf_rank([1.0, bad], 3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 1.0], 1, 5), "1 × 5 matrix has no 2 singular values"),
        (([], 0, 5), "0 × 5 matrix"),
        (([1.0], 2, 2, -1.0), "must be a number ≥ 0, not -1"),
        (([1.0], 2, 2, math.nan), "must be a number ≥ 0, not nan"),
    ],
    ids=["too-many", "empty", "negative-noise", "nan-noise"],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        evbmf_rank(*arguments)


# The spectrum of a kernel


def multilinear(shape, ranks, noise=0.0, seed=0):
    """Return a kernel of multilinear rank `ranks` in its first two modes, and noise (share of its norm)."""
    core = random((*ranks, *shape[2:]), seed).double()
    u = torch.linalg.qr(random((shape[0], ranks[0]), seed + 1).double())[0]
    v = torch.linalg.qr(random((shape[1], ranks[1]), seed + 2).double())[0]
    kernel = torch.einsum("oi...,to,si->ts...", core, u, v)
    extra = random(shape, seed + 3).double()
    return kernel + noise * extra * (kernel.norm() / extra.norm())


@pytest.mark.parametrize("shape", [(12, 8, 3, 3), (8, 12, 5), (30, 4), (40, 3, 3, 3), (6, 5, 2, 3, 2)], ids=str)
def test_tails_are_the_energies_beyond_the_leading_singular_values(shape):
    weight = random(shape, 5)
    found = spectrum(weight)
    total = weight.double().square().sum()
    for tail, unfolding in ((found.out_tail, weight.flatten(1)), (found.in_tail, weight.transpose(0, 1).flatten(1))):
        gammas = torch.linalg.svdvals(unfolding.double())
        assert len(tail) == unfolding.shape[0] + 1
        assert tail[0] == 1.0
        assert tail[-1] == 0.0
        expected = [float(gammas[r:].square().sum() / total) for r in range(len(tail))]
        assert tail == pytest.approx(expected, abs=1e-12)


def test_ranks_of_both_unfoldings_are_found_in_noise():
    weight = multilinear((48, 40, 3, 3), (10, 6), noise=0.3).float()
    assert spectrum(weight).vbmf == (10, 6)
    found = spectrum(weight.transpose(0, 1))
    assert found.vbmf == (6, 10)
    assert found.out_tail == pytest.approx(spectrum(weight).in_tail)
    for dtype in (torch.float64, torch.bfloat16):
        assert spectrum(weight.to(dtype)).vbmf == (10, 6)


def test_a_random_kernel_is_noise():
    assert spectrum(random((32, 24, 3, 3), 0)).vbmf == (0, 0)


def test_ranks_of_a_dense_kernel_are_those_of_its_unfoldings():
    weight = multilinear((24, 20, 3, 3), (8, 5), noise=0.5)
    out, into = weight.flatten(1), weight.transpose(0, 1).flatten(1)
    expected = tuple(evbmf_rank(torch.linalg.svdvals(m), *m.shape) for m in (out, into))
    assert spectrum(weight).vbmf == expected


def test_a_kernel_multiplied_out_of_factors_has_the_ranks_of_its_core():
    """What is exactly zero beyond the ranks of the factors says nothing about the noise inside of them."""
    core = multilinear((20, 16, 3, 3), (6, 4), noise=0.4)
    u, v = random((64, 20), 1).double(), random((48, 16), 2).double()
    u, v = torch.linalg.qr(u)[0], torch.linalg.qr(v)[0]
    kernel = torch.einsum("oikl,to,si->tskl", core, u, v)
    assert spectrum(core).vbmf == (6, 4)
    assert spectrum(kernel).vbmf == spectrum(kernel.float()).vbmf == (6, 4)
    gammas = torch.linalg.svdvals(kernel.flatten(1))
    assert evbmf_rank(gammas, 64, 48 * 9) == 20  # of the whole kernel: everything that is there


def test_a_kernel_of_lower_rank_without_any_noise_has_that_rank():
    assert spectrum(multilinear((24, 16, 3, 3), (1, 1)).float()).vbmf == (1, 1)
    found = spectrum(multilinear((24, 16, 3, 3), (7, 16)).float()).vbmf
    assert 0 < found[0] <= 7


def test_dead_channels_are_not_taken_for_an_absence_of_noise():
    weight = multilinear((24, 20, 3, 3), (6, 5), noise=0.4)
    padded = torch.zeros(32, 26, 3, 3, dtype=weight.dtype)
    padded[4:28, :20] = weight
    assert spectrum(weight).vbmf == spectrum(padded).vbmf == (6, 5)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_share_a_rank_and_their_tails_add_up(groups):
    blocks = [multilinear((24, 20, 3, 3), (4 + i, 3 + i), noise=0.3, seed=10 * i) for i in range(groups)]
    found = spectrum(torch.cat(blocks), groups)
    assert (len(found.out_tail), len(found.in_tail)) == (25, 21)
    assert found.vbmf == tuple(map(max, *(spectrum(b).vbmf for b in blocks))) == (3 + groups, 2 + groups)
    energy = [float(b.square().sum()) for b in blocks]
    alone = [spectrum(b) for b in blocks]
    expected = [sum(e * a.out_tail[r] for e, a in zip(energy, alone, strict=True)) / sum(energy) for r in range(25)]
    assert found.out_tail == pytest.approx(expected)
    assert spectrum(blocks[0], 1).vbmf == spectrum(torch.cat([blocks[0]] * groups), groups).vbmf


def test_depthwise():
    found = spectrum(random((16, 1, 3, 3), 0), 16)
    assert found.out_tail == found.in_tail == (1.0, 0.0)
    assert found.vbmf == (0, 0)


@pytest.mark.parametrize("name", sorted(HARD_WEIGHTS))
def test_hard_kernels(name):
    weight = HARD_WEIGHTS[name]((12, 10, 3, 3)).float()
    found = spectrum(weight)
    assert found.out_tail[0] == found.in_tail[0] == 1.0
    for tail in (found.out_tail, found.in_tail):
        assert all(0.0 <= b <= a <= 1.0 for a, b in pairwise(tail))
    expected = {"zero": (0, 0), "tiny": (0, 0), "huge": (0, 0)}.get(name, (1, 1))
    assert found.vbmf == expected


def test_scale_layout_and_repetition_change_no_spectrum():
    weight = multilinear((24, 20, 3, 3), (6, 5), noise=0.4).float()
    found = spectrum(weight)
    assert spectrum(weight) == found
    assert spectrum(weight.to(memory_format=torch.channels_last)) == found
    assert spectrum(torch.nn.Parameter(weight)) == found
    assert spectrum(weight * 2.0**40) == found


def test_linear_layers_have_one_spectrum_twice():
    weight = (random((30, 4), 0) @ random((4, 20), 1) + 0.2 * random((30, 20), 2)).float()
    found = spectrum(weight)
    assert found.vbmf == (4, 4)
    assert found.out_tail[:21] == pytest.approx(found.in_tail)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_kernels_that_are_not_finite(bad):
    weight = random((4, 4, 3, 3), 0)
    weight[1, 2, 0, 0] = bad
    with pytest.raises(FormatError, match="not finite"):
        spectrum(weight)


def test_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="10 output channels cannot be divided into 4 groups"):
        spectrum(random((10, 2, 3, 3), 0), 4)
