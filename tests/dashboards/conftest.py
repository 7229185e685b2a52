"""A real server in a process of its own, and a real browser."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import CHROMIUM


@dataclass
class Served:
    """A dashboard that runs: what it said, and where it is."""

    process: subprocess.Popen[str]
    said: list[str]
    errors: Path

    @property
    def dashboard(self) -> str:
        """Address of the dashboard, with the slash at its end."""
        return self._address("dashboard")

    @property
    def mlflow(self) -> str:
        """Address of MLflow's pages, without a slash at its end."""
        return self._address("MLflow").rstrip("/")

    def _address(self, what: str) -> str:
        found = re.search(rf"^{what}: +(\S+)", "\n".join(self.said), re.MULTILINE)
        assert found, (self.said, self.errors.read_text())
        return found[1]

    def stop(self) -> int:
        """Press Ctrl-C and wait."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(30)


@contextmanager
def serving(*arguments: object, directory: Path, port: int = 0) -> Iterator[Served]:
    """Run `autorank dashboard` in `directory`, on a free port unless one is given, until the block ends."""
    errors = directory / "dashboard-errors.txt"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "autorank.cli",
                "dashboard",
                *map(str, arguments),
                "--port",
                str(port),
                "--no-browser",
            ],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=directory,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        assert process.stdout is not None
        served = Served(process, [], errors)
        try:
            for line in process.stdout:
                served.said.append(line.rstrip())
                if "Ctrl-C" in line:
                    break
            else:
                raise AssertionError(f"it did not start: {served.said} {errors.read_text()}")
            yield served
        finally:
            served.stop()
            process.stdout.close()


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Served]]:
    """Return a function that starts a dashboard on places; all of them end with the module."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(*arguments: object, directory: Path | None = None) -> Served:
            place = directory or tmp_path_factory.mktemp("served")
            return stack.enter_context(serving(*arguments, directory=place))

        yield start


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Containers have no user namespaces for the sandbox, and little shared memory.
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A fresh page; the test fails when a script on it does."""
    context = browser.new_context(viewport={"width": 1366, "height": 768}, accept_downloads=True)
    opened = context.new_page()
    opened.set_default_timeout(300_000)  # only keeps a broken build from hanging
    troubles: list[str] = []
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    yield opened
    context.close()
    assert not troubles
