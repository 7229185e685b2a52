"""A feed gives the batches of one split; tensors and map-style data sets are fed by index."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autorank.errors import DataError
from autorank.pytrees import map_tensors, tensors
from autorank.tasks.batch import Batch, Device, Unpack, unpack_batch
from autorank.tasks.hashing import hash_arrays, hash_tensors
from autorank.tasks.labels import labels_of
from autorank.tasks.randomness import PrivateRandom, derive
from autorank.tasks.splits import Indices, split_indices


class Feed(ABC):
    """The batches of one split."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples, for which some data must be gone through once."""

    @property
    def known_size(self) -> int | None:
        """Number of examples, or None when it cannot be known without going through the data."""
        return len(self)

    def is_empty(self) -> bool:
        """Return whether there is no example."""
        return self.known_size == 0

    @property
    @abstractmethod
    def labels(self) -> NDArray[np.int64] | None:
        """Class of every example in order, or None when it cannot be known without going through the data."""

    @abstractmethod
    def train_batches(self, steps: int, batch_size: int, seed: int, device: Device = "cpu") -> Iterator[Batch]:
        """Yield `steps` batches, epoch after epoch without replacement: a function of `seed` alone."""

    @abstractmethod
    def batches(self, batch_size: int, device: Device = "cpu", limit: int | None = None) -> Iterator[Batch]:
        """Yield all examples (or the first `limit`) once, in a fixed order, without augmentation."""

    @abstractmethod
    def calibration_batches(self, examples: int, batch_size: int, device: Device = "cpu") -> Iterator[Batch]:
        """Yield a fixed random sample of `examples` examples without augmentation."""

    @abstractmethod
    def split(self, size: int | float, seed: int) -> tuple[Feed, Feed]:
        """Return two feeds without a common example: the training part and the validation part."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the data: its size, and hashes of labels and content where they can be had."""


