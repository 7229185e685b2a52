"""The layers on which formats are held to their contract, and the dense modules they are compared with."""

from __future__ import annotations

import itertools
import math
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from autorank.layout import stored_weight
from autorank.measure import dense_layer
from autorank.solvers.whitening import LayerStats, collect
from autorank.types import CallSize, Kind, LayerSpec

Sizes = int | tuple[int, ...]
"""One number for all axes, or one for each."""

_MODES = ("zeros", "reflect", "replicate", "circular")


HARD_WEIGHTS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "zero": lambda shape: torch.zeros(shape),
    "constant": lambda shape: torch.ones(shape),
    "tiny": lambda shape: random(shape, 1) * 1e-30,
    "huge": lambda shape: random(shape, 1) * 1e30,
    "rank-one": lambda shape: torch.arange(1, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1)) * torch.ones(shape),
    "one-entry": lambda shape: torch.arange(math.prod(shape)).eq(0).reshape(shape),
}
"""Kernels on which careless fits divide by zero or overflow, by name."""


@dataclass(frozen=True)
class Case:
    """A layer and the size of its input: spatial sizes, or the leading dimensions of a linear layer after the batch."""

    spec: LayerSpec
    size: tuple[int, ...]

    @property
    def id(self) -> str:
        """A short name for the test report."""
        s = self.spec
        if s.kind == "linear":
            return f"linear-{'x'.join(map(str, s.weight_shape))}-in{self.size}"

        def short(value: object) -> str:
            return "".join(map(str, value)) if isinstance(value, tuple) else str(value)

        shape = "x".join(map(str, s.weight_shape))
        geometry = f"s{short(s.stride)}-p{short(s.padding)}-{s.padding_mode}-d{short(s.dilation)}-g{s.groups}"
        extra = f"-o{short(s.output_padding)}" if s.transposed else ""
        return f"{s.kind}-{shape}-{geometry}{extra}"

    def input(self, batch: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return a random input of the layer."""
        middle = (
            (*self.size, self.spec.in_channels) if self.spec.kind == "linear" else (self.spec.in_channels, *self.size)
        )
        return random((batch, *middle), seed).to(dtype)


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return normal float64 values that depend on the arguments alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(spec: LayerSpec, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """Return PyTorch's own layer with this weight (T, S/groups, K1, ..., Kd) and bias."""
    module = dense_layer(spec).to(weight.dtype)
    with torch.no_grad():
        module.weight.copy_(stored_weight(weight, spec))  # type: ignore[operator]
        if bias is not None:
            module.bias.copy_(bias)  # type: ignore[operator]
    return module


def make(
    kind: Kind,
    shape: tuple[int, ...],
    size: tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    padding_mode: str = "zeros",
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    output_padding: int | tuple[int, ...] = 0,
    bias: bool = True,
    calls: int = 1,
) -> Case:
    """Return a case whose calls have the sizes that PyTorch's own layer produces.

    Parameters
    ----------
    kind, shape
        Kind of the layer and shape of its weight, (T, S/groups, K1, ..., Kd) for every kind.
    size : tuple of int
        Spatial sizes of the input, or a linear layer's leading dimensions after the batch.
    stride, padding, padding_mode, dilation, groups, output_padding, bias
        As PyTorch's layers take them; `output_padding` for transposed convolutions only.
    calls : int
        How often the layer is called with this input.
    """
    d = len(shape) - 2
    spec = LayerSpec(
        "block.layer",
        kind,
        shape,
        _per_axis(stride, d),
        padding if isinstance(padding, str) else _per_axis(padding, d),
        padding_mode,
        _per_axis(dilation, d),
        groups,
        bias,
    )
    if kind == "linear":
        spec = replace(spec, padding=())
    if spec.transposed:
        spec = replace(spec, output_padding=_per_axis(output_padding, d))
    case = Case(spec, size)
    with torch.no_grad():
        out = dense(spec, torch.zeros(shape))(case.input(1, dtype=torch.float32))
    after = tuple(out.shape[1:-1]) if kind == "linear" else tuple(out.shape[2:])
    return Case(replace(spec, calls=(CallSize(1, size, after),) * calls), size)


def grid() -> list[Case]:
    """Return the full grid: stride × padding × padding mode × dilation × groups × kernel × dimensions."""
    return list(_grid())


@cache
def _grid() -> tuple[Case, ...]:
    cases = [
        make("linear", (10, 7), ()),
        make("linear", (7, 12), (), bias=False),
        make("linear", (8, 9), (5,)),
        make("linear", (8, 9), (2, 3), calls=2),
        make("conv2d", (8, 6, 1, 1), (6, 5), stride=2),
        make("conv2d", (8, 6, 1, 1), (5, 5), padding=1, padding_mode="reflect"),
        make("conv2d", (8, 6, 1, 3), (6, 7), padding=(0, 1)),
        make("conv2d", (8, 6, 5, 5), (9, 8), padding=2, stride=(2, 1), calls=2),
        make("conv2d", (8, 6, 4, 4), (9, 8), padding="same", bias=False),
        make("conv3d", (6, 4, 1, 3, 3), (3, 5, 6), padding=(0, 1, 1), stride=(1, 2, 1)),
        make("conv3d", (6, 4, 3, 1, 1), (5, 4, 3), padding=(1, 0, 0)),
    ]
    cases += _product("conv1d", [(3,), (4,)], [1, 2], [0, 1, "same", "valid"], [1, 2], (10,))
    two: list[int | tuple[int, ...] | str] = [(0, 0), (1, 1), (1, 0), "same", "valid"]
    cases += _product("conv2d", [(3, 3), (3, 2)], [1, 2, (2, 1)], two, [1, 2, (1, 2)], (9, 8))
    three: list[int | tuple[int, ...] | str] = [(0, 0, 0), (1, 0, 1), "same"]
    cases += _product("conv3d", [(2, 3, 3)], [1, (2, 1, 2)], three, [1, (1, 2, 1)], (5, 7, 6))
    return (*cases, *_transposed())


def _transposed() -> list[Case]:
    """Return the transposed part of the grid; PyTorch pads them with zeros only."""
    # kind, size, kernel, stride, padding, output padding, dilation
    wanted: list[tuple[Kind, tuple[int, ...], tuple[int, ...], Sizes, Sizes, Sizes, Sizes]] = [
        ("conv_transpose1d", (7,), (3,), 1, 0, 0, 1),
        ("conv_transpose1d", (7,), (3,), 2, 1, 1, 1),
        ("conv_transpose1d", (7,), (4,), 2, 1, 0, 1),
        ("conv_transpose1d", (7,), (4,), 3, 2, 2, 2),
        ("conv_transpose1d", (7,), (2,), 2, 0, 0, 1),
        ("conv_transpose2d", (5, 4), (3, 3), 1, 1, 0, 1),
        ("conv_transpose2d", (5, 4), (3, 3), 2, 1, 1, 1),
        ("conv_transpose2d", (5, 4), (3, 3), (2, 1), (0, 1), (1, 0), (1, 2)),
        ("conv_transpose2d", (5, 4), (3, 3), 3, 0, 2, 1),
        ("conv_transpose2d", (5, 4), (3, 2), 1, 0, 0, 2),
        ("conv_transpose2d", (5, 4), (3, 2), (1, 2), (1, 0), (0, 1), 1),
        ("conv_transpose2d", (5, 4), (4, 4), 2, 1, 0, 1),
        ("conv_transpose2d", (5, 4), (4, 4), 2, 1, 0, 2),
        ("conv_transpose2d", (5, 4), (2, 2), 2, 0, 0, 1),
        ("conv_transpose2d", (5, 4), (2, 2), 3, 0, 1, 1),
        ("conv_transpose2d", (5, 4), (1, 1), 1, 0, 0, 1),
        ("conv_transpose2d", (5, 4), (1, 1), 2, 0, 1, 1),
        ("conv_transpose2d", (5, 4), (1, 3), 2, (0, 1), 1, 1),
        ("conv_transpose2d", (5, 4), (5, 5), 2, 2, (1, 0), 1),
        ("conv_transpose3d", (3, 2, 3), (2, 3, 3), 1, (0, 1, 1), 0, 1),
        ("conv_transpose3d", (3, 2, 3), (2, 3, 3), (2, 1, 2), (1, 0, 1), (1, 0, 1), (1, 2, 1)),
        ("conv_transpose3d", (3, 2, 3), (2, 2, 2), 2, 0, 0, 1),
        ("conv_transpose3d", (3, 2, 3), (1, 3, 3), (1, 2, 2), (0, 1, 1), (0, 1, 1), 1),
    ]
    return [
        make(
            kind,
            (8, 6 // groups, *kernel),
            size,
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            dilation=dilation,
            groups=groups,
            bias=groups == 1,
        )
        for kind, size, kernel, stride, padding, output_padding, dilation in wanted
        for groups in (1, 2)
    ]


_SHOWN = ("kernel", "stride", "padding", "padding_mode", "dilation", "groups", "output_padding")


def thinned(cases: Sequence[Case], every: int) -> list[Case]:
    """Return about one case in `every`, always the same ones, with all that the layers of each kind show somewhere.

    Parameters
    ----------
    cases : sequence of Case
    every : int
        1 returns all. Each kernel, stride, padding and its mode, dilation, number of groups and output padding of a
        kind stays in at least one case.
    """
    # In an order of no meaning: every fourth of a product of lists could have one value of the last ones only.
    shuffled = sorted(range(len(cases)), key=lambda i: zlib.crc32(cases[i].id.encode()))
    kept: set[int] = set()
    seen: set[tuple[str, str, object]] = set()
    for place, i in enumerate(shuffled):
        spec = cases[i].spec
        shown = {(spec.kind, name, getattr(spec, name)) for name in _SHOWN}
        if place % every == 0 or not shown <= seen:
            kept.add(i)
            seen |= shown
    return [cases[i] for i in sorted(kept)]


def few() -> list[Case]:
    """Return a case of each kind, for tests that are slow or do not depend on the geometry."""
    return list(_few())


@cache
def _few() -> tuple[Case, ...]:
    return (
        make("linear", (10, 7), (3,)),
        make("conv1d", (8, 3, 3), (10,), padding=1, stride=2, groups=2),
        make("conv2d", (8, 6, 3, 3), (9, 8), padding=1, padding_mode="reflect", stride=(2, 1)),
        make("conv2d", (8, 3, 3, 2), (9, 8), padding="same", dilation=(1, 2), groups=2, bias=False),
        make("conv2d", (10, 6, 1, 1), (6, 5), stride=2, calls=2),
        make("conv3d", (6, 4, 2, 3, 3), (5, 7, 6), padding=(1, 0, 1), padding_mode="circular"),
        make("conv_transpose1d", (8, 3, 4), (6,), stride=2, padding=1, groups=2),
        make("conv_transpose2d", (8, 6, 3, 3), (5, 4), stride=2, padding=1, output_padding=1),
    )


def odd() -> list[LayerSpec]:
    """Return layers that some or all formats must refuse in words."""
    cases = [
        make("conv2d", (8, 1, 3, 3), (6, 6), groups=8),
        make("conv1d", (8, 1, 3), (6,), groups=8),
        make("conv3d", (4, 1, 3, 3, 3), (4, 4, 4), groups=4),
        make("conv2d", (8, 1, 3, 3), (6, 6), groups=4),
        make("conv2d", (1, 6, 3, 3), (6, 6)),
        make("conv2d", (6, 1, 1, 1), (6, 6)),
        make("linear", (1, 5), ()),
        make("linear", (5, 1), ()),
        make("conv_transpose1d", (8, 8, 3), (6,), padding=1),
        make("conv_transpose2d", (8, 8, 3, 3), (6, 6), padding=1),
        make("conv_transpose3d", (8, 8, 3, 3, 3), (4, 4, 4), padding=1),
        make("conv_transpose2d", (8, 1, 4, 4), (6, 6), stride=2, padding=1, groups=8),
        make("conv_transpose2d", (1, 6, 3, 3), (6, 6), stride=2, output_padding=1),
    ]
    return [case.spec for case in (*cases, *few())]


def separable_statistics(spec: LayerSpec) -> LayerStats:
    """Return statistics with uneven, correlated channels and nothing between kernel positions."""
    channels, positions = spec.weight_shape[1], math.prod(spec.kernel)
    mix = random((spec.groups, channels, channels), 5) * torch.logspace(0, -2, channels, dtype=torch.float64)[:, None]
    eye = torch.eye(positions, dtype=torch.float64)
    return LayerStats(torch.stack([torch.kron(block, eye) for block in mix @ mix.mT]).float(), 100)


def gradient_covariance(spec: LayerSpec) -> Tensor:
    """Return the covariance of uneven, correlated output gradients, (groups, T/groups, T/groups)."""
    channels = spec.out_channels // spec.groups
    mix = random((spec.groups, channels, channels), 6) * torch.logspace(0, -2, channels, dtype=torch.float64)[:, None]
    return (mix @ mix.mT).float()


def real_statistics(case: Case) -> LayerStats:
    """Return the statistics that the layer collects from random inputs with an offset."""
    layer = dense(case.spec, torch.zeros(case.spec.weight_shape))
    model = nn.Sequential(OrderedDict(block=nn.Sequential(OrderedDict(layer=layer))))
    return collect(model, [case.spec], [(case.input(3, dtype=torch.float32) + 0.5,)])[case.spec.name]


def _per_axis(value: int | tuple[int, ...], d: int) -> tuple[int, ...]:
    return (value,) * max(d, 0) if isinstance(value, int) else value


def _product(
    kind: Kind,
    kernels: list[tuple[int, ...]],
    strides: list[int | tuple[int, ...]],
    paddings: list[int | tuple[int, ...] | str],
    dilations: list[int | tuple[int, ...]],
    size: tuple[int, ...],
) -> list[Case]:
    return list(_cases(kind, kernels, strides, paddings, dilations, size))


def _cases(
    kind: Kind,
    kernels: list[tuple[int, ...]],
    strides: list[int | tuple[int, ...]],
    paddings: list[int | tuple[int, ...] | str],
    dilations: list[int | tuple[int, ...]],
    size: tuple[int, ...],
) -> Iterator[Case]:
    for kernel, stride, padding, mode, dilation, groups in itertools.product(
        kernels, strides, paddings, _MODES, dilations, (1, 2)
    ):
        pads = padding == "same" or (not isinstance(padding, str) and any(_per_axis(padding, 1)))
        if not pads and mode != "zeros":
            continue  # without padding its mode says nothing
        if padding == "same" and stride != 1:
            continue  # PyTorch has no such layer
        yield make(
            kind,
            (8, 6 // groups, *kernel),
            size,
            stride=stride,
            padding=padding,
            padding_mode=mode,
            dilation=dilation,
            groups=groups,
            bias=groups == 1,
        )
