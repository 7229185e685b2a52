"""Sweep directories at fsspec URLs: everything works in a local working copy, which is brought in line with the URL.

What is at the remote is the truth. A working copy that has more has not sent it yet; one that has something else is
set aside.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autorank.errors import ConfigError, SweepError, describe
from autorank.journal import FILE_NAME, LOCK_NAME
from autorank.privacy import MASK, filled, lost, public
from autorank.remotestore import RemoteError, Store, is_kept, is_url
from autorank.tasks.memory import default_cache
from autorank.trouble import tell

NOTE = "remote.json"
"""File of a working copy that says whose copy it is."""


class CopyError(SweepError):
    """A working copy cannot be written."""


_given: dict[Path, str] = {}  # secrets of a URL are in no file


def home() -> Path:
    """Return where the working copies are."""
    return default_cache().absolute() / "remote"


def copy_of(url: str) -> Path:
    """Return the directory of a URL's working copy: side by side for sweeps that are side by side."""
    try:
        whole = public(str(filled(url))).rstrip("/")
    except KeyError as error:
        raise ConfigError(f"{public(url)} names ${{{error.args[0]}}}, which is not set in the environment") from None
    name = re.sub(r"[^A-Za-z0-9._]+", "-", whole.rpartition("/")[2]).strip("-.")[:80] or "sweep"
    return folder_of(whole.rpartition("/")[0]) / f"{name}-{_hash(whole)[:8]}"


def folder_of(url: str) -> Path:
    """Return the directory that holds the working copies of the sweeps directly below a URL."""
    return home() / _hash(public(str(filled(url))).rstrip("/"))[:16]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def url_of(directory: Path) -> str | None:
    """Return the URL of a working copy; None for any other directory.

    Raises
    ------
    ConfigError
        It had a secret in it, which no file keeps.
    """
    directory = Path(os.path.abspath(directory))
    if directory in _given:
        return _given[directory]
    if not directory.is_relative_to(home()):  # a note in somebody else's directory may name any address
        return None
    url = _note(directory).get("url")
    if not isinstance(url, str) or not is_url(url):
        return None
    if lost({"url": url}):
        raise ConfigError(f"{directory} is the working copy of {url}, whose secret is kept nowhere; give the URL")
    return url


def shown(directory: Path) -> str:
    """Return how a sweep directory is named in messages: by its URL where it is the copy of one."""
    url = url_of(directory)
    return str(directory) if url is None else public(url)


def mark_of(directory: Path) -> str:
    """Return what a working copy is known by at the remote."""
    return str(_note(directory).get("copy"))


def opened(place: Path | str, *, everything: bool = False, new: bool = False) -> Path:
    """Return the local directory of a sweep, brought up to date where it is the working copy of a URL.

    Parameters
    ----------
    place : path or str
        A directory, which is returned as it is, or a URL.
    everything : bool
        Also bring statistics, tables and weights, which a sweep needs to go on; else the journal alone.
    new : bool
        Whether nothing may be there yet.

    Raises
    ------
    SweepError
        There is no sweep (unless `new`), or the remote cannot be read.
    """
    url = str(place) if is_url(place) else url_of(Path(place))
    if url is None:
        return Path(place)
    directory, store = copy_of(url), Store(url)
    try:
        refresh(directory, url, store, everything=everything, new=new)
    except RemoteError as error:
        if is_url(place) or everything or not (directory / FILE_NAME).exists():
            raise
        tell(f"{error}; this is what its working copy has")
    return directory


