"""Small networks that the task tests name as ``python:tests.tasks.nets:...``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autorank.tasks import ClassificationTask

not_callable = 3


def convnet(channels: int = 1, classes: int = 10, width: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(16 * width, classes),
    )


def broken(width: int = 1) -> nn.Module:
    raise RuntimeError(f"no net\nof width {width}")


def number() -> int:
    return 3


class TwoInputs(nn.Module):
    """Adds two linear maps of two inputs."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, classes), nn.Linear(2, classes)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) + self.b(y)


def vectors(count: int = 60, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator), torch.arange(count) % classes


def data(count: int = 60, classes: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    return {"train": vectors(count, classes), "test": vectors(30, classes, 1)}


def regression(count: int = 40) -> dict[str, object]:
    x, _ = vectors(count)
    return {
        "train": (x, x.sum(1, keepdim=True)),
        "loss": nn.functional.mse_loss,
        "metric": lambda outputs, targets: (outputs - targets).abs().mean(),
        "metric_name": "mae",
        "direction": "min",
    }


def in_batches(size: int) -> dict[str, object]:
    return {"train": vectors(), "evaluation_batch": size}


def without_loss(key: str) -> dict[str, object]:
    return {"train": vectors(), key: regression().get(key, len)}


def task() -> ClassificationTask:
    return ClassificationTask(nn.Linear(4, 3), train=vectors(), name="mine")


def not_data() -> dict[str, int]:
    return {"training": 1}


def linear(inputs: int = 4, classes: int = 3) -> nn.Module:
    return nn.Linear(inputs, classes)
