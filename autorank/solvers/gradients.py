"""Covariances of the loss's gradients at the outputs of layers, summed while the model runs backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

from autorank.copying import model_copy
from autorank.errors import AutorankError, DataError, ModelError, describe
from autorank.seeding import seeded
from autorank.solvers.moments import CHUNK, MIN_ROWS, ROWS_PER_COLUMN, stride_of
from autorank.types import LayerSpec

Loss = Callable[[Any], Tensor]
"""From a model's outputs to a scalar: the losses of the batch's examples, added up (not averaged)."""


def fisher_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return a scalar whose gradients have the Fisher information of a classifier as their covariance.

    The Fisher information of a softmax p is diag(p) − p pᵀ, which is also the Hessian of the cross-entropy, whatever
    the labels or their smoothing. Labels drawn from the model give gradients e_c − p with that covariance. So does
    B v with B = diag(√p) − p √pᵀ, as B Bᵀ = diag(p) − p pᵀ, and random signs v; its spread is much smaller where the
    model is sure of itself and other labels are drawn once in a thousand times.

    Parameters
    ----------
    logits : Tensor, shape (N, classes, ...)
        With P positions in the trailing dimensions, the loss of an example is taken as the mean over them.
    generator : torch.Generator
        On the CPU; the source of the signs.

    Returns
    -------
    Tensor, scalar
        Σ over examples of (B v)ᵀ·logits / √P. Its value means nothing; P independent positions with a loss of 1/P each
        have a Hessian of 1/P, hence the root.
    """
    scores = logits.float()
    share = scores.detach().softmax(1)
    coin = torch.randint(0, 2, logits.shape, generator=generator, dtype=torch.int8).to(logits.device)
    signed = share.sqrt() * (2.0 * coin - 1)
    pull = signed - share * signed.sum(1, keepdim=True)
    # B v = √p ∘ v − p (√pᵀ v): `signed` is the first term, and the sum of its entries the bracket.
    return (scores * pull).sum() / math.sqrt(max(1, math.prod(logits.shape[2:])))


