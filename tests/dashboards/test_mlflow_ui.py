"""MLflow's own pages on the dashboard's port: what somebody sees there who knows nothing of autorank."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autorank.registry import pack
from autorank.run_values import trial_name
from autorank.tracking import Tracker
from tests import exporting
from tests.dashboards import looking
from tests.dashboards.samples import DENSE, front_points, write_sweep

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep as MLflow holds it when all is done, with a model in the registry; its root, header and trials."""
    root = tmp_path_factory.mktemp("mlflow-ui")
    head, done = write_sweep(root / "sweeps" / "first", 12, seed=1)
    head = replace(head, config={**head.config, "model": "python:nets.zoo:tiny"})
    front = front_points(head, done)
    case = exporting.make("tiny_conv", exporting.TINY)
    point = replace(case.point, record=replace(case.point.record, number=front[0].record.number))
    (packed := root / "packed").mkdir()
    package = pack(case.task, head, point, case.model, packed, lambda *_: None)
    tracker = Tracker(None, root / "sweeps" / "first")
    tracker.start(head)
    for record in done:
        tracker.log(record)
    tracker.finish(front, dense=DENSE)
    assert "champion" in tracker.register(package)
    tracker.close()
    assert not tracker.problem
    return root, head, done


@pytest.fixture(scope="module")
def served(serve, sweep):
    return serve("sweeps", directory=sweep[0])


@pytest.fixture(autouse=True)
def _nothing_from_elsewhere(page, served):
    hosts = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if request.url.startswith("http") else None)
    yield
    assert hosts == {served.mlflow.partition("//")[2]}


def test_from_the_dashboard_to_the_figure_of_the_sweep(page, served):
    looking.home(page, served)
    page.get_by_role("link", name="first").click()
    link = page.locator("#mlflow-run")
    link.wait_for()
    page.goto(f"{served.mlflow}{link.get_attribute('href')}")
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("pareto.html").first.click()
    frame = page.frame_locator("iframe.mlflow-html-iframe")
    frame.locator(".scatterlayer .points path").first.wait_for()
    assert frame.locator(".scatterlayer .points path").count() > 10
    assert frame.locator(".g-xtitle text").text_content().startswith("MACs kept (compressed ÷ dense)")
    page.get_by_text("rank_map.html").first.click()
    frame.locator(".heatmaplayer image").wait_for()


def test_runs_have_names_that_say_what_they_are(page, served, sweep):
    _, head, done = sweep
    page.goto(f"{served.mlflow}/#/experiments/1/runs")
    row = page.get_by_role("gridcell").filter(has=page.get_by_role("link", name=head.sweep_id, exact=True))
    row.locator("button").first.click()
    for record in done[:3]:
        page.get_by_role("link", name=trial_name(record)).first.wait_for()


def test_the_registry_shows_the_champion(page, served):
    page.goto(f"{served.mlflow}/#/models/nets.zoo.tiny")
    page.get_by_text("champion", exact=True).or_(page.get_by_text("@ champion")).first.wait_for()
    page.get_by_text("Version 1").first.wait_for()