class IndexedFeed(Feed):
    """A feed over data that can be asked for example i.

    Parameters
    ----------
    indices : array of int64
        The examples of the underlying data that belong to this feed, in order.
    """

    def __init__(self, indices: Indices) -> None:
        self.indices = indices

    @abstractmethod
    def load(self, groups: Sequence[Indices], seed: int, device: Device, *, augment: bool) -> Iterator[Batch]:
        """Yield one batch per group of indices into the underlying data."""

    @abstractmethod
    def all_labels(self) -> NDArray[np.int64] | None:
        """Return the labels of the underlying data."""

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class of every example in order."""
        labels = self.all_labels()
        return None if labels is None else np.asarray(labels)[self.indices]

    def __getstate__(self) -> dict[str, Any]:
        # A split of a large set is a bit per example in the pickle instead of eight bytes.
        if len(self.indices) and bool((np.diff(self.indices) > 0).all()):
            mask = np.zeros(int(self.indices[-1]) + 1, dtype=bool)
            mask[self.indices] = True
            return self.__dict__ | {"indices": None, "packed": np.packbits(mask)}
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        packed = state.pop("packed", None)
        self.__dict__.update(state)
        if packed is not None:
            self.indices = np.flatnonzero(np.unpackbits(packed)).astype(np.int64)

    def subset(self, places: Indices) -> Self:
        """Return a feed of the examples at `places` in this one."""
        part = copy.copy(self)
        part.indices = self.indices[places]
        return part

    def train_batches(self, steps: int, batch_size: int, seed: int, device: Device = "cpu") -> Iterator[Batch]:
        """Yield `steps` full batches; a remainder at the end of an epoch waits for the next permutation."""
        groups = [self.indices[places] for places in epochs(len(self), steps, batch_size, seed)]
        return self.load(groups, seed, device, augment=True)

    def batches(self, batch_size: int, device: Device = "cpu", limit: int | None = None) -> Iterator[Batch]:
        """Yield the examples in order."""
        return self.load(_chunks(self.indices[:limit], batch_size), 0, device, augment=False)

    def calibration_batches(self, examples: int, batch_size: int, device: Device = "cpu") -> Iterator[Batch]:
        """Yield a sample that is the same for everybody."""
        chosen = np.random.default_rng(derive(0xCA11B)).permutation(len(self))[:examples]
        return self.load(_chunks(self.indices[chosen], batch_size), 0, device, augment=False)

    def split(self, size: int | float, seed: int) -> tuple[Feed, Feed]:
        """Split, stratified when the labels are known."""
        train, validation = split_indices(len(self), self.labels, size, seed)
        return self.subset(train), self.subset(validation)

    def fingerprint(self) -> dict[str, Any]:
        """Return size and label hash; subclasses add what they know of the content."""
        found: dict[str, Any] = {"size": len(self), "indices": hash_arrays(self.indices)}
        if (labels := self.labels) is not None:
            found["labels"] = hash_arrays(labels)
        return found


class TensorFeed(IndexedFeed):
    """Tensors held in memory: ``(x1, ..., targets)``, all with the same leading dimension."""

    def __init__(self, values: tuple[Tensor, ...], indices: Indices | None = None) -> None:
        sizes = [len(value) if value.dim() else 0 for value in values]
        if len(values) < 2 or len(set(sizes)) != 1:
            raise DataError(f"tensors must be (x1, ..., targets) of one length, not of lengths {sizes}")
        self.values = tuple(value.detach().cpu() for value in values)
        super().__init__(np.arange(sizes[0], dtype=np.int64) if indices is None else indices)

    def all_labels(self) -> NDArray[np.int64] | None:
        """Return the last tensor when it holds one whole number per example."""
        return labels_of(self.values[-1])

    def load(self, groups: Sequence[Indices], seed: int, device: Device, *, augment: bool) -> Iterator[Batch]:
        """Yield slices of the tensors."""
        for group in groups:
            *inputs, targets = (value[torch.from_numpy(group)] for value in self.values)
            yield Batch(tuple(inputs), targets).to(device)

    def fingerprint(self) -> dict[str, Any]:
        """Return size, label hash and a hash of the tensors."""
        return super().fingerprint() | {"content": hash_tensors(*self.values)}


class DatasetFeed(IndexedFeed):
    """A map-style data set, collated as a DataLoader does it.

    Parameters
    ----------
    data : Dataset
        Sized, with ``data[i]``.
    unpack : callable, optional
        See `autorank.tasks.batch.unpack_batch`.
    workers : int
        Worker processes that fetch examples.
    """

    def __init__(self, data: Dataset[Any], unpack: Unpack | None = None, workers: int = 0) -> None:
        self.data, self.unpack, self.workers = data, unpack, workers
        super().__init__(np.arange(len(data), dtype=np.int64))  # type: ignore[arg-type]

    def all_labels(self) -> NDArray[np.int64] | None:
        """Return labels that the data set shows (``targets``, ``labels``, tensors), without fetching examples."""
        return labels_of(self.data)

    def load(self, groups: Sequence[Indices], seed: int, device: Device, *, augment: bool) -> Iterator[Batch]:
        """Yield collated examples; random transforms draw from generators that are seeded for this call."""
        loader: DataLoader[Any] = DataLoader(
            self.data,
            batch_sampler=[group.tolist() for group in groups],
            num_workers=min(self.workers, len(groups)),
            pin_memory=torch.device(device).type == "cuda",
        )
        for item in seeded(loader, derive(seed, 0xDA7A)):
            yield unpack_batch(item, self.unpack).to(device)

    def fingerprint(self) -> dict[str, Any]:
        """Return size, label hash and a hash of the first examples, spread over the data."""
        places = np.unique(np.linspace(0, len(self) - 1, min(len(self), 8)).astype(np.int64))
        batch = next(iter(self.load([self.indices[places]], 0, "cpu", augment=False)))
        return {"type": type(self.data).__name__, **super().fingerprint(), "sample": sample(batch)}


def sample(batch: Batch) -> str:
    """Return a hash of the inputs and targets of a batch."""
    return hash_tensors(*batch.inputs, *tensors(batch.targets))


def seeded(items: Iterable[Any], seed: int) -> Iterator[Any]:
    """Iterate over `items` with global random numbers that belong to this iteration alone."""
    own = PrivateRandom(seed)
    with own:
        iterator = iter(items)
    while True:
        with own:
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def epochs(count: int, steps: int, batch_size: int, seed: int) -> Iterator[Indices]:
    """Yield `steps` groups of places in ``range(count)``: a new permutation per epoch, full groups only."""
    size = min(batch_size, count)
    per_epoch = count // size
    order = np.empty(0, dtype=np.int64)
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = np.random.default_rng(derive(seed, epoch, 0xE90C)).permutation(count)
        yield order[place * size : (place + 1) * size]


def first_inputs(feed: Feed, examples: int = 2) -> tuple[Tensor, ...]:
    """Return the inputs of the first examples, as tensors of their own."""
    batch = next(iter(feed.batches(examples)))
    parts = (x[:examples] if x.dim() else x for x in batch.inputs)
    return tuple(map_tensors(x, lambda t: t.detach().clone().contiguous()) for x in parts)


def _chunks(indices: Indices, size: int) -> list[Indices]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]
