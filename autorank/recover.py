"""Recovery of a decomposed model: batch-norm statistics, and a short fine-tune with distillation."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autorank.copying import model_copy
from autorank.errors import ConfigError, TrialError
from autorank.features import FeatureMatch
from autorank.memoryformat import channels_last, lay_out
from autorank.precision import full_precision, widened
from autorank.seeding import seeded
from autorank.tasks.base import Task
from autorank.tasks.batch import Batch, Device, move
from autorank.tasks.randomness import derive
from autorank.teacher import Lesson, Teacher

__all__ = ["Proximal", "Recovery", "Teacher", "fine_tune", "reestimate_batch_norm"]

DEFAULTS = {"sgd": (0.02, 5e-4), "adamw": (0.0015, 0.01)}
"""Optimizer → learning rate and weight decay that serve where none is given."""

ADAMW_MOST = 0.015
"""Learning rate beyond which AdamW is refused: rates of SGD are ten times its own."""

SCHEDULES = ("cosine", "linear", "constant")
BATCH_NORM = ("auto", "always", "never")
CURVE_POINTS = 50
DIVERGED = 10.0  # times the loss at the start


@dataclass(frozen=True)
class Recovery:
    """How a decomposed model is recovered.

    Attributes
    ----------
    steps : int
        Fine-tune steps; 0 leaves the weights as they are.
    batch_size : int
    optimizer : {"sgd", "adamw"}
        SGD with Nesterov momentum, or AdamW.
    lr : float or None
        Peak learning rate; None takes 0.02 for SGD and 0.0015 for AdamW.
    momentum : float
        Of SGD.
    weight_decay : float or None
        Not applied to biases and normalisation layers; None takes 5e-4 for SGD and 0.01 for AdamW.
    schedule : {"cosine", "linear", "constant"}
        From the peak towards zero, after the warm-up.
    warmup : int
        Steps over which the learning rate rises to its peak.
    distill : float
        Weight of the distance to the dense model's outputs; the task's loss has the rest of 1.
    temperature : float
        Softens both distributions in classification.
    features : float
        Weight of the distance between the blocks' outputs and the dense model's (see `autorank.features`), which costs
        a forward pass of the dense model at every step; 0 leaves them alone.
    grad_clip : float or None
        Largest norm of the gradient.
    in_order : bool
        Fit the layers of a plan one after the other, each to the dense outputs given what the layers before it now hand
        over (see `autorank.sequential`): a better start, and most of all for harsh plans, at the price of fits that
        are each plan's own. Probes and trials that start from trained weights are fitted layer by layer on their own.
    batch_norm : {"auto", "always", "never"}
        Whether batch-norm statistics are re-estimated; "auto" keeps the new ones where they lower the validation loss.
    calibration : int
        Training examples for that.
    amp : bool
        Mixed precision, on CUDA devices only.
    """

    steps: int = 100
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float | None = None
    schedule: str = "cosine"
    warmup: int = 0
    distill: float = 0.9
    temperature: float = 4.0
    features: float = 3.0
    grad_clip: float | None = 5.0
    in_order: bool = False
    batch_norm: str = "auto"
    calibration: int = 1024
    amp: bool = True

    def __post_init__(self) -> None:
        whole = {"steps": 0, "batch_size": 1, "warmup": 0, "calibration": 1}
        for name, least in whole.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise _wrong(name, value, f"a whole number from {least}")
        real: dict[str, tuple[bool, str]] = {
            "lr": (self.lr is None or (_real(self.lr) and self.lr > 0), "a number above 0, or null"),
            "momentum": (_real(self.momentum) and 0 <= self.momentum < 1, "a number from 0 to below 1"),
            "weight_decay": (
                self.weight_decay is None or (_real(self.weight_decay) and self.weight_decay >= 0),
                "a number from 0, or null",
            ),
            "features": (_real(self.features) and self.features >= 0, "a number from 0"),
            "optimizer": (self.optimizer in list(DEFAULTS), " or ".join(map(repr, DEFAULTS))),
            "distill": (_real(self.distill) and 0 <= self.distill <= 1, "a number from 0 to 1"),
            "temperature": (_real(self.temperature) and self.temperature > 0, "a number above 0"),
            "grad_clip": (
                self.grad_clip is None or (_real(self.grad_clip) and self.grad_clip > 0),
                "a number above 0, or null",
            ),
            "schedule": (self.schedule in SCHEDULES, " or ".join(map(repr, SCHEDULES))),
            "batch_norm": (self.batch_norm in BATCH_NORM, " or ".join(map(repr, BATCH_NORM))),
            "amp": (type(self.amp) is bool, "true or false"),
            "in_order": (type(self.in_order) is bool, "true or false"),
        }
        for name, (fine, allowed) in real.items():
            if not fine:
                raise _wrong(name, getattr(self, name), allowed)
        if self.optimizer == "adamw" and self.peak > ADAMW_MOST:
            raise ConfigError(
                f"recovery: lr {self.peak:g} is a rate for sgd and ruins a model under adamw, whose default is "
                f"{DEFAULTS['adamw'][0]:g}; leave lr out, or name optimizer: sgd"
            )

    @property
    def peak(self) -> float:
        """The largest learning rate."""
        return DEFAULTS[self.optimizer][0] if self.lr is None else self.lr

    @property
    def decay(self) -> float:
        """The weight decay."""
        return DEFAULTS[self.optimizer][1] if self.weight_decay is None else self.weight_decay

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warmup = min(self.warmup, self.steps)
        if step < warmup:
            return self.peak * (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(self.steps - warmup, 1)
        if self.schedule == "cosine":
            return self.peak * 0.5 * (1 + math.cos(math.pi * progress))
        return self.peak * (1 - progress) if self.schedule == "linear" else self.peak


class Proximal(Protocol):
    """A further term of the loss, whose steps are implicit: stable however steep the term is."""

    def value(self) -> Tensor:
        """Return the term at the present weights, a scalar without gradient."""
        ...

    def step(self, rate: float) -> None:
        """Move the weights W, in place, to the argmin over V of term(V) + ‖V − W‖² / (2·rate)."""
        ...


def reestimate_batch_norm(
    model: nn.Module,
    batches: Iterable[Batch] | Iterable[tuple[Tensor, ...]],
    device: Device = "cpu",
    laid: bool = False,
) -> nn.Module | None:
    """Return a copy whose batch-norm statistics are those of `batches`, averaged with equal weights.

    Everything but batch norm stays in eval mode, so dropout and the like do not blur the statistics.

    Parameters
    ----------
    model : Module
        Not changed.
    batches : iterable of Batch, or of tuples of inputs
    device : device
    laid : bool
        Run in channels last (`Task.channels_last`).

    Returns
    -------
    Module or None
        On `device`, in eval mode; None when the model has no batch norm with running statistics.
    """
    if not _batch_norms(model):
        return None
    copied = model_copy(model).to(device).eval()
    norms = _batch_norms(copied)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    try:
        with channels_last(copied, laid), torch.no_grad():
            for batch in batches:
                copied(*move(batch.inputs if isinstance(batch, Batch) else batch, device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    return copied


def fine_tune(
    model: nn.Module,
    task: Task,
    recovery: Recovery,
    seed: int,
    device: Device = "cpu",
    teacher: Teacher | None = None,
    proximal: Proximal | None = None,
) -> tuple[tuple[int, float], ...]:
    """Fine-tune `model` in place; the result is a function of the seed, on a CPU bit by bit.

    Weights of 16 bits are tuned in float32 and rounded at the end.

    The loss is (1 − distill) · task.loss + distill · task.distill against the dense model's outputs, plus `features`
    times the distance between the outputs of the blocks and the dense model's, and `proximal`.

    Parameters
    ----------
    model : Module
        Comes back on `device`, in eval mode.
    task : Task
    recovery : Recovery
    seed : int
        Of batches, augmentation and dropout. The caller's random numbers are not touched.
    device : device
    teacher : Teacher, optional
        None computes the dense outputs as they are needed.
    proximal : Proximal, optional
        For SGD only. Takes its own step after each step of SGD, at the rate lr / (1 − momentum) that momentum comes to;
        its gradient is neither clipped nor remembered.

    Returns
    -------
    tuple of (step, loss)
        At most 50 points, the last step among them.

    Raises
    ------
    TrialError
        If loss or weights are not finite, or the loss stays above ten times its start.
    """
    if proximal is not None and recovery.optimizer != "sgd":
        raise ConfigError("recovery: a proximal term needs the optimizer 'sgd', whose steps have a length")
    device = torch.device(device)
    model.to(device)
    if not recovery.steps or not any(p.requires_grad for p in model.parameters()):
        model.eval()
        return ()
    guard = _Guard(recovery.steps, every=1 if device.type == "cpu" else 10)
    lesson = (teacher or Teacher(seed, recovery.batch_size)).lesson(task, recovery.batch_size, seed, device)
    laid = task.channels_last(device)
    dense = lay_out(task.model().to(device).eval(), laid) if recovery.features else None
    match = FeatureMatch(model, dense) if dense is not None else None
    model.train()
    try:
        with channels_last(model, laid), seeded(derive(seed, 0xF17E), device), full_precision(model) as widen:
            _train(model, task, recovery, seed, device, lesson, guard, widen, proximal, match)
    finally:
        model.eval()
        if match is not None:
            match.close()
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise TrialError(f"the fine-tune diverged: {name} is not finite after {recovery.steps} steps")
    return guard.curve()


def _train(
    model: nn.Module,
    task: Task,
    recovery: Recovery,
    seed: int,
    device: torch.device,
    lesson: Lesson,
    guard: _Guard,
    widen: bool,
    proximal: Proximal | None,
    match: FeatureMatch | None,
) -> None:
    """Take the steps; `widen` puts inputs, targets and the teacher's outputs in float32, where the model was put."""
    groups = _parameter_groups(model, recovery.decay)
    optimizer = _optimizer(groups, recovery)
    matched = match is not None and bool(match.places)
    half = _half_precision(recovery, device)
    scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16)
    same = widened if widen else lambda value: value
    for step, batch in enumerate(task.train_batches(recovery.steps, recovery.batch_size, seed, device)):
        for group in optimizer.param_groups:
            group["lr"] = recovery.rate(step)
        with torch.autocast(device.type, half, enabled=half is not None):
            outputs = model(*same(batch.inputs))
            if matched:
                assert match is not None
                taught = same(match.teach(batch.inputs))
            else:
                taught = same(lesson(step, batch)) if recovery.distill > 0 else None
            loss = _loss(task, recovery, outputs, same(batch.targets), taught)
            if matched:
                assert match is not None
                loss = loss + recovery.features * match.loss()
        guard.see(loss if proximal is None else loss.detach() + proximal.value())
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if recovery.grad_clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], recovery.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        if proximal is not None:
            proximal.step(recovery.rate(step) / (1 - recovery.momentum))
    guard.check()


