"""The modules that decomposed layers are made of: convolutions, linear maps, and moves between batch and channels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from autorank.formats.steps import AxisWork, Move

_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
_TRANSPOSED: dict[int, type[nn.ConvTranspose1d] | type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


class DecomposedLayer(nn.Sequential):
    """A chain of convolutions or linear maps that stands for one dense layer; the bias is added last.

    Parameters
    ----------
    modules : dict of nn.Module
        What runs, in order, by the names of the factors where a module has one as its weight.
    format_name : str
        The format that built it.
    axes : int
        Number of spatial axes; 0 for a linear layer.
    """

    def __init__(self, modules: Mapping[str, nn.Module], format_name: str, axes: int = 0) -> None:
        super().__init__()
        self.format_name = format_name
        self.axes = axes
        self.moves = any(isinstance(module, Regroup) for module in modules.values())
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        """Run the chain on what the dense layer takes: also one example without a batch dimension."""
        if not self.moves or x.ndim == self.axes + 2:
            return super().forward(x)
        # Moves between batch and channels need exactly one dimension of each.
        if self.axes:
            return super().forward(x.unsqueeze(0)).squeeze(0)
        y = super().forward(x.reshape(-1, x.shape[-1]))
        return y.reshape(*x.shape[:-1], y.shape[-1])


class Regroup(nn.Module):
    """Move indices between the batch and the channels; no weights, no MACs.

    Parameters
    ----------
    move : Move
    sizes : mapping
        Index name → size.
    groups : int
        Groups of the layer, the slowest index of the channels before and after.
    """

    def __init__(self, move: Move, sizes: Mapping[str, int], groups: int) -> None:
        super().__init__()
        group = ("groups",) if groups > 1 else ()
        names = ("batch", *move.batch, *group, *move.channels)
        wanted = ("batch", *move.new_batch, *group, *move.new_channels)
        known = {**sizes, "groups": groups}
        self.split = [known[name] for name in names[1:]]
        self.order = [names.index(name) for name in wanted]
        self.channels = math.prod(known[name] for name in (*group, *move.new_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Take (N · batch indices, channels, ...) to (N · new batch indices, new channels, ...)."""
        space = x.shape[2:]
        parts = x.reshape(-1, *self.split, *space)
        moved = parts.permute(*self.order, *range(len(self.order), parts.ndim))
        return moved.reshape(-1, self.channels, *space)

    def extra_repr(self) -> str:
        """Show the sizes and their new order."""
        return f"split={self.split}, order={self.order}, channels={self.channels}"


class Pad(nn.Module):
    """Pad the spatial axes by different amounts before and after, which convolutions cannot."""

    def __init__(self, amounts: Sequence[tuple[int, int]], mode: str) -> None:
        super().__init__()
        self.amounts = [amount for pair in reversed(amounts) for amount in pair]
        self.mode = "constant" if mode == "zeros" else mode

    def forward(self, x: Tensor) -> Tensor:
        """Return the padded tensor."""
        return functional.pad(x, self.amounts, mode=self.mode)

    def extra_repr(self) -> str:
        """Show what is padded, the last axis first, and with what."""
        return f"{self.amounts}, mode={self.mode}"


class Bias(nn.Module):
    """Add a value per output channel, where the last convolution cannot."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.axes = axes
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        return x + self.bias.to(x.dtype).reshape(-1, *[1] * self.axes)

    def extra_repr(self) -> str:
        """Show the number of channels."""
        return str(self.bias.shape[0])


class SummedConv(nn.modules.conv._ConvNd):
    """A grouped convolution with one output channel per group, run as a depthwise one whose channels are then summed.

    It has the weight, the result and the MACs of the grouped convolution, for which PyTorch has no fast kernel on a
    CPU. In eight cases on one core (PyTorch, 3 × 3, batch 1 and 8) it took from a sixth of the time to a tenth more.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of (N, groups · into, ...), or of one example without a batch dimension."""
        return self.run(x, self.weight)

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the convolution with another weight."""
        axes, into = len(self.kernel_size), weight.shape[1]
        padding: str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            x = functional.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * axes
        run = (functional.conv1d, functional.conv2d, functional.conv3d)[axes - 1]
        single = weight.flatten(0, 1).unsqueeze(1)
        y = run(x, single, None, self.stride, padding, self.dilation, self.groups * into)
        y = y.unflatten(-axes - 1, (self.groups, into)).sum(-axes - 1).to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype).reshape(-1, *[1] * axes)


