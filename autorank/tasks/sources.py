"""Data by name: which source reads it, and which splits it has.

========================  ==================================================================================
name                      reads
========================  ==================================================================================
``digits``                scikit-learn's embedded digits
``hf:name``               the Hugging Face hub, a directory written by ``save_to_disk``, or a local data set
``parquet:path``          parquet files in the Hugging Face layout (image bytes and a label)
``imagefolder:path``      a directory per class
``python:module:name``    a function that returns ``{"train": ..., "test": ...}`` or a Task
========================  ==================================================================================

``data_args`` of image sets are the fields of `autorank.tasks.options.ImageOptions` (``digits`` takes ``mean``, ``std``
and ``augment``) and ``evaluation_batch``; ``train``, ``validation`` and ``test`` name the splits (a split of ``hf:``, a
file pattern of ``parquet:``, a directory of ``imagefolder:``; null leaves one out); ``image_column`` and
``label_column`` name columns; ``hf:`` also takes ``config`` and ``revision``. The ``data_args`` of ``python:`` are the
function's own arguments; what it returns may hold ``loss``, ``metric``, ``metric_name``, ``direction``, ``distill``,
``unpack``, ``example_inputs``, ``workers`` and ``evaluation_batch`` beside the splits, and is a `CustomTask` when it
holds a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autorank.errors import ConfigError, DataError
from autorank.tasks.base import Task, checked_batch
from autorank.tasks.classification import ClassificationTask
from autorank.tasks.custom import CustomTask
from autorank.tasks.digits import WHITE, Digits
from autorank.tasks.encoded import EncodedImages, open_images
from autorank.tasks.factories import call, resolve
from autorank.tasks.hub import HUB_KEYS, open_hub
from autorank.tasks.imagefolder import open_imagefolder
from autorank.tasks.images import ImageFeed
from autorank.tasks.memory import ImageArrays
from autorank.tasks.models import NamedModel
from autorank.tasks.naming import SPLIT_KEYS
from autorank.tasks.options import IMAGE_KEYS, PIPELINE_KEYS, ImageOptions, check_keys
from autorank.tasks.parquet import COLUMN_KEYS, open_parquet

SPLITS = ("train", "validation", "test")
EVALUATION_KEYS = ("evaluation_batch",)
CUSTOM_KEYS = ("metric", "metric_name", "direction", "distill")  # mean something only beside a loss
TASK_KEYS = ("loss", *CUSTOM_KEYS, "unpack", "example_inputs", "workers", *EVALUATION_KEYS)


@dataclass(frozen=True)
class OpenedData:
    """The splits of a source, and what else it says about the task."""

    name: str
    splits: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    whole: Task | None = None

    def task(self, model: NamedModel, validation: int | float, seed: int) -> Task:
        """Return the task of this data with `model`."""
        if self.whole is not None:
            return self.whole.with_model(model)
        kind: Any = CustomTask if "loss" in self.extras else ClassificationTask
        return kind(
            model,
            self.splits["train"],
            self.splits.get("validation", validation),
            self.splits.get("test"),
            seed=seed,
            name=self.name,
            **self.extras,
        )


def open_data(name: str, args: dict[str, Any], cache_dir: Path | None) -> OpenedData:
    """Open the data source called `name`.

    Raises
    ------
    ConfigError
        If there is no such kind of source, or an option is wrong.
    DataError
        If the data cannot be read.
    """
    scheme, colon, rest = name.partition(":")
    if name == "digits":
        return _digits(args, cache_dir)
    if colon and rest and scheme in SOURCES:
        return SOURCES[scheme](rest, args, cache_dir)
    raise ConfigError(
        f"data {name!r} must be digits, hf:name, parquet:path, imagefolder:path or python:package.module:function"
    )


def _digits(args: dict[str, Any], cache_dir: Path | None) -> OpenedData:
    check_keys(args, PIPELINE_KEYS + EVALUATION_KEYS, "digits")
    pipeline = _options(args).pipeline(1, WHITE)
    splits = {split: ImageFeed(ImageArrays(Digits(split), cache_dir), pipeline) for split in ("train", "test")}
    return OpenedData("digits", splits, _extras(args))


def _parquet(rest: str, args: dict[str, Any], cache_dir: Path | None) -> OpenedData:
    check_keys(args, IMAGE_KEYS + SPLIT_KEYS + COLUMN_KEYS + EVALUATION_KEYS, "parquet")
    return _images(rest, open_parquet(rest, args, cache_dir), args, cache_dir)


def _imagefolder(rest: str, args: dict[str, Any], cache_dir: Path | None) -> OpenedData:
    check_keys(args, IMAGE_KEYS + SPLIT_KEYS + EVALUATION_KEYS, "imagefolder")
    return _images(rest, open_imagefolder(rest, args), args, cache_dir)


def _hub(rest: str, args: dict[str, Any], cache_dir: Path | None) -> OpenedData:
    check_keys(args, IMAGE_KEYS + SPLIT_KEYS + COLUMN_KEYS + HUB_KEYS + EVALUATION_KEYS, "hf")
    return _images(rest, open_hub(rest, args), args, cache_dir)


def _images(rest: str, splits: Mapping[str, EncodedImages], args: dict[str, Any], cache_dir: Path | None) -> OpenedData:
    name = Path(rest.split(",")[0]).name or rest
    return OpenedData(name, open_images(splits, _options(args), cache_dir), _extras(args))


def _options(args: Mapping[str, Any]) -> ImageOptions:
    return ImageOptions.read({key: value for key, value in args.items() if key in IMAGE_KEYS})


def _extras(args: Mapping[str, Any]) -> dict[str, Any]:
    return {key: checked_batch(args[key]) for key in EVALUATION_KEYS if args.get(key) is not None}


def _python(rest: str, args: dict[str, Any], cache_dir: Path | None) -> OpenedData:
    name = f"python:{rest}"
    made = call(name, resolve(rest, DataError), args, DataError)
    if isinstance(made, Task):
        return OpenedData(made.name, whole=made)
    if not isinstance(made, Mapping) or "train" not in made:
        what = (
            f"a mapping with {', '.join(map(repr, made))}" if isinstance(made, Mapping) else f"a {type(made).__name__}"
        )
        raise DataError(f'{name} must return {{"train": ..., "test": ...}} or a Task, not {what}')
    unknown = [key for key in made if key not in SPLITS + TASK_KEYS]
    if unknown:
        raise DataError(f"{name} returned an unknown key {unknown[0]!r}; allowed: {', '.join(SPLITS + TASK_KEYS)}")
    if made.get("loss") is None and (custom := [key for key in CUSTOM_KEYS if made.get(key) is not None]):
        raise DataError(f"{name} returned {custom[0]!r} without a loss: {custom[0]} needs loss beside it")
    splits = {key: made[key] for key in SPLITS if made.get(key) is not None}
    return OpenedData(
        rest.rpartition(":")[2], splits, {key: made[key] for key in TASK_KEYS if made.get(key) is not None}
    )


Source = Callable[[str, dict[str, Any], Path | None], OpenedData]
SOURCES: dict[str, Source] = {
    "hf": _hub,
    "parquet": _parquet,
    "imagefolder": _imagefolder,
    "python": _python,
}
