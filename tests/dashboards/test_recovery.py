"""Everything that can go wrong around the dashboard: it says what it knows in a line, and recovers by itself."""

from __future__ import annotations

import shutil
import signal
import socket
import sqlite3
from urllib.parse import urlsplit

import pytest

from autorank.journal import FILE_NAME
from tests.dashboards import looking
from tests.dashboards.conftest import serving
from tests.dashboards.samples import Growing, write_sweep

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("recovery")


@pytest.fixture(scope="module")
def lock(root):
    """Hold MLflow's database as another process does that writes and writes; the value lets it go."""
    file = root / "mlflow.db"
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(f"sqlite:///{file}", (root / "mlartifacts").as_uri()).engine.dispose()
    held = sqlite3.connect(file, isolation_level=None)
    held.execute("PRAGMA locking_mode=EXCLUSIVE")
    held.execute("BEGIN EXCLUSIVE")
    yield held
    held.close()


@pytest.fixture(scope="module")
def served(serve, root, lock):
    """Started where nothing is but a database that is locked."""
    return serve("sweeps", "--tracking-uri", f"sqlite:///{root / 'mlflow.db'}", directory=root)


@pytest.fixture(autouse=True)
def _no_traceback(served):
    yield
    assert "Traceback" not in served.errors.read_text()


def open_sweep_page(page, served, name):
    """Open the page of a sweep as soon as it is listed."""
    page.goto(served.dashboard)
    page.get_by_role("link", name=name, exact=True).click()
    page.wait_for_selector("#sweep-head")


class TestInThisOrder:
    """One server that lives through it all."""

    def test_nothing_is_there_and_the_database_is_locked(self, page, served, lock):
        page.goto(served.dashboard)
        page.get_by_role("heading", name="No sweep yet").wait_for()
        notes = page.locator("#notes")
        notes.get_by_text("does not exist yet").wait_for()
        looking.wait(page, "/locked/.test(document.querySelector('#notes p')?.title || '')")
        assert len(notes.locator("p").all()) == 1
        assert "\n" not in notes.inner_text()
        lock.execute("ROLLBACK")
        lock.close()
        looking.wait(page, "!/locked/.test(document.querySelector('#notes p')?.title || '')")

    def test_a_sweep_begins_while_one_looks(self, page, served, root):
        page.goto(served.dashboard)
        page.get_by_role("heading", name="No sweep yet").wait_for()
        page.evaluate("() => { window.same = true; }")
        with Growing(root / "sweeps" / "growing", 30, seed=4) as sweep:
            page.wait_for_selector(".chip.preparing")
            page.get_by_role("link", name="growing").click()
            page.get_by_text("candidates are fitted").first.wait_for()
            sweep.begin()
            page.wait_for_selector(".chip.running")
            for count in (6, 12):
                sweep.grow(6)
                looking.wait(page, f"{looking.MARKS} === arg", sum(r.status != "failed" for r in sweep.records[:count]))
            page.get_by_text("12 of 30 trials").wait_for()
        page.wait_for_selector(".chip.stopped")
        assert page.locator("#notes, .note-line").count() == 0
        assert page.evaluate("() => window.same")

    def test_a_journal_that_a_crash_cut_in_the_middle_of_a_line(self, page, served, root):
        write_sweep(root / "sweeps" / "crashed", 18, seed=6, ended="", measured=False)
        with (root / "sweeps" / "crashed" / FILE_NAME).open("a") as journal:
            journal.write('{"event": "trial", "number": 1')
        open_sweep_page(page, served, "crashed")
        page.get_by_text("18 of 18 trials").wait_for()
        page.wait_for_selector(".chip.stopped")
        assert page.locator(".note-line").count() == 0
        looking.wait(page, f"{looking.MARKS} > 0")

    def test_a_journal_with_a_line_that_is_damaged(self, page, served, root):
        directory = root / "sweeps" / "damaged"
        write_sweep(directory, 18, seed=7)
        whole = (directory / FILE_NAME).read_text()
        lines = whole.splitlines(keepends=True)
        (directory / FILE_NAME).write_text("".join([*lines[:9], "\x00\x00 not json\n", *lines[10:]]))
        open_sweep_page(page, served, "damaged")
        page.wait_for_selector(".note-line")
        said = page.locator(".note-line").inner_text()
        assert "line 10" in said
        assert "\n" not in said
        (directory / FILE_NAME).write_text(whole)
        page.wait_for_selector(".note-line", state="detached")
        page.get_by_text("18 of 18 trials").wait_for()

    def test_the_directory_goes_away_while_one_looks(self, page, served, root):
        write_sweep(root / "sweeps" / "removed", 12, seed=8)
        open_sweep_page(page, served, "removed")
        looking.wait(page, f"{looking.MARKS} > 0")
        shutil.rmtree(root / "sweeps" / "removed")
        page.get_by_role("heading", name="There is no such sweep (any more).").wait_for()
        page.get_by_role("link", name="Back to all sweeps").click()
        page.wait_for_selector("table.list")
        assert "removed" not in looking.keys(page)

    def test_the_dashboard_is_killed_and_started_again_without_a_server_for_the_runs(self, page, served, root):
        with Growing(root / "sweeps" / "outlives", 30, seed=9) as sweep:
            sweep.begin()
            sweep.grow(6)
            open_sweep_page(page, served, "outlives")
            looking.wait(page, f"{looking.MARKS} > 0")
            page.evaluate("() => { window.same = true; }")
            served.process.send_signal(signal.SIGKILL)
            page.get_by_text("The server does not answer").wait_for()
            sweep.grow(12)
            with socket.socket() as closed:
                closed.bind(("127.0.0.1", 0))
                away = f"http://me:s3cret@127.0.0.1:{closed.getsockname()[1]}"
            port = urlsplit(served.mlflow).port
            with serving("sweeps", "--tracking-uri", away, directory=root, port=port) as again:
                page.get_by_text("The server does not answer").wait_for(state="detached")
                looking.wait(page, f"{looking.MARKS} === arg", sum(r.status != "failed" for r in sweep.records[:18]))
                sweep.grow(3)
                page.get_by_text("21 of 30 trials").wait_for()
                assert page.evaluate("() => window.same")
                page.goto(again.dashboard)
                note = page.locator("#notes").get_by_text("MLflow at http")
                note.wait_for()
                assert "s3cret" not in page.content()
                assert "\n" not in note.inner_text()
                assert "Traceback" not in again.errors.read_text()
