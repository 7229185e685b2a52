"""Feeds over the user's own DataLoaders, and the choice of a feed for whatever the user gives."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, Subset

from autorank.errors import DataError
from autorank.tasks.batch import Batch, Device, Unpack, unpack_batch
from autorank.tasks.feeds import DatasetFeed, Feed, TensorFeed, seeded
from autorank.tasks.labels import labels_of
from autorank.tasks.randomness import derive
from autorank.tasks.splits import split_indices


class LoaderFeed(Feed):
    """A DataLoader of the user's, iterated as it is: its batch size, its sampler, its workers.

    Its generators are seeded for each pass and given back as they were.
    """

    def __init__(self, loader: DataLoader[Any], unpack: Unpack | None = None) -> None:
        self.loader, self.unpack = loader, unpack
        self._count: int | None = None

    def __len__(self) -> int:
        if self._count is None:
            data = self.loader.dataset
            if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
                self._count = sum(len(batch) for batch in self._pass(0))
            else:
                sampler: Any = self.loader.sampler
                self._count = len(sampler) if hasattr(sampler, "__len__") else len(data)
        return self._count

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Classes of the loader's data set, when it shows them and the loader goes through all of it."""
        plain = isinstance(self.loader.sampler, RandomSampler | SequentialSampler)
        return labels_of(self.loader.dataset) if plain else None

    def train_batches(self, steps: int, batch_size: int, seed: int, device: Device = "cpu") -> Iterator[Batch]:
        """Yield `steps` batches of the loader, epoch after epoch; `batch_size` is the loader's own."""
        done = epoch = 0
        while done < steps:
            before, largest = done, 0
            for batch in self._pass(derive(seed, epoch, 0x10AD)):
                # A single left-over example has no variance: batch normalisation cannot train on it.
                if done == steps or (len(batch) == 1 and largest > 1):
                    break
                largest, done = max(largest, len(batch)), done + 1
                yield batch.to(device)
            if done == before:
                raise DataError("the training loader gives no batches")
            epoch += 1

    def batches(self, batch_size: int, device: Device = "cpu", limit: int | None = None) -> Iterator[Batch]:
        """Yield the loader's batches in a fixed order, whole ones, until `limit` examples have been given."""
        given = 0
        for batch in self._pass(0):
            if limit is not None and given >= limit:
                return
            given += len(batch)
            yield batch.to(device)

    def calibration_batches(self, examples: int, batch_size: int, device: Device = "cpu") -> Iterator[Batch]:
        """Yield the first batches of one pass."""
        return self.batches(batch_size, device, examples)

    def split(self, size: int | float, seed: int) -> tuple[Feed, Feed]:
        """Split the loader's data set and rebuild the loader over both parts."""
        loader, data = self.loader, self.loader.dataset
        plain = isinstance(loader.sampler, RandomSampler | SequentialSampler) and loader.batch_size is not None
        if isinstance(data, IterableDataset) or not hasattr(data, "__len__") or not plain:
            raise DataError(
                "validation data cannot be split off a training loader with an iterable data set or a sampler of its "
                "own: pass validation="
            )
        train, validation = split_indices(len(data), self.labels, size, seed)
        return self._over(Subset(data, train.tolist()), True), self._over(Subset(data, validation.tolist()), False)

    def fingerprint(self) -> dict[str, Any]:
        """Return size, label hash and the type of the data set."""
        found: dict[str, Any] = {"size": len(self), "type": type(self.loader.dataset).__name__}
        if (labels := self.labels) is not None:
            found["labels"] = hashlib.sha256(labels.tobytes()).hexdigest()[:32]
        return found

    def _over(self, data: Dataset[Any], training: bool) -> LoaderFeed:
        old = self.loader
        loader: DataLoader[Any] = DataLoader(
            data,
            batch_size=old.batch_size,
            shuffle=training and isinstance(old.sampler, RandomSampler),
            num_workers=old.num_workers,
            collate_fn=old.collate_fn,
            pin_memory=old.pin_memory,
            drop_last=training and old.drop_last,
            worker_init_fn=old.worker_init_fn,
        )
        return LoaderFeed(loader, self.unpack)

    def _pass(self, seed: int) -> Iterator[Batch]:
        own = {g for g in (self.loader.generator, getattr(self.loader.sampler, "generator", None)) if g is not None}
        saved = [(generator, generator.get_state()) for generator in own]
        try:
            for generator in own:
                generator.manual_seed(seed)
            for item in seeded(self.loader, seed):
                yield unpack_batch(item, self.unpack)
        finally:
            for generator, state in saved:
                generator.set_state(state)


def as_feed(data: Any, split: str, unpack: Unpack | None = None, workers: int = 0) -> Feed:
    """Return a feed for what the user gave as one split.

    Parameters
    ----------
    data : Feed, DataLoader, Dataset, or tuple of Tensor
        Tensors are ``(x1, ..., targets)``.
    split : str
        Named in errors.
    unpack : callable, optional
        ``unpack(batch) -> (inputs, targets)``.
    workers : int
        Worker processes for a data set.
    """
    if isinstance(data, Feed):
        feed = data
    elif isinstance(data, DataLoader):
        feed = LoaderFeed(data, unpack)
    elif isinstance(data, list | tuple) and data and all(isinstance(value, Tensor) for value in data):
        feed = TensorFeed(tuple(data))
    elif isinstance(data, IterableDataset):
        raise DataError(f"{split}: an iterable data set needs a DataLoader around it, which says the batch size")
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, str | bytes | dict):
        feed = DatasetFeed(data, unpack, workers)
    else:
        raise DataError(
            f"{split} must be a Dataset, a DataLoader or a tuple of tensors (x1, ..., targets), not {_kind(data)}"
        )
    if len(feed) == 0:
        raise DataError(f"the {split} split is empty")
    return feed


def _kind(value: Any) -> str:
    return "a tensor alone" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
