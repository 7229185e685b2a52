"""Feeds over the user's own DataLoaders, and the choice of a feed for whatever the user gives."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, Subset

from autorank.errors import DataError
from autorank.tasks.batch import Batch, Device, Unpack, unpack_batch
from autorank.tasks.feeds import DatasetFeed, Feed, TensorFeed, sample, seeded
from autorank.tasks.hashing import hash_arrays
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
            known = self.known_size
            self._count = sum(len(batch) for batch in self._pass(0)) if known is None else known
        return self._count

    @property
    def known_size(self) -> int | None:
        """Number of examples; None for an iterable data set, which may have no end."""
        data, sampler = self.loader.dataset, cast(Any, self.loader.sampler)
        if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
            return None
        return len(sampler) if hasattr(sampler, "__len__") else len(data)

    def is_empty(self) -> bool:
        """Return whether there is no example; asks for one batch when the size is not known."""
        return self._first() is None if self.known_size is None else self.known_size == 0

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
        for batch in self._pass(0) if limit != 0 else ():
            yield batch.to(device)
            given += len(batch)
            if limit is not None and given >= limit:
                return

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
        """Return size, type, label hash and a hash of the first batch of a seeded pass."""
        size = self.known_size
        found: dict[str, Any] = {
            "type": type(self.loader.dataset).__name__,
            "size": "unknown" if size is None else size,
        }
        if (labels := self.labels) is not None:
            found["labels"] = hash_arrays(labels)
        if (batch := self._first()) is not None:
            found["sample"] = sample(batch)
        return found

    def _first(self) -> Batch | None:
        with closing(self._pass(0)) as batches:
            return next(batches, None)

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

    def _pass(self, seed: int) -> Generator[Batch]:
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
    if feed.is_empty():
        raise DataError(f"the {split} split is empty")
    return feed


def _kind(value: Any) -> str:
    return "a tensor alone" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
