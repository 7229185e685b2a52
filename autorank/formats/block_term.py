"""Block terms: a pointwise convolution to P·R_in channels, a K-convolution in P groups, a pointwise one to T."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from autorank.formats.base import Factors, Options
from autorank.formats.chain import ChainFormat
from autorank.formats.steps import Step, pointwise
from autorank.solvers import block_term, lowrank
from autorank.types import LayerSpec, Scalar

BLOCKS = (2, 4, 8)
"""The values of the option ``blocks``; one block is tucker2."""

_NARROWEST = 2
"""Four and more blocks are offered where each could have this many channels of its own in both modes."""


class BlockTerm(ChainFormat):
    """W ≈ Σ_p core_p ×_T U_p ×_S V_p (Phan et al., arXiv 2203.02617): P·(S·R_in + R_in·R_out·K + R_out·T) per group.

    The option ``blocks`` is P: 2, 4 or 8. The factors are ``input`` (groups, P·R_in, S/groups, 1, ...), ``core``
    (groups, P·R_out, R_in, K1, ..., Kd) with P groups of channels, which carries stride, padding and dilation, and
    ``output`` (groups, T/groups, P·R_out, 1, ...). Within a block input and output are orthonormal. The fit keeps the
    energy of the blocks bounded, and with it their sensitivity: see `solvers.block_term`.
    """

    name = "block_term"
    rank_names = ("R_out", "R_in")

    def variants(self, spec: LayerSpec) -> tuple[Options, ...]:
        """Return one option set per number of blocks."""
        narrow = min(spec.out_channels // spec.groups, spec.weight_shape[1])
        return tuple((("blocks", p),) for p in BLOCKS if p == 2 or p * _NARROWEST <= narrow)

    def max_rank(self, spec: LayerSpec, options: Options = ()) -> tuple[int, ...]:
        """Return an equal share of both modes with which blocks, side by side, cover the weight.

        Ranks along the way from (1, 1) then have the proportions of the layer, which fits better than long blocks; the
        cost passes the dense layer's before the top where P is no square.
        """
        out, into, share = spec.out_channels // spec.groups, spec.weight_shape[1], math.isqrt(self._blocks(options))
        return math.ceil(out / share), math.ceil(into / share)

    def sizes(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> dict[str, int]:
        """Return the number of blocks and their ranks."""
        return {"p": self._blocks(options), "o": rank[0], "i": rank[1]}

    def steps(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> tuple[Step, ...]:
        """Return the three convolutions: stride, padding and dilation are on the cores."""
        return (
            Step("input", ("p", "i"), ("s",)),
            Step("core", ("o",), ("i",), along=("p",), axes=tuple(range(len(spec.kernel)))),
            Step("output", ("t",), ("p", "o")),
        )

    def _blocks(self, options: Options) -> int:
        return int(dict(options).get("blocks", BLOCKS[0]))

    def _own_options(self, spec: LayerSpec) -> Mapping[str, tuple[Scalar, ...]]:
        return {"blocks": BLOCKS}

    def _refuse(self, spec: LayerSpec, options: Options) -> str | None:
        why = "the weight has only two modes, a sum of blocks would be channel_svd with superfluous cores"
        return (what := pointwise(spec)) and f"{what}: {why}"

    def _fit_plain(
        self, weight: Tensor, spec: LayerSpec, rank: tuple[int, ...], options: Options, seed: int
    ) -> Factors:
        r_out, r_in = rank
        found = block_term.block_term(weight.flatten(3), self._blocks(options), (r_out, r_in))
        named = {"input": found.v.mT, "core": found.core, "output": found.u.movedim(1, 2)}
        return self._pack(named, spec, rank, options)

    def _normal_form(self, factors: Factors, spec: LayerSpec, rank: tuple[int, ...], options: Options) -> Factors:
        """Make the bases of every block orthonormal again: unwhitening bends them and may leave extreme scales."""
        named = self._named(factors, spec, rank, options)
        v, right = lowrank.orthonormal(named["input"].mT)
        u, left = lowrank.orthonormal(named["output"].movedim(2, 1))
        core = torch.einsum("gpao,gpbi,gpoik->gpabk", left, right, named["core"].flatten(4))
        named = {"input": v.mT, "core": core, "output": u.movedim(1, 2)}
        return self._pack(named, spec, rank, options)


from_layer = BlockTerm().from_layer