def refresh(directory: Path, url: str, store: Store, *, everything: bool = False, new: bool = False) -> None:
    """Bring a working copy in line with its URL, unless a process of this machine works in it."""
    with writing(directory):
        for _ in range(2):
            there = store.journal()
            if not there and not (directory / FILE_NAME).exists() and not new:
                raise SweepError(f"{store.url} holds no sweep (give the URL that the search was given)")
            make(directory, url)
            with held(directory) as free:
                if free and new and not there and b"\n" in journal_of(directory):
                    raise SweepError(
                        f"{store.url} holds nothing, but its working copy {directory} holds a sweep: "
                        f"`autorank resume {store.url}` sends it there; or remove the copy"
                    )
                if not free:
                    return
                if extend(directory, there):
                    if everything:
                        for name, size in store.files().items():
                            bring(directory, store, name, size)
                    return
                set_aside(directory, store)


def extend(directory: Path, there: bytes) -> bool:
    """Add to a working copy's journal what that of the remote has more; False when they do not agree."""
    here = journal_of(directory)
    whole = here[: here.rfind(b"\n") + 1]
    if not there.startswith(whole):
        return whole.startswith(there)  # what it has more is not sent yet
    if len(there) > len(whole):
        with (directory / FILE_NAME).open("r+b" if here else "wb") as file:
            file.seek(len(whole))
            file.truncate()
            file.write(there[len(whole) :])
            file.flush()
            os.fsync(file.fileno())
    return True


def set_aside(directory: Path, store: Store) -> None:
    """Move a working copy away that is not of the sweep that the remote has."""
    aside = home() / "aside" / f"{directory.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    aside.parent.mkdir(exist_ok=True)
    directory.rename(aside)
    tell(f"{store.url} has other trials than its working copy here: what is there counts; the copy is now {aside}")


def bring(directory: Path, store: Store, name: str, size: int) -> None:
    """Have a file of the remote in the working copy, unless it is there in that size."""
    path = directory / name
    if not is_kept(name):
        raise ValueError(f"{name!r} is not a file of a sweep")
    if not path.is_file() or path.stat().st_size != size:
        store.download(name, path, size)


def have(directory: Path, path: Path) -> None:
    """Have one file of a sweep directory here, if its remote has it."""
    url = url_of(directory)
    if url is not None and not path.exists():
        store, name = Store(url), path.relative_to(directory).as_posix()
        size = store.files().get(name)
        if size is not None:
            with writing(directory):
                bring(directory, store, name, size)


def send_export(directory: Path, target: Path) -> None:
    """Send the files of an export that lies in the working copy of a URL there; others are left alone."""
    url = url_of(directory)
    if url is not None and target.parent.absolute() == directory / "exports":
        store = Store(url)
        for path in sorted(target.iterdir()):
            store.upload(path.relative_to(directory).as_posix(), path)


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Tell in one line what keeps a working copy from being written."""
    try:
        yield
    except OSError as error:
        raise CopyError(
            f"cannot write the working copy {directory}: {error.strerror or describe(error)}; "
            "AUTORANK_CACHE names another place"
        ) from None


@contextmanager
def held(directory: Path) -> Iterator[bool]:
    """Hold a working copy's own lock, and say whether it could be had."""
    try:
        import fcntl
    except ImportError:  # as for the journal: one process is then the user's promise
        yield True
        return
    with (directory / LOCK_NAME).open("ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def journal_of(directory: Path) -> bytes:
    """Return the journal of a working copy; nothing when there is none yet."""
    try:
        return (directory / FILE_NAME).read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise SweepError(f"cannot read {directory / FILE_NAME}: {error.strerror}") from None


def make(directory: Path, url: str) -> None:
    """Make the directory of a working copy, with its note."""
    _given[directory] = url
    note = {"copy": secrets.token_hex(8)} | _note(directory)
    if note.get("url") == public(url, MASK):
        return
    with writing(directory):
        home().mkdir(parents=True, exist_ok=True)
        home().chmod(0o700)
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / f"{NOTE}.part"
        part.write_text(json.dumps(note | {"url": public(url, MASK)}))
        part.replace(directory / NOTE)


def _note(directory: Path) -> dict[str, Any]:
    try:
        found = json.loads((directory / NOTE).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
