"""Image sets as files store them: encoded images with labels. They become feeds, decoded in memory or streamed."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autorank.errors import DataError, describe
from autorank.tasks.decode import Decoder, SizesDifferError, look
from autorank.tasks.images import ImageFeed, stream
from autorank.tasks.memory import ImageArrays, default_cache
from autorank.tasks.options import ImageOptions
from autorank.tasks.splits import Indices

DEFAULT_SIZE = 224
CHUNK = 1024
BLOCK = 64  # images that a thread decodes in one go


class EncodedImages(ABC):
    """One split of an image set on disk. Only what is needed to open it again is pickled."""

    @property
    @abstractmethod
    def labels(self) -> NDArray[np.int64]:
        """Class of every image."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what identifies the content, as JSON values."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return one encoded image."""

    @abstractmethod
    def where(self, index: int) -> str:
        """Return file and row of an image, for errors."""

    def chunks(self, size: int) -> Iterator[list[bytes]]:
        """Yield all encoded images in order, some at a time."""
        for start in range(0, len(self), size):
            yield [self.read(index) for index in range(start, min(start + size, len(self)))]

    def prepare(self) -> None:  # noqa: B027
        """Make random access quick, before worker processes use it."""

    def __len__(self) -> int:
        return len(self.labels)


def decode(source: EncodedImages, decoder: Decoder, index: int, data: bytes) -> NDArray[np.uint8]:
    """Decode image `index`; DataError names it when it cannot be read."""
    try:
        return decoder(data)
    except SizesDifferError:
        raise
    except Exception as error:
        raise DataError(f"{source.where(index)} is not a readable image: {describe(error)}") from error


@dataclass(frozen=True)
class Decoding:
    """Recipe for the arrays of an encoded image set; see `autorank.tasks.memory.Recipe`."""

    source: EncodedImages
    decoder: Decoder

    def identity(self) -> dict[str, Any]:
        """Return what the arrays depend on."""
        return self.source.identity() | self.decoder.identity()

    def write(self, directory: Path) -> None:
        """Decode everything, in threads, into ``images.npy``; labels go into ``labels.npy``."""
        shape = (len(self.source), self.decoder.channels, self.decoder.height, self.decoder.width)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        threads = min(os.cpu_count() or 1, 16)
        # Written as a stream: a full disk is then an error, where a memory map would kill the process.
        with (directory / "images.npy").open("wb") as file, ThreadPoolExecutor(threads) as pool:
            np.lib.format.write_array_header_1_0(file, header)
            start = 0
            for chunk in self.source.chunks(CHUNK):
                blocks = [(start + i, chunk[i : i + BLOCK]) for i in range(0, len(chunk), BLOCK)]
                for block in pool.map(self._block, blocks):
                    file.write(block.data)
                start += len(chunk)
        np.save(directory / "labels.npy", self.source.labels, allow_pickle=False)

    def _block(self, block: tuple[int, list[bytes]]) -> NDArray[np.uint8]:
        start, items = block
        images = [decode(self.source, self.decoder, start + i, item) for i, item in enumerate(items)]
        return np.ascontiguousarray(np.stack(images))


@dataclass(frozen=True)
class StreamedImages:
    """Images decoded by worker processes each time they are needed."""

    source: EncodedImages
    decoder: Decoder

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of every image."""
        return self.source.labels

    def identity(self) -> dict[str, Any]:
        """Return what the images depend on."""
        return self.source.identity() | self.decoder.identity()

    def batches(self, groups: Sequence[Indices], workers: int, pin: bool) -> Iterator[Tensor]:
        """Yield one uint8 batch per group."""
        self.source.prepare()
        return stream(self, groups, workers, pin)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(decode(self.source, self.decoder, index, self.source.read(index)).copy())


def open_images(
    splits: Mapping[str, EncodedImages], options: ImageOptions, cache_dir: Path | None
) -> dict[str, ImageFeed]:
    """Return feeds for the splits of an image set; size and channels are those of the training split.

    Raises
    ------
    DataError
        If an image cannot be read.
    """
    for split, source in splits.items():
        if len(source) == 0:
            raise DataError(f"the {split} split has no images")
    decoder = _decoder(splits["train"], options)
    if decoder.strict and (_differs(splits["train"], decoder, cache_dir)).exists():
        decoder = _default(decoder)
    try:
        return {name: _feed(source, _for(name, decoder), options, cache_dir) for name, source in splits.items()}
    except SizesDifferError:
        _differs(splits["train"], decoder, cache_dir).touch()
        decoder = _default(decoder)
        return {name: _feed(source, decoder, options, cache_dir) for name, source in splits.items()}


def _feed(source: EncodedImages, decoder: Decoder, options: ImageOptions, cache_dir: Path | None) -> ImageFeed:
    size = len(source) * decoder.channels * decoder.height * decoder.width
    streaming = options.streaming if options.streaming is not None else size > options.memory_gb * 1e9
    pipeline = options.pipeline(decoder.channels)
    if streaming:
        return ImageFeed(StreamedImages(source, replace(decoder, strict=False)), pipeline, options.workers)
    return ImageFeed(ImageArrays(Decoding(source, decoder), cache_dir), pipeline)


def _decoder(train: EncodedImages, options: ImageOptions) -> Decoder:
    seen: list[tuple[int, int, int]] = []
    for index, data in enumerate(next(train.chunks(BLOCK))):
        try:
            seen.append(look(data))
        except Exception as error:
            raise DataError(f"{train.where(index)} is not a readable image: {describe(error)}") from error
    channels = options.channels or max(channels for *_, channels in seen)
    if options.image_size is not None:
        return Decoder(*options.image_size, channels, options.crop_pct)
    decoder = Decoder(*seen[0][:2], channels, options.crop_pct, strict=True)
    return decoder if len({item[:2] for item in seen}) == 1 else _default(decoder)


def _for(split: str, decoder: Decoder) -> Decoder:
    return decoder if split == "train" else replace(decoder, strict=False)


def _default(decoder: Decoder) -> Decoder:
    return replace(decoder, height=DEFAULT_SIZE, width=DEFAULT_SIZE, strict=False)


def _differs(source: EncodedImages, decoder: Decoder, cache_dir: Path | None) -> Path:
    """Return the file that remembers that the images turned out to have different sizes."""
    arrays = ImageArrays(Decoding(source, decoder), cache_dir or default_cache())
    return arrays.directory.with_name(f"{arrays.directory.name}.sizes-differ")
