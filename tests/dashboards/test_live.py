"""The whole way: a dashboard before there is anything; a real sweep watched, killed, resumed, and exported from."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import yaml

import autorank
from autorank import demo
from autorank.evaluate import evaluate
from autorank.sweep import open_sweep
from autorank.tasks import load_task
from tests.dashboards import looking

pytestmark = pytest.mark.browser

MANY = 400
"""Trials that no test waits for: the sweep is ended when enough was seen."""


@pytest.fixture(scope="module")
def root(tmp_path_factory, digits_weights):
    """An empty directory, but for what a search of a few hundred short trials needs."""
    root = tmp_path_factory.mktemp("live")
    settings = {
        "model": demo.MODEL,
        "weights": str(digits_weights),
        "data": "digits",
        "validation": 0.2,
        "space": demo.QUICK,
        "trials": MANY,
        "recovery": {"steps": 5, "batch_size": 32, "calibration": 64},
        "calibration": 64,
    }
    (root / "sweep.yaml").write_text(yaml.safe_dump(settings))
    return root


@pytest.fixture(scope="module")
def served(serve, root):
    return serve(directory=root)


@contextmanager
def running(root, *arguments):
    """Run autorank in another process, and kill it with all that belongs to it at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "autorank.cli", *map(str, arguments), "--quiet"],
        cwd=root,
        stdout=subprocess.DEVNULL,
        stderr=(root / "errors.txt").open("w"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def sweep(root):
    """The sweep's directory, with a front that was measured; ended here if no test did it yet."""
    directory = root / "sweeps" / "live"
    command = ("resume", directory) if directory.exists() else ("search", "sweep.yaml", "--sweep-dir", directory)
    if not directory.exists() or not open_sweep(directory).ended:
        count = len(open_sweep(directory).records) if directory.exists() else 0
        with running(root, *command, "--executor", "inline", "--trials", count + 6) as process:
            assert process.wait() == 0, (root / "errors.txt").read_text()
    return directory


@pytest.fixture
def query(page, served, sweep):
    """The query of the sweep's page."""
    found = looking.home(page, served)
    assert len(found) == 1
    return next(iter(found.values()))


def test_from_nothing_to_a_front_that_grows_is_killed_and_goes_on(page, served, root):
    with looking.listening(page) as said:
        page.goto(served.dashboard)
        page.get_by_role("heading", name="No sweep yet").wait_for()
        command = shlex.split(page.locator("#empty-command").inner_text())
        assert command[0] == "autorank"
        subprocess.run([sys.executable, "-m", "autorank.cli", *command[1:], "--help"], check=True, capture_output=True)
        page.evaluate("() => { window.same = true; }")  # gone after a reload

        with running(root, "search", "sweep.yaml", "--sweep-dir", "sweeps/live", "--workers", 1) as process:
            page.wait_for_selector("table.list th[scope=row] a")
            page.locator("table.list th[scope=row] a").click()
            looking.wait(page, f"{looking.MARKS} >= 3")
            assert "of 400 trials" in page.locator("#sweep-head").inner_text()
            page.locator("#members a").first.click()
            page.wait_for_selector("#point #layers")
            number = looking.query(page)["point"]
            zoomed = looking.zoom(page)
            looking.wait(page, f"{looking.MARKS} >= arg", looking.marks(page) + 3)
            assert looking.shown_range(page) == zoomed
            assert looking.query(page)["point"] == number
            assert page.locator(f"#member-{number}[aria-current=true]").count() + page.locator("#point").count() >= 1
            page.wait_for_selector("#mlflow-run")
            page.wait_for_selector(".chip.running")
            os.kill(process.pid, signal.SIGKILL)
            page.wait_for_selector(".chip.stopped")
        done = looking.marks(page)

        with running(root, "resume", "sweeps/live", "--executor", "inline") as process:
            page.wait_for_selector(".chip.running")
            looking.wait(page, f"{looking.MARKS} > arg", done)
            process.send_signal(signal.SIGINT)
            page.wait_for_selector(".chip.running", state="detached")
            process.wait()
        assert page.evaluate("() => window.same")
    assert not said
    assert "Traceback" not in served.errors.read_text()


def test_a_click_shows_the_point_and_a_command_that_works(page, served, sweep, query, tmp_path):
    looking.look(page, served, query)
    point = open_sweep(sweep).points[0]
    looking.click_point(page, point.record.number)
    page.wait_for_selector("#point #layers")
    looking.wait_for_query(page, point=point.record.number)
    shown = page.locator("#layers").inner_text()
    for layer in point.record.layers:
        assert layer.name in shown
        assert layer.choice.format in shown
    heads = page.locator("#layers thead").inner_text()
    assert "Weight error" in heads
    assert "Output error" in heads
    assert f"{point.record.score:.2f} %" in page.locator("#scores").inner_text()
    page.wait_for_selector("#panel-figure .scatterlayer .js-line")
    looking.wait(page, "document.querySelector('#panel-figure .g-ytitle text')?.textContent.includes('loss')")
    command = page.locator("#command").inner_text()
    program = f"{shlex.quote(sys.executable)} -m autorank.cli"
    written = tmp_path / "out"
    done = subprocess.run(
        f"{command.replace('autorank', program, 1)} --formats safetensors --out {shlex.quote(str(written))}",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((written / "plan.json").read_text()) == point.record.plan.to_json()


@pytest.mark.parametrize(
    ("mode", "keys", "bound"),
    [
        pytest.param("lose", ["End"], lambda value: {"max_drop": value}, id="everything may be lost"),
        pytest.param("lose", ["ArrowLeft", "ArrowLeft"], lambda value: {"max_drop": value}, id="a little less"),
        pytest.param("need", ["ArrowRight"] * 3, lambda value: {"max_macs": 1 / value}, id="fewer MACs"),
    ],
)
def test_the_slider_picks_what_export_would(page, served, sweep, query, mode, keys, bound):
    looking.look(page, served, query)
    if mode == "need":
        page.get_by_text("I need fewer MACs").click()
        looking.wait(page, "new URLSearchParams(location.search).has('need')")
        page.wait_for_selector("#amount.need, .need #amount, .need")
    slider = page.get_by_role("slider")
    slider.focus()
    for key in keys:
        page.keyboard.press(key)
    looking.wait(page, "new URLSearchParams(location.search).get(arg) !== null", mode)
    value = looking.until(
        lambda: (now := slider.get_attribute("aria-valuenow")) == looking.query(page)[mode] and float(now), "a value"
    )
    found = open_sweep(sweep)
    try:
        number = found.best(**bound(value)).record.number
    except autorank.AutorankError:
        page.locator("#answer").get_by_text("No point").wait_for()
    else:
        page.locator("#answer").get_by_text(f"#{number} (").wait_for()
        page.wait_for_selector(f"#point h2:text-is('Point #{number}')")


def test_an_export_is_downloaded_and_scores_what_the_page_said(page, served, sweep, query, tmp_path):
    import onnxruntime

    point = open_sweep(sweep).points[0]
    page.goto(f"{served.dashboard}{query}&point={point.record.number}")
    page.wait_for_selector("#export")
    page.get_by_label("pt2").uncheck()
    said = page.locator("#scores tr", has_text="after recovery").inner_text().split("\t")[2]
    page.click("#export")
    page.wait_for_selector("#download")
    link = page.locator("#download").get_attribute("href")
    with page.expect_download() as waiting:
        page.click("#download")
    archive = tmp_path / "model.zip"
    waiting.value.save_as(archive)
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path)
        names = opened.namelist()
    assert not any(name.startswith(("/", "..")) for name in names)
    folder = tmp_path / names[0].partition("/")[0]

    task = load_task(model=demo.MODEL, data="digits", validation=0.2)
    model = autorank.load(folder, demo.network)
    assert f"{evaluate(model, task, 'validation').score:.2f} %" == said
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    name = session.get_inputs()[0].name
    right = [
        (session.run(None, {name: batch.inputs[0].numpy()})[0].argmax(1) == batch.targets.numpy())
        for batch in task.batches("validation", 64)
    ]
    assert f"{100 * np.concatenate(right).mean():.2f} %" == said

    forged = page.request.get(f"{served.mlflow}{link[:-1]}{'0' if link[-1] != '0' else '1'}")
    assert forged.status == 404
