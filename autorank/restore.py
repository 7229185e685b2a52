"""How a trial's model gets its accuracy back: batch norms, fine-tune, quantization, steps with quantization."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from autorank.clock import Clock
from autorank.evaluate import evaluate
from autorank.quant import QuantSettings, calibrate
from autorank.recover import Recovery, Teacher, fine_tune, reestimate_batch_norm
from autorank.tasks import Task
from autorank.teacher import note_of
from autorank.types import Direction, Evaluation, Fidelity, Plan

Curve = tuple[tuple[int, float], ...]
"""(step, loss) of a training."""

Restored = tuple[nn.Module, Evaluation, Curve, str]
"""A model, its evaluation on validation data, the curve of the training, and a note."""

BATCH_NORM_BATCH = 128


class Restorer:
    """Restores models in one process; the teacher is made once.

    Parameters
    ----------
    task : Task
    recovery : Recovery
    quantization : QuantSettings
    seed : int
    device : str
    teacher_file : Path or None
        Where the teacher's outputs are kept.
    fetch : callable
        Brings a file of the sweep directory, if there is one, to its place on this machine.
    """

    def __init__(
        self,
        task: Task,
        recovery: Recovery,
        quantization: QuantSettings,
        seed: int,
        device: str,
        teacher_file: Path | None,
        fetch: Callable[[Path], object],
    ) -> None:
        self._task, self._recovery, self._quantization = task, recovery, quantization
        self._seed, self._device, self._teacher_file, self._fetch = seed, device, teacher_file, fetch
        self._teacher: Teacher | None = None

    @property
    def teacher(self) -> Teacher:
        """The dense model, as a teacher."""
        if self._teacher is None:
            if self._teacher_file is not None:
                for file in (self._teacher_file, note_of(self._teacher_file)):
                    self._fetch(file)
            self._teacher = Teacher.build(self._task, self._recovery, self._seed, self._device, self._teacher_file)
        return self._teacher

    def first_steps(self, plan: Plan, fidelity: Fidelity, pulled: bool = False) -> int:
        """Return how many of a trial's steps are taken in floating point; of a pulled training, one at least."""
        first = fidelity.steps - (round(self._quantization.qat * fidelity.steps) if plan.has_bits else 0)
        return max(first, min(1, fidelity.steps)) if pulled else first

    def restore(
        self, model: nn.Module, start: Evaluation, plan: Plan, fidelity: Fidelity, clock: Clock, trained: bool = False
    ) -> Restored:
        """Fine-tune a decomposed model; quantize the layers that have bits, and fine-tune with quantization.

        Parameters
        ----------
        model : nn.Module
            Changed in place, or left behind.
        start : Evaluation
            Of the model.
        plan : Plan
        fidelity : Fidelity
        clock : Clock
        trained : bool
            Whether the steps in floating point were taken before the model was decomposed.
        """
        curve: Curve = ()
        notes = []
        best = start
        first = self.first_steps(plan, fidelity, trained)
        if first and not trained:
            model, best, curve, note = self._fine_tune(model, best, self._recovery, first, clock)
            notes.append(note)
        if plan.has_bits:
            model, best, more, note = self._quantize(model, fidelity, fidelity.steps - first, clock)
            curve += tuple((first + step, loss) for step, loss in more)
            notes.append(note)
        return model, best, curve, "; ".join(filter(None, notes))

    def batch_norm(
        self, model: nn.Module, before: Evaluation, fidelity: Fidelity, clock: Clock
    ) -> tuple[nn.Module, Evaluation]:
        """Re-estimate the batch-norm statistics where that lowers the validation loss (or always, when told so)."""
        if not fidelity.batch_norm:
            return model, before
        with clock("batch_norm"):
            # As in training: statistics of images that are not augmented would cost accuracy.
            steps = -(-self._recovery.calibration // BATCH_NORM_BATCH)
            batches = self._task.train_batches(steps, BATCH_NORM_BATCH, self._seed, self._device)
            laid = self._task.channels_last(self._device)
            other = reestimate_batch_norm(model, batches, self._device, laid)
        if other is None:
            return model, before
        with clock("evaluate"):
            after = evaluate(other, self._task, "validation", self._device)
        if self._recovery.batch_norm == "always" or after.loss < before.loss:
            return other, after
        return model, before

    def _quantize(self, model: nn.Module, fidelity: Fidelity, steps: int, clock: Clock) -> Restored:
        """Quantize the layers with bits, correct the batch norms, and take the last steps with quantization."""
        with clock("quantize"):
            taken = self._task.calibration_batches(self._quantization.calibration, BATCH_NORM_BATCH, self._device)
            calibrate(model, (batch.inputs for batch in taken), self._quantization)
        with clock("evaluate"):
            before = evaluate(model, self._task, "validation", self._device)
        model, best = self.batch_norm(model, before, fidelity, clock)
        if not steps:
            return model, best, (), ""
        recovery = replace(self._recovery, lr=self._recovery.peak * self._quantization.qat_rate, warmup=0)
        return self._fine_tune(model, best, recovery, steps, clock)

    def _fine_tune(self, model: nn.Module, start: Evaluation, recovery: Recovery, steps: int, clock: Clock) -> Restored:
        """Fine-tune, and keep the untuned weights where tuning only made the model worse."""
        recovery = replace(recovery, steps=steps)
        untuned = copy.deepcopy(model.state_dict())
        with clock("tune"):
            curve = fine_tune(model, self._task, recovery, self._seed, self._device, self.teacher)
        with clock("evaluate"):
            after = evaluate(model, self._task, "validation", self._device)
        if better(start.score, after.score, self._task.direction):
            model.load_state_dict(untuned)
            note = f"the fine-tune did not help ({start.score:.2f} → {after.score:.2f}): the untuned weights are kept"
            return model, start, curve, note
        return model, after, curve, ""


def better(a: float, b: float, direction: Direction) -> bool:
    """Whether score `a` is strictly better than score `b`."""
    return a > b if direction == "max" else a < b
