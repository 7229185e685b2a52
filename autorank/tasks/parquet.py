"""``parquet:``: image sets in parquet files, as the Hugging Face hub lays them out."""

from __future__ import annotations

import bisect
import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autorank.errors import ConfigError, DataError, describe
from autorank.tasks.elsewhere import here
from autorank.tasks.encoded import EncodedImages
from autorank.tasks.memory import default_cache
from autorank.tasks.naming import LABEL_NAMES, SPLIT_KEYS, choose_column, encode_labels, split_of

HASH_LIMIT = 1 << 28  # files up to this size in all are identified by content, larger ones by size and time
COLUMN_KEYS = ("image_column", "label_column")


class ParquetImages(EncodedImages):
    """One split: some parquet files, one after the other.

    Parameters
    ----------
    files : tuple of Path
    image_column, label_column : str
    split : str
    classes : tuple of str or None
        Class names, when labels are text.
    cache_dir : Path
        Where a copy for random access goes, if one is needed.
    """

    def __init__(
        self,
        files: tuple[Path, ...],
        image_column: str,
        label_column: str,
        split: str,
        classes: tuple[str, ...] | None,
        cache_dir: Path,
    ) -> None:
        self.files, self.split, self.cache_dir = files, split, cache_dir
        self.image_column, self.label_column = image_column, label_column
        self.classes, self.starts = classes, [0]
        self._labels: NDArray[np.int64] | None = self._read_labels()
        self._identity = {"parquet": _content(files), "columns": [image_column, label_column]}
        self._table: Any = None

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of every image."""
        if self._labels is None:
            self._labels = self._read_labels()
        return self._labels

    def _read_labels(self) -> NDArray[np.int64]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        values: list[Any] = []
        self.starts = [0]
        for file in self.files:
            try:
                column = pq.ParquetFile(file).read(columns=[self.label_column]).column(0)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{file} cannot be read as parquet: {describe(error)}") from error
            values += column.to_pylist()
            self.starts.append(len(values))
        labels, self.classes = encode_labels(values, self.classes, self.split, _named(self.files))
        return labels

    def identity(self) -> dict[str, Any]:
        """Return a hash of the files, or their names, sizes and times."""
        return self._identity

    def chunks(self, size: int) -> Iterator[list[bytes]]:
        """Yield the images in order, without reading more than a batch of rows at a time."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        for file, start in zip(self.files, self.starts, strict=False):
            try:
                for batch in pq.ParquetFile(file).iter_batches(size, columns=[self.image_column]):
                    items = batch.column(0).to_pylist()
                    yield [self._bytes(item, start + i) for i, item in enumerate(items)]
                    start += len(items)
            except pa.ArrowException as error:
                raise DataError(f"{file} is damaged: {describe(error)}") from error

    def prepare(self) -> None:
        """Copy the images into an Arrow file that can be mapped into memory: parquet itself has no random access."""
        import pyarrow as pa

        key = hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()[:32]
        target = here(self.cache_dir / "arrow" / f"{key}.arrow")
        try:
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                handle, part = tempfile.mkstemp(dir=target.parent)
                os.close(handle)
                schema = pa.schema([("image", pa.large_binary())])
                with pa.OSFile(part, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                    for chunk in self.chunks(256):
                        writer.write_batch(pa.record_batch([pa.array(chunk, pa.large_binary())], schema=schema))
                os.replace(part, target)
            self._table = pa.ipc.open_file(pa.memory_map(str(target))).read_all().column(0)
        except OSError as error:
            raise DataError(f"the image cache {target.parent} cannot be used: {describe(error)}") from error

    def read(self, index: int) -> bytes:
        """Return one encoded image."""
        if self._table is None:
            self.prepare()
        data: bytes = self._table[int(index)].as_py()
        return data

    def where(self, index: int) -> str:
        """Return file and row."""
        place = bisect.bisect_right(self.starts, index) - 1
        return f"{self.files[place]}, row {index - self.starts[place]}, column {self.image_column}"

    def _bytes(self, item: Any, index: int) -> bytes:
        data = item.get("bytes") if isinstance(item, dict) else item
        if not isinstance(data, bytes):
            raise DataError(f"{self.where(index)} holds no image bytes")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_table": None, "_labels": None}


def open_parquet(path: str, args: Mapping[str, Any], cache_dir: Path | None) -> dict[str, EncodedImages]:
    """Return the splits of a directory, file, glob pattern, or several of them separated by commas."""
    files = _split_files(path, args)
    if "train" not in files:
        names = ", ".join(sorted(file.name for group in files.values() for file in group)[:5])
        raise DataError(f"parquet:{path} has no file for training (train*.parquet), only {names}; name it with train=")
    image, label = _columns(files["train"][0], args)
    splits: dict[str, EncodedImages] = {}
    classes: tuple[str, ...] | None = None
    for split in SPLIT_KEYS:
        if split in files:
            source = ParquetImages(files[split], image, label, split, classes, cache_dir or default_cache())
            classes = source.classes if split == "train" else classes
            splits[split] = source
    return splits


def _split_files(path: str, args: Mapping[str, Any]) -> dict[str, tuple[Path, ...]]:
    found: list[Path] = []
    root: Path | None = None
    for part in path.split(","):
        place = Path(part).expanduser()
        if place.is_dir():
            root = root or place
            found += sorted(place.rglob("*.parquet"))
        elif place.is_file():
            found.append(place)
        else:
            matches = sorted(Path(match) for match in glob.glob(str(place)))
            if not matches:
                raise DataError(f"parquet:{part} does not exist (a directory, a file or a pattern that matches some)")
            found += matches
    if not found:
        raise DataError(f"parquet:{path} has no .parquet files")
    files: dict[str, tuple[Path, ...]] = {}
    for split in SPLIT_KEYS:
        if split not in args:
            continue
        pattern = args[split]
        if pattern is None or pattern == "none":
            continue
        base = root or Path()
        chosen = tuple(sorted(Path(match) for match in glob.glob(str(base / str(pattern)))))
        if not chosen:
            raise ConfigError(f"data_args: {split}={pattern!r} matches no file in {base}")
        files[split] = chosen
    taken = {file for group in files.values() for file in group}
    rest = [file for file in found if file not in taken]
    for split in SPLIT_KEYS:
        mine = tuple(file for file in rest if (split_of(file.stem) or split_of(file.parent.name)) == split)
        if mine and split not in args:
            files[split] = mine
    if not files and len(found) == 1:
        files["train"] = (found[0],)
    return files or {"": tuple(found)}


def _columns(file: Path, args: Mapping[str, Any]) -> tuple[str, str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as parquet: {describe(error)}") from error
    kinds = _hub_types(schema.metadata)
    images = [f.name for f in schema if kinds.get(f.name) == "Image" or _holds_bytes(f.type)]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel" and name in schema.names]
    if not labels:
        labels = [f.name for f in schema if pa.types.is_integer(f.type) or pa.types.is_string(f.type)]
    image = choose_column("image", args.get("image_column"), schema.names, images, ("image", "img"), str(file))
    label = choose_column("label", args.get("label_column"), schema.names, labels, LABEL_NAMES, str(file))
    return image, label


def _hub_types(metadata: Mapping[bytes, bytes] | None) -> dict[str, str]:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: str(kind.get("_type", "")) for name, kind in features.items()}
    except (KeyError, ValueError, AttributeError, TypeError):
        return {}


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _content(files: tuple[Path, ...]) -> list[list[Any]]:
    if sum(file.stat().st_size for file in files) > HASH_LIMIT:
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    found: list[list[Any]] = []
    for file in files:
        with file.open("rb") as stream:
            found.append([file.name, hashlib.file_digest(stream, "sha256").hexdigest()])
    return found


def _named(files: tuple[Path, ...]) -> str:
    return str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
