"""Training of an undecomposed network that is pulled towards its decomposed copy, as learned-rank alternation needs it.

The learning step of Idelbayev and Carreira-Perpiñán, "Low-rank compression of neural nets: learning the rank of each
layer" (CVPR 2020): minimise L(W) + (μ/2)·Σ‖W_l − Ŵ_l‖² over the dense weights W, the copy Ŵ held fixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from autorank import formats
from autorank.errors import TrialError
from autorank.fitcache import FitCache
from autorank.layout import canonical_weight, stored_weight
from autorank.modules import read
from autorank.quanterrors import rounded_kernel
from autorank.recover import Recovery, Teacher, fine_tune
from autorank.solvers.whitening import LayerStats
from autorank.tasks.base import Task
from autorank.tasks.batch import Device
from autorank.types import DENSE, Choice, LayerSpec, Plan

__all__ = ["Pull", "decomposed_kernels", "squared_distances", "train_with_pull"]


class Pull:
    """The term (μ/2)·Σ‖W_l − Ŵ_l‖², whose implicit step is in closed form.

    W ← (W + rate·μ·Ŵ) / (1 + rate·μ) lies between W and Ŵ for every μ, where an explicit step blows up as soon as
    rate·μ > 2.

    Parameters
    ----------
    pairs : iterable of (Parameter, Tensor)
        Weights, changed in place, and their copies, of equal shapes; frozen weights stay as they are.
    pull : float
        μ.
    """

    def __init__(self, pairs: Iterable[tuple[nn.Parameter, Tensor]], pull: float) -> None:
        self.pull = pull
        self._pairs = [
            # Weights of 16 bits are trained in float32, so their copies are held in it.
            (weight, copy.detach().to(weight.device, torch.promote_types(weight.dtype, torch.float32)))
            for weight, copy in pairs
            if weight.requires_grad
        ]

    @torch.no_grad()
    def value(self) -> Tensor:
        """Return (μ/2)·Σ‖W_l − Ŵ_l‖², a scalar."""
        parts = [(weight - copy).square().sum() for weight, copy in self._pairs]
        return 0.5 * self.pull * torch.stack(parts).sum() if parts else torch.zeros(())

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Take the implicit step of length `rate`."""
        share = rate * self.pull / (1.0 + rate * self.pull)
        for weight, copy in self._pairs:
            weight.lerp_(copy, share)


def train_with_pull(
    model: nn.Module,
    copies: Mapping[str, Tensor],
    task: Task,
    recovery: Recovery,
    pull: float,
    seed: int,
    device: Device = "cpu",
    teacher: Teacher | None = None,
) -> tuple[tuple[int, float], ...]:
    """Train an undecomposed model in place, its kernels pulled towards those of its decomposed copy.

    As `fine_tune` does, with the term of `Pull` besides, and always by SGD: at its default rate where the recovery has
    another optimizer. Weights where training has settled have the gradient μ·(Ŵ − W), whatever learning rate and
    momentum. Layers without a copy train freely.

    Parameters
    ----------
    model : Module
        Comes back on `device`, in eval mode.
    copies : mapping of str to Tensor, shape (T, S/groups, K1, ..., Kd)
        Layer → the dense kernel that the decomposed layer stands for, in the layout of `LayerSpec.weight_shape`, as
        `Format.reconstruct` and `decomposed_kernels` return it.
    task : Task
    recovery : Recovery
    pull : float
        μ, in units of the loss per squared unit of the weights; 0 is the plain fine-tune, bit by bit.
    seed : int
    device : device
    teacher : Teacher, optional

    Returns
    -------
    tuple of (step, loss)
        The pull's term included; at most 50 points.

    Raises
    ------
    TrialError
        A copy has no layer or another shape than its layer, or the training diverged.
    """
    model.to(device)
    if recovery.optimizer != "sgd":
        recovery = replace(recovery, optimizer="sgd", lr=None, weight_decay=None)
    pairs = _pairs(model, copies)
    return fine_tune(model, task, recovery, seed, device, teacher, Pull(pairs, pull) if pull and pairs else None)


