"""Score and loss of a model over one split of a task."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from autorank.errors import DataError, TrialError
from autorank.memoryformat import channels_last
from autorank.pytrees import tensors
from autorank.tasks.base import Task
from autorank.tasks.batch import Device, wide
from autorank.types import Evaluation


def evaluate(
    model: nn.Module,
    task: Task,
    split: str,
    device: Device = "cpu",
    batch_size: int | None = None,
    limit: int | None = None,
) -> Evaluation:
    """Evaluate `model` on a split, in eval mode and without gradients; its training mode is restored.

    Parameters
    ----------
    model : Module
        Moved to `device`.
    task : Task
    split : {"validation", "test", "train"}
    device : device
    batch_size : int, optional
        The task's `evaluation_batch` when not given.
    limit : int, optional
        Only the first so many examples.

    Returns
    -------
    Evaluation
        Metric and loss, averaged over examples.

    Raises
    ------
    TrialError
        If outputs are NaN, or loss or metric are not finite.
    DataError
        If the task has no such split.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least one example, not {limit}")
    modes = {module: module.training for module in model.modules()}
    model.to(device).eval()
    values: list[Tensor] = []
    sizes: list[int] = []
    dtype = wide(torch.device(device))
    broken: Tensor = torch.zeros((), dtype=torch.bool, device=device)
    try:
        # Not inference_mode: a tensor that the model caches must serve training later.
        with channels_last(model, task.channels_last(device)), torch.no_grad():
            for batch in task.batches(split, batch_size, device, limit):
                outputs = model(*batch.inputs)
                pair = (task.metric(outputs, batch.targets), task.loss(outputs, batch.targets))
                # Kept where they are until the end, so that an accelerator is not waited for at each batch.
                values.append(torch.stack([value.to(device, dtype) for value in pair]))
                sizes.append(len(batch))
                broken = _any_nan(outputs, broken)
    finally:
        for module, training in modes.items():
            module.training = training
    if not (examples := sum(sizes)):
        raise DataError(f"the {split} split has no examples")
    weights = torch.tensor(sizes, dtype=torch.float64)
    score, loss = (weights @ torch.stack(values).cpu().double() / examples).tolist()
    if bool(broken):
        raise TrialError(f"the model's outputs on the {split} split are NaN")
    for name, value in (("loss", loss), (task.metric_name, score)):
        if not math.isfinite(value):
            raise TrialError(f"{name} on the {split} split is {value}")
    return Evaluation(score=score, loss=loss, examples=examples)


def _any_nan(outputs: Any, like: Tensor) -> Tensor:
    found = like
    for value in tensors(outputs):
        if value.is_floating_point():
            found = found | value.isnan().any()
    return found
