"""Block term decomposition: identities, least squares by brute force, and what keeps blocks from cancelling."""

import math

import pytest
import torch

from autorank.solvers import hooi
from autorank.solvers.block_steps import bounded
from autorank.solvers.block_term import Blocks, block_term, compose, energy, sensitivity
from autorank.testing.cases import HARD_WEIGHTS, random


def planted(t, s, k, blocks, rank, batch=1, seed=0):
    """Return a sum of random blocks (batch, T, S, K)."""
    u, v = random((batch, blocks, t, rank[0]), seed), random((batch, blocks, s, rank[1]), seed + 1)
    return compose(Blocks(random((batch, blocks, *rank, k), seed + 2), u, v))


def relative(blocks, tensor):
    return float((compose(blocks) - tensor).norm() / tensor.norm())


def share(blocks, tensor):
    return float(energy(blocks).sum() / tensor.square().sum())


def border(n, k):
    """Return the derivative at 0 of a block moving along itself: the limit of differences of two growing blocks."""
    u, du = random((1, 1, n, 2), 0), random((1, 1, n, 2), 1)
    v, dv = random((1, 1, n, 2), 2), random((1, 1, n, 2), 3)
    c, dc = random((1, 1, 2, 2, k), 4), random((1, 1, 2, 2, k), 5)
    return compose(Blocks(c, du, v)) + compose(Blocks(c, u, dv)) + compose(Blocks(dc, u, v))


@pytest.mark.parametrize(
    ("blocks", "rank", "shape"),
    [(2, (2, 3), (12, 14, 9)), (3, (2, 2), (10, 12, 9)), (2, (4, 2), (16, 9, 6)), (4, (1, 1), (8, 9, 7))],
    ids=str,
)
def test_tensors_made_of_blocks_are_recovered(blocks, rank, shape):
    tensor = planted(*shape, blocks, rank, batch=8)
    found = block_term(tensor, blocks, rank, bound=20, max_sweeps=200, tolerance=0)
    assert tuple(found.core.shape) == (8, blocks, *rank, shape[2])
    errors = (compose(found) - tensor).flatten(1).norm(dim=1) / tensor.flatten(1).norm(dim=1)
    # like every alternating fit it may stop in a local minimum; from half of the tensors on it does not
    assert int((errors < 1e-3).sum()) >= 4
    assert float(errors.min()) < 1e-6


@pytest.mark.parametrize("rank", [(3, 2), (5, 5), (1, 1), (10, 3)], ids=str)
def test_one_block_is_tucker2(rank):
    tensor = random((2, 10, 8, 9), 0)
    core, u, v = hooi.tucker2(tensor, rank)
    approx = core if u is None else torch.einsum("goik,gto->gtik", core, u)
    expected = float((torch.einsum("gtik,gsi->gtsk", approx, v) - tensor).norm() / tensor.norm())
    assert relative(block_term(tensor, 1, rank), tensor) == pytest.approx(expected, rel=1e-9)


def test_blocks_of_size_one_are_cp():
    import tensorly
    from tensorly.decomposition import parafac

    tensor = planted(10, 9, 8, 12, (1, 1)) + 0.5 * random((1, 10, 9, 8), 7)
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        cp = parafac(tensor[0], rank=4, init="svd", n_iter_max=1000, tol=1e-9)
        theirs = float((tensorly.cp_to_tensor(cp) - tensor[0]).norm() / tensor.norm())
    assert relative(block_term(tensor, 4, (1, 1), max_sweeps=400, tolerance=1e-8), tensor) <= theirs * 1.01


