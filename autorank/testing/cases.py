"""The layers on which formats are held to their contract, and the dense modules they are compared with."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autorank.measure import dense_layer
from autorank.solvers.whitening import LayerStats, collect
from autorank.types import CallSize, Kind, LayerSpec

_DENSE = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
_TRANSPOSED: tuple[Kind, ...] = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
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
        return f"{s.kind}-{shape}-{geometry}"

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
    """Return PyTorch's own layer with this weight and bias."""
    module = dense_layer(spec).to(weight.dtype)
    with torch.no_grad():
        module.weight.copy_(weight)  # type: ignore[operator]
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
    bias: bool = True,
    calls: int = 1,
) -> Case:
    """Return a case whose calls have the sizes that PyTorch's own layer produces.

    Parameters
    ----------
    kind, shape
        Kind of the layer and shape of its weight.
    size : tuple of int
        Spatial sizes of the input, or a linear layer's leading dimensions after the batch.
    stride, padding, padding_mode, dilation, groups, bias
        As PyTorch's layers take them.
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
    case = Case(spec, size)
    with torch.no_grad():
        out = dense(spec, torch.zeros(shape))(case.input(1, dtype=torch.float32))
    after = tuple(out.shape[1:-1]) if kind == "linear" else tuple(out.shape[2:])
    return Case(replace(spec, calls=(CallSize(1, size, after),) * calls), size)


def grid() -> list[Case]:
    """Return the full grid: stride × padding × padding mode × dilation × groups × kernel × dimensions."""
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
    return cases


def few() -> list[Case]:
    """Return a case of each kind, for tests that are slow or do not depend on the geometry."""
    return [
        make("linear", (10, 7), (3,)),
        make("conv1d", (8, 3, 3), (10,), padding=1, stride=2, groups=2),
        make("conv2d", (8, 6, 3, 3), (9, 8), padding=1, padding_mode="reflect", stride=(2, 1)),
        make("conv2d", (8, 3, 3, 2), (9, 8), padding="same", dilation=(1, 2), groups=2, bias=False),
        make("conv2d", (10, 6, 1, 1), (6, 5), stride=2, calls=2),
        make("conv3d", (6, 4, 2, 3, 3), (5, 7, 6), padding=(1, 0, 1), padding_mode="circular"),
    ]


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
    ]
    specs = [case.spec for case in (*cases, *few())]
    for d in (1, 2, 3):
        kind = _TRANSPOSED[d - 1]
        ones = (1,) * d
        specs.append(LayerSpec("block.up", kind, (8, 8, *(3,) * d), ones, ones, "zeros", ones, 1, True))
    return specs


def separable_statistics(spec: LayerSpec) -> LayerStats:
    """Return statistics with uneven, correlated channels and nothing between kernel positions."""
    channels, positions = spec.weight_shape[1], math.prod(spec.kernel)
    mix = random((spec.groups, channels, channels), 5) * torch.logspace(0, -2, channels, dtype=torch.float64)[:, None]
    eye = torch.eye(positions, dtype=torch.float64)
    return LayerStats(torch.stack([torch.kron(block, eye) for block in mix @ mix.mT]).float(), 100)


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
