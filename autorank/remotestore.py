"""The objects of a sweep below an fsspec URL: named, listed, read, written; foreign errors as one line."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from autorank.errors import ConfigError, MissingExtraError, SweepError, describe
from autorank.privacy import filled, public, remember

JOURNAL = "journal"
"""Folder of the journal's parts. A part is called after the bytes of the journal that it holds, ``START-END.jsonl``."""

LARGEST_JOURNAL = 4 << 30
_MOST_NAMES = 100_000
_ATTEMPTS = 5
_AT_ONCE = 8

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PART = re.compile(r"(\d{12,15})-(\d{12,15})\.jsonl", re.ASCII)
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}"
_FILE = re.compile(
    rf"models/{_NAME}\.safetensors|cache/stats-{_NAME}\.safetensors|cache/teacher\.(npy|json)"
    rf"|(errors|latencies)-{_NAME}\.json",
    re.ASCII,
)
_EXPORT = re.compile(rf"exports/{_NAME}/{_NAME}", re.ASCII)
_CHILD = re.compile(_NAME, re.ASCII)

# They have no folders; asked for one, some of them make a bucket.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "r2", "hf", "memory"}
_OPTION_SECRETS = ("key", "account_key", "connection_string", "sas_token", "passwd", "passphrase", "client_secret")

_NOTHING = logging.NullHandler()

T = TypeVar("T")


class RemoteError(SweepError):
    """A remote place cannot be read or written now; `gone` says that the very object is not there."""

    def __init__(self, message: str, *, gone: bool = False, refused: bool = False) -> None:
        super().__init__(message)
        self.gone, self.refused = gone, refused


def is_url(place: object) -> bool:
    """Say whether a place is a URL, not a path of this machine."""
    return isinstance(place, str) and _URL.match(place) is not None


def is_kept(name: str) -> bool:
    """Say whether a file of a sweep directory is kept at the remote, too, and is taken from there."""
    return _FILE.fullmatch(name) is not None


