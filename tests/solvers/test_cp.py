"""Stable CP: exact recovery, TensorLy's errors, kernels on which plain alternating least squares degenerates."""

import warnings

import pytest
import torch

from autorank.solvers import cp_modes, cp_start
from autorank.solvers.cp import cp
from autorank.solvers.cp_sweeps import Problem
from autorank.testing.cases import random


def full(factors):
    """Return the tensors (groups, n1, ..., nd)."""
    letters = "abcdef"[: len(factors)]
    return torch.einsum(",".join(f"g{letter}r" for letter in letters) + "->g" + letters, *factors)


def relative(factors, tensor):
    return float((full(factors) - tensor).norm() / tensor.norm())


def low_rank(shape, rank, seed=0):
    return full([random((2, n, rank), seed + i) for i, n in enumerate(shape)])


def decaying(t, s, k, seed=0):
    """Return a kernel (1, T, S, K) with falling spectra, as trained ones have."""
    a = torch.linalg.qr(random((t, t), seed))[0] * torch.arange(1, t + 1) ** -0.7
    b = torch.linalg.qr(random((s, s), seed + 1))[0] * torch.arange(1, s + 1) ** -0.7
    return torch.einsum("abk,ta,sb->tsk", random((t, s, k), seed + 2), a, b)[None]


def border(rank):
    """Return a unit tensor of border rank 2 or 3 and of higher rank: it has no best approximation of that rank."""
    tensor = torch.zeros(1, rank, rank, rank, dtype=torch.float64)
    for i in range(rank):
        for j in range(rank - i):
            tensor[0, i, j, rank - 1 - i - j] = 1  # products of x + εy + ε²z, the term of highest order
    return tensor / tensor.norm()


def product_of_matrices(a, b, c):
    """Return the unit tensor of a product of matrices a×b and b×c; for 2, 2, 3 the rank is 11, the border rank 10."""
    tensor = torch.zeros(1, a * b, b * c, c * a, dtype=torch.float64)
    for i in range(a):
        for j in range(b):
            for k in range(c):
                tensor[0, i * b + j, j * c + k, k * a + i] = 1
    return tensor / tensor.norm()


def plain_als(tensor, rank, seeds, iterations):
    """Return error and sensitivity (iterations, seeds) of alternating least squares as it stands in the textbooks.

    From normal random factors; the sensitivity is the least over all scalings of the components.
    """
    factors = [torch.stack([random((n, rank), 100 * s + i) for s in seeds]) for i, n in enumerate(tensor.shape[1:])]
    unfoldings = [tensor.movedim(1 + mode, 1).flatten(2) for mode in range(3)]
    errors, sensitivities = [], []
    for _ in range(iterations):
        for mode in range(3):
            one, two = (f for m, f in enumerate(factors) if m != mode)
            product = (one[:, :, None] * two[:, None]).flatten(1, 2)
            factors[mode] = unfoldings[mode] @ product @ torch.linalg.pinv((one.mT @ one) * (two.mT @ two))
        errors.append((unfoldings[2] - factors[2] @ product.mT).flatten(1).norm(dim=1) / tensor.norm())
        sensitivities.append(cp_modes.sensitivity(cp_modes.balanced(factors)))
    return torch.stack(errors), torch.stack(sensitivities)


def at_first(errors, limit):
    """Return for each seed the first iteration with an error within the limit, the last one where there is none."""
    inside = errors <= limit
    inside[-1] = True
    return inside.int().argmax(0)[None]


def tensorly_error(tensor, rank, iterations):
    import tensorly
    from tensorly.decomposition import parafac

    with tensorly.backend_context("pytorch", local_threadsafe=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its start pads with random columns
        weights, factors = parafac(tensor[0], rank, n_iter_max=iterations, init="svd", tol=1e-9, random_state=0)
    return relative([(factors[0] * weights)[None], *(f[None] for f in factors[1:])], tensor)


# What it finds


@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        ((12, 10, 9), 4),
        ((12, 10, 9), 10),
        ((12, 10, 9), 14),
        ((3, 30, 20), 8),
        ((40, 6, 5), 3),
        ((9, 8, 3, 3), 5),
        ((6, 5, 3, 2, 3), 4),
        ((4, 5, 2, 2, 2, 3), 3),
        ((9, 7), 5),
    ],
    ids=str,
)
def test_exact_where_the_rank_is_enough(shape, rank):
    tensor = low_rank(shape, rank)
    result = cp(tensor, rank)
    assert [tuple(f.shape) for f in result.factors] == [(2, n, rank) for n in shape]
    assert float(result.error.max()) < 1e-5
    for i in range(2):
        assert relative([f[i : i + 1] for f in result.factors], tensor[i : i + 1]) < 1e-5


