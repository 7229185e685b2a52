"""The steps of a chain of convolutions: their indices, and what each does on each spatial axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autorank.types import CallSize, LayerSpec


@dataclass(frozen=True, slots=True)
class Step:
    """One convolution of a chain, by the names of its indices.

    Indices that are alive when the step runs, but are neither in `into` nor in `along`, go into the batch: the same
    weights then serve every value of them.

    Attributes
    ----------
    factor : str
        Name of its weight.
    out, into : tuple of str
        Indices that it makes and that it sums over; the first one counts slowest.
    along : tuple of str
        Indices that it keeps, with a block of the weight for each value: the groups of a grouped convolution.
    axes : tuple of int
        The spatial axes on which it has a kernel, and the stride, padding and dilation; pointwise on the others.
    kernel : tuple of int
        Sizes of the kernel on `axes`; empty for those of the dense layer. When several steps have a kernel on one axis
        their sizes multiply to the dense one: position = Σ (position in the step) · (sizes of the steps before it).
    """

    factor: str
    out: tuple[str, ...]
    into: tuple[str, ...]
    along: tuple[str, ...] = ()
    axes: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()

    def size(self, axis: int, spec: LayerSpec) -> int:
        """Return the size of its kernel on an axis."""
        if axis not in self.axes:
            return 1
        return self.kernel[self.axes.index(axis)] if self.kernel else spec.kernel[axis]

    def kernel_names(self) -> tuple[str, ...]:
        """Return the names of the kernel's indices; a step's own, as several steps may cover an axis."""
        return tuple(f"k{axis}@{self.factor}" for axis in self.axes)


@dataclass(frozen=True, slots=True)
class AxisWork:
    """What one step does on one axis, in the terms of a convolution; `before` and `after` are the padding."""

    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0
    output_padding: int = 0

    def size_after(self, size: int, transposed: bool) -> int:
        """Return the size of the axis after the step."""
        reach = self.dilation * (self.kernel - 1)
        if transposed:
            return (size - 1) * self.stride + reach + 1 - self.before - self.after + self.output_padding
        return (size + self.before + self.after - reach - 1) // self.stride + 1


@dataclass(frozen=True, slots=True)
class Move:
    """Indices that move between batch and channels before a step (or after the last one), each list in order."""

    batch: tuple[str, ...]
    channels: tuple[str, ...]
    new_batch: tuple[str, ...]
    new_channels: tuple[str, ...]


def carriers(steps: Sequence[Step], axis: int, spec: LayerSpec) -> list[Step]:
    """Return the steps that have a kernel on an axis; the first that names the axis when its kernel has size one."""
    named = [step for step in steps if axis in step.axes]
    return [step for step in named if step.size(axis, spec) > 1] or named[:1]


def geometry(steps: Sequence[Step], spec: LayerSpec) -> dict[str, tuple[AxisWork, ...]]:
    """Return, by factor, what each step does on each axis.

    A convolution that is split over several steps of one axis pads in the first and strides in the last of them; the
    dilation of each is that of the layer times the kernel sizes of the steps before it. A transposed one is the
    adjoint: it strides in the first and crops in the last.
    """
    work = {step.factor: [AxisWork()] * len(spec.kernel) for step in steps}
    for axis in range(len(spec.kernel)):
        dilation = spec.dilation[axis]
        chosen = carriers(steps, axis, spec)
        for step in chosen:
            first, last = step is chosen[0], step is chosen[-1]
            pads, strides = (last, first) if spec.transposed else (first, last)
            before, after = spec.pads(axis) if pads else (0, 0)
            work[step.factor][axis] = AxisWork(
                step.size(axis, spec),
                spec.stride[axis] if strides else 1,
                dilation,
                before,
                after,
                spec.output_padding[axis] if strides and spec.output_padding else 0,
            )
            dilation *= step.size(axis, spec)
    return {factor: tuple(found) for factor, found in work.items()}


def pointwise(spec: LayerSpec) -> str | None:
    """Return in words what a layer without a kernel is (its weight has only two modes), None for all others."""
    if math.prod(spec.kernel) > 1:
        return None
    return "linear" if spec.kind == "linear" else f"{spec.kind} with kernel {spec.kernel}"


def wide_axes(spec: LayerSpec) -> tuple[int, ...]:
    """Return the axes on which the kernel is larger than one."""
    return tuple(axis for axis, size in enumerate(spec.kernel) if size > 1)


def positions(steps: Sequence[Step], spec: LayerSpec, call: CallSize) -> list[int]:
    """Return how often each step applies its weights in a call, over all axes; the batch is not counted.

    A convolution applies them once per output position, a transposed one once per input position.
    """
    if not spec.kernel:
        return [math.prod(call.output)] * len(steps)
    work = geometry(steps, spec)
    size, found = list(call.input), []
    for step in steps:
        before = math.prod(size)
        size = [axis.size_after(n, spec.transposed) for axis, n in zip(work[step.factor], size, strict=True)]
        found.append(before if spec.transposed else math.prod(size))
    return found


def moves(steps: Sequence[Step], inputs: Sequence[str], outputs: Sequence[str]) -> list[Move | None]:
    """Return what moves before each step, and after the last; None where everything is in its place."""
    batch: tuple[str, ...] = ()
    channels = tuple(inputs)
    found: list[Move | None] = []
    wanted = [((*step.along, *step.into), (*step.along, *step.out)) for step in steps]
    for needed, made in [*wanted, (tuple(outputs), ())]:
        left = tuple(name for name in (*batch, *channels) if name not in needed)
        same = (batch, channels) == (left, needed)
        found.append(None if same else Move(batch, channels, left, needed))
        batch, channels = left, made
    assert not batch, f"indices {batch} are left in the batch"
    return found


def idle(move: Move, sizes: Mapping[str, int]) -> bool:
    """Say whether a move changes nothing, because all that it moves are indices of size one."""

    def real(names: Iterable[str]) -> list[str]:
        return [name for name in names if sizes[name] > 1]

    return (real(move.batch), real(move.channels)) == (real(move.new_batch), real(move.new_channels))


def folded(steps: Sequence[Step], inputs: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the indices that are in the batch at each step."""
    alive = tuple(inputs)
    found = []
    for step in steps:
        rest = tuple(name for name in alive if name not in step.into and name not in step.along)
        found.append(rest)
        alive = (*rest, *step.along, *step.out)
    return found


def total(names: Iterable[str], sizes: Mapping[str, int]) -> int:
    """Return the product of the sizes of some indices."""
    return math.prod(sizes[name] for name in names)