class Store:
    """What lies below a URL.

    Parameters
    ----------
    url : str
        As the user gave it; ``${NAME}`` stands for a variable of the environment. What else the file system needs
        (endpoint, keys) it takes from its own places and from fsspec's configuration.

    Attributes
    ----------
    url : str
        The URL without secrets, for messages.

    Raises
    ------
    ConfigError
        No URL of a file system, or a variable that is not set.
    MissingExtraError
        The package of the file system is not installed.
    """

    def __init__(self, url: str) -> None:
        remember({"url": url})
        self.url = public(url).rstrip("/") if url.partition("://")[2] else url
        try:
            self._url = str(filled(url)).rstrip("/")
        except KeyError as error:
            raise ConfigError(f"{self.url} names ${{{error.args[0]}}}, which is not set in the environment") from None
        remember({"url": self._url})
        scheme = self._url.partition("://")[0].lower()
        if "::" in self._url or not self._url.partition("://")[2]:
            raise ConfigError(f"{self.url}: give the URL of one directory, such as s3://bucket/sweeps/net")
        self._scheme = scheme
        self._open()

    def _open(self) -> None:
        from fsspec.config import conf
        from fsspec.core import url_to_fs
        from fsspec.registry import known_implementations

        for options in conf.values():
            if isinstance(options, Mapping):
                remember({f"{name}_secret": options[name] for name in _OPTION_SECRETS if options.get(name)})
                remember(options)
        try:
            self._fs, root = url_to_fs(self._url)
        except ImportError as error:
            known = known_implementations.get(self._scheme, {})
            package = str(known.get("class", "fsspec")).partition(".")[0]
            hint = str(known.get("err") or describe(error)) if package == "fsspec" else f"pip install {package}"
            raise MissingExtraError(f"{self.url}: a package is missing: {hint}") from None
        except Exception as error:  # whatever a file system says of an address that it does not understand
            raise ConfigError(f"{self.url} cannot be opened: {describe(error)}") from None
        if hasattr(self._fs, "retries"):
            self._fs.retries = 1  # of s3fs, beside those of the client below it: minutes, in which nobody is told
        logging.getLogger("asyncio").addFilter(_unless_disconnected)
        # What nobody handles Python prints, with tracebacks; what matters comes as an error, and is said in one line.
        logging.getLogger(type(self._fs).__module__.partition(".")[0]).addHandler(_NOTHING)
        self._root = str(root).rstrip("/")
        self._made: set[str] = set()

    def renew(self) -> None:
        """Forget connections and credentials, which may have expired, and take them anew."""
        type(self._fs).clear_instance_cache()
        self._open()

    # Reading.

    def parts(self) -> dict[tuple[int, int], str]:
        """Return the parts of the journal: its bytes from, to → name. Half-written and foreign objects are left out."""
        found = {}
        for name, size in self._list(JOURNAL).items():
            match = _PART.fullmatch(name)
            if match and size == int(match[2]) - int(match[1]) and int(match[2]) <= LARGEST_JOURNAL:
                found[int(match[1]), int(match[2])] = f"{JOURNAL}/{name}"
        return found

    def journal(self, position: int = 0) -> bytes:
        """Return the journal from a byte on, to its end.

        Raises
        ------
        RemoteError
            It cannot be read, or a part of it is missing.
        """
        for attempt in range(_ATTEMPTS):
            parts, chosen, end = self.parts(), [], position
            # Parts overlap after a driver was killed while it put them together: the longest are taken.
            while best := max((part for part in parts if part[0] <= end < part[1]), key=lambda p: p[1], default=None):
                chosen.append((best, end))
                end = best[1]
            beyond = max((part[1] for part in parts), default=0)
            if end < beyond and attempt == _ATTEMPTS - 1:
                raise RemoteError(f"{self.url}: the journal lacks its bytes from {end} on; restore {JOURNAL}/ there")
            if end < beyond:
                continue  # listed while parts were put together
            try:
                with ThreadPoolExecutor(_AT_ONCE if self._fs.async_impl else 1) as pool:
                    return b"".join(pool.map(self._part, [(parts[part], part, start) for part, start in chosen]))
            except RemoteError as error:
                if not error.gone or attempt == _ATTEMPTS - 1:  # put together meanwhile
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _part(self, wanted: tuple[str, tuple[int, int], int]) -> bytes:
        """Return a part, given by its name and bytes, from a byte of the journal on."""
        name, (first, end), start = wanted
        raw = self.read(name, start - first)
        if len(raw) != end - start:
            raise RemoteError(f"{self.url}: {name} has not the size that its name says; restore it")
        return raw

    def files(self) -> dict[str, int]:
        """Return name → size of the files that are kept beside the journal; names that we did not give are left out."""
        found = {}
        for folder in ("", "models", "cache"):
            for name, size in self._list(folder).items():
                path = f"{folder}/{name}" if folder else name
                if is_kept(path):
                    found[path] = size
        return found

    def children(self) -> list[str]:
        """Return the names of the folders, as far as they are plain ones."""
        return sorted(name for name, size in self._list("", folders=True).items() if _CHILD.fullmatch(name))

    def read(self, name: str, start: int = 0) -> bytes:
        """Return the content of an object, from a byte on; `RemoteError.gone` when there is none."""
        part = {"start": start} if start else {}
        return bytes(self._try("read", lambda: self._fs.cat_file(self._path(name), **part)))

    def download(self, name: str, path: Path, size: int) -> None:
        """Bring a file of `size` bytes here; it appears under its name when it is whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < size:
            raise SweepError(f"{path}: no space for {name} of {self.url}, which has {size:,} bytes; free the disk")
        part = path.with_name(f"{path.name}.part")
        try:
            self._try("read", lambda: self._fs.get_file(self._path(name), str(part)))
            if part.stat().st_size != size:
                raise RemoteError(f"{self.url}: {name} has not the size that was listed; try again")
            part.replace(path)
        finally:
            with suppress(OSError):
                part.unlink()

    # Writing.

    def write(self, name: str, data: bytes) -> None:
        """Write an object."""
        self._folder(name)
        self._try("written", lambda: self._fs.pipe_file(self._path(name), data))

    def upload(self, name: str, path: Path) -> None:
        """Write a file of this machine."""
        if not (is_kept(name) or _EXPORT.fullmatch(name)):
            raise ValueError(f"{name!r} is not a file that is kept at a remote")
        self._folder(name)
        self._try("written", lambda: self._fs.put_file(str(path), self._path(name)))

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects, those that are gone already as well."""
        if len(names) > 1:
            with suppress(RemoteError):
                self._try("written", lambda: self._fs.rm([self._path(name) for name in names]))
                return
        for name in names:
            with _unless_gone():
                self._try("written", lambda name=name: self._fs.rm_file(self._path(name)))  # type: ignore[misc]

    def _folder(self, name: str) -> None:
        folder = self._path(name).rpartition("/")[0]
        if self._scheme not in _OBJECT_STORES and folder not in self._made:
            self._try("written", lambda: self._fs.makedirs(folder, exist_ok=True))
            self._made.add(folder)

    def _list(self, folder: str, folders: bool = False) -> dict[str, int]:
        """Return the names directly below a folder, of files with their sizes; nothing when there is no such folder."""
        path = f"{self._root}/{folder}" if folder else self._root
        self._fs.invalidate_cache()
        try:
            listed: Iterable[Any] = self._try("read", lambda: self._fs.ls(path or "/", detail=True))
        except RemoteError as error:
            if error.gone:
                return {}
            raise
        wanted = "directory" if folders else "file"
        found = {}
        for entry in listed:
            name = str(entry["name"]).rstrip("/").rpartition("/")[2]
            if entry.get("type") == wanted and name:
                found[name] = int(entry.get("size") or 0)
        if len(found) > _MOST_NAMES:
            raise RemoteError(f"{self.url}/{folder} has {len(found):,} entries: it is not part of a sweep")
        return found

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _try(self, what: str, action: Callable[[], T]) -> T:
        try:
            return action()
        except FileNotFoundError as error:
            raise RemoteError(f"{self.url} cannot be {what}: {describe(error)}", gone=True) from None
        except PermissionError as error:
            raise RemoteError(f"{self.url} cannot be {what}: {describe(error)}", refused=True) from None
        except Exception as error:  # every file system has errors of its own
            raise RemoteError(f"{self.url} cannot be {what}: {describe(error)}") from None


def _unless_disconnected(record: logging.LogRecord) -> bool:
    """Drop the traces of connections that broke: the request itself says so."""
    return record.exc_info is None or not getattr(record.exc_info[0], "__name__", "").startswith("ClientConnection")


@contextmanager
def _unless_gone() -> Any:
    try:
        yield
    except RemoteError as error:
        if not error.gone:
            raise
