"""What is done to whole batches of images on the device: crop, flip, normalise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

AUGMENTATIONS = ("none", "flip", "flip+crop")


@dataclass(frozen=True)
class ImagePipeline:
    """From stored bytes to model inputs.

    Attributes
    ----------
    mean, std : tuple of float
        One per channel, in units of the scaled image (0 to 1).
    augment : str
        ``"none"``, ``"flip"`` (left-right, every second image) or ``"flip+crop"`` (also shifted by up to an eighth of
        the size, black beyond the border: for 32 × 32 images the usual pad by 4 and crop).
    white : int
        Stored value that means 1.0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str = "none"
    white: int = 255

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return normalised float images.

        Parameters
        ----------
        images : Tensor of uint8, (N, C, H, W)
        generator : torch.Generator, optional
            A CPU generator, so that the draws do not depend on the device; None leaves the images as they are.
        """
        if generator is not None and self.augment != "none":
            count, _, height, width = images.shape
            mirrored = torch.rand(count, generator=generator) < 0.5
            if self.augment == "flip+crop":
                images = _shift(images, generator, max(1, round(height / 8)), max(1, round(width / 8)))
            images = torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(3), images)
        shape = (1, -1, 1, 1)
        scale = torch.tensor([1 / (self.white * s) for s in self.std], device=images.device).view(shape)
        shift = torch.tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)], device=images.device)
        return torch.addcmul(shift.view(shape), images.float(), scale)


def _shift(images: Tensor, generator: torch.Generator, rows: int, columns: int) -> Tensor:
    count, _, height, width = images.shape
    down = torch.randint(2 * rows + 1, (count,), generator=generator).to(images.device)
    right = torch.randint(2 * columns + 1, (count,), generator=generator).to(images.device)
    windows = pad(images, (columns, columns, rows, rows)).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(count, device=images.device), :, down, right]
