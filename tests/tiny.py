"""A task so small that a whole sweep takes a second."""

from __future__ import annotations

import torch
from torch import nn

import autorank


def network() -> nn.Module:
    """Return a network whose kernels are of rank 5 but for a little noise, as those of trained ones are."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=True),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=2, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )
    with torch.no_grad():
        for index in (3, 5):
            kernel = made[index].weight
            rows, columns = torch.randn(len(kernel), 5), torch.randn(5, kernel[0].numel())
            kernel.copy_((rows @ columns * 0.1).reshape(kernel.shape) + 0.01 * torch.randn(kernel.shape))
    return made


def task(seed: int = 0, count: int = 160) -> autorank.Task:
    """Return two classes of noisy images, a quarter of them for validation."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 2
    images = torch.randn(count, 3, 8, 8, generator=generator) + targets.view(-1, 1, 1, 1) * 0.4
    return autorank.ClassificationTask(network(), train=(images, targets), validation=0.25)
