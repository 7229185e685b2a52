"""Classification: cross-entropy, accuracy in percent, distillation by Kullback-Leibler divergence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autorank.errors import ConfigError, DataError, ModelError
from autorank.solvers.gradients import fisher_loss
from autorank.tasks.base import EVALUATION_BATCH, Task
from autorank.tasks.batch import Batch, Unpack, wide
from autorank.tasks.models import ModelLike
from autorank.types import Direction


class ClassificationTask(Task):
    """One class out of several per example, or per position for outputs of shape (N, classes, ...).

    Parameters
    ----------
    model, train, validation, test, example_inputs, unpack, seed, workers, name, evaluation_batch
        See `autorank.tasks.base.Task`. Targets are whole numbers from 0, or class probabilities (N, classes).
    label_smoothing : float
        Of the training loss, from 0 to below 1.

    Examples
    --------
    >>> task = ClassificationTask(model, train=train_set, test=test_set)  # doctest: +SKIP
    """

    name: str = "classification"
    metric_name: str = "accuracy"
    direction: Direction = "max"

    def __init__(
        self,
        model: ModelLike,
        train: Any,
        validation: Any = None,
        test: Any = None,
        *,
        example_inputs: Tensor | tuple[Tensor, ...] | None = None,
        unpack: Unpack | None = None,
        seed: int = 0,
        workers: int = 0,
        name: str | None = None,
        label_smoothing: float = 0.0,
        evaluation_batch: int = EVALUATION_BATCH,
    ) -> None:
        if not 0.0 <= label_smoothing < 1.0:
            raise ConfigError(f"label_smoothing must be from 0 to below 1, not {label_smoothing}")
        self.label_smoothing = label_smoothing
        self.classes = 0
        super().__init__(
            model,
            train,
            validation,
            test,
            example_inputs=example_inputs,
            unpack=unpack,
            seed=seed,
            workers=workers,
            name=name,
            evaluation_batch=evaluation_batch,
        )

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean cross-entropy, in nats."""
        return F.cross_entropy(logits_of(outputs).float(), _classes(targets), label_smoothing=self.label_smoothing)

    def metric(self, outputs: Any, targets: Any) -> Tensor:
        """Return the accuracy in percent."""
        predicted = logits_of(outputs).argmax(1)
        truth = targets.argmax(1) if targets.is_floating_point() else targets
        return (predicted == truth).to(wide(predicted.device)).mean() * 100

    def distill(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """Return T² · KL(teacher ‖ student) of the softened distributions (Hinton et al. 2015, section 2)."""
        student = F.log_softmax(logits_of(outputs).float() / temperature, 1)
        target = F.log_softmax(logits_of(teacher).float() / temperature, 1)
        divergence = F.kl_div(student, target, reduction="none", log_target=True).sum(1).mean()
        return divergence * temperature**2

    def sampled_loss(self, outputs: Any, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return a scalar whose gradients have the Fisher information of the predicted classes as their covariance.

        The targets are not looked at; see `autorank.solvers.gradients.fisher_loss`.
        """
        return fisher_loss(logits_of(outputs), generator)

    def _check(self) -> None:
        outputs = logits_of(self.run_example())
        if outputs.dim() < 2 or outputs.shape[1] < 2:
            raise ModelError(
                f"a classifier's outputs must be (N, classes), not {tuple(outputs.shape)}; "
                "use CustomTask for other outputs"
            )
        self.classes = int(outputs.shape[1])
        for split, feed in self._feeds.items():
            if (labels := feed.labels) is not None:
                self._check_range(int(labels.min()), int(labels.max()), split)

    def _check_targets(self, targets: Any, split: str) -> None:
        if not isinstance(targets, Tensor):
            raise DataError(f"targets of the {split} split are a {type(targets).__name__}, not a tensor of classes")
        if targets.is_floating_point() and targets.dim() < 2:
            raise DataError(
                f"targets of the {split} split are {str(targets.dtype).removeprefix('torch.')} numbers; give whole "
                "numbers from 0, or class probabilities (N, classes)"
            )
        if targets.is_floating_point() or not targets.numel():
            return
        low, high = (int(x) for x in targets.aminmax())
        self._check_range(low, high, split)

    def _check_range(self, low: int, high: int, split: str) -> None:
        for label in (low, high):
            if not 0 <= label < self.classes:
                raise DataError(
                    f"label {label} in the {split} split, but the model has {self.classes} classes (labels 0 to "
                    f"{self.classes - 1})"
                )


def _classes(targets: Tensor) -> Tensor:
    return targets if targets.is_floating_point() else targets.long()


def logits_of(outputs: Any) -> Tensor:
    """Return the class scores (N, classes, ...) of a classifier's outputs.

    Takes a tensor, or an object or mapping with ``logits``, as many libraries return.
    """
    if isinstance(outputs, Tensor):
        return outputs
    found = outputs.get("logits") if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    if isinstance(found, Tensor):
        return found
    raise ModelError(f"a classifier must return a tensor of logits, not a {type(outputs).__name__}; use CustomTask")
