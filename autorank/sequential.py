"""A plan fitted layer by layer: each to what the dense layer puts out, given what the layers before it now hand over.

`autorank.plan.apply` fits every layer as if its inputs were those of the dense model. Behind decomposed layers they are
not: errors add up, and a layer could undo a part of them. Here layers are fitted in the order in which they run. With
x̂ the inputs that a layer gets from the decomposed layers before it, and y the dense layer's outputs for the same
examples, the kernel that comes nearest to y is W* = argmin E‖y − W* x̂‖² + λ‖W* − W‖²; W* is decomposed in place of W,
under the covariance of x̂. For low-rank layers this is the asymmetric reconstruction of Zhang et al. (CVPR 2015,
arXiv 1411.4229, section 3.3), with a ridge, and for every format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from autorank import formats
from autorank.copying import model_copy
from autorank.errors import DataError
from autorank.fitcache import FitCache
from autorank.formats import Factors
from autorank.formats.replacing import in_place_of
from autorank.layout import canonical_weight
from autorank.measure import undisturbed
from autorank.modules import substitute
from autorank.plan import apply, check
from autorank.solvers.moments import CHUNK, MIN_ROWS, ROWS_PER_COLUMN, patches, stride_of
from autorank.solvers.whitening import LayerStats
from autorank.types import LayerResult, LayerSpec, Plan

Inputs = tuple[Tensor, ...]

PASSES = 32
"""Times that the calibration examples are run: networks with more layers are fitted a few layers at a time."""


def apply_in_order(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Inputs],
    *,
    specs: Sequence[LayerSpec],
    stats: Mapping[str, LayerStats] | None = None,
    hold: float = 0.03,
    passes: int = PASSES,
    max_patch: int = 4608,
) -> tuple[nn.Module, tuple[LayerResult, ...]]:
    """Return a decomposed copy of a model whose layers were fitted one after the other; see `autorank.plan.apply`.

    Parameters
    ----------
    model : nn.Module
        The dense model, not changed.
    plan : Plan
    batches : sequence of tuples of Tensor
        Positional inputs of the model; gone through once per pass. A few hundred examples are enough.
    specs : sequence of LayerSpec
        Layers of the model's profile.
    stats : mapping of str to LayerStats, optional
        Needed for the layers that the plan whitens by gradients (``output`` and ``both``), whose G is kept, and for
        layers with long patches.
    hold : float
        λ in units of the mean variance of the inputs x̂: how strongly the kernel is held at the dense one.
    passes : int
        Layers that are fitted in one pass see the errors of the passes before, and not each other's.
    max_patch : int
        Layers with more weights per output (S/groups · K) are fitted as `apply` fits them.

    Returns
    -------
    model : nn.Module
    results : tuple of LayerResult
        In the order of the plan. The output error is that against the dense outputs, of the decomposed layer on the
        inputs that it really gets; the weight error is that against the dense kernel, which is no longer the aim.

    Raises
    ------
    PlanError
        The plan does not fit the model, or whitens a layer without the statistics for it.
    DataError
        There is no batch.
    FormatError
        A weight cannot be decomposed.
    """
    if not batches:
        raise DataError("there is no calibration batch to fit the layers to")
    check(model, plan, specs=specs)
    known = {spec.name: spec for spec in specs}
    dense, student = model_copy(model).eval(), model_copy(model).eval()
    results: dict[str, LayerResult] = {}
    wanted = [name for name, _ in plan.layers if math.prod(known[name].weight_shape[1:]) <= max_patch]
    order = _order(dense, wanted, batches[0])
    rest = {name: choice for name, choice in plan.layers if name not in order}
    size = max(1, -(-len(order) // max(1, passes)))
    with undisturbed(), torch.no_grad():
        if rest:
            student, others = apply(student, Plan.of(rest, plan.seed), specs=specs, stats=stats)
            results |= {result.name: result for result in others}
        for group in (order[i : i + size] for i in range(0, len(order), size)):
            changes: dict[nn.Module, nn.Module] = {}
            for name, moments in _observed(dense, student, [known[name] for name in group], batches).items():
                old = student.get_submodule(name)
                changes[old], results[name] = _fitted(old, known[name], plan, moments, (stats or {}).get(name), hold)
            student = substitute(student, changes)
    _same_modes(student, model)
    return student, tuple(results[name] for name, _ in plan.layers)


class Moments:
    """Second moments of a layer's inputs x̂ from one network and its outputs y from another, summed batch by batch.

    Parameters
    ----------
    spec : LayerSpec
    batches : int
        How many there will be, of the size of the first: layers with many positions take every k-th of them.
    """

    def __init__(self, spec: LayerSpec, batches: int) -> None:
        self.spec, self.batches = spec, batches
        self.inputs = self.cross = torch.zeros(())
        self.power, self.count = 0.0, 0
        self._stride, self._seen = 0, 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add one call: the layer's input, and the outputs (bias left out) that it should have."""
        spec, groups = self.spec, self.spec.groups
        for rows, wanted in self._blocks(x.to(torch.float32), y.to(torch.float32)):
            a = rows.reshape(len(rows), groups, -1).transpose(0, 1)
            b = wanted.reshape(len(rows), groups, spec.out_channels // groups).transpose(0, 1)
            self.inputs = self.inputs + (a.mT @ a).double()
            self.cross = self.cross + (b.mT @ a).double()
            self.power += float(b.double().square().sum())
            self.count += len(rows)

    def nearest(self, weight: Tensor, hold: float) -> Tensor:
        """Return argmin E‖y − V x̂‖² + λ‖V − W‖² over V, with λ = hold · mean variance of x̂; float64.

        Parameters
        ----------
        weight : Tensor, shape (T, S/groups, K1, ..., Kd)
            W.
        hold : float
        """
        plain = weight.double().reshape(self.spec.groups, -1, self.inputs.shape[-1])
        a, b = self.inputs / self.count, self.cross / self.count
        ridge = max(hold, 1e-6) * a.diagonal(dim1=1, dim2=2).mean().clamp_min(1e-12)
        held = a + ridge * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        return torch.linalg.solve(held, (b + ridge * plain).mT).mT.reshape(weight.shape)

    def error(self, weight: Tensor) -> float:
        """Return the relative RMS error of the outputs V x̂ against y."""
        plain = weight.double().reshape(self.spec.groups, -1, self.inputs.shape[-1])
        left = self.power + float(((plain @ self.inputs - 2 * self.cross) * plain).sum())
        return math.sqrt(max(0.0, left) / self.power) if self.power > 0 else 0.0

    def _blocks(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows, S · K) and (rows, T) of the same examples and positions."""
        spec, d = self.spec, len(self.spec.kernel)
        if d == 0:
            x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
            for part in self._taken(len(x), 1, x.shape[-1], x.device):
                yield x[part], y[part]
            return
        if x.ndim == d + 1:
            x, y = x[None], y[None]
        windows = patches(x, spec)
        windows = windows.permute(0, *range(2, 2 + d), 1, *range(2 + d, 2 + 2 * d))
        y = y.movedim(1, -1)
        if spec.transposed:
            y = y.flip(*range(1, 1 + d))  # the patches of a transposed convolution run from the last to the first
        places = windows.shape[: d + 1]
        total, columns = math.prod(places), math.prod(windows.shape[d + 1 :])
        for part in self._taken(total, math.prod(places[1:]), columns, x.device):
            at = torch.unravel_index(part, places)
            yield windows[at].flatten(1), y[at]

    def _taken(self, rows: int, positions: int, columns: int, device: torch.device) -> Iterator[Tensor]:
        if not self._stride:
            wanted = max(ROWS_PER_COLUMN * columns, MIN_ROWS)
            self._stride = stride_of(rows * self.batches * max(1, len(self.spec.calls)), wanted, positions)
        taken = torch.arange(-self._seen % self._stride, rows, self._stride, device=device)
        self._seen += rows
        yield from taken.split(max(1, CHUNK // columns)) if len(taken) else ()


def _fitted(
    old: nn.Module, spec: LayerSpec, plan: Plan, moments: Moments, stats: LayerStats | None, hold: float
) -> tuple[nn.Module, LayerResult]:
    choice = plan.choices[spec.name]
    fmt = formats.get(choice.format)
    dense = old.weight
    assert isinstance(dense, Tensor)
    weight = canonical_weight(dense.detach(), spec)
    target = moments.nearest(weight, hold).to(torch.float32)
    covariance = (moments.inputs / moments.count).to("cpu", torch.float32)
    given = LayerStats(covariance, moments.count, gradient=stats.gradient if stats else None)
    factors: Factors
    factors, info = FitCache(None).get_or_fit(fmt, target.contiguous(), spec, choice, given, plan.seed)
    found = fmt.reconstruct(factors, spec, choice.rank, choice.options).detach()
    cost = fmt.cost(spec, choice.rank, choice.options)
    result = LayerResult(
        name=spec.name,
        choice=choice,
        weight_error=float((found - weight).norm() / weight.norm().clamp_min(1e-30)),
        output_error=moments.error(found),
        sensitivity=info["sensitivity"],
        macs=cost.macs,
        params=cost.params,
        macs_dense=spec.macs,
        params_dense=spec.params,
        full_rank=fmt.max_rank(spec, choice.options),
    )
    return in_place_of(old, fmt.layer(spec, choice.rank, choice.options, factors)), result


class _ReachedError(Exception):
    """Everything that was asked for has run."""


def _observed(
    dense: nn.Module, student: nn.Module, group: Sequence[LayerSpec], batches: Sequence[Inputs]
) -> dict[str, Moments]:
    """Return the moments of some layers: inputs of the student, outputs of the dense model."""
    found = {spec.name: Moments(spec, len(batches)) for spec in group}
    for inputs in batches:
        seen = _run(student, group, inputs, inner=True)
        aims = _run(dense, group, inputs, inner=False)
        for spec in group:
            for x, y in zip(seen[spec.name], aims[spec.name], strict=True):
                found[spec.name].add(x, y)
    return found


def _run(model: nn.Module, group: Sequence[LayerSpec], inputs: Inputs, inner: bool) -> dict[str, list[Tensor]]:
    """Run a model until all calls of the layers are seen; return their inputs (`inner`) or outputs without bias."""
    seen: dict[str, list[Tensor]] = {spec.name: [] for spec in group}
    left = sum(max(1, len(spec.calls)) for spec in group)
    handles = []
    for spec in group:

        def hook(
            module: nn.Module, args: Inputs, kwargs: dict[str, Tensor], output: Tensor, spec: LayerSpec = spec
        ) -> None:
            nonlocal left
            value = args[0] if args else kwargs["input"]
            if not inner:
                bias: Tensor | None = module.bias  # type: ignore[assignment]
                value = output if bias is None else output - bias.reshape(-1, *[1] * len(spec.kernel))
            seen[spec.name].append(value)
            left -= 1
            if not left:
                raise _ReachedError

        handles.append(model.get_submodule(spec.name).register_forward_hook(hook, with_kwargs=True))
    try:
        model(*(x.to(_device(model)) for x in inputs))
    except _ReachedError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _order(model: nn.Module, names: Sequence[str], inputs: Inputs) -> list[str]:
    """Return the layers in the order of their first calls; those that are not called are left out."""
    order: dict[str, None] = {}
    handles = []
    for name in names:

        def hook(_module: nn.Module, _args: Inputs, name: str = name) -> None:
            order.setdefault(name)

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    try:
        with torch.no_grad():
            model(*(x.to(_device(model)) for x in inputs))
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def _same_modes(model: nn.Module, like: nn.Module) -> None:
    """Put every module in the mode of the one of the same name; a decomposed layer as a whole."""
    modes = {name: module.training for name, module in like.named_modules()}
    for name, module in model.named_modules():
        while name not in modes:
            name = name.rpartition(".")[0]
        module.training = modes[name]


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