def collect_gradients(
    model: nn.Module,
    specs: Sequence[LayerSpec],
    batches: Iterable[tuple[tuple[Tensor, ...], Loss]],
    device: str | torch.device = "cpu",
    max_side: int = 4608,
    examples: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Run a model forward and backward and return the covariances of the gradients at the outputs of its layers.

    Parameters
    ----------
    model : nn.Module
        Left as it is: a copy in eval mode is run, in which no parameter has gradients. Its examples must not mix, as
        they do under batch normalisation in training: the gradient of the sum is then that of each example's loss.
    specs : sequence of LayerSpec
        The layers to watch, by name.
    batches : iterable of (inputs, loss)
        The positional inputs of the model, and the loss of its outputs: a scalar that sums over the examples.
    device : str or torch.device
        Where to run.
    max_side : int
        Layers with more output channels per group keep the diagonal only.
    examples : int, optional
        How many examples the batches hold together; by default known from the number of batches, if they have one.
        Layers with many output positions then take every k-th one only, as for input statistics, and scale it up.
    seed : int
        Of what is random in the model or the loss; nobody's random state is changed.

    Returns
    -------
    dict from layer name to Tensor, shape (groups, T/groups, T/groups) or (groups, T/groups), float32
        `LayerStats.gradient`, on the CPU: the mean over examples of the sum over output positions of g gᵀ, over all
        calls. Zero for a layer that ran without an effect on the loss; a layer that never ran is missing.

    Raises
    ------
    DataError
        There was no batch.
    ModelError
        A layer does not exist, the loss has no gradient, or the gradients of a layer are not finite.
    """
    with torch.inference_mode(False):
        runner = model_copy(model).eval().to(device).requires_grad_(False)
    for module in runner.modules():
        if isinstance(module, nn.RNNBase):  # cuDNN runs them backward in training mode only
            module.dropout = 0.0
            module.train()
    known = float(len(batches)) if examples is None and isinstance(batches, Sized) else None
    sums: dict[str, GradientSum] = {}
    handles = []
    seen = done = 0
    try:
        for spec in specs:
            try:
                module = runner.get_submodule(spec.name)
            except AttributeError:
                raise ModelError(f"layer {spec.name!r} is not in the model, so it has no gradients") from None
            with torch.inference_mode(False):
                sums[spec.name] = GradientSum(spec, max_side, known)
            handles.append(module.register_forward_hook(_watch(sums[spec.name])))
        for inputs, loss in batches:
            size = next((len(x) for x in inputs if x.ndim), 1)
            if not done and examples is not None:
                for each in sums.values():
                    each.batches = examples / max(size, 1)
            with seeded(seed + done, device), torch.inference_mode(False), torch.enable_grad():
                # A tensor of inference mode cannot take part in autograd; its copy can.
                ready = (x.clone() if x.is_inference() else x for x in (y.to(device) for y in inputs))
                _backward(runner(*ready), loss)
            seen += size
            done += 1
    finally:
        for handle in handles:
            handle.remove()
    if not done:
        raise DataError("there is no calibration batch to collect gradients from")
    return {name: each.mean(seen) for name, each in sums.items() if each.ran}


def _watch(to: GradientSum) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        to.ran = True
        if output.is_inference():  # the model's own inference mode: no gradient comes by
            return None
        if not output.requires_grad:
            # No gradient goes further up. A copy, as a leaf of autograd must not be changed in place by what follows.
            with torch.enable_grad():
                output = output.detach().requires_grad_().clone()
        # Registered before anything changes the output in place, the hook is given the gradient at what it is now.
        output.register_hook(to.add)
        return output

    return hook


def _backward(outputs: Any, loss: Loss) -> None:
    try:
        value = loss(outputs)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ModelError(f"the loss for gradients must be one number, a sum over examples, not {found}")
        if not value.requires_grad:
            raise ModelError(
                "the loss has no gradient at any layer that is whitened by it: the model or the loss detaches its "
                "outputs or works on whole numbers"
            )
        value.reshape(()).backward()
    except AutorankError:
        raise
    except Exception as error:  # the user's own loss, or an operator without a derivative
        raise ModelError(f"the gradients of the loss cannot be computed: {describe(error)}") from error


class GradientSum:
    """Sums g gᵀ of one layer in float64, a bounded block of positions at a time.

    Parameters
    ----------
    spec : LayerSpec
    max_side : int
        With more output channels per group only the diagonal is kept.
    batches : float or None
        Batches of the first one's size that are to come; None takes every position.
    """

    def __init__(self, spec: LayerSpec, max_side: int, batches: float | None) -> None:
        self.spec, self.batches = spec, batches
        self.side = spec.out_channels // spec.groups
        self.diagonal = self.side > max_side
        self.ran = False
        self._wanted = max(ROWS_PER_COLUMN * (1 if self.diagonal else self.side), MIN_ROWS)
        self._stride: int | None = None
        self._seen = self._taken = 0
        shape = (spec.groups, self.side) if self.diagonal else (spec.groups, self.side, self.side)
        self._total = torch.zeros(shape, dtype=torch.float64)

    def add(self, gradient: Tensor) -> None:
        """Add the gradient at the output of one call: (N, T, O1, ..., Od), or (..., T) for a linear layer."""
        channels, d = self.spec.out_channels, len(self.spec.kernel)
        gradient = gradient.detach()
        if d:
            gradient = (gradient[None] if gradient.ndim == d + 1 else gradient).movedim(1, -1)
        positions = math.prod(gradient.shape[1:-1])
        rows = gradient.reshape(-1, channels)
        if self._stride is None:
            expected = 0.0 if self.batches is None else len(rows) * self.batches * max(1, len(self.spec.calls))
            self._stride = stride_of(expected, self._wanted, positions)
        taken = rows[-self._seen % self._stride :: self._stride]
        self._seen += len(rows)
        self._taken += len(taken)
        for block in taken.split(max(1, CHUNK // channels)) if len(taken) else ():
            block = block.to(torch.float32)
            # Gradients may be so small that their squares are none in float32.
            scale = block.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
            each = (block / scale).reshape(len(block), self.spec.groups, self.side).transpose(0, 1)
            product = each.square().sum(1) if self.diagonal else each.mT @ each
            self._total += product.cpu().to(torch.float64) * scale.cpu().to(torch.float64).square()

    def mean(self, examples: int) -> Tensor:
        """Return the mean over examples of the sum over positions; ModelError when it is not finite."""
        total = self._total * (self._seen / max(1, self._taken) / max(1, examples))
        if not bool(torch.isfinite(total).all()):
            raise ModelError(f"layer {self.spec.name!r}: the gradients of the loss at its outputs are not finite")
        # Beyond float32 at either end it still says which directions matter.
        return total.clamp(-_LARGEST, _LARGEST).to(torch.float32)


_LARGEST = torch.finfo(torch.float32).max
