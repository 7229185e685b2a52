"""What is believed of what lies at a URL, and what is said of the URL itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import autorank
from autorank import remotedir
from autorank.config import make_config
from autorank.errors import AutorankError, ConfigError, MissingExtraError, SweepError
from autorank.journal import FILE_NAME
from autorank.privacy import to_keep
from autorank.remotedir import copy_of, opened, url_of
from autorank.remotestore import Store
from tests.remote.driving import Driving


def test_a_kill_while_parts_are_put_together_loses_and_doubles_nothing(memory: str) -> None:
    with Driving(memory) as driver:
        for number in range(3):
            driver.trial(number)
        store, raw = Store(memory), driver.journal.path.read_bytes()
        middle = raw.index(b"\n", len(raw) // 2) + 1
        store.write(f"journal/{0:012d}-{middle:012d}.jsonl", raw[:middle])  # whole, but nothing is removed yet
        assert store.journal() == raw
        store.write(f"journal/{0:012d}-{len(raw):012d}.jsonl", raw[: len(raw) // 3])  # half written
        assert store.journal() == raw
        assert store.journal(middle) == raw[middle:]


def test_a_journal_with_a_hole_is_an_error_not_a_shorter_sweep(memory: str) -> None:
    store = Store(memory)
    store.write("journal/000000000000-000000000003.jsonl", b"{}\n")
    store.write("journal/000000000005-000000000008.jsonl", b"{}\n")
    with pytest.raises(SweepError, match="lacks its bytes from 3"):
        opened(memory)


HOSTILE = (
    "models/../../../../evil.safetensors",
    "models//etc/evil.safetensors",
    "models/..safetensors",
    "models/.hidden.safetensors",
    "models/a\\..\\b.safetensors",
    "models/" + "x" * 4000 + ".safetensors",
    "models/line\nbreak.safetensors",
    "models/evil.pkl",
    "cache/fits/evil.safetensors",
    "cache/evil.pt",
    "../evil.json",
    "errors-../evil.json",
    "journal/../journal.jsonl",
    "journal/x.jsonl",
    "journal.jsonl",
    "remote.json",
    "lock",
    "exports/0/model.pt2",
)


def test_names_at_the_remote_cannot_leave_the_working_copy(
    memory: str, elsewhere: Callable[[str], None], tmp_path: Path
) -> None:
    with Driving(memory) as driver:
        driver.file("models/good.safetensors")
        driver.trial(0)
    root = f"/{memory.partition('://')[2]}"
    plain: Any = fsspec.filesystem("memory")
    for name in HOSTILE:
        plain.pipe_file(f"{root}/plain", b"evil")
        MemoryFileSystem.store[f"{root}/{name}"] = MemoryFileSystem.store.pop(f"{root}/plain")
    elsewhere("there")
    there = opened(memory, everything=True)
    found = {
        path.relative_to(tmp_path / "there").as_posix() for path in (tmp_path / "there").rglob("*") if path.is_file()
    }
    prefix = there.relative_to(tmp_path / "there").as_posix()
    expected = {FILE_NAME, "lock", "remote.json", "models/good.safetensors"}
    assert found == {f"{prefix}/{name}" for name in expected}
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize(
    "address",
    ["memory://b/../../etc", "memory://b/..", "memory://b/a b/ü\n<script>", "memory://b/" + "x" * 300],
    ids=["up", "dots", "strange", "long"],
)
def test_the_working_copy_stays_in_the_cache_whatever_the_url(address: str, tmp_path: Path) -> None:
    directory = copy_of(address)
    assert directory.resolve().is_relative_to(tmp_path / "here" / "remote")
    assert len(directory.relative_to(tmp_path / "here" / "remote").parts) == 2


def test_a_note_in_another_directory_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / remotedir.NOTE).write_text(json.dumps({"url": "memory://evil/net", "copy": "x"}))
    assert url_of(tmp_path) is None


@pytest.mark.parametrize(
    ("address", "kind", "said"),
    [
        ("gs://bucket/net", MissingExtraError, "pip install gcsfs"),
        ("abfs://bucket/net", MissingExtraError, "pip install adlfs"),
        ("sftp://host/net", MissingExtraError, "paramiko"),
        ("webdav://host/net", MissingExtraError, "pip install webdav4"),
        ("nowhere://host/net", ConfigError, "Protocol not known"),
        ("s3://", ConfigError, "one directory"),
        ("simplecache::s3://bucket/net", SweepError, "not a sweep"),
        ("s3://${NOT_SET_HERE}/net", ConfigError, "NOT_SET_HERE"),
    ],
)
def test_what_is_wrong_with_an_address_is_one_line(address: str, kind: type[AutorankError], said: str) -> None:
    with pytest.raises(kind, match=said) as caught:
        autorank.open_sweep(address)
    assert "\n" not in str(caught.value)


def test_secrets_of_a_url_are_kept_and_shown_nowhere(
    memory: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, elsewhere: Callable[[str], None]
) -> None:
    secret = "pa55word-of-mine"
    monkeypatch.setenv("REMOTE_WORD", secret)
    name = memory.partition("://")[2]
    for address in (f"memory://me:{secret}@{name}", f"memory://me:${{REMOTE_WORD}}@{name}"):
        directory = opened(address, new=True)
        assert secret not in str(directory)
        assert url_of(directory) == address
        assert secret not in remotedir.shown(directory)
        with pytest.raises(SweepError) as caught:
            opened(f"{address}/nothing")
        assert secret not in str(caught.value)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert secret.encode() not in written
    remotedir._given.clear()  # another process
    assert url_of(directory) == address  # the variable's name is kept
    first = copy_of(f"memory://me:{secret}@{name}")
    (first / remotedir.NOTE).unlink()
    opened(f"memory://me:{secret}@{name}", new=True)
    remotedir._given.clear()
    with pytest.raises(ConfigError, match="give the URL"):
        url_of(first)


def test_no_secret_of_the_sweep_directory_stands_in_the_journal() -> None:
    kept = to_keep(make_config({"sweep_dir": "sftp://me:pa55word-of-mine@host/sweeps/net"}).model_dump(mode="json"))
    assert kept["sweep_dir"] == "sftp://***@host/sweeps/net"


def test_options_from_fsspec_s_configuration_are_secrets(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "memory", {"account_key": "k3y-of-mine", "token": "t0ken-of-mine"})
    Store(memory)
    assert str(SweepError("refused: k3y-of-mine t0ken-of-mine")) == "refused: *** ***"


NOISY = """
import logging
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem

class Noisy(MemoryFileSystem):
    protocol, __module__ = "noisy", "noisy.core"

    def ls(self, *given, **more):
        try:
            raise OSError("no route to the server")
        except OSError:
            logging.getLogger("noisy.retry").exception("out of retries")
            raise

register_implementation("noisy", Noisy)
from autorank.remotestore import RemoteError, Store
try:
    Store("noisy://bucket/net").parts()
except RemoteError as error:
    print(error)
"""


def test_what_a_package_logs_of_its_troubles_is_not_printed_beside_the_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", NOISY], capture_output=True, text=True)
    assert "no route to the server" in done.stdout
    assert done.stderr == ""
