"""The two tasks on which searches are compared, and how long each level trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import cifar

from autorank.demo import MODEL, prepare_weights
from autorank.tasks import Task, load_task

TASKS = ("digits", "cifar")
LEVELS = ("none", "short")
LONG = 800
"""Fine-tune steps of the final front."""


@dataclass(frozen=True)
class Setting:
    """How a task is trained at a level: settings of `autorank.search`."""

    recovery: dict[str, Any]
    calibration: int


def setting(task: str, level: str, steps: int | None = None) -> Setting:
    """Return the fine-tune of a level; `steps` replaces its number of steps (not at level none)."""
    if task == "digits":
        recovery: dict[str, Any] = {"steps": 60, "batch_size": 64, "calibration": 1024}
    else:
        recovery = {"steps": 50, "batch_size": 128, "calibration": 512}
    if level == "none":
        return Setting({**recovery, "steps": 0}, 512)
    return Setting({**recovery, "steps": steps or recovery["steps"]}, 512)


def load(task: str, shared: Path, cache: Path, validation: int | None = None, *, test: bool = True) -> Task:
    """Return a task with a split that depends on no seed of a search.

    Parameters
    ----------
    task : {"digits", "cifar"}
    shared : Path
        Folder of the CIFAR-10 images and the ResNet-20.
    cache : Path
        Where the network of the digits is kept; it is trained there, in seconds, when it is missing.
    validation : int, optional
        Images of the validation split: by default 260 digits, 1,000 of CIFAR-10.
    test : bool
        False leaves the test split out, so that no search spends time on it.
    """
    if task == "digits":
        weights = cache / "digits-net.safetensors"
        if not weights.is_file():
            prepare_weights(weights)
        return load_task(model=MODEL, weights=weights, data="digits", validation=validation or 0.2)
    settings = cifar(shared)
    if not test:
        settings["data_args"]["test"] = None
    return load_task(**settings, validation=validation or 1000)
