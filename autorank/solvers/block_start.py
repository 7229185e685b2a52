"""Where the fit of block terms starts: tensors (g, T, K, S), cores (g, P, R_out, K, R_in)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from autorank.solvers import hooi


class Terms(NamedTuple):
    """Blocks as they are fitted: core (g, P, R_out, K, R_in), u (g, P, T, R_out), v (g, P, S, R_in)."""

    core: Tensor
    u: Tensor
    v: Tensor


_ITERATIONS = 4
"""Of HOOI where sweeps follow anyway."""


def compress(work: Tensor, rank: tuple[int, int], iterations: int = _ITERATIONS) -> tuple[Tensor, Tensor, Tensor]:
    """Return the Tucker-2 core (g, R_out, K, R_in) and bases, with bases for modes that are kept whole too."""
    core, u, v = hooi.tucker2(work.transpose(2, 3).contiguous(), rank, max_iterations=iterations)
    eye = torch.eye(max(work.shape[1], work.shape[3]), dtype=work.dtype, device=work.device)
    if u is None:
        u = eye[: rank[0], : rank[0]].expand(len(work), -1, -1)
    if v is None:
        v = eye[: rank[1], : rank[1]].expand(len(work), -1, -1)
    return core.transpose(2, 3).contiguous(), u, v


def blocks_of(work: Tensor, blocks: int, r_out: int, r_in: int) -> tuple[Terms, bool]:
    """Return the better start in every batch member, and whether it is exact by construction.

    One start takes the best Tucker-2 of what the blocks before left. The other one shares out the bases of a single
    Tucker-2 of rank (a·R_out, b·R_in), a·b = P, block (i, j) getting the i-th share of the one and the j-th of the
    other: it equals that Tucker-2, and the tensor itself when the shares cover both modes.
    """
    t, s = work.shape[1], work.shape[3]
    splits = [(a, blocks // a) for a in range(1, blocks + 1) if blocks % a == 0]
    a, b = max(splits, key=lambda ab: (min(ab[0] * r_out, t) * min(ab[1] * r_in, s), -abs(ab[0] - ab[1])))
    shared = _shared(work, a, b, r_out, r_in)
    if (a * r_out >= t and b * r_in >= s) or blocks == 1:
        return shared, True
    greedy = _greedy(work, blocks, r_out, r_in)
    # Both have orthogonal parts, so that the energy they hold says which one is closer: the greedy blocks are
    # orthogonal to what they leave, one after the other.
    held = [terms.core.square().sum(dim=(1, 2, 3, 4)) for terms in (shared, greedy)]
    take = (held[0] > held[1])[:, None, None, None]
    return Terms(
        torch.where(take[..., None], shared.core, greedy.core),
        torch.where(take, shared.u, greedy.u),
        torch.where(take, shared.v, greedy.v),
    ), False


def _greedy(work: Tensor, blocks: int, r_out: int, r_in: int) -> Terms:
    rest, found = work, []
    for _ in range(blocks):
        core, u, v = compress(rest, (r_out, r_in))
        rest = rest - torch.einsum("goki,gto,gsi->gtks", core, u, v)
        found.append((core, u, v))
    cores, us, vs = zip(*found, strict=True)
    return Terms(torch.stack(cores, 1), torch.stack(us, 1), torch.stack(vs, 1))


def _shared(work: Tensor, a: int, b: int, r_out: int, r_in: int) -> Terms:
    rank = min(work.shape[1], a * r_out), min(work.shape[3], b * r_in)
    core, u, v = compress(work, rank, 50 if a * b == 1 else _ITERATIONS)
    pad = torch.nn.functional.pad
    core = pad(core, (0, b * r_in - rank[1], 0, 0, 0, a * r_out - rank[0]))
    u, v = pad(u, (0, a * r_out - rank[0])), pad(v, (0, b * r_in - rank[1]))
    # Strided shares, so that every block gets strong and weak directions.
    cores, us, vs = [], [], []
    for i in range(a):
        for j in range(b):
            cores.append(core[:, i::a, :, j::b])
            us.append(u[:, :, i::a])
            vs.append(v[:, :, j::b])
    return Terms(torch.stack(cores, 1), torch.stack(us, 1), torch.stack(vs, 1))