@pytest.mark.parametrize("shape", [(8, 6, 9), (5, 9, 4), (6, 5, 3, 3), (5, 4, 2, 3, 2)], ids=str)
def test_reported_error_and_sensitivity_are_those_of_the_factors(shape):
    tensor = random((2, *shape), 0) * torch.tensor([1.0, 1e3]).reshape(2, *[1] * len(shape))
    result = cp(tensor, 4)
    for i in range(2):
        part = [f[i : i + 1] for f in result.factors]
        assert float(result.error[i]) == pytest.approx(relative(part, tensor[i : i + 1]), rel=1e-9)
        assert float(result.sensitivity[i]) == pytest.approx(float(cp_modes.sensitivity(part)), rel=1e-9)


@pytest.mark.parametrize(
    ("tensor", "rank"),
    [
        (random((1, 10, 8, 9), 0), 5),
        (random((1, 10, 8, 9), 1), 20),
        (decaying(16, 16, 9), 12),
        (decaying(32, 24, 9), 40),
        (decaying(40, 40, 9), 8),
    ],
    ids=["random-5", "random-20", "decaying-12", "decaying-40", "compressed-8"],
)
def test_as_good_as_tensorly(tensor, rank):
    assert float(cp(tensor, rank).error) <= 1.01 * tensorly_error(tensor, rank, 100)


@pytest.mark.shared
@pytest.mark.parametrize(("layer", "rank"), [("layer1.1.conv1", 30), ("layer2.1.conv2", 66), ("layer3.0.conv1", 60)])
def test_as_good_as_tensorly_on_real_kernels(layer, rank, shared_dir):
    tensor = real(shared_dir, layer)
    assert float(cp(tensor, rank).error) <= 1.01 * tensorly_error(tensor, rank, 100)


def real(shared_dir, layer):
    from safetensors import safe_open

    with safe_open(shared_dir / "models" / "resnet20-cifar10jpeg.safetensors", "pt") as file:
        return file.get_tensor(f"{layer}.weight").double().flatten(2)[None]


def test_two_modes_are_a_truncated_svd():
    matrix = random((2, 9, 7), 0)
    values = torch.linalg.svdvals(matrix)
    expected = values[:, 3:].norm(dim=1) / values.norm(dim=1)
    torch.testing.assert_close(cp(matrix, 3).error, expected)


# Stability


@pytest.mark.parametrize("rank", [2, 3])
def test_no_best_approximation_plain_diverges_ours_is_bounded(rank):
    """A lower error costs both the same sensitivity; plain alternation goes on paying, ours stops."""
    tensor = border(rank)
    errors, sensitivities = plain_als(tensor, rank, range(5), 1600)
    for early, late in ((50, 400), (400, 1600)):
        assert bool((sensitivities[late - 1] > 1.5 * sensitivities[early - 1]).all())
    ours, longer = (cp(tensor, rank, max_sweeps=n, tolerance=1e-7) for n in (100, 500))
    assert float(ours.error) < 0.02
    assert float(longer.sensitivity) < 1.1 * float(ours.sensitivity)
    brief = cp(tensor, rank, max_sweeps=15)
    equal = sensitivities.gather(0, at_first(errors, brief.error))[0] / brief.sensitivity
    torch.testing.assert_close(equal, torch.ones_like(equal), rtol=0.05, atol=0)


def test_border_rank_10_ours_is_found_and_at_equal_error_less_than_half_as_sensitive():
    """Plain alternation gets some of ten random starts to our error, at twice to a hundred times the sensitivity.

    Equal error: the first iteration with an error of at most ours. From there the sensitivity goes on growing. The
    other starts end at a stationary point of eight times the error.
    """
    tensor = product_of_matrices(2, 2, 3)
    ours, longer = cp(tensor, 10), cp(tensor, 10, max_sweeps=500, tolerance=1e-7)
    errors, sensitivities = plain_als(tensor, 10, range(10), 1500)
    reached = errors[-1] <= float(ours.error)
    assert bool(reached.any())
    assert bool((errors[-1][~reached] > 5 * float(ours.error)).all())
    equal = sensitivities.gather(0, at_first(errors, float(ours.error)))[0]
    assert float((equal / ours.sensitivity)[reached].min()) > 2
    assert float((equal / ours.sensitivity)[reached].median()) > 5
    assert float((sensitivities[-1] / sensitivities[299])[reached].min()) > 3
    assert float(longer.sensitivity) < 2 * float(ours.sensitivity)


