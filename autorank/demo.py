"""The demonstration: a small network is trained on scikit-learn's digits in seconds, and a real sweep is run on it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autorank.errors import SweepError
from autorank.evaluate import evaluate
from autorank.seeding import seeded
from autorank.tasks import Task, load_task

MODEL = "python:autorank.demo:network"


def network() -> nn.Module:
    """Return an untrained convolutional network for 8×8 grey images and ten classes (about 0.3 M parameters)."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 64),
        *block(64, 128),
        nn.MaxPool2d(2),
        *block(128, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


QUICK = {
    "version": 1,
    "defaults": {
        "formats": ["channel_svd", "spatial_svd", "tucker2"],
        "whiten": ["both"],
        "ranks": {"macs_kept": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]},
    },
}
"""The formats of the default space whose fits take next to no time: a demonstration should not keep anyone waiting."""


def train(task: Task, steps: int = 150, seed: int = 0) -> nn.Module:
    """Train the network from scratch on the task's training part, deterministically for a seed on one machine."""
    with seeded(seed):
        model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    model.train()
    for batch in task.train_batches(steps, 128, seed):
        optimizer.zero_grad()
        task.loss(model(*batch.inputs), batch.targets).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def prepare_weights(path: Path) -> float:
    """Train the network, write its weights to `path`, and return its validation accuracy in percent."""
    from safetensors.torch import save_model

    task = load_task(model=MODEL, data="digits", validation=0.2)
    model = train(task)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, str(path))
    except OSError as error:
        raise SweepError(f"cannot write {path}: {error.strerror or error}") from None
    return evaluate(model, task, "validation").score


def settings(weights: Path) -> dict[str, Any]:
    """Return what a search over the network with these weights is told: model, data, space, fine-tune."""
    return {
        "model": MODEL,
        "weights": str(weights),
        "data": "digits",
        "validation": 0.2,
        "space": QUICK,
        "recovery": {"steps": 60, "batch_size": 64},
    }


def run(directory: Path, trials: int = 40) -> None:
    """Train, sweep, print the front, export the recommended point."""
    from autorank.show import print_result
    from autorank.sweep import search

    begun = time.monotonic()
    weights = directory / "digits-net.safetensors"
    print(f"training a small convolutional network on scikit-learn's digits → {weights}")
    score = prepare_weights(weights)
    print(f"trained in {time.monotonic() - begun:.0f} s: {score:.1f} % on validation data\n")
    sweep = directory / time.strftime("demo-%Y%m%d-%H%M%S")
    print(f"searching formats and ranks for its layers: {trials} trials in {sweep}")
    result = search(
        **settings(weights),
        trials=trials,
        sweep_dir=str(sweep),
    )
    print_result(result)
    exported = result.export(say=print)
    print(f"\nexported to  {exported.directory} (start with its report.md)")
    print(f"all of it took {time.monotonic() - begun:.0f} s")
