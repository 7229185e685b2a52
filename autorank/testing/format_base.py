"""What the parts of the format contract share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import ClassVar

import pytest
from torch import Tensor

from autorank import formats
from autorank.formats import Format, Options
from autorank.testing import cases
from autorank.testing.cases import Case
from autorank.types import LayerSpec

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


class ContractBase:
    """What the parts of the contract share: the cases, the choices that a format takes for them, and the attributes."""

    format_name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ("linear", *CONVOLUTIONS)
    exact_at_max_rank: ClassVar[bool] = True
    slack: ClassVar[float] = 1e-6
    every: ClassVar[int] = 1

    def grid(self) -> list[Case]:
        """Return the cases for the comparison with the dense layer; extend it for your own."""
        return cases.grid()

    def few(self) -> list[Case]:
        """Return the cases for everything else."""
        return cases.few()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Give `case` the grid and `sample` the short list, without the layers that the format refuses."""
        for fixture in ("case", "sample"):
            if fixture in metafunc.fixturenames:
                taken = _taken(type(self), fixture)  # type: ignore[arg-type]
                metafunc.parametrize(fixture, taken, ids=[case.id for case in taken])

    @property
    def format(self) -> Format:
        """The format under test."""
        return formats.get(self.format_name)

    def choices(self, spec: LayerSpec) -> Iterator[Options]:
        """Yield the options under which the format takes this layer."""
        for options in self.format.variants(spec):
            if self.format.supports(spec, options) is None:
                yield options

    def middle_rank(self, spec: LayerSpec, options: Options) -> tuple[int, ...]:
        """Return a rank about half of the largest one."""
        return tuple((top + 1) // 2 for top in self.format.max_rank(spec, options))

    def whitened(self, spec: LayerSpec, whiten: str) -> Iterator[Options]:
        """Yield the options under which the format takes this layer with this whitening."""
        for options in self.choices(spec):
            if whiten in self.format.whitenings(spec, options):
                yield tuple(sorted((*options, ("whiten", whiten))))

    def error(self, weight: Tensor, spec: LayerSpec, rank: tuple[int, ...], options: Options) -> float:
        """Return the relative error of a fit."""
        factors = self.format.fit(weight, spec, rank, options)
        return float((self.format.reconstruct(factors, spec, rank, options) - weight).norm() / weight.norm())


def one_at_top(top: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the ranks that are at their largest in one mode and 1 in the others."""
    return [tuple(r if i == j else 1 for i, r in enumerate(top)) for j in range(len(top))]


@cache
def _taken(contract: type[ContractBase], fixture: str) -> tuple[Case, ...]:
    """Return the cases of a fixture that the format takes; asked once, as there are hundreds for every test."""
    held = contract()
    source = held.grid() if fixture == "case" else held.few()
    taken = [case for case in source if any(True for _ in held.choices(case.spec))]
    return tuple(cases.thinned(taken, held.every if fixture == "case" else 1))
