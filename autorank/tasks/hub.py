"""``hf:``: data sets of the Hugging Face hub, directories of ``save_to_disk``, local data set directories."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autorank.errors import DataError, MissingExtraError, describe
from autorank.tasks.encoded import EncodedImages
from autorank.tasks.naming import LABEL_NAMES, choose_column, choose_splits, encode_labels

HUB_KEYS = ("config", "revision")


class HubImages(EncodedImages):
    """One split of a data set of the ``datasets`` library, memory-mapped by it.

    Parameters
    ----------
    name : str
    options : mapping
        ``config`` and ``revision``.
    split : str
        Its name in the data set.
    data : datasets.Dataset
    image_column, label_column : str
    classes : tuple of str or None
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        split: str,
        data: Any,
        image_column: str,
        label_column: str,
        classes: tuple[str, ...] | None,
    ) -> None:
        self.name, self.options, self.split = name, dict(options), split
        self.image_column, self.label_column = image_column, label_column
        self.classes = classes
        self._labels: NDArray[np.int64] | None = self._read_labels(data)
        self._fingerprint = str(data._fingerprint)
        self._data: Any = self._encoded(data)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of every image."""
        if self._labels is None:
            self._labels = self._read_labels(_load(self.name, self.options)[self.split])
        return self._labels

    def _read_labels(self, data: Any) -> NDArray[np.int64]:
        values = list(data.with_format(None)[self.label_column])
        labels, self.classes = encode_labels(values, self.classes, self.split, f"hf:{self.name}")
        return labels

    def identity(self) -> dict[str, Any]:
        """Return the fingerprint that the library keeps of the data."""
        return {"hf": self._fingerprint, "columns": [self.image_column, self.label_column], "size": len(self)}

    def chunks(self, size: int) -> Iterator[list[bytes]]:
        """Yield the images in order."""
        for start in range(0, len(self), size):
            items = self._opened()[start : start + size][self.image_column]
            yield [self._bytes(item, start + i) for i, item in enumerate(items)]

    def read(self, index: int) -> bytes:
        """Return one encoded image."""
        return self._bytes(self._opened()[int(index)][self.image_column], int(index))

    def where(self, index: int) -> str:
        """Return split and row."""
        return f"hf:{self.name}, split {self.split}, row {index}, column {self.image_column}"

    def _opened(self) -> Any:
        if self._data is None:
            self._data = self._encoded(_load(self.name, self.options)[self.split])
        return self._data

    def _encoded(self, data: Any) -> Any:
        from datasets import Image

        columns = data.select_columns([self.image_column]).with_format(None)
        return columns.cast_column(self.image_column, Image(decode=False))

    def _bytes(self, item: Any, index: int) -> bytes:
        data = item.get("bytes") if item else None
        if data is None and item and item.get("path"):
            try:
                data = Path(item["path"]).read_bytes()
            except OSError as error:
                raise DataError(f"{self.where(index)}: {describe(error)}") from error
        if not isinstance(data, bytes):
            raise DataError(f"{self.where(index)} holds no image bytes")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_data": None, "_labels": None}


def open_hub(name: str, args: Mapping[str, Any]) -> dict[str, EncodedImages]:
    """Return the splits of a data set."""
    options = {key: args[key] for key in HUB_KEYS if args.get(key) is not None}
    found = _load(name, options)
    chosen = choose_splits(list(found), args, f"hf:{name}")
    image, label = _columns(found[chosen["train"]], args, f"hf:{name}")
    splits: dict[str, EncodedImages] = {}
    classes: tuple[str, ...] | None = None
    for split in ("train", "validation", "test"):
        if split in chosen:
            source = HubImages(name, options, chosen[split], found[chosen[split]], image, label, classes)
            classes = source.classes if split == "train" else classes
            splits[split] = source
    return splits


def _load(name: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("hf: data needs autorank's extra 'hub': pip install datasets") from error
    place = Path(name).expanduser()
    saved = any((place / note).is_file() for note in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            loaded: Any = datasets.load_from_disk(str(place))
        else:
            target = str(place) if place.is_dir() else name
            loaded = datasets.load_dataset(target, options.get("config"), revision=options.get("revision"))
    except Exception as error:
        lines = describe(error).strip().split("\n")
        raise DataError(f"hf:{name} cannot be loaded: {lines[0][:300]}") from error
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


def _columns(data: Any, args: Mapping[str, Any], where: str) -> tuple[str, str]:
    from datasets import ClassLabel, Image, Value

    features: Mapping[str, Any] = data.features
    images = [name for name, kind in features.items() if isinstance(kind, Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    if not labels:
        labels = [
            name
            for name, kind in features.items()
            if isinstance(kind, Value) and kind.dtype.startswith(("int", "uint", "string", "large_string"))
        ]
    image = choose_column("image", args.get("image_column"), list(features), images, ("image", "img"), where)
    label = choose_column("label", args.get("label_column"), list(features), labels, LABEL_NAMES, where)
    return image, label
