"""What of a directory is taken for code and sent to other machines."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autorank.cluster import packed
from autorank.config import SweepConfig
from autorank.errors import AutorankError, ConfigError, SweepError
from autorank.jobfiles import pack
from autorank.usercode import SMALL, code_files
from tests.nobody import as_nobody


def made(root: Path, *names: str, size: int = 5) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size)


def taken(root: Path, *exclude: str) -> set[str]:
    return {str(path.relative_to(root)) for path in code_files(root, exclude)}


def test_what_is_no_code_stays_at_home(tmp_path: Path) -> None:
    made(tmp_path, "net.py", "pkg/net.py", "pkg/table.json", "pkg/means.npy")
    made(tmp_path, ".git/x", ".env", "env/pyvenv.cfg", "env/lib.py", "sweeps/a/journal.jsonl", "sweeps/a/w.py")
    made(tmp_path, "mlflow.db", "pkg/__pycache__/net.pyc", "photos/1.jpg", "build/lib/net.py", "run.log")
    assert taken(tmp_path) == {"net.py", "pkg/net.py", "pkg/table.json", "pkg/means.npy"}


KEYS = [
    *("key.pem", "pkg/server.key", "SERVER.PEM", "cert.pfx", "store.jks", "putty.ppk", "x.env", "Prod.ENV"),
    *("id_rsa", "id_rsa.old", "id_ed25519.pub", "id_ecdsa_sk", "id_github"),
    *("kubeconfig.yaml", "kube.config", "site.kubeconfig", "auth_token", "HF_TOKEN.txt", "token", "token.txt"),
    *("credentials.json", "aws_credentials", "service-account.json", "my_service_account_7.json"),
    *("client_secret_7.json", "secrets.yaml", "db-passwords.txt", "secrets/gcp.json", "pkg/credentials/gcp.json"),
]


@pytest.mark.parametrize("name", KEYS)
def test_keys_stay_at_home(name: str, tmp_path: Path) -> None:
    made(tmp_path, name, "net.py")
    assert taken(tmp_path) == {"net.py"}


def test_code_and_data_that_sound_like_keys_go_along(tmp_path: Path) -> None:
    code = {"credentials.py", "pkg/secrets.py", "secrets/__init__.py", "id_rsa.py", "kubeconfig.py", "token.py"}
    data = {"tokens.txt", "tokenizer.json", "special_tokens_map.json", "id_to_label.json", "secretary.csv", "keys.json"}
    made(tmp_path, *code, *data)
    assert taken(tmp_path) == code | data


def test_packages_named_as_what_is_built_go_along(tmp_path: Path) -> None:
    code = {"net/__init__.py", "net/build/__init__.py", "net/build/deep/net.py", "net/dist/ddp.py"}
    made(tmp_path, *code, "build/lib/net.py", "dist/net.tar.gz", "other/build/lib/net.py")
    assert taken(tmp_path) == code


def test_data_go_along_while_they_are_small(tmp_path: Path) -> None:
    made(tmp_path, "small.npz", "small.parquet", size=SMALL)
    made(tmp_path, "large.npz", "large.safetensors", "large.bin", size=SMALL + 1)
    made(tmp_path, "large.py", size=SMALL + 1)
    assert taken(tmp_path) == {"small.npz", "small.parquet", "large.py"}


def test_patterns_are_left_out_by_name_and_by_path(tmp_path: Path) -> None:
    made(tmp_path, "net.py", "notes/net.py", "pkg/notes/net.py", "pkg/draft.py")
    assert taken(tmp_path, "draft*") == {"net.py", "notes/net.py", "pkg/notes/net.py"}
    assert taken(tmp_path, "pkg/notes/") == {"net.py", "notes/net.py", "pkg/draft.py"}
    assert taken(tmp_path, "notes") == {"net.py", "pkg/draft.py"}


def test_links_to_what_lies_outside_are_not_followed(tmp_path: Path) -> None:
    made(tmp_path, "code/net.py", "secret.py", "other/x.py")
    (tmp_path / "code" / "inside.py").symlink_to("net.py")
    (tmp_path / "code" / "outside.py").symlink_to(tmp_path / "secret.py")
    (tmp_path / "code" / "folder").symlink_to(tmp_path / "other")
    assert taken(tmp_path / "code") == {"net.py", "inside.py"}


STAYS = [".env", "key.pem", ".git/config", "env/lib.py", "sweeps/a/x.py", "build/lib/x.py", "large.bin", "draft/x.py"]


@pytest.mark.parametrize("name", STAYS)
def test_links_to_what_stays_at_home_are_not_followed(name: str, tmp_path: Path) -> None:
    made(tmp_path, "net.py", "env/pyvenv.cfg", "sweeps/a/journal.jsonl")
    made(tmp_path, name, size=SMALL + 1)
    (tmp_path / "link.py").symlink_to(name)
    (tmp_path / "second.txt").symlink_to("link.py")
    assert taken(tmp_path, "draft") == {"net.py"}


@pytest.fixture
def open_place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:  # pytest's own directories are closed to others as a whole
        Path(name).chmod(0o755)
        made(Path(name), "code/net.py")
        (Path(name) / "sent").mkdir()
        (Path(name) / "sent").chmod(0o777)
        yield Path(name)


@pytest.mark.parametrize("mode", [0, 0o444, 0o111], ids=oct)
def test_directories_that_may_not_be_read_are_passed_over(mode: int, open_place: Path) -> None:
    made(open_place / "code", "lost+found/x.py", "lost+found/deep/x.py", "build/lib.txt")
    for name in ("lost+found", "build"):
        (open_place / "code" / name).chmod(mode)
    with as_nobody():
        assert taken(open_place / "code") == {"net.py"}
    for name in ("lost+found", "build"):
        (open_place / "code" / name).chmod(0o755)


def as_job(code: Path, folder: Path) -> object:
    return pack(SweepConfig(model="python:net:make", data="python:net:data"), folder, code)


@pytest.mark.parametrize(
    ("send", "kind", "way_out"),
    [(packed, SweepError, "let its name begin with a dot"), (as_job, ConfigError, "left out with --exclude")],
    ids=["to the nodes", "as a job"],
)
def test_a_file_that_may_not_be_read_is_named_with_the_way_out(
    send: Callable[[Path, Path], object], kind: type[AutorankError], way_out: str, open_place: Path
) -> None:
    made(open_place, "code/private.txt")
    (open_place / "code" / "private.txt").chmod(0)
    says = f"{re.escape(str(open_place))}/code/private.txt cannot be sent .*Permission denied.*{way_out}"
    with as_nobody(), pytest.raises(kind, match=says):
        send(open_place / "code", open_place / "sent")


@pytest.mark.parametrize("send", [packed, as_job], ids=["to the nodes", "as a job"])
def test_names_that_are_not_utf8_are_passed_over(send: Callable[[Path, Path], object], tmp_path: Path) -> None:
    made(tmp_path, "code/net.py", "sent/x")
    for name in (b"caf\xe9.txt", b"d\xe9p\xf4t/x.py"):
        made(tmp_path / "code", os.fsdecode(name))
    assert taken(tmp_path / "code") == {"net.py"}
    send(tmp_path / "code", tmp_path / "sent")
