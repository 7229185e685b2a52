"""`load_task`: a task from names, as the command line gives them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autorank.tasks.base import Task, checked_batch
from autorank.tasks.models import NamedModel
from autorank.tasks.sources import open_data


def load_task(
    *,
    model: str,
    weights: str | Path | None = None,
    data: str,
    model_args: Mapping[str, Any] | None = None,
    data_args: Mapping[str, Any] | None = None,
    validation: int | float = 0.1,
    seed: int = 0,
    cache_dir: Path | None = None,
    evaluation_batch: int | None = None,
) -> Task:
    """Make the task that names describe.

    Parameters
    ----------
    model : str
        ``python:package.module:function``, ``timm:name``, ``torchvision:name`` or ``torchhub:repository:name``.
    weights : str or Path, optional
        ``.safetensors``, ``.pt`` or ``.pth`` file with the state dict.
    data : str
        ``digits``, ``hf:name``, ``parquet:directory-or-files``, ``imagefolder:directory`` or
        ``python:package.module:function``.
    model_args : mapping, optional
        Keyword arguments of the model's factory.
    data_args : mapping, optional
        Options of the data source; see `autorank.tasks.sources`.
    validation : int or float
        Examples, or the fraction, that are split off the training data when the source has no validation split.
    seed : int
        Of that split.
    cache_dir : Path, optional
        Where decoded images are kept; ``$AUTORANK_CACHE`` or ``~/.cache/autorank`` by default.
    evaluation_batch : int, optional
        Examples per batch when the model is evaluated; what the data source says (image sets: ``evaluation_batch`` in
        `data_args`), or 256, by default.

    Raises
    ------
    ConfigError, ModelError, WeightsError, DataError, MissingExtraError
        One line: what is wrong, where, and what would be right.
    """
    opened = open_data(data, dict(data_args or {}), cache_dir)
    source = NamedModel(model, dict(model_args or {}), weights)
    task = opened.task(source, validation, seed)
    task._paths = (os.getcwd(),)
    if evaluation_batch is not None:
        task.evaluation_batch = checked_batch(evaluation_batch)
    return task
