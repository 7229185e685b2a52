"""scikit-learn's embedded digits: 1,797 grey images of 8 × 8, ten classes; 1,297 for training and 500 for test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autorank.tasks.splits import split_indices

TEST_SIZE = 500
WHITE = 16  # the images hold whole numbers from 0 to 16


@dataclass(frozen=True)
class Digits:
    """One split of the digits; the division is fixed, stratified, and part of what the name means."""

    split: str

    def identity(self) -> dict[str, Any]:
        """Return the name of the split."""
        return {"digits": self.split, "test": TEST_SIZE}

    def write(self, directory: Path) -> None:
        """Write images and labels of this split."""
        from sklearn.datasets import load_digits

        data = load_digits()
        labels = np.asarray(data.target, dtype=np.int64)
        train, test = split_indices(len(labels), labels, TEST_SIZE, seed=0)
        chosen = test if self.split == "test" else train
        np.save(directory / "images.npy", data.images[chosen].astype(np.uint8)[:, None], allow_pickle=False)
        np.save(directory / "labels.npy", labels[chosen], allow_pickle=False)