class GroupedLinear(nn.Module):
    """Linear maps side by side, each on its own block of the features.

    Parameters
    ----------
    blocks : int
    into, out : int
        Features of each block.
    bias : bool
    """

    def __init__(self, blocks: int, into: int, out: int, bias: bool) -> None:
        super().__init__()
        self.blocks = blocks
        self.weight = nn.Parameter(torch.empty(blocks * out, into))
        self.bias = nn.Parameter(torch.empty(blocks * out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., blocks · into) to (..., blocks · out)."""
        return self.run(x, self.weight)

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """Map with another weight."""
        rows = x.reshape(-1, self.blocks, weight.shape[1]).transpose(0, 1)
        maps = weight.reshape(self.blocks, -1, weight.shape[1]).transpose(1, 2)
        y = torch.bmm(rows, maps).transpose(0, 1).reshape(*x.shape[:-1], weight.shape[0])
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Show the blocks and the features of each."""
        out, into = self.weight.shape
        return f"blocks={self.blocks}, into={into}, out={out // self.blocks}, bias={self.bias is not None}"


def linear(blocks: int, into: int, out: int, bias: bool) -> nn.Module:
    """Return the linear map of a step, without values."""
    if blocks == 1:
        return nn.Linear(into, out, bias=bias, device="meta")
    with torch.device("meta"):
        return GroupedLinear(blocks, into, out, bias)


def convolution(
    groups: int, into: int, out: int, work: tuple[AxisWork, ...], transposed: bool, padding_mode: str, bias: bool
) -> tuple[Pad | None, nn.Module]:
    """Return the convolution of a step, without values, and what pads its input where it cannot do so itself.

    Parameters
    ----------
    groups : int
    into, out : int
        Channels per group.
    work : tuple of AxisWork
    transposed : bool
        A step without any kernel, stride or padding becomes an ordinary convolution in any case.
    padding_mode : str
    bias : bool
    """
    idle = all(axis == AxisWork(dilation=axis.dilation) for axis in work)
    sizes = {
        "kernel_size": tuple(axis.kernel for axis in work),
        "stride": tuple(axis.stride for axis in work),
        # A kernel of size one has none, but PyTorch bounds the output padding of a transposed convolution by it.
        "dilation": tuple(1 if axis.kernel == 1 and not axis.output_padding else axis.dilation for axis in work),
    }
    even = all(axis.before == axis.after for axis in work)
    common = {"groups": groups, "bias": bias, "device": "meta"}
    if transposed and not idle:
        extra = {
            "padding": tuple(axis.before for axis in work),
            "output_padding": tuple(axis.output_padding for axis in work),
        }
        return None, _TRANSPOSED[len(work)](groups * into, groups * out, **sizes, **extra, **common)  # type: ignore[arg-type]
    pad = None if even else Pad([(axis.before, axis.after) for axis in work], padding_mode)
    amounts = tuple(axis.before if even else 0 for axis in work)
    mode = padding_mode if even and any(amounts) else "zeros"
    if groups > 1 and out == 1 < into and max(sizes["kernel_size"]) > 1:
        more = {"transposed": False, "output_padding": (0,) * len(work), "padding": amounts, "padding_mode": mode}
        return pad, SummedConv(groups * into, groups, **sizes, **more, **common)  # type: ignore[arg-type]
    return pad, _CONVOLUTIONS[len(work)](
        groups * into,
        groups * out,
        **sizes,  # type: ignore[arg-type]
        padding=amounts,  # type: ignore[arg-type]
        padding_mode=mode,  # type: ignore[arg-type]
        **common,  # type: ignore[arg-type]
    )