@pytest.mark.parametrize(
    ("blocks", "rank"), [(2, (8, 6)), (2, (16, 6)), (4, (8, 6)), (6, (6, 6)), (3, (16, 4))], ids=str
)
def test_exact_where_shares_of_the_modes_cover_the_tensor(blocks, rank):
    tensor = random((2, 16, 12, 9), 0)
    covered = any(a * rank[0] >= 16 and blocks // a * rank[1] >= 12 for a in range(1, blocks + 1) if blocks % a == 0)
    assert covered == (relative(block_term(tensor, blocks, rank), tensor) < 1e-12)


@pytest.mark.parametrize(("blocks", "rank"), [(2, (5, 6)), (4, (4, 3)), (4, (7, 5)), (3, (9, 2))], ids=str)
def test_no_worse_than_what_it_contains(blocks, rank):
    tensor = random((1, 16, 12, 9), 0)
    error = relative(block_term(tensor, blocks, rank), tensor)
    # the best Tucker-2 of every share of the blocks over both modes
    for a in (a for a in range(1, blocks + 1) if blocks % a == 0):
        core, *_ = hooi.tucker2(tensor, (min(16, a * rank[0]), min(12, blocks // a * rank[1])))
        assert error <= math.sqrt(max(0.0, 1 - float(core.square().sum() / tensor.square().sum())))
    # one block after the other
    rest = tensor
    for _ in range(blocks):
        rest = rest - compose(block_term(rest, 1, rank))
    assert error < float(rest.norm() / tensor.norm())


def test_fixed_point_of_brute_force_least_squares():
    # at the answer of a fit without a bound, no factor alone can do better
    tensor = random((1, 8, 7, 5), 0)
    core, u, v = block_term(tensor, 2, (2, 2), bound=math.inf, max_sweeps=300, tolerance=1e-12)
    error = float((compose(Blocks(core, u, v)) - tensor).norm())
    for name in ("core", "u", "v"):
        factors = {"core": core, "u": u, "v": v}
        jacobian = torch.func.jacrev(lambda x, n=name, f=factors: compose(Blocks(**{**f, n: x})).flatten())(
            factors[name]
        )
        matrix = jacobian.reshape(tensor.numel(), -1)
        best = torch.linalg.lstsq(matrix, tensor.reshape(-1, 1), driver="gelsd").solution
        assert error == pytest.approx(float((matrix @ best - tensor.reshape(-1, 1)).norm()), rel=1e-5)


def test_sensitivity_is_the_sum_of_squared_jacobians():
    blocks = Blocks(random((1, 2, 3, 2, 4), 0), random((1, 2, 6, 3), 1), random((1, 2, 5, 2), 2))
    jacobians = torch.func.jacrev(lambda *f: compose(Blocks(*f)), argnums=(0, 1, 2))(*blocks)
    assert float(sensitivity(blocks)) == pytest.approx(float(sum(j.square().sum() for j in jacobians)), rel=1e-10)


@pytest.mark.parametrize("blocks", [2, 4], ids=str)
def test_sensitivity_of_fits_is_the_energy_of_their_blocks(blocks):
    tensor = random((2, 9, 8, 6), 0)
    found = block_term(tensor, blocks, (3, 2))
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(found.u.mT @ found.u, eye.expand(2, blocks, 3, 3))
    torch.testing.assert_close(energy(found), found.core.square().sum(dim=(1, 2, 3, 4)))
    torch.testing.assert_close(sensitivity(found), (9 + 8) * energy(found) + 6 * blocks * 3 * 2)


@pytest.mark.parametrize("share_of_free", [0.3, 0.9, 2.0], ids=str)
def test_bounded_least_squares_meets_its_bound(share_of_free):
    y, w = random((2, 6, 40), 0), random((2, 5, 40), 1)
    gram, rhs = y @ y.mT, w @ y.mT
    free = torch.linalg.solve(gram, rhs.mT).mT
    bound = share_of_free * free.square().sum(dim=(1, 2))
    found, ridge = bounded(gram, rhs, bound)
    if share_of_free > 1:
        torch.testing.assert_close(found, free)
        assert (ridge == 0).all()
        return
    torch.testing.assert_close(found.square().sum(dim=(1, 2)), bound)
    assert (ridge > 0).all()
    # stationary: the gradient of the error is parallel to X
    torch.testing.assert_close(found @ gram - rhs, -ridge[:, None, None] * found)


def test_least_squares_diverge_on_a_border_tensor_and_the_bound_holds():
    tensor = border(8, 6)
    sweeps = {"max_sweeps": 250, "tolerance": 0}
    plain = block_term(tensor, 2, (2, 2), bound=math.inf, **sweeps)
    assert share(plain, tensor) > 50
    errors = []
    for bound in (4, 20):
        ours = block_term(tensor, 2, (2, 2), bound=bound, **sweeps)
        assert share(ours, tensor) <= bound * (1 + 1e-9)
        errors.append(relative(ours, tensor))
    # there the error is paid for with energy, whoever fits
    assert relative(plain, tensor) < errors[1] < errors[0] < 0.05


def test_the_bound_stops_growing_blocks_for_less_than_a_percent_of_the_error():
    """Five noisy tensors: plain least squares spend ever more energy on the last percent of the error.

    Stopped early, plain least squares may have our error with no more energy than ours: what the bound does is to make
    late stops safe. Not every tensor makes blocks grow; most do.
    """
    tensor = torch.cat(
        [planted(16, 16, 9, 12, (2, 2), seed=10 * seed) + random((1, 16, 16, 9), 9 + seed) for seed in range(5)]
    )

    def measured(sweeps, **bound):
        found = block_term(tensor, 6, (2, 2), max_sweeps=sweeps, tolerance=0, **bound)
        error = (compose(found) - tensor).flatten(1).norm(dim=1)
        return error, energy(found) / tensor.flatten(1).square().sum(1), sensitivity(found)

    plain = {sweeps: measured(sweeps, bound=math.inf) for sweeps in (50, 200, 400)}
    error, held, ours = measured(200)
    assert float(held.max()) <= 4 * (1 + 1e-9)
    assert bool((error <= 1.01 * plain[400][0]).all())
    assert float((plain[200][2] / ours).median()) > 3
    assert float((plain[400][2] / ours).median()) > 5
    assert float((plain[400][2] / plain[50][2]).median()) > 3


@pytest.mark.parametrize("hard", list(HARD_WEIGHTS))
@pytest.mark.parametrize(("blocks", "rank"), [(2, (3, 2)), (4, (5, 1)), (3, (9, 1))], ids=str)
def test_hard_tensors_stay_finite(hard, blocks, rank):
    tensor = HARD_WEIGHTS[hard]((9, 8, 4))[None].double()
    found = block_term(tensor, blocks, rank)
    assert all(torch.isfinite(x).all() for x in found)
    assert (compose(found) - tensor).norm() <= tensor.norm() * (1 + 1e-9)
    if hard in ("zero", "constant", "rank-one", "one-entry"):
        assert (compose(found) - tensor).norm() <= 1e-6 * tensor.norm()


def test_members_of_a_batch_do_not_touch_each_other():
    parts = [random((1, 12, 10, 9), 0), torch.zeros(1, 12, 10, 9).double(), 1e8 * planted(12, 10, 9, 3, (2, 2))]
    together = compose(block_term(torch.cat(parts), 3, (2, 2)))
    for i, part in enumerate(parts):
        alone = compose(block_term(part, 3, (2, 2)))
        assert (together[i] - alone[0]).norm() <= 0.02 * part.norm()


def test_large_cores_keep_the_bound_too():
    # more unknowns than are solved for directly
    tensor = random((1, 24, 24, 9), 0)
    ours = block_term(tensor, 4, (9, 9), max_sweeps=60, tolerance=0)
    plain = block_term(tensor, 4, (9, 9), bound=math.inf, max_sweeps=60, tolerance=0)
    assert share(ours, tensor) <= 4 * (1 + 1e-9)
    assert relative(ours, tensor) <= relative(plain, tensor) * 1.05
