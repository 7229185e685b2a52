"""Splitting validation data off the training data: seeded, stratified, without overlap."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autorank.errors import ConfigError, DataError
from autorank.tasks.randomness import derive

Indices = NDArray[np.int64]


def validation_size(count: int, size: int | float) -> int:
    """Return how many of `count` examples go to validation.

    Parameters
    ----------
    count : int
        Number of training examples before the split.
    size : int or float
        A number of examples, or a fraction strictly between 0 and 1.

    Raises
    ------
    ConfigError
        If `size` is no size at all.
    DataError
        If it leaves no training or no validation example.
    """
    if isinstance(size, bool) or not isinstance(size, int | float):
        raise ConfigError(f"validation must be a number of examples or a fraction between 0 and 1, not {size!r}")
    if isinstance(size, float):
        if not 0.0 < size < 1.0:
            raise ConfigError(f"validation={size} as a fraction must lie between 0 and 1 (a count is a whole number)")
        taken = round(size * count)
    else:
        taken = size
    if not 1 <= taken <= count - 1:
        what = f"validation={size}" + (f" (= {taken} examples)" if isinstance(size, float) else "")
        allowed = f"1 to {count - 1} examples" if count > 1 else "no split at all"
        raise DataError(f"{what} cannot be split off {count} training examples: they allow {allowed}")
    return taken


def apportion(counts: NDArray[np.int64], size: int) -> Indices:
    """Share `size` places among classes in proportion to `counts` (largest remainders, ties to the first class).

    A class keeps one example for training whenever the classes together leave room for that.
    """
    caps = counts - 1 if size <= int((counts - 1).sum()) else counts
    quota = counts * (size / counts.sum())
    shares = np.minimum(np.floor(quota).astype(np.int64), caps)
    while (left := size - int(shares.sum())) > 0:
        order = [i for i in np.argsort(-(quota - shares), kind="stable") if shares[i] < caps[i]]
        shares[order[:left]] += 1
    return shares


def split_indices(
    count: int, labels: NDArray[np.int64] | None, size: int | float, seed: int
) -> tuple[Indices, Indices]:
    """Split ``range(count)`` into training and validation indices, each in ascending order.

    Parameters
    ----------
    count : int
    labels : array of int of shape (count,) or None
        Classes to keep in proportion; None splits at random.
    size : int or float
        See `validation_size`.
    seed : int

    Returns
    -------
    train, validation : array of int64
    """
    taken = validation_size(count, size)
    generator = np.random.default_rng(derive(seed, 0x5B117))
    if labels is None:
        chosen = generator.permutation(count)[:taken]
    else:
        classes, counts = np.unique(labels, return_counts=True)
        shares = apportion(counts.astype(np.int64), taken)
        chosen = np.concatenate(
            [
                generator.permutation(np.flatnonzero(labels == label))[:share]
                for label, share in zip(classes, shares, strict=True)
            ]
        )
    mask = np.zeros(count, dtype=bool)
    mask[chosen] = True
    return np.flatnonzero(~mask).astype(np.int64), np.flatnonzero(mask).astype(np.int64)