def decomposed_kernels(
    model: nn.Module,
    plan: Plan,
    *,
    specs: Sequence[LayerSpec] = (),
    stats: Mapping[str, LayerStats] | None = None,
    cache: FitCache | None = None,
) -> dict[str, Tensor]:
    """Return the dense kernels that a plan's layers stand for when they are fitted to the model as it is.

    Parameters
    ----------
    model : Module
        Undecomposed; not changed.
    plan : Plan
    specs : sequence of LayerSpec
        Layers of the model's profile.
    stats : mapping of str to LayerStats, optional
        For the layers that the plan whitens.
    cache : FitCache, optional

    Returns
    -------
    dict of str to Tensor, shape (T, S/groups, K1, ..., Kd)
        By layer, for `train_with_pull`.
    """
    cache = cache or FitCache(None)
    kernels = {}
    for name, choice in plan.layers:
        weight, spec = _kernel(model, name, specs)
        factors = None
        if choice.format != DENSE:
            own = (stats or {}).get(name)
            factors, _ = cache.get_or_fit(formats.get(choice.format), weight, spec, choice, own, plan.seed)
        kernels[name] = rounded_kernel(weight, spec, choice, factors)
    return kernels


def squared_distances(
    model: nn.Module,
    candidates: Mapping[str, Sequence[Choice]],
    *,
    specs: Sequence[LayerSpec] = (),
    stats: Mapping[str, LayerStats] | None = None,
    seed: int = 0,
    cache: FitCache | None = None,
) -> dict[str, tuple[float, ...]]:
    """Return ‖W − Ŵ_k‖² of every candidate of every layer, each fitted to the model as it is.

    Parameters
    ----------
    model : Module
        Undecomposed; not changed.
    candidates : mapping of str to sequence of Choice
        Layer → its candidates.
    specs, stats
        As in `decomposed_kernels`.
    seed : int
        Of the fits, the plan's.
    cache : FitCache, optional
        For weights whose fits are there or are asked for again, as the dense model's are; those of a training never.

    Returns
    -------
    dict of str to tuple of float
        In the order of `candidates`.
    """
    found = {}
    for name, choices in candidates.items():
        weight, spec = _kernel(model, name, specs)
        distances = []
        for choice in choices:
            own, factors = (stats or {}).get(name), None
            if choice.format != DENSE and cache is None:
                factors = formats.get(choice.format).fit(weight, spec, choice.rank, choice.options, own, seed)
            elif choice.format != DENSE and cache is not None:
                factors, _ = cache.get_or_fit(formats.get(choice.format), weight, spec, choice, own, seed)
            copy = rounded_kernel(weight, spec, choice, factors)
            distances.append(float((weight - copy.to(weight)).float().square().sum()))
        found[name] = tuple(distances)
    return found


def _kernel(model: nn.Module, name: str, specs: Sequence[LayerSpec]) -> tuple[Tensor, LayerSpec]:
    """Return a layer's kernel in the layout of its spec, and the spec."""
    spec = next((spec for spec in specs if spec.name == name), None) or read(model).layers.get(name)
    if spec is None:
        raise TrialError(f"the model has no layer {name!r} that can be decomposed")
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return canonical_weight(weight.detach(), spec), spec


def _pairs(model: nn.Module, copies: Mapping[str, Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
    """Return each pulled weight beside its copy, in the layout in which the module stores it."""
    layers = read(model).layers
    pairs = []
    for name, copy in copies.items():
        if name not in layers:
            raise TrialError(f"the model has no layer {name!r} that could be pulled towards a copy")
        if tuple(copy.shape) != layers[name].weight_shape:
            raise TrialError(
                f"layer {name!r}: the copy has shape {tuple(copy.shape)}, the layer {layers[name].weight_shape}"
            )
        weight = model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        pairs.append((weight, stored_weight(copy, layers[name])))
    return pairs
