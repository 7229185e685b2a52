"""Makes tiny image data sets of every kind that autorank reads, from random or digits images."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def images(count: int, size: tuple[int, int] = (8, 8), channels: int = 3, seed: int = 0) -> np.ndarray:
    """Return random uint8 images (count, H, W, channels)."""
    return np.random.default_rng(seed).integers(0, 256, (count, *size, channels), dtype=np.uint8)


def digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first digits as uint8 images (count, 8, 8, 1) from 0 to 255, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images[:count, ..., None] * 15.9375).astype(np.uint8), data.target[:count].astype(np.int64)


def encode(image: np.ndarray, kind: str = "PNG") -> bytes:
    """Return the bytes of an image file."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(stream, kind)
    return stream.getvalue()


def write_parquet(
    path: Path,
    encoded: Sequence[bytes | None],
    labels: Sequence[Any],
    image_column: str = "img",
    label_column: str = "label",
    hub: bool = True,
    extra: dict[str, Sequence[Any]] | None = None,
) -> Path:
    """Write a file in the Hugging Face layout: struct of bytes and path, label, types in the metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            image_column: [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(encoded)],
            label_column: list(labels),
            **{name: list(values) for name, values in (extra or {}).items()},
        }
    )
    if hub:
        features = {image_column: {"_type": "Image"}, label_column: {"names": ["a", "b"], "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=7)
    return path


def write_parquet_set(
    root: Path, pixels: np.ndarray, labels: np.ndarray, test: int = 10, kind: str = "PNG"
) -> tuple[Path, Path]:
    """Write ``train-*.parquet`` in two files and ``test-*.parquet``; the last `test` images are the test split."""
    data = [encode(image, kind) for image in pixels]
    train = len(data) - test
    half = train // 2
    write_parquet(root / "train-00000-of-00002.parquet", data[:half], labels[:half].tolist())
    write_parquet(root / "train-00001-of-00002.parquet", data[half:train], labels[half:train].tolist())
    write_parquet(root / "test-00000-of-00001.parquet", data[train:], labels[train:].tolist())
    return root, root / "train-00000-of-00002.parquet"


def write_folder(root: Path, pixels: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Path:
    """Write one PNG per image into a directory per class."""
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        place = root / names[label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:04d}.png").write_bytes(encode(image))
    return root


def write_saved(root: Path, splits: dict[str, tuple[np.ndarray, np.ndarray]], classes: int = 10) -> Path:
    """Write a directory of ``save_to_disk`` with an image and a label column."""
    import datasets

    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "digit": datasets.ClassLabel(num_classes=classes),
            "note": datasets.Value("string"),
        }
    )
    made = {
        name: datasets.Dataset.from_dict(
            {
                "picture": [{"bytes": encode(image), "path": None} for image in pixels],
                "digit": labels.tolist(),
                "note": ["x"] * len(labels),
            },
            features=features,
        )
        for name, (pixels, labels) in splits.items()
    }
    datasets.DatasetDict(made).save_to_disk(str(root))
    return root
