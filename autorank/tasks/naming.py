"""Which split, column or class a name stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autorank.errors import ConfigError, DataError

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
SPLIT_KEYS = tuple(SPLIT_NAMES)
LABEL_NAMES = ("label", "labels", "target", "class", "fine_label", "y")


def split_of(name: str) -> str | None:
    """Return the split that a file or directory name begins with, such as ``train`` for ``train-00000-of-00001``."""
    word = re.match(r"[a-z]+", name.lower())
    return next((split for split, names in SPLIT_NAMES.items() if word and word.group() in names), None)


def choose_splits(found: Sequence[str], args: Mapping[str, Any], where: str) -> dict[str, str]:
    """Return split → name among `found`: what ``data_args`` says, else the usual names that are still free.

    Raises
    ------
    ConfigError
        If ``data_args`` names a split that is not there.
    DataError
        If there is no training split.
    """
    chosen: dict[str, str] = {}
    for split in SPLIT_KEYS:
        wanted = args.get(split)
        if wanted is None or wanted == "none":
            continue
        if wanted not in found:
            raise ConfigError(
                f"data_args: {split}={wanted!r} is not in {where}; it has {', '.join(found) or 'nothing'}"
            )
        chosen[split] = wanted
    for split in SPLIT_KEYS:
        if split not in args:
            free = [name for name in found if name not in chosen.values() and name.lower() in SPLIT_NAMES[split]]
            chosen.update({split: free[0]} if free else {})
    if "train" not in chosen:
        raise DataError(f"{where} has no training split, only {', '.join(found) or 'nothing'}; name it with train=")
    return chosen


def choose_column(
    role: str, wanted: Any, columns: Sequence[str], candidates: Sequence[str], preferred: Sequence[str], where: str
) -> str:
    """Return the column of a role (``image`` or ``label``): what ``data_args`` says, the preferred, or the only one.

    Raises
    ------
    ConfigError
        If ``data_args`` names a column that is not there.
    DataError
        If none or several would do.
    """
    key = f"{role}_column"
    if wanted is not None:
        if wanted not in columns:
            raise ConfigError(f"data_args: {key}={wanted!r} is not in {where}; its columns are {', '.join(columns)}")
        return str(wanted)
    if len(candidates) == 1:
        return candidates[0]
    named = [name for name in preferred if name in candidates]
    if len(named) == 1 or (named and role == "image"):
        return named[0]
    if candidates:
        raise DataError(f"{where}: {key} could be {' or '.join(candidates)}; say which with {key}= in data_args")
    raise DataError(f"{where} has no {role} column; its columns are {', '.join(columns)}")


def encode_labels(
    values: Sequence[Any], classes: Sequence[str] | None, split: str, where: str
) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
    """Return labels as whole numbers, and the class names if they were given as text.

    Parameters
    ----------
    values : sequence of int or str
    classes : sequence of str or None
        Classes of the training split, to which text of another split must belong.
    split, where : str
        Named in errors.
    """
    empty = next((i for i, value in enumerate(values) if value is None), None)
    if empty is not None:
        raise DataError(f"{where}: row {empty} of the {split} split has no label")
    if all(isinstance(value, int | np.integer) for value in values):
        return np.asarray(values, dtype=np.int64), None
    if not all(isinstance(value, str) for value in values):
        kind = next(type(value).__name__ for value in values if not isinstance(value, str))
        raise DataError(f"{where}: labels of the {split} split must be whole numbers or text, not {kind}")
    known = tuple(classes) if classes is not None else tuple(sorted(set(values)))
    places = {name: i for i, name in enumerate(known)}
    strange = next((value for value in values if value not in places), None)
    if strange is not None:
        raise DataError(f"{where}: class {strange!r} of the {split} split is not among the training classes")
    return np.asarray([places[value] for value in values], dtype=np.int64), known
