"""HOOI against TensorLy, against its own start, and on tensors whose rank is known."""

import pytest
import torch

from autorank.solvers import hooi
from autorank.solvers.hooi import tucker2
from autorank.solvers.lowrank import leading_basis
from autorank.testing.cases import random


def decaying(t, s, k, seed=0):
    """Return a kernel (1, T, S, K) with falling spectra, as trained ones have."""
    a = torch.linalg.qr(random((t, t), seed))[0] * torch.arange(1, t + 1) ** -0.7
    b = torch.linalg.qr(random((s, s), seed + 1))[0] * torch.arange(1, s + 1) ** -0.7
    return torch.einsum("abk,ta,sb->tsk", random((t, s, k), seed + 2), a, b)[None]


def full(core, u, v):
    if u is not None:
        core = torch.einsum("bosk,bto->btsk", core, u)
    return core if v is None else torch.einsum("btik,bsi->btsk", core, v)


def relative(approx, tensor):
    return float((approx - tensor).norm() / tensor.norm())


@pytest.mark.parametrize(
    ("shape", "rank"), [((12, 8, 9), (5, 3)), ((32, 24, 9), (8, 8)), ((10, 20, 27), (3, 12)), ((48, 48, 9), (24, 12))]
)
def test_as_good_as_tensorly(shape, rank):
    import tensorly
    from tensorly.decomposition import partial_tucker

    tensor = decaying(*shape)
    before = tensorly.get_backend()
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        (core, (u, v)), _ = partial_tucker(tensor[0], rank=list(rank), modes=[0, 1], n_iter_max=200, tol=1e-10)
    assert tensorly.get_backend() == before
    theirs = relative(full(core[None], u[None], v[None]), tensor)
    assert relative(full(*tucker2(tensor, rank)), tensor) <= theirs * (1 + 1e-5)


@pytest.mark.parametrize("rank", [(8, 8), (24, 12), (36, 30)], ids=str)
def test_it_stops_when_six_digits_stand(rank, monkeypatch):
    calls = []
    monkeypatch.setattr(hooi, "leading_basis", lambda m, r: calls.append(r) or leading_basis(m, r))
    tensor = decaying(48, 48, 9)
    error = relative(full(*tucker2(tensor, rank)), tensor)
    usual = len(calls)
    best = relative(full(*tucker2(tensor, rank, tolerance=1e-13)), tensor)
    assert error <= best * (1 + 1e-5)
    calls.clear()
    tucker2(tensor, rank, tolerance=1e-9)
    assert usual < len(calls)


def test_better_than_its_start():
    tensor = random((1, 12, 10, 9), 0)
    u = leading_basis(tensor.flatten(2), 4)
    v = leading_basis(tensor.transpose(1, 2).flatten(2), 3)
    start = torch.einsum("btsk,bto,bsi->boik", tensor, u, v)
    core, *_ = tucker2(tensor, (4, 3))
    assert core.norm() > start.norm()


@pytest.mark.parametrize("rank", [(3, 2), (3, 8), (10, 2), (10, 8)], ids=str)
def test_exact_where_the_rank_is_enough(rank):
    tensor = torch.einsum("boik,bto,bsi->btsk", random((2, 3, 2, 9), 0), random((2, 10, 3), 1), random((2, 8, 2), 2))
    core, u, v = tucker2(tensor, rank)
    assert tuple(core.shape) == (2, *rank, 9)
    assert (u is None) == (rank[0] == 10)
    assert (v is None) == (rank[1] == 8)
    assert relative(full(core, u, v), tensor) < 1e-7


def test_bases_are_orthonormal_even_where_the_core_cannot_fill_them():
    # R_out > R_in · K: some columns carry nothing
    core, u, v = tucker2(random((2, 20, 6, 3), 0), (15, 2))
    for basis in (u, v):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[2], dtype=torch.float64).expand(2, -1, -1))
    assert torch.isfinite(core).all()


def test_members_of_a_batch_do_not_touch_each_other():
    one, two = decaying(12, 8, 9), 1e6 * decaying(12, 8, 9, seed=5)
    together = full(*tucker2(torch.cat([one, two]), (5, 3)))
    for i, tensor in enumerate((one, two)):
        alone = full(*tucker2(tensor, (5, 3)))
        assert relative(together[i : i + 1], alone) < 1e-4
