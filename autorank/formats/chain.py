"""Formats whose layer is a chain of convolutions: shapes, cost and module follow from one description of the steps."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autorank.formats.base import Factors, Format, Options
from autorank.types import LayerCost, LayerSpec

_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}


@dataclass(frozen=True, slots=True)
class Step:
    """One convolution of a chain.

    Attributes
    ----------
    factor : str
        Name of its weight.
    out, into : int
        Output and input channels per group.
    axes : tuple of int
        The spatial axes on which it has the dense layer's kernel, stride, padding and dilation; it is pointwise on the
        others.
    """

    factor: str
    out: int
    into: int
    axes: tuple[int, ...] = ()


class DecomposedLayer(nn.Sequential):
    """A chain of convolutions or linear maps that stands for one dense layer; the bias is on the last one.

    Parameters
    ----------
    modules : dict of nn.Module
        The steps by the names of their factors, in order.
    format_name : str
        The format that built it.
    """

    def __init__(self, modules: dict[str, nn.Module], format_name: str) -> None:
        super().__init__()
        self.format_name = format_name
        for name, module in modules.items():
            self.add_module(name, module)


class ChainFormat(Format):
    """A format that runs as a sequence of (grouped) convolutions, each with one factor as its weight.

    A subclass says `steps`, `max_rank`, how to fit and how to reconstruct.
    """

    @abstractmethod
    def steps(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> tuple[Step, ...]:
        """Return the convolutions in the order in which they run."""

    def factor_shapes(
        self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape (groups, out, in, K1, ..., Kd) of every factor; 1 on the axes its step does not cover."""
        self.check(spec, rank, options)
        return self._shapes(spec, rank, options)

    def cost(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> LayerCost:
        """Return MACs and parameters: each factor is applied once per position of its step's output."""
        self.check(spec, rank, options)
        return self._cost(spec, rank, options)

    def layer(
        self,
        spec: LayerSpec,
        rank: tuple[int, ...],
        options: Options = (),
        factors: Factors | None = None,
        bias: Tensor | None = None,
    ) -> DecomposedLayer:
        """Return the chain as a module; see `Format.layer`."""
        shapes = self.factor_shapes(spec, rank, options)
        if factors is not None:
            found = {name: tuple(factor.shape) for name, factor in factors.items()}
            if found != shapes:
                raise self._error(spec, f"factors of shapes {found} given, expected {shapes}")
        if bias is not None and (not spec.bias or tuple(bias.shape) != (spec.out_channels,)):
            expected = f"one of shape ({spec.out_channels},)" if spec.bias else "none"
            raise self._error(spec, f"a bias of shape {tuple(bias.shape)} given, expected {expected}")
        steps = self.steps(spec, rank, options)
        like = torch.empty(()) if factors is None else factors[steps[0].factor]
        modules: dict[str, nn.Module] = {}
        with torch.no_grad():
            for step in steps:
                last = step is steps[-1]
                module = _module(spec, step, bias=spec.bias and last).to_empty(device=like.device).to(like.dtype)
                weight: Tensor = module.weight  # type: ignore[assignment]
                if factors is None:
                    # A weight variance of 1/fan_in keeps the variance; PyTorch's default for a dense layer is a third
                    # of that, which the last step takes.
                    fan_in = weight[0].numel()
                    bound = math.sqrt((1 if last else 3) / fan_in)
                    nn.init.uniform_(weight, -bound, bound)
                else:
                    weight.copy_(factors[step.factor].reshape(weight.shape))
                modules[step.factor] = module
            if spec.bias:
                target: Tensor = modules[steps[-1].factor].bias  # type: ignore[assignment]
                if bias is not None:
                    target.copy_(bias)
                elif factors is not None:
                    nn.init.zeros_(target)
                else:
                    bound = 1 / math.sqrt(math.prod(spec.weight_shape[1:]))
                    nn.init.uniform_(target, -bound, bound)
        return DecomposedLayer(modules, self.name)

    def _shapes(self, spec: LayerSpec, rank: tuple[int, ...], options: Options) -> dict[str, tuple[int, ...]]:
        return {
            step.factor: (
                spec.groups,
                step.out,
                step.into,
                *(size if axis in step.axes else 1 for axis, size in enumerate(spec.kernel)),
            )
            for step in self.steps(spec, rank, options)
        }

    def _cost(self, spec: LayerSpec, rank: tuple[int, ...], options: Options) -> LayerCost:
        sizes = {name: math.prod(shape) for name, shape in self._shapes(spec, rank, options).items()}
        macs = 0
        for call in spec.calls:
            # A linear layer's positions are its leading dimensions, which no step changes.
            positions = list(call.input) if spec.kernel else list(call.output)
            for step in self.steps(spec, rank, options):
                for axis in step.axes:
                    positions[axis] = call.output[axis]
                macs += sizes[step.factor] * call.batch * math.prod(positions)
        return LayerCost(macs, sum(sizes.values()) + (spec.out_channels if spec.bias else 0))

    def _no_gain(self, spec: LayerSpec, options: Options) -> str | None:
        # A mode costs least at rank 1 or, where its step falls away, at full rank.
        corners = itertools.product(*({1, top} for top in self.max_rank(spec, options)))
        least = min(self._cost(spec, corner, options).params for corner in corners)
        if least < spec.params:
            return None
        depthwise = spec.groups > 1 and spec.weight_shape[1] == 1 and spec.out_channels == spec.groups
        kind = f"depthwise {spec.kind}" if depthwise else spec.kind
        per_group = f"{spec.out_channels // spec.groups} output and {spec.weight_shape[1]} input channels per group"
        return (
            f"{kind} with {per_group} and kernel {spec.kernel}: {self.name} cannot make it smaller "
            f"({least} parameters at the least, {spec.params} in the dense layer)"
        )


def _module(spec: LayerSpec, step: Step, bias: bool) -> nn.Module:
    """Return the convolution or linear map of a step, without storage."""
    if spec.kind == "linear":
        return nn.Linear(step.into, step.out, bias=bias, device="meta")

    def on_axes(values: tuple[int, ...], default: int) -> tuple[int, ...]:
        return tuple(value if axis in step.axes else default for axis, value in enumerate(values))

    d = len(spec.kernel)
    padding: str | tuple[int, ...]
    if isinstance(spec.padding, str):
        padding = spec.padding if step.axes else (0,) * d
    else:
        padding = on_axes(spec.padding, 0)
    return _CONVOLUTIONS[d](
        spec.groups * step.into,
        spec.groups * step.out,
        on_axes(spec.kernel, 1),  # type: ignore[arg-type]
        stride=on_axes(spec.stride, 1),  # type: ignore[arg-type]
        padding=padding,  # type: ignore[arg-type]
        dilation=on_axes(spec.dilation, 1),  # type: ignore[arg-type]
        groups=spec.groups,
        bias=bias,
        padding_mode=spec.padding_mode if step.axes else "zeros",  # type: ignore[arg-type]
        device="meta",
    )
