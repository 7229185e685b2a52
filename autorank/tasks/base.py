"""A task: a trained model, its data, its loss, and the metric by which copies of it are judged."""

from __future__ import annotations

import copy
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from autorank.copying import model_copy
from autorank.errors import ConfigError, DataError, ModelError, describe
from autorank.memoryformat import runs_in_channels_last
from autorank.pytrees import map_tensors
from autorank.tasks.batch import Batch, Device, Unpack
from autorank.tasks.factories import extend_path
from autorank.tasks.feeds import Feed, first_inputs
from autorank.tasks.loaders import as_feed
from autorank.tasks.models import ModelLike, ModelSource, as_source
from autorank.tasks.weights import hash_weights
from autorank.types import Direction

DEFAULT_VALIDATION = 0.1
EVALUATION_BATCH = 256


class Task(ABC):
    """What a sweep needs to know of the user's problem. Use `ClassificationTask` or `CustomTask`.

    The test split is read by ``batches("test")`` and nowhere else.

    Parameters
    ----------
    model : Module, or function that returns one
        Copied; never changed.
    train : Dataset, DataLoader, or tuple of Tensor
        Items or batches are ``(x1, ..., target)``; tensors are ``(x1, ..., targets)``.
    validation : Dataset, DataLoader, tuple of Tensor, int, float or None
        A number or fraction is split off the training data, stratified by class where the labels are known; None is
        a tenth. When the training set augments its items, give a validation set of its own.
    test : Dataset, DataLoader, tuple of Tensor or None
    example_inputs : Tensor or tuple of Tensor, optional
        Inputs that the model runs on; taken from the data when not given.
    unpack : callable, optional
        ``unpack(batch) -> (inputs, targets)`` for batches of another form.
    seed : int
        Of the validation split.
    workers : int
        Processes that fetch items of a Dataset.
    name : str
        A short name for tables.
    evaluation_batch : int
        Examples per batch when the model is evaluated; a DataLoader keeps its own. Smaller ones need less memory.
    """

    name: str = "task"
    metric_name: str = "score"
    direction: Direction = "max"

    def __init__(
        self,
        model: ModelLike,
        train: Any,
        validation: Any = None,
        test: Any = None,
        *,
        example_inputs: Tensor | tuple[Tensor, ...] | None = None,
        unpack: Unpack | None = None,
        seed: int = 0,
        workers: int = 0,
        name: str | None = None,
        evaluation_batch: int = EVALUATION_BATCH,
    ) -> None:
        self.evaluation_batch = checked_batch(evaluation_batch)
        if type(seed) is not int or seed < 0:
            raise ConfigError(f"seed must be a whole number from 0, not {seed!r}")
        self.name = name or self.name
        self._paths: tuple[str, ...] = ()
        self._source: ModelSource = as_source(model)
        whole = as_feed(train, "train", unpack, workers)
        if validation is None or isinstance(validation, int | float):
            size = DEFAULT_VALIDATION if validation is None else validation
            training, held_out = whole.split(size, seed)
        else:
            training, held_out = whole, as_feed(validation, "validation", unpack, workers)
        self._feeds: dict[str, Feed] = {"train": training, "validation": held_out}
        if test is not None:
            self._feeds["test"] = as_feed(test, "test", unpack, workers)
        self._labelled = {split for split, feed in self._feeds.items() if feed.labels is not None}
        self._given_inputs = example_inputs is not None
        self.example_inputs = self._example(example_inputs)
        self._prints: dict[str, Any] = {}
        self._channels_last: bool | None = None
        self._check()

    def model(self) -> nn.Module:
        """Return a fresh copy of the trained model: eval mode, CPU, the caller's own."""
        return model_copy(self._source.template())

    @abstractmethod
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the scalar that training makes small."""

    @abstractmethod
    def metric(self, outputs: Any, targets: Any) -> Tensor:
        """Return the score of a batch, averaged over its examples."""

    @abstractmethod
    def distill(self, outputs: Any, teacher: Any, temperature: float) -> Tensor:
        """Return how far `outputs` are from those of the dense model, as a scalar."""

    def sampled_loss(self, outputs: Any, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return a scalar whose gradients at the outputs have the curvature of the loss as their covariance.

        They weigh the outputs of layers (``whiten: output``). Here it is the loss on the true targets, summed over the
        examples, so the covariance is the *empirical* Fisher information: it grows with the errors that the model still
        makes, and says nothing about examples whose loss is zero. A task that knows the distribution which its model
        predicts does better with targets drawn from it, as `ClassificationTask` does.

        Parameters
        ----------
        outputs : object
            Of the model, for `batch`.
        batch : Batch
        generator : torch.Generator
            On the CPU, for what is random.

        Returns
        -------
        Tensor, scalar
            The sum over examples. `loss` is taken as the mean over them.
        """
        return self.loss(outputs, batch.targets) * len(batch)

    def train_batches(self, steps: int, batch_size: int, seed: int, device: Device = "cpu") -> Iterator[Batch]:
        """Yield `steps` training batches that depend on `seed` alone; fewer steps give the same first ones.

        Parameters
        ----------
        steps, batch_size : int
            A DataLoader of the user's keeps its own batch size.
        seed : int
        device : device
            Where the batches are put, and images are augmented and normalised.
        """
        feed, where = self._feeds["train"], self._first_device("train", device)
        return self._checked("train", feed.train_batches(steps, batch_size, seed, where), device)

    def calibration_batches(self, examples: int, batch_size: int = 128, device: Device = "cpu") -> Iterator[Batch]:
        """Yield `examples` training examples, always the same ones, without augmentation."""
        feed, where = self._feeds["train"], self._first_device("train", device)
        return self._checked("train", feed.calibration_batches(examples, batch_size, where), device)

    def batches(
        self, split: str, batch_size: int | None = None, device: Device = "cpu", limit: int | None = None
    ) -> Iterator[Batch]:
        """Yield the examples of a split (or the first `limit`) in a fixed order.

        Parameters
        ----------
        split : {"validation", "test", "train"}
        batch_size : int, optional
            `evaluation_batch` when not given.
        device : device
        limit : int, optional

        Raises
        ------
        DataError
            If the task has no such split.
        """
        if split not in self._feeds:
            raise DataError(f"task {self.name} has no {split} split; it has {', '.join(self._feeds)}")
        feed, where = self._feeds[split], self._first_device(split, device)
        size = self.evaluation_batch if batch_size is None else batch_size
        return self._checked(split, feed.batches(size, where, limit), device)

    def size(self, split: str) -> int:
        """Return the number of examples of a split; 0 when there is none.

        An iterable loader is gone through once for it.

        Raises
        ------
        DataError
            For the training split when it is an iterable loader, which may have no end.
        """
        if split not in self._feeds:
            return 0
        if split == "train" and self._feeds[split].known_size is None:
            raise DataError(f"task {self.name}: the size of an iterable training loader is not known")
        return len(self._feeds[split])

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What identifies weights and data: sizes and hashes, as JSON values."""
        return {"task": self.name, **{part: self.fingerprint_of(part) for part in ("model", *self._feeds)}}

    def fingerprint_of(self, part: str) -> Any:
        """Return what identifies the weights (``"model"``) or one split; the other parts are not looked at."""
        if part not in self._prints:
            model = part == "model"
            self._prints[part] = hash_weights(self._source.template()) if model else self._feeds[part].fingerprint()
        return self._prints[part]

    def with_model(self, model: ModelLike) -> Self:
        """Return this task with another model; data, loss and metric stay."""
        other = copy.copy(self)
        other._source = as_source(model)
        other._prints = {part: found for part, found in self._prints.items() if part != "model"}
        other._channels_last = None
        if not self._given_inputs:
            other.example_inputs = other._example(None)
        other._check()
        return other

    def channels_last(self, device: Device = "cpu") -> bool:
        """Say whether the model is to run in channels last: on a CPU, where it is faster, if it runs so at all."""
        if torch.device(device).type != "cpu":
            return False
        if self._channels_last is None:
            self._channels_last = runs_in_channels_last(self.model(), self.example_inputs)
        return self._channels_last

    def run_example(self) -> Any:
        """Run the model on the example inputs and return its outputs.

        Raises
        ------
        ModelError
            If it does not run; the message names the shapes.
        """
        shapes = ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in self.example_inputs)
        try:
            with torch.no_grad():
                return self.model()(*self.example_inputs)
        except Exception as error:
            raise ModelError(f"the model does not run on its example inputs [{shapes}]: {describe(error)}") from error

    def _check(self) -> None:
        """Run the model once, so that what does not fit is said before anything else is done."""
        self.run_example()

    def _check_targets(self, targets: Any, split: str) -> None:  # noqa: B027 (a hook that few tasks need)
        """Raise DataError for targets that the loss cannot take."""

    def _first_device(self, split: str, device: Device) -> Device:
        # Unknown labels are looked at on the CPU first: on an accelerator a wrong one aborts the process.
        return device if split in self._labelled else "cpu"

    def _checked(self, split: str, batches: Iterator[Batch], device: Device) -> Iterator[Batch]:
        for batch in batches:
            if split not in self._labelled:
                self._check_targets(batch.targets, split)
            yield batch.to(device)

    def _example(self, given: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        if given is None:
            return first_inputs(self._feeds["train"])
        inputs = tuple(given) if isinstance(given, list | tuple) else (given,)
        if not inputs or not all(isinstance(x, Tensor) for x in inputs):
            raise ModelError("example_inputs must be a tensor or a tuple of tensors")
        return tuple(map_tensors(x, lambda t: t.detach().cpu().clone()) for x in inputs)

    def __copy__(self) -> Self:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = type(self).__new__(type(self))
        other.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        # The state is pickled inside the pickle: a worker must put the user's directories on its path before it can
        # import the classes that the state refers to.
        import cloudpickle  # type: ignore[import-untyped]

        from autorank.tasks import travel

        rest = {key: value for key, value in self.__dict__.items() if key != "_feeds"}
        return _restore, (self._paths, cloudpickle.dumps((type(self), rest)), travel.dumps(self._feeds))

    def __repr__(self) -> str:
        known = {split: feed.known_size for split, feed in self._feeds.items()}
        sizes = ", ".join(f"{split}: {'unknown' if size is None else size}" for split, size in known.items())
        return f"{type(self).__name__}({self.name}, {self.metric_name} {self.direction}; {sizes})"


def checked_batch(value: Any) -> int:
    """Return a size for evaluation batches; ConfigError when it is none."""
    if type(value) is not int or value < 1:
        raise ConfigError(f"evaluation_batch must be a whole number from 1, not {value!r}")
    return value


def _restore(paths: tuple[str, ...], payload: bytes, feeds: bytes) -> Task:
    for path in paths:
        extend_path(path)
    kind, state = pickle.loads(payload)  # bytes of the very pickle that this call is part of
    task: Task = kind.__new__(kind)
    task.__dict__.update(state, _feeds=pickle.loads(feeds))
    return task
