"""Tensor trains against TensorLy, against their own start, and on tensors whose ranks are known."""

import itertools

import pytest
import torch

from autorank.solvers.ring_algebra import chain
from autorank.solvers.train import train
from autorank.testing.cases import HARD_WEIGHTS, random


def full(cores, shape):
    return chain(cores).reshape(shape)


def error(tensor, cores):
    return float((full(cores, tensor.shape) - tensor).norm() / tensor.norm())


def theirs(tensor, rank):
    import tensorly
    from tensorly.decomposition import tensor_train

    with tensorly.backend_context("pytorch", local_threadsafe=True):
        found = tensor_train(tensor[0], [1, *rank, 1])
        return float((tensorly.tt_to_tensor(found) - tensor[0]).norm() / tensor.norm())


CASES = [((12, 3, 3, 10), (5, 6, 4)), ((8, 9, 8), (3, 4)), ((6, 3, 2, 3, 7), (3, 4, 5, 2)), ((20, 30), (7,))]


@pytest.mark.parametrize(("shape", "rank"), CASES, ids=str)
def test_without_sweeps_it_is_tensorlys(shape, rank):
    tensor = random((1, *shape), 0)
    assert error(tensor, train(tensor, rank, sweeps=0)) == pytest.approx(theirs(tensor, rank), rel=1e-9)


@pytest.mark.parametrize(("shape", "rank"), CASES[:3], ids=str)
def test_sweeps_lower_the_error(shape, rank):
    tensor = random((1, *shape), 0)
    errors = [error(tensor, train(tensor, rank, sweeps=n, tolerance=0.0)) for n in range(6)]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0] * 0.999


@pytest.mark.parametrize("sweeps", [0, 1, 2])
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((6, 3, 3, 5), (6, 15, 5)), ((4, 9, 5), (4, 5)), ((2, 7), (2,)), ((3, 2, 2, 2, 4), (3, 6, 8, 4))],
)
def test_full_ranks_lose_nothing(shape, rank, sweeps):
    tensor = random((3, *shape), 1)
    assert error(tensor, train(tensor, rank, sweeps=sweeps)) < 1e-7


def test_a_train_is_found():
    cores = [random((2, r, n, q), i) for i, (r, n, q) in enumerate([(1, 8, 3), (3, 3, 4), (4, 3, 2), (2, 9, 1)])]
    tensor = full(cores, (2, 8, 3, 3, 9))
    assert error(tensor, train(tensor, (3, 4, 2))) < 1e-7


@pytest.mark.parametrize("sweeps", [0, 1, 2, 3])
def test_the_cores_behind_the_free_end_are_orthonormal(sweeps):
    cores = train(random((2, 7, 3, 3, 6), 0), (3, 4, 3), sweeps=sweeps, tolerance=0.0)
    for k, core in enumerate(cores):
        r, n, q = core.shape[1:]
        if sweeps % 2 == 0 and k < 3:
            flat = core.reshape(2, r * n, q)
        elif sweeps % 2 == 1 and k > 0:
            flat = core.reshape(2, r, n * q).mT
        else:
            continue
        torch.testing.assert_close(flat.mT @ flat, torch.eye(flat.shape[2], dtype=flat.dtype).expand(2, -1, -1))


def test_a_batch_is_its_members():
    tensor = random((3, 7, 3, 3, 6), 0)
    together = full(train(tensor, (3, 4, 3), tolerance=0.0), tensor.shape)
    alone = torch.cat([full(train(t[None], (3, 4, 3), tolerance=0.0), (1, *tensor.shape[1:])) for t in tensor])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("rank", [(2, 2, 2), (6, 18, 5), (6, 30, 9)], ids=str)
@pytest.mark.parametrize("hard", list(HARD_WEIGHTS))
def test_hard_tensors_stay_finite(hard, rank):
    tensor = HARD_WEIGHTS[hard]((1, 6, 3, 3, 5)).double()
    cores = train(tensor, rank)
    assert [core.shape[3] for core in cores] == [*rank, 1]
    approx = full(cores, tensor.shape)
    assert torch.isfinite(approx).all()
    assert (approx - tensor).norm() <= (1 + 1e-9) * tensor.norm() * (rank == (2, 2, 2)) + 1e-7 * tensor.norm()
