"""One class per thing a user can get wrong; a message is one line: what is wrong, where, and what would be right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from autorank.privacy import hidden

_LONGEST = 1500


class AutorankError(Exception):
    """Base of all errors that are shown to the user as one line, without a traceback and without secrets."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message, _LONGEST))


class ModelError(AutorankError):
    """The model cannot be made, loaded, or run on its example inputs."""


class WeightsError(ModelError):
    """A weights file is missing, unreadable, unsafe, or belongs to another model."""


class DataError(AutorankError):
    """A data source is missing, malformed, or does not fit the model."""


class SpaceError(AutorankError):
    """A search space has a wrong key, a wrong value, or a pattern that matches nothing."""


class ConfigError(AutorankError):
    """A sweep's settings (file or flags) are wrong."""


class PlanError(AutorankError):
    """A plan does not fit the model: unknown layer or format, rank out of range, wrong options."""


class FormatError(AutorankError):
    """A weight cannot be decomposed (not finite) or a format does not support the layer."""


class SweepError(AutorankError):
    """A sweep directory is missing, unwritable, in use, or not a sweep."""


class JobError(AutorankError):
    """A cluster's job server cannot be reached, refuses, or has no such job."""


class EmptyFrontError(AutorankError):
    """No point meets what was asked for; the message names the nearest one, and `nearest` is its trial's number."""

    def __init__(self, message: str, nearest: int | None = None) -> None:
        super().__init__(message)
        self.nearest = nearest


class ExportError(AutorankError):
    """An exported file could not be written or does not behave as the model did."""


class MissingExtraError(AutorankError):
    """An optional dependency is needed; the message names the extra to install."""


class TrialError(AutorankError):
    """A trial cannot go on (divergence, NaN); the sweep does. Becomes the record's reason."""


def describe(error: BaseException) -> str:
    """Return type and message of a foreign error in one line, short enough to stand in a message of ours."""
    text = one_line(re.sub(r" ?<_io\.BytesIO[^>]*>", "", str(error)), 300)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def one_line(text: str, limit: int) -> str:
    """Return a text on one line without secrets; what a terminal would act upon or cannot show is spelt out."""
    line = hidden(" ".join(text[: 100 * limit].split()))
    if not line.isprintable():
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line if len(line) <= limit else line[:limit] + "…"


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the allowed word nearest to `word`, or nothing."""
    near = difflib.get_close_matches(word, list(allowed), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
