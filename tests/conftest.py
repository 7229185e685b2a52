"""Shared by all tests: one thread, a cache of their own, and the real data beside the checkout where it is found."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Debian keeps it off the search path.
_SERVERS = filter(None, [shutil.which("postgres"), *glob("/usr/lib/postgresql/*/bin/postgres")])
POSTGRES = next((Path(found).resolve() for found in _SERVERS), None)
VISION = all(importlib.util.find_spec(name) is not None for name in ("torchvision", "timm"))

# Before anything imports torch or numpy; tests run side by side on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def shared_found() -> bool:
    """Whether the real data and weights lie beside the checkout."""
    return (SHARED / "data" / "cifar10-jpeg").is_dir() and (SHARED / "models").is_dir()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "browser: needs Chromium (run only when it is found)")
    config.addinivalue_line("markers", "postgres: needs PostgreSQL's programs (run only when they are found)")
    config.addinivalue_line("markers", "vision: needs torchvision and timm (run only when they are installed)")
    if "AUTORANK_CACHE" not in os.environ or not hasattr(config, "workerinput"):
        directory = tempfile.TemporaryDirectory(prefix="autorank-tests-")
        config.add_cleanup(directory.cleanup)
        os.environ["AUTORANK_CACHE"] = directory.name
    import torch

    torch.set_num_threads(1)
    if VISION:
        _declare_torchvision_operators()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # In the summary, since the header is not printed with -q.
    data = str(SHARED) if shared_found() else f"not found ({SHARED}): tests marked 'shared' are deselected"
    vision = "installed" if VISION else "not installed: tests marked 'vision' are deselected"
    terminalreporter.write_line(f"shared data: {data}")
    terminalreporter.write_line(f"torchvision and timm: {vision}")
    terminalreporter.write_line(f"PostgreSQL: {POSTGRES or 'not found: tests marked postgres are deselected'}")
    terminalreporter.write_line(f"browser: {CHROMIUM or 'no chromium found: tests marked browser are deselected'}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = {
        "shared": not shared_found(),
        "vision": not VISION,
        "browser": CHROMIUM is None,
        "postgres": POSTGRES is None,
    }
    for item in items:
        if item.get_closest_marker("browser"):
            # All tests of a file in one process: they share the server and the browser.
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    gone = [item for item in items if any(absent and item.get_closest_marker(m) for m, absent in missing.items())]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in gone]


@pytest.fixture(scope="session", autouse=True)
def brief_timings() -> Iterator[None]:
    """Let latencies be measured for a moment only: no test looks at how steady they are."""
    from autorank import measure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "SECONDS", 0.01)
        patch.setattr(measure, "LAYER_SECONDS", 0.002)
        patch.setattr(measure, "MIN_BLOCKS", 2)
        yield


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Directory of the real data and weights; only for tests marked ``shared``."""
    assert shared_found(), "mark the test with @pytest.mark.shared"
    return SHARED


@pytest.fixture(scope="session")
def digits_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the demonstration's network, trained on digits for a few seconds."""
    from autorank import demo

    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    demo.prepare_weights(path)
    return path


def _declare_torchvision_operators() -> None:
    # A torchvision built for another torch imports once the schemas of its compiled operators are there; models and
    # transforms need no more than that.
    import torch

    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    pytest.torchvision_library = library  # type: ignore[attr-defined]  # the schemas live as long as the library object
