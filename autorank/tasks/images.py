"""Feed of images: from a memory-mapped array that all workers share, or streamed through worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from autorank.tasks.augment import ImagePipeline
from autorank.tasks.batch import Batch, Device
from autorank.tasks.feeds import IndexedFeed, seeded
from autorank.tasks.randomness import derive
from autorank.tasks.splits import Indices


class ImageData(Protocol):
    """Images as uint8 arrays with class labels."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of every image."""

    def identity(self) -> dict[str, Any]:
        """Return what identifies the content, as JSON values."""

    def batches(self, groups: Sequence[Indices], workers: int, pin: bool) -> Iterator[Tensor]:
        """Yield uint8 images (N, C, H, W), one batch per group of indices."""


class ImageFeed(IndexedFeed):
    """Images with class labels.

    Parameters
    ----------
    data : ImageData
    pipeline : ImagePipeline
        Normalisation and augmentation, done on the device.
    workers : int
        Worker processes, when the data are streamed.
    """

    def __init__(self, data: ImageData, pipeline: ImagePipeline, workers: int = 0) -> None:
        self.data, self.pipeline, self.workers = data, pipeline, workers
        super().__init__(np.arange(len(data.labels), dtype=np.int64))

    def all_labels(self) -> NDArray[np.int64]:
        """Return the labels of all images."""
        return self.data.labels

    def load(self, groups: Sequence[Indices], seed: int, device: Device, *, augment: bool) -> Iterator[Batch]:
        """Yield normalised batches; the augmentation of step i depends on (seed, i) alone."""
        labels, pin = self.data.labels, torch.device(device).type == "cuda"
        for step, images in enumerate(self.data.batches(groups, self.workers, pin)):
            generator = torch.Generator().manual_seed(derive(seed, step, 0xA06)) if augment else None
            inputs = self.pipeline(images.to(device, non_blocking=True), generator)
            targets = torch.from_numpy(np.asarray(labels[groups[step]], dtype=np.int64)).to(device, non_blocking=True)
            yield Batch((inputs,), targets)

    def fingerprint(self) -> dict[str, Any]:
        """Return size, label hash, and the identity of the images and of their normalisation."""
        norm = {"mean": list(self.pipeline.mean), "std": list(self.pipeline.std), "augment": self.pipeline.augment}
        return super().fingerprint() | {"content": self.data.identity(), **norm}


def stream(data: Any, groups: Sequence[Indices], workers: int, pin: bool) -> Iterator[Tensor]:
    """Yield uint8 batches of a map-style data set of uint8 images, fetched by worker processes."""
    loader: DataLoader[Tensor] = DataLoader(
        data,
        batch_sampler=[group.tolist() for group in groups],
        num_workers=min(workers, len(groups)),
        pin_memory=pin,
    )
    return seeded(loader, 0)
