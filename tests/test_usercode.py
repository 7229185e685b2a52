"""What of a directory is taken for code and sent to other machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from autorank.usercode import SMALL, code_files


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


@pytest.mark.parametrize("name", ["key.pem", "pkg/server.key", "id_rsa", "id_rsa.old", "auth_token", "kubeconfig.yaml"])
def test_keys_stay_at_home(name: str, tmp_path: Path) -> None:
    made(tmp_path, name, "net.py")
    assert taken(tmp_path) == {"net.py"}


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
