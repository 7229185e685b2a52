"""How long fits will take, from sizes alone, and which ranks to fit when that is too long."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from autorank import formats
from autorank.space import Candidate, LayerCandidates
from autorank.types import Choice, LayerSpec

DEFAULT_BUDGET_S = 60.0
"""Estimated seconds of fitting per process beyond which some ranks are not fitted."""

_COSTS: dict[str, tuple[float, float]] = {
    "channel_svd": (0.004, 2e-9),
    "spatial_svd": (0.004, 2e-9),
    "tucker2": (0.005, 1e-9),
    "grouped_svd": (0.1, 4e-8),
    "tensor_train": (0.01, 4e-9),
    "kronecker": (0.05, 1e-8),
    "cp": (0.5, 7e-8),
    "tucker_cp": (0.4, 4e-8),
    "block_term": (0.3, 1.2e-7),
    "tensor_chain": (0.3, 1e-7),
    "tensor_ring": (0.5, 2e-7),
    "sekron": (0.4, 1.5e-7),
}
"""Seconds of a fit: a constant, and so many for each unit of work; measured on one core of a server of 2023."""

_UNKNOWN = (0.1, 1e-7)


@dataclass(frozen=True)
class Family:
    """The candidates of one layer that differ in their ranks only, cheapest first."""

    spec: LayerSpec
    candidates: tuple[Candidate, ...]

    @cached_property
    def each(self) -> tuple[float, ...]:
        """Estimated seconds of each fit, were it the only one."""
        return tuple(fit_seconds(self.spec, candidate) for candidate in self.candidates)

    @cached_property
    def seconds(self) -> float:
        """Estimated seconds of all fits; where they are parts of one, of that."""
        if formats.get(self.candidates[0].choice.format).nested:
            return max(self.each) + 0.002 * len(self.each)
        return sum(self.each)

    def spread(self, count: int) -> Family:
        """Return `count` of the candidates, both ends among them and the others evenly between."""
        last = len(self.candidates) - 1
        if count > last:
            return self
        return Family(self.spec, tuple(self.candidates[round(i * last / (count - 1))] for i in range(count)))


def fit_seconds(spec: LayerSpec, candidate: Candidate) -> float:
    """Return roughly how long one fit takes on one core.

    Work is counted as the entries of the weight times a rank of its order: parameters over the sum of the modes, which
    is exact for CP, where each sweep multiplies every entry with every component.
    """
    constant, slope = _COSTS.get(candidate.choice.format, _UNKNOWN)
    entries = spec.weight_count
    modes = spec.out_channels + spec.weight_shape[1] + entries // (spec.out_channels * spec.weight_shape[1])
    return constant + slope * entries * candidate.cost.params / modes


def families(layer: LayerCandidates) -> list[Family]:
    """Group the candidates of a layer by format, options and bits."""
    groups: dict[Choice, list[Candidate]] = {}
    for candidate in layer.candidates:
        groups.setdefault(replace(candidate.choice, rank=()), []).append(candidate)
    return [
        Family(layer.spec, tuple(sorted(group, key=lambda c: (c.cost.macs, c.cost.params, c.choice.rank))))
        for group in groups.values()
    ]


def thinned(ranked: Sequence[Family], budget_s: float) -> list[Family]:
    """Take ranks out of families until all fits are thought to take `budget_s` seconds.

    Always one out of the family that takes longest as it stands. First three of each are kept, then its two ends; that
    many are fitted even where they take longer.
    """
    left = list(ranked)
    total = sum(family.seconds for family in left)
    for least in (3, 2):
        # Where ranks are parts of one fit, taking some out saves nothing.
        waiting = [
            (-family.seconds, i)
            for i, family in enumerate(left)
            if len(family.candidates) > least and not formats.get(family.candidates[0].choice.format).nested
        ]
        heapq.heapify(waiting)
        while waiting and total > budget_s:
            _, i = heapq.heappop(waiting)
            count = len(left[i].candidates) - 1
            fewer = ranked[i].spread(count)
            total += fewer.seconds - left[i].seconds
            left[i] = fewer
            if count > least:
                heapq.heappush(waiting, (-fewer.seconds, i))
    return left
