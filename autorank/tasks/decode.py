"""From an encoded image file to a uint8 array of a fixed size."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

GREY_MODES = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L")


class SizesDifferError(Exception):
    """An image has another size than the first one, by which the size was to be chosen."""


@dataclass(frozen=True)
class Decoder:
    """Decodes with Pillow.

    Attributes
    ----------
    height, width : int
        Size of the result. An image of another size is scaled so that it covers it (bilinear), and its centre is taken.
    channels : int
        1 (grey) or 3 (RGB).
    crop_pct : float
        Share of the scaled image's sides that the centre keeps; images that have the size already stay whole.
    strict : bool
        Refuse images of another size instead.
    """

    height: int
    width: int
    channels: int
    crop_pct: float = 1.0
    strict: bool = False

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        """Return the image, uint8 (C, H, W).

        Raises
        ------
        SizesDifferError
            If `strict` and the image has another size.
        Exception
            Whatever Pillow raises on data that are no image.
        """
        from PIL import Image

        with Image.open(io.BytesIO(data)) as image:
            if (image.height, image.width) != (self.height, self.width):
                if self.strict:
                    raise SizesDifferError
                plain = self._fitted(_eight_bits(image, self.channels))
            else:
                plain = _eight_bits(image, self.channels)
        pixels = np.asarray(plain, dtype=np.uint8)
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)

    def identity(self) -> dict[str, Any]:
        """Return what the result depends on."""
        return {"size": [self.height, self.width], "channels": self.channels, "crop_pct": self.crop_pct}

    def _fitted(self, image: Any) -> Any:
        from PIL import Image

        scale = max(self.height / image.height, self.width / image.width) / self.crop_pct
        size = (max(self.width, round(image.width * scale)), max(self.height, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (image.width - self.width) // 2, (image.height - self.height) // 2
        return image.crop((left, top, left + self.width, top + self.height))


def look(data: bytes) -> tuple[int, int, int]:
    """Return (height, width, channels) of an encoded image from its header."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return image.height, image.width, 1 if image.mode in GREY_MODES else 3


def _eight_bits(image: Any, channels: int) -> Any:
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips instead of scaling
        from PIL import Image

        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")
