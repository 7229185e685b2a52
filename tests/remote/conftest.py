"""Machines and URLs for tests of sweeps at a URL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from autorank import remotelock


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let every test begin on a machine of its own, and move to another one."""

    def move(machine: str) -> None:
        monkeypatch.setenv("AUTORANK_CACHE", str(tmp_path / machine))

    move("here")
    monkeypatch.setattr(remotelock, "RENEWED", 0.1)
    monkeypatch.setattr(remotelock, "STALE", 0.6)
    monkeypatch.setattr(remotelock, "SETTLED", 0.05)
    return move


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield f"memory://{tmp_path.name}/net" if request.param == "memory" else f"file://{tmp_path}/far/net"
    if request.param == "memory":
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[str]:
    yield f"memory://{tmp_path.name}/net"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
