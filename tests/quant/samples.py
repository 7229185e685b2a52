"""What the tests of quantization share: references in NumPy, small networks, decomposed layers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from autorank import formats
from autorank.testing.cases import Case, dense, few, random
from autorank.types import Choice


def reference(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Levels and values, in float32 and whole numbers, as a runtime with integers has them."""
    inverse = np.float32(1) / scale.astype(np.float32)
    levels = np.clip(np.rint(zero.astype(np.float32) + x.astype(np.float32) * inverse).astype(np.int64), low, high)
    return levels, (levels - zero).astype(np.float32) * scale.astype(np.float32)


def network(seed: int = 0) -> nn.Module:
    """A convolutional network with batch norms that have seen something, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 5),
        )
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
        model.train()
        for _ in range(3):
            model(torch.randn(16, 3, 9, 9) * 2 + 1)
    return model.eval()


def images(count: int = 32, seed: int = 0) -> Tensor:
    """Inputs of the network."""
    return random((count, 3, 9, 9), seed).float() * 2 + 1


def decomposed_layers() -> Iterator[tuple[str, Case, nn.Module, Choice]]:
    """Every format on one layer of each kind, at about half the largest rank; every option set on one of them."""
    for name in formats.names():
        fmt = formats.get(name)
        for number, case in enumerate(few()):
            options_of = fmt.variants(case.spec)
            for options in options_of if case.spec.padding_mode == "reflect" else options_of[:1]:
                if fmt.supports(case.spec, options) is not None:
                    continue
                rank = tuple(max(1, top // 2) for top in fmt.max_rank(case.spec, options))
                layer = dense(case.spec, random(case.spec.weight_shape, number).float())
                shown = ",".join(str(value) for _, value in options)
                yield f"{name}-{shown}-{case.id}", case, layer, Choice(name, rank, options, 8, 8)