@pytest.mark.shared
def test_real_kernel_same_error_at_a_quarter_of_the_sensitivity(shared_dir):
    """Equal error: the first iteration within 0.5 % of ours, or the last one where plain alternation stays above."""
    tensor = real(shared_dir, "layer1.1.conv1")
    ours, longer = cp(tensor / tensor.norm(), 30), cp(tensor / tensor.norm(), 30, max_sweeps=400, tolerance=1e-6)
    errors, sensitivities = plain_als(tensor / tensor.norm(), 30, range(5), 1000)
    first = at_first(errors, 1.005 * float(ours.error))
    assert bool((errors.gather(0, first) >= ours.error).all())
    ratios = sensitivities.gather(0, first)[0] / ours.sensitivity
    assert float(ratios.min()) > 4
    assert float((sensitivities[-1] / sensitivities[249]).min()) > 1.5
    assert float(longer.sensitivity) < 1.5 * float(ours.sensitivity)


def test_the_price_lowers_sensitivity_not_accuracy():
    tensor = decaying(24, 24, 9)
    free, priced = cp(tensor, 24, price=0.0), cp(tensor, 24)
    assert float(priced.error) <= 1.03 * float(free.error)
    assert float(priced.sensitivity) < float(free.sensitivity)


# Behaviour


def test_same_seed_same_factors_whatever_the_global_state():
    tensor = random((2, 7, 6, 9), 0)
    before = tensor.clone()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = cp(tensor, 5, seed=3).factors
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(one, cp(tensor, 5, seed=3).factors, strict=True))
    assert torch.equal(tensor, before)


def test_members_of_a_batch_do_not_touch_each_other():
    one, two = decaying(12, 8, 9), 1e6 * decaying(12, 8, 9, seed=5)
    together = cp(torch.cat([one, two]), 8)
    for i, tensor in enumerate((one, two)):
        assert float(together.error[i]) == pytest.approx(float(cp(tensor, 8).error), rel=0.03)


def test_a_singular_neighbour_takes_no_start_away():
    """The exact components of a tensor are found beside one whose slices are singular."""
    tensor = low_rank((9, 8, 7), 5)
    pair = torch.stack([tensor[0], torch.zeros_like(tensor[0])])
    starts = cp_start.eigen(Problem(pair), 5, torch.Generator().manual_seed(0))
    assert relative([factor[:1] for factor in starts], tensor[:1]) < 1e-6
    assert float(full(starts)[1].abs().max()) == 0


@pytest.mark.parametrize("scale", [1e-30, 1e30], ids=str)
def test_scale_changes_nothing_but_the_scale(scale):
    tensor = random((1, 6, 5, 4), 0)
    one, other = cp(tensor, 4), cp(tensor * scale, 4)
    assert float(other.error) == pytest.approx(float(one.error), rel=1e-6)
    assert relative([f.clone() for f in other.factors], tensor * scale) == pytest.approx(float(one.error), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 40])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1, 4, 5, 6),
        low_rank((4, 5, 6), 1),
        torch.eye(6)[None, :, None, :].expand(1, 6, 3, 6),
        random((1, 1, 5, 9), 0),
        random((1, 6, 1, 9), 0),
        random((1, 6, 5, 1), 0),
        torch.cat([torch.zeros(1, 4, 5, 6), torch.ones(1, 4, 5, 6)]),
    ],
    ids=["constant", "rank-one", "equal-slices", "1-5-9", "6-1-9", "6-5-1", "one-of-two-zero"],
)
def test_hard_tensors_stay_finite(tensor, rank):
    tensor = tensor.double()
    result = cp(tensor, rank)
    assert all(bool(f.isfinite().all()) for f in result.factors)
    assert bool(result.sensitivity.isfinite().all())
    assert bool((result.error <= 1).all())
    if rank == 40:
        assert float(result.error.max()) < 1e-3


def test_zero_gives_zero():
    result = cp(torch.zeros(1, 4, 5, 6, dtype=torch.float64), 3)
    assert float(result.error) == 0
    assert all(bool((f == 0).all()) for f in result.factors)
