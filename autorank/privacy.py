"""What must not be shown or kept: passwords in addresses, values under the names of secrets, and who stands for them.

A secret is meant to come from the environment: ``${NAME}`` in a setting stands for the variable NAME wherever the
setting is used, and is shown and kept as it is written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
"""Stands where a secret was."""

_SECRET_KEY = re.compile(
    r"(passw(or)?d|passphrase|pwd|token|secret|credentials?|auth|connection_string"
    r"|(api|access|secret|private|account|storage)_?key)$",
    re.I,
)
_SECRET_NUMBER = re.compile(r"(passw(or)?d|passphrase|pwd)$", re.I)
_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SCHEME = r"([A-Za-z][A-Za-z0-9+.-]*://)"
# The password of a database may hold slashes, as SQLAlchemy reads it; the part of a web address before a slash is all.
_USER_INFO = (
    re.compile(r"(?<![A-Za-z0-9+.-])(?!https?:)" + _SCHEME + r"([^:/@\s'\"]*:[^@\s'\"]*)@", re.I),
    re.compile(_SCHEME + r"([^/\s'\"]*)@"),
)
_SECRET_QUERY = re.compile(
    r"([?&;](?:[\w-]*(?:password|passwd|pwd|token|secret|api_?key)|sig|signature)=)([^&;\s'\"]+)", re.I
)
_LEAST = 6  # shorter secrets are parts of words as likely as not
_known: set[str] = set()


def public(text: str, mask: str = "") -> str:
    """Return `text` without the user names, passwords and tokens that addresses in it carry.

    Parameters
    ----------
    text : str
    mask : str
        Put in the place of user names and passwords; by default nothing is, not even the ``@`` behind them.
    """

    def shut(found: re.Match[str]) -> str:
        if found[2] == mask or _refers(found[2].rpartition(":")[2]):
            return found[0]
        return found[1] + (f"{mask}@" if mask else "")

    for pattern in _USER_INFO:
        text = pattern.sub(shut, text)
    return _SECRET_QUERY.sub(lambda found: found[0] if _refers(found[2]) else found[1] + MASK, text)


def without_secrets(value: Any, mask: str = "") -> Any:
    """Return a copy of nested settings in which no secret stands: by the name of its key, or inside an address."""
    if isinstance(value, Mapping):
        return {str(k): MASK if _is_secret(str(k), v) else without_secrets(v, mask) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item, mask) for item in value]
    return public(value, mask) if isinstance(value, str) else value


def to_keep(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as they may be written to disk: with `MASK` where a secret was, so that it is seen to be gone."""
    return dict(without_secrets(settings, MASK))


def lost(settings: Any, where: str = "") -> str:
    """Name the first of the settings whose secret was not kept; empty when all are whole."""
    if isinstance(settings, Mapping):
        named = ((f"{where}.{key}" if where else str(key), value) for key, value in settings.items())
        return next(filter(None, (lost(value, name) for name, value in named)), "")
    if isinstance(settings, list | tuple):
        return next(filter(None, (lost(item, where) for item in settings)), "")
    gone = isinstance(settings, str) and (settings == MASK or f"://{MASK}@" in settings or f"={MASK}" in settings)
    return where if gone else ""


def filled(value: Any) -> Any:
    """Return nested settings with the environment's value in the place of each ``${NAME}``.

    Raises
    ------
    KeyError
        With the name of a variable that is not set.
    """
    if isinstance(value, Mapping):
        return {key: filled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(filled(item) for item in value)
    if not isinstance(value, str):
        return value
    text = _REFERENCE.sub(lambda found: os.environ[found[1]], value)
    if text != value:
        _known.update(os.environ[name] for name in _REFERENCE.findall(value) if len(os.environ[name]) >= _LEAST)
    return text


def remember(settings: Any, key: str = "") -> None:
    """Keep the secrets among settings in mind, so that `hidden` finds them in the words of others."""
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            remember(value, f"{name}")
    elif isinstance(settings, list | tuple):
        for item in settings:
            remember(item, key)
    elif _is_secret(key, settings) and len(str(settings)) >= _LEAST:
        _known.add(str(settings))
    elif isinstance(settings, str):
        found = [text for pattern in _USER_INFO for _, text in pattern.findall(settings)]
        found = [text.partition(":")[2] for text in found] + [text for _, text in _SECRET_QUERY.findall(settings)]
        _known.update(text for text in found if len(text) >= _LEAST and not _refers(text))


def hidden(text: str) -> str:
    """Return a foreign text, such as an error's, without addresses' passwords and without secrets that are known."""
    if not text:
        return text
    named = {name: value for name, value in os.environ.items() if not name.endswith("PWD")}  # the working directory
    given = {value for name, value in named.items() if _is_secret(name, value) and len(value) >= _LEAST}
    for secret in sorted(_known | given, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return public(text)


def _refers(text: str) -> bool:
    return _REFERENCE.fullmatch(text) is not None


def _is_secret(key: str, value: Any) -> bool:
    """Say whether a value is a secret by the name of its key; numbers are only under the name of a password."""
    if not value or isinstance(value, bool) or (isinstance(value, str) and (_refers(value) or value == MASK)):
        return False
    return (_SECRET_NUMBER if isinstance(value, int | float) else _SECRET_KEY).search(key) is not None
