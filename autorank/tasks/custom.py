"""A task from the user's own loss and metric functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from autorank.errors import ConfigError, ModelError
from autorank.pytrees import tensors
from autorank.tasks.base import EVALUATION_BATCH, Task
from autorank.tasks.batch import Unpack
from autorank.tasks.models import ModelLike
from autorank.types import Direction

Function = Callable[[Any, Any], Any]


class CustomTask(Task):
    """Any model and data, judged by functions of the user's.

    Parameters
    ----------
    model, train, validation, test, example_inputs, unpack, seed, workers, name, evaluation_batch
        See `autorank.tasks.base.Task`.
    loss : callable
        ``loss(outputs, targets)``, a scalar tensor to make small.
    metric : callable, optional
        ``metric(outputs, targets)``, a number: the mean over the batch. Batches are averaged by their sizes. None takes
        the loss, to be made small.
    metric_name : str
    direction : {"max", "min"}
        Whether a larger or a smaller metric is better.
    distill : callable, optional
        ``distill(outputs, teacher_outputs, temperature)``, a scalar; the mean squared error over all tensors
        when not given.
    """

    name: str = "custom"

    def __init__(
        self,
        model: ModelLike,
        train: Any,
        validation: Any = None,
        test: Any = None,
        *,
        loss: Function,
        metric: Function | None = None,
        metric_name: str = "score",
        direction: str = "max",
        distill: Callable[[Any, Any, float], Tensor] | None = None,
        example_inputs: Tensor | tuple[Tensor, ...] | None = None,
        unpack: Unpack | None = None,
        seed: int = 0,
        workers: int = 0,
        name: str | None = None,
        evaluation_batch: int = EVALUATION_BATCH,
    ) -> None:
        for label, function in (("loss", loss), ("metric", metric), ("distill", distill)):
            if function is not None and not callable(function):
                raise ConfigError(f"{label} must be a function, not a {type(function).__name__}")
        if direction not in ("max", "min"):
            raise ConfigError(f"direction must be 'max' or 'min', not {direction!r}")
        self._loss, self._metric, self._distill = loss, metric or loss, distill
        self.metric_name = metric_name if metric is not None else "loss"
        self.direction = cast(Direction, direction) if metric is not None else "min"
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
        """Return the user's loss."""
        return _scalar(self._loss(outputs, targets), "loss")

    def metric(self, outputs: Any, targets: Any) -> Tensor:
        """Return the user's metric."""
        return _scalar(self._metric(outputs, targets), "metric")

    def distill(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """Return the user's distance, or the mean squared error over all floating-point tensors."""
        if self._distill is not None:
            return _scalar(self._distill(outputs, teacher, temperature), "distill")
        pairs = [
            (mine.float(), theirs.float())
            for mine, theirs in zip(tensors(outputs), tensors(teacher), strict=True)
            if mine.is_floating_point()
        ]
        if not pairs:
            raise ModelError("the outputs hold no floating-point tensor to distil; pass distill=")
        count = sum(mine.numel() for mine, _ in pairs)
        return torch.stack([F.mse_loss(mine, theirs, reduction="sum") for mine, theirs in pairs]).sum() / count


def _scalar(value: Any, name: str) -> Tensor:
    result = value if isinstance(value, Tensor) else torch.as_tensor(float(value))
    if result.numel() != 1:
        raise ConfigError(f"{name} must return one number per batch, not a tensor of shape {tuple(result.shape)}")
    return result.reshape(())
