"""The ``data_args`` of image sources, checked."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autorank.errors import ConfigError, did_you_mean
from autorank.tasks.augment import AUGMENTATIONS, ImagePipeline

PIPELINE_KEYS = ("mean", "std", "augment")
IMAGE_KEYS = (*PIPELINE_KEYS, "image_size", "crop_pct", "channels", "streaming", "workers", "memory_gb")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageOptions:
    """How images are read, kept and normalised.

    Attributes
    ----------
    image_size : (int, int) or None
        Height and width; None is the size of the first image, or 224 × 224 when sizes differ.
    crop_pct : float
        Share of the shorter side that the central crop keeps when an image has to be resized.
    channels : int or None
        1 or 3; None is what the first image has.
    mean, std : tuple of float or None
        In units of images from 0 to 1; None is ImageNet's for three channels, and 0 and 1 otherwise.
    augment : str
    streaming : bool or None
        True streams images through worker processes, False keeps them decoded; None decides by `memory_gb`.
    workers : int
        Worker processes when streaming.
    memory_gb : float
        Decoded size up to which a split is kept decoded.
    """

    image_size: tuple[int, int] | None = None
    crop_pct: float = 1.0
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: str = "none"
    streaming: bool | None = None
    workers: int = 2
    memory_gb: float = 2.0

    @classmethod
    def read(cls, args: Mapping[str, Any]) -> ImageOptions:
        """Check `args`; ConfigError names the key and what it may be."""
        found: dict[str, Any] = dict(args)
        if "image_size" in args:
            size = args["image_size"]
            pair = (size, size) if type(size) is int else tuple(size) if isinstance(size, list | tuple) else ()
            if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
                raise _wrong("image_size", size, "a positive whole number, or [height, width]")
            found["image_size"] = pair
        for key in ("mean", "std"):
            if key in args:
                found[key] = _floats(key, args[key])
        checks = {
            "crop_pct": (lambda v: _number(v) and 0 < v <= 1, "a number above 0 and up to 1"),
            "channels": (lambda v: v in (1, 3) and type(v) is int, "1 or 3"),
            "augment": (lambda v: v in AUGMENTATIONS, " or ".join(map(repr, AUGMENTATIONS))),
            "streaming": (lambda v: v is None or type(v) is bool, "true, false or null"),
            "workers": (lambda v: type(v) is int and v >= 0, "a whole number from 0"),
            "memory_gb": (lambda v: _number(v) and v >= 0, "a number of gigabytes"),
        }
        for key, (accept, allowed) in checks.items():
            if key in args and not accept(args[key]):
                raise _wrong(key, args[key], allowed)
        return cls(**found)

    def pipeline(self, channels: int, white: int = 255, plain: bool = False) -> ImagePipeline:
        """Return normalisation and augmentation for images of `channels` channels.

        Parameters
        ----------
        channels : int
        white : int
            Stored value that means 1.0.
        plain : bool
            Whether the default is no normalisation, whatever the channels.
        """
        imagenet = channels == 3 and not plain
        mean = self.mean or (IMAGENET_MEAN if imagenet else (0.0,))
        std = self.std or (IMAGENET_STD if imagenet else (1.0,))
        for key, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise _wrong(key, list(values), f"one number, or {channels} for images of {channels} channels")
        full = [values * channels if len(values) == 1 else values for values in (mean, std)]
        return ImagePipeline(full[0], full[1], self.augment, white)


def check_keys(args: Mapping[str, Any], allowed: tuple[str, ...], source: str) -> None:
    """Raise ConfigError for a key of ``data_args`` that the source does not know."""
    for key in args:
        if key not in allowed:
            raise ConfigError(
                f"data_args: {source} does not know {key!r}{did_you_mean(str(key), allowed)}; "
                f"allowed: {', '.join(allowed)}"
            )


def _number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _floats(key: str, value: Any) -> tuple[float, ...]:
    values = [value] if _number(value) else list(value) if isinstance(value, list | tuple) else []
    if not values or not all(_number(v) and (key == "mean" or v > 0) for v in values):
        raise _wrong(key, value, "a number per channel" + (", above 0" if key == "std" else ""))
    return tuple(float(v) for v in values)


def _wrong(key: str, value: Any, allowed: str) -> ConfigError:
    return ConfigError(f"data_args: {key} must be {allowed}, not {value!r}")
