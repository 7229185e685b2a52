"""Formats whose layer is a chain of convolutions: everything follows from the named indices of the steps."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from autorank.formats import steps as chain_steps
from autorank.formats.base import Factors, Format, Options, Roots
from autorank.formats.running import Bias, DecomposedLayer, Regroup, convolution, linear
from autorank.formats.steps import AxisWork, Step
from autorank.layout import swapped
from autorank.solvers import whitening
from autorank.solvers.network import Operand
from autorank.types import LayerCost, LayerSpec


class ChainFormat(Format):
    """A format that runs as a sequence of (grouped) convolutions, each with one factor as its weight.

    A subclass says `sizes` and `steps`, `max_rank`, and how to fit. A factor is stored in the layout of a convolution's
    weight: (groups, along and out, into, K1, ..., Kd), with size one on the axes that its step does not cover.
    """

    def input_names(self, spec: LayerSpec, options: Options = ()) -> tuple[str, ...]:
        """Return the indices that the input channels of a group are made of, slowest first."""
        return ("s",)

    def output_names(self, spec: LayerSpec, options: Options = ()) -> tuple[str, ...]:
        """Return the indices that the output channels of a group are made of, slowest first."""
        return ("t",)

    @abstractmethod
    def sizes(self, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> dict[str, int]:
        """Return the size of every index; plain ``s`` and ``t`` may be left out."""

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
        """Return MACs and parameters: a factor is applied once per position and value folded into the batch."""
        self.check(spec, rank, options)
        return self._cost(spec, rank, options)

    def network(
        self, factors: Factors, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()
    ) -> tuple[list[Operand], tuple[str, ...]]:
        """Return the factors with the indices of their steps; see `Format.network`."""
        steps = self.steps(spec, rank, options)
        named = self._named(factors, spec, rank, options)
        operands = [
            (named[step.factor], ("groups", *step.along, *step.out, *step.into, *step.kernel_names())) for step in steps
        ]
        kernel = [
            name
            for axis in range(len(spec.kernel))
            for step in reversed(steps)
            for of, name in zip(step.axes, step.kernel_names(), strict=True)
            if of == axis
        ]
        return operands, ("groups", *self.output_names(spec, options), *self.input_names(spec, options), *kernel)

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
        modules = self._modules(spec, rank, options)
        like = torch.empty(()) if factors is None else factors[steps[0].factor]
        layer = DecomposedLayer(modules, self.name, len(spec.kernel)).to_empty(device=like.device).to(like.dtype)
        with torch.no_grad():
            if factors is None:
                self._initialise(layer, spec, steps, rank, options)
            else:
                for step in steps:
                    module, weight = layer.get_submodule(step.factor), factors[step.factor].flatten(0, 1)
                    if isinstance(module, nn.modules.conv._ConvTransposeNd):
                        weight = swapped(weight, module.groups)
                    target: Tensor = module.weight  # type: ignore[assignment]
                    target.copy_(weight.reshape(target.shape))
            if spec.bias:
                self._set_bias(list(layer.children())[-1].bias, spec, bias, factors is None)  # type: ignore[arg-type]
        return layer

    def factors_of(self, layer: nn.Module, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> Factors:
        """Return the factors that a module made by `layer` holds now, which may have been trained since."""
        found = {}
        for step, shape in zip(
            self.steps(spec, rank, options), self.factor_shapes(spec, rank, options).values(), strict=True
        ):
            module = layer.get_submodule(step.factor)
            weight: Tensor = module.weight.detach()  # type: ignore[operator]
            if isinstance(module, nn.modules.conv._ConvTransposeNd):
                weight = swapped(weight, module.groups)
            found[step.factor] = weight.reshape(shape)
        return found

    def _sizes(self, spec: LayerSpec, rank: tuple[int, ...], options: Options) -> dict[str, int]:
        return {"s": spec.weight_shape[1], "t": spec.out_channels // spec.groups, **self.sizes(spec, rank, options)}

    def _shapes(self, spec: LayerSpec, rank: tuple[int, ...], options: Options) -> dict[str, tuple[int, ...]]:
        sizes = self._sizes(spec, rank, options)
        return {
            step.factor: (
                spec.groups,
                chain_steps.total((*step.along, *step.out), sizes),
                chain_steps.total(step.into, sizes),
                *(step.size(axis, spec) for axis in range(len(spec.kernel))),
            )
            for step in self.steps(spec, rank, options)
        }

    def _cost(self, spec: LayerSpec, rank: tuple[int, ...], options: Options) -> LayerCost:
        steps = self.steps(spec, rank, options)
        sizes = self._sizes(spec, rank, options)
        counts = {name: math.prod(shape) for name, shape in self._shapes(spec, rank, options).items()}
        in_batch = chain_steps.folded(steps, self.input_names(spec, options))
        copies = [chain_steps.total(names, sizes) for names in in_batch]
        macs = 0
        for call in spec.calls:
            positions = chain_steps.positions(steps, spec, call)
            macs += call.batch * sum(
                counts[step.factor] * times * many for step, times, many in zip(steps, copies, positions, strict=True)
            )
        return LayerCost(macs, sum(counts.values()) + (spec.out_channels if spec.bias else 0))

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

    # Factors, by named indices and as they are stored

    def _named(
        self, factors: Factors, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()
    ) -> dict[str, Tensor]:
        """Return the factors as (groups, along..., out..., into..., kernel on the step's axes...)."""
        sizes = self._sizes(spec, rank, options)
        return {
            step.factor: factors[step.factor].reshape(
                spec.groups,
                *(sizes[name] for name in (*step.along, *step.out, *step.into)),
                *(step.size(axis, spec) for axis in step.axes),
            )
            for step in self.steps(spec, rank, options)
        }

    def _pack(self, named: Factors, spec: LayerSpec, rank: tuple[int, ...], options: Options = ()) -> Factors:
        """Return factors, given with a dimension per index (see `_named`), as they are stored, in run order."""
        return {name: named[name].reshape(shape) for name, shape in self._shapes(spec, rank, options).items()}

    def _part(self, factors: Factors, spec: LayerSpec, rank: tuple[int, ...], options: Options) -> Factors:
        """Return the leading part of every factor along the indices that are shorter at this rank."""
        named = self._named(factors, spec, self.max_rank(spec, options), options)
        sizes = self._sizes(spec, rank, options)
        cut = {
            step.factor: [slice(sizes[name]) for name in (*step.along, *step.out, *step.into)]
            for step in self.steps(spec, rank, options)
        }
        return self._pack({name: named[name][:, *slices] for name, slices in cut.items()}, spec, rank, options)

    # Whitening

    def _fit_weighted(
        self, weight: Tensor, roots: Roots, spec: LayerSpec, rank: tuple[int, ...], options: Options, seed: int
    ) -> Factors:
        """Fit L_outᵀ W L_in and undo the roots on the factors that carry S and T.

        That is right for every format that is closed under linear maps of S and of T; others say how they do it.
        """
        if roots.input is not None:
            weight = whitening.whiten(weight, roots.input, roots.axes)
        if roots.output is not None:
            weight = whitening.whiten_output(weight, roots.output)
        factors = self._fit_plain(weight, spec, rank, options, seed)
        steps = self.steps(spec, rank, options)
        if roots.input is not None:
            into = next(step.factor for step in steps if step.into == ("s",) and not step.along)
            factors[into] = whitening.unwhiten(factors[into], roots.input, roots.axes)
        if roots.output is not None:
            out = next(step.factor for step in steps if step.out == ("t",) and not step.along)
            factors[out] = whitening.unwhiten_output(factors[out], roots.output)
        return factors

    # Modules

    def _modules(self, spec: LayerSpec, rank: tuple[int, ...], options: Options) -> dict[str, nn.Module]:
        """Return what runs, by name, on the meta device."""
        steps = self.steps(spec, rank, options)
        sizes = self._sizes(spec, rank, options)
        inputs, outputs = self.input_names(spec, options), self.output_names(spec, options)
        found = chain_steps.moves(steps, inputs, outputs)
        *before, after = (None if move is None or chain_steps.idle(move, sizes) else move for move in found)
        work = chain_steps.geometry(steps, spec)
        modules: dict[str, nn.Module] = {}
        for step, move in zip(steps, before, strict=True):
            if move is not None:
                modules[f"to_{step.factor}"] = Regroup(move, sizes, spec.groups)
            bias = spec.bias and step is steps[-1] and after is None
            pad, module = self._module(spec, step, work[step.factor], sizes, bias)
            if pad is not None:
                modules[f"pad_{step.factor}"] = pad
            modules[step.factor] = module
        if after is not None:
            modules["regroup"] = Regroup(after, sizes, spec.groups)
            if spec.bias:
                with torch.device("meta"):
                    modules["bias"] = Bias(spec.out_channels, len(spec.kernel))
        return modules

    @staticmethod
    def _module(
        spec: LayerSpec, step: Step, work: tuple[AxisWork, ...], sizes: dict[str, int], bias: bool
    ) -> tuple[nn.Module | None, nn.Module]:
        into, out = chain_steps.total(step.into, sizes), chain_steps.total(step.out, sizes)
        groups = spec.groups * chain_steps.total(step.along, sizes)
        if spec.kind == "linear":
            return None, linear(groups, into, out, bias)
        return convolution(groups, into, out, work, spec.transposed, spec.padding_mode, bias)

    def _initialise(
        self, layer: nn.Module, spec: LayerSpec, steps: tuple[Step, ...], rank: tuple[int, ...], options: Options
    ) -> None:
        """Draw factors whose product has entries of the variance that PyTorch gives a dense layer's weight.

        The entries are uncorrelated in both, so the outputs have the same variance, too.
        """
        shapes = self._shapes(spec, rank, options)
        weights = {step.factor: layer.get_submodule(step.factor).weight for step in steps}
        sizes = self._sizes(spec, rank, options)
        # The entries of W are sums over the bonds; the paths through them are independent.
        bonds = {name for step in steps for name in (*step.out, *step.into, *step.along)}
        bonds -= {*self.input_names(spec, options), *self.output_names(spec, options)}
        left = 1 / (3 * self._fan_in(spec)) / chain_steps.total(bonds, sizes)
        for step in steps:
            weight: Tensor = weights[step.factor]  # type: ignore[assignment]
            variance = left if step is steps[-1] else 1 / math.prod(shapes[step.factor][2:])
            left /= variance
            bound = math.sqrt(3 * variance)
            nn.init.uniform_(weight, -bound, bound)

    @staticmethod
    def _fan_in(spec: LayerSpec) -> int:
        """Return what PyTorch takes for the number of inputs of an output when it initialises the dense layer."""
        channels = spec.out_channels // spec.groups if spec.transposed else spec.weight_shape[1]
        return channels * math.prod(spec.kernel)

    def _set_bias(self, target: Tensor, spec: LayerSpec, bias: Tensor | None, fresh: bool) -> None:
        if bias is not None:
            target.copy_(bias)
        elif fresh:
            bound = 1 / math.sqrt(self._fan_in(spec))
            nn.init.uniform_(target, -bound, bound)
        else:
            nn.init.zeros_(target)