def _optimizer(groups: list[dict[str, Any]], recovery: Recovery) -> torch.optim.Optimizer:
    if recovery.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recovery.peak)
    return torch.optim.SGD(groups, lr=recovery.peak, momentum=recovery.momentum, nesterov=recovery.momentum > 0)


def _loss(task: Task, recovery: Recovery, outputs: Any, targets: Any, taught: Any) -> Tensor:
    parts: list[Tensor] = []
    if recovery.distill < 1:
        parts.append((1 - recovery.distill) * task.loss(outputs, targets))
    if recovery.distill > 0:
        parts.append(recovery.distill * task.distill(outputs, taught, recovery.temperature))
    return sum(parts[1:], parts[0])


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _half_precision(recovery: Recovery, device: torch.device) -> torch.dtype | None:
    if not recovery.amp or device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


class _Guard:
    """Watches the loss; reads it off an accelerator only now and then."""

    def __init__(self, steps: int, every: int) -> None:
        self.every, self.patience = every, max(20, steps // 4)
        self.losses: list[float] = []
        self._waiting: list[Tensor] = []
        self._above = 0

    def see(self, loss: Tensor) -> None:
        self._waiting.append(loss.detach().float())
        if len(self._waiting) >= self.every:
            self.check()

    def check(self) -> None:
        values = torch.stack(self._waiting).tolist() if self._waiting else []
        self._waiting = []
        for value in values:
            step = len(self.losses)
            if not math.isfinite(value):
                raise TrialError(f"the fine-tune diverged: the loss is {value} at step {step}")
            self.losses.append(value)
            begin = self.losses[:5]
            start = sum(begin) / len(begin)
            self._above = self._above + 1 if abs(value) > DIVERGED * abs(start) and value > start else 0
            if self._above >= self.patience:
                raise TrialError(
                    f"the fine-tune diverged: the loss went from {start:.3g} to {value:.3g} and stayed there for "
                    f"{self.patience} steps (step {step}); a smaller learning rate may help"
                )

    def curve(self) -> tuple[tuple[int, float], ...]:
        count = len(self.losses)
        points = min(count, CURVE_POINTS)
        steps = sorted({round(i * (count - 1) / max(points - 1, 1)) for i in range(points)})
        return tuple((step, self.losses[step]) for step in steps)


def _real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(name: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"recovery: {name} must be {allowed}, not {value!r}")
