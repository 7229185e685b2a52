"""The pages as trees of components and as answers of the server; how they behave in a browser is in `test_browser`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.utils
import pytest

from autorank.dashboards import drawings
from autorank.dashboards.address import TABS, Address
from autorank.dashboards.jobs import Exports
from autorank.dashboards.library import Library, SweepView
from autorank.dashboards.pages import make_dash, page
from autorank.dashboards.sections import Aside, Section, changed, shown
from autorank.dashboards.server import Sources
from autorank.dashboards.standing import PAGES, panel_figure, standing
from autorank.journal import Journal
from autorank.types import FrontPoint, TrialRecord
from tests.dashboards.samples import Growing, sweep_header, write_sweep
from tests.sweep_samples import DENSE, HOSTILE, header, points, records

NAME = "<img src=x onerror=alert(1)> **bold** [x](javascript:alert(1))"


@dataclass
class Links:
    """Stands for MLflow, which knows one sweep."""

    problem: str = ""
    home: str = "/"

    def page(self, sweep_id: str) -> str | None:
        return "/#/experiments/1/runs/2" if sweep_id == "finished" else None


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sources]:
    root = tmp_path_factory.mktemp("sweeps")
    write_sweep(root / "finished", 60)
    write_sweep(root / "killed", 12, ended="", measured=False)
    write_sweep(root / "hostile", 30, sweep_id=NAME)
    write_sweep(root / "empty", 0, ended="", measured=False)
    with Journal(root / "failed") as journal:
        journal.write_header(sweep_header("failed", 4))
        for record in records(sweep_header("failed"), 12):
            if record.status == "failed":
                journal.write_trial(record)
    lower = header("lower", ("score", "macs_kept", "params_kept"), "min", "loss")
    done = records(lower, 40, 3, mixed_fidelity=True)
    with Journal(root / "lower") as journal:
        journal.write_header(lower)
        for record in done:
            journal.write_trial(record)
        journal.write_front(points(lower, done), DENSE)
    (root / "damaged").mkdir()
    (root / "damaged" / "journal.jsonl").write_text('{"event": "sweep"\nnonsense\n')
    library, exports = Library([root]), Exports(tmp_path_factory.mktemp("exports"))
    with Growing(root / "preparing", 10):
        library.poll()
        yield Sources(library, exports, Links())  # type: ignore[arg-type]
    exports.close()


def view_of(sources: Sources, name: str) -> SweepView:
    return next(view for view in sources.library.sweeps() if view.directory.name == name)


def tree(part: Any) -> Any:
    """The components as the browser gets them."""
    return json.loads(json.dumps(part, cls=plotly.utils.PlotlyJSONEncoder))


def nodes(part: Any) -> Iterator[dict[str, Any]]:
    """Every component of a tree."""
    if isinstance(part, list):
        for item in part:
            yield from nodes(item)
    elif isinstance(part, dict):
        if "type" in part and "props" in part:
            yield part
        elif "tag" in part:  # of `dashboards.plain`
            yield {"type": part["tag"].capitalize(), "props": {**part["attributes"], "children": part["children"]}}
        for value in part.values():
            yield from nodes(value)


def text(part: Any) -> str:
    """What a reader reads."""
    if isinstance(part, list):
        return " ".join(map(text, part))
    if isinstance(part, dict):
        props = part.get("props", part)
        return text(props.get("tree", props.get("children", "")))
    return "" if part is None else str(part)


def ids(part: Any) -> set[str]:
    return {str(node["props"]["id"]) for node in nodes(part) if "id" in node["props"]}


def at(sources: Sources, name: str, **more: Any) -> Address:
    return Address(view_of(sources, name).key, **more)


@pytest.mark.parametrize(
    "address",
    [
        Address(),
        Address("a1", point=3, pin=4, tab="compare"),
        Address("a1", "b2"),
        Address("a1", x="score", y="params_kept", lose=1.5, hide=("a b", "c&d=e", NAME), skip=("full",)),
        Address("a1", need=3.25, tab="ranks"),
    ],
    ids=["list", "points", "sweeps", "figure", "bound"],
)
def test_an_address_is_read_as_it_was_written(address: Address) -> None:
    assert Address.of(address.link()) == address


@pytest.mark.parametrize(
    "search",
    [
        None,
        "",
        "?",
        "?point=3",
        "?sweep=a&point=-1&pin=x&tab=nothing&lose=nan&need=inf",
        "?sweep=a&point=99999999999999999999&lose=-1&point=١",
        "?" + "&".join(f"a{i}=1" for i in range(5000)),
        "?sweep=" + "x" * 100_000,
        "?%ff%00=%ff&sweep=%00",
    ],
    ids=["none", "empty", "mark", "no sweep", "wrong values", "too large", "many", "long", "bytes"],
)
def test_what_cannot_be_read_in_an_address_is_left_out(search: str | None) -> None:
    read = Address.of(search)
    assert read.point is None or read.sweep == ""
    assert (read.pin, read.tab, read.lose, read.need) == (None, "", None, None)


@pytest.mark.parametrize("name", ["finished", "killed", "hostile", "empty", "failed", "lower", "damaged", "preparing"])
def test_every_sweep_has_a_whole_page_whatever_is_known_of_it(sources: Sources, name: str) -> None:
    view = view_of(sources, name)
    looks: list[dict[str, Any]] = [{"point": 999}, {"lose": 0.0}, {"need": 50.0}, {"x": "no", "y": "score"}]
    for more in [*looks, *({"point": 1, "pin": 2, "tab": tab} for tab in TABS)]:
        address = at(sources, name, **more)
        made = tree(page(sources, address))
        assert view.name in text(made)
        assert {"sweep-head", "members", "panel", "front", "answer"} <= ids(made)
        assert standing(sources, address)["title"] == f"{view.name} · autorank"
        if address.tab != "importance" and (drawing := panel_figure(sources, address)) is not None:
            assert set(drawing.draw()) == {"data", "layout"}


@pytest.mark.parametrize(
    "address", [Address("no"), Address("no", "neither"), Address("no", point=3)], ids=["sweep", "pair", "point"]
)
def test_an_unknown_sweep_says_so_and_leads_back(sources: Sources, address: Address) -> None:
    made = tree(page(sources, address))
    assert "any more" in text(made)
    assert [node["props"]["href"] for node in nodes(made) if node["props"].get("id") == "back-to-list"] == ["?"]
    assert standing(sources, address)["selected"] == [None, address.pin]


def test_the_list_shows_all_sweeps_with_state_and_numbers(sources: Sources) -> None:
    made = tree(page(sources, Address()))
    read = text(made)
    for view in sources.library.sweeps():
        assert f"row-{view.key}" in ids(made)
        assert view.name in read
    assert {"stopped", "ended", "preparing"} <= set(read.split())
    best = view_of(sources, "finished").recommended
    assert best is not None
    assert best.record.score is not None
    assert f"{best.record.score:.2f} %" in read
    assert "damaged" in text(next(n for n in nodes(made) if n["props"].get("id") == "notes"))


def test_the_list_is_filtered_by_name_and_says_what_to_do_when_there_is_nothing(
    sources: Sources, tmp_path: Path
) -> None:
    rows = [name for name in PAGES["list"].sections(sources, Address(), "FINI") if name.startswith("row-")]
    assert rows == [f"row-{view_of(sources, 'finished').key}"]
    empty = Sources(Library([tmp_path / "later"]), sources.exports, sources.runs)
    assert "autorank search" in text(tree(page(empty, Address())))


def test_names_are_text_and_nothing_else(sources: Sources) -> None:
    pages = [Address(), at(sources, "hostile", point=1), at(sources, "hostile", point=1, pin=2)]
    pages.append(Address(view_of(sources, "hostile").key, view_of(sources, "finished").key))
    for address in pages:
        made = tree(page(sources, address))
        assert not [n for n in nodes(made) if n["type"] in ("Markdown", "Iframe", "Script", "DangerouslySetInnerHTML")]
        for node in nodes(made):
            href = node["props"].get("href", "?")
            assert href.startswith(("?", "/")), href
            assert "dangerously_allow_html" not in node["props"]
    assert HOSTILE in text(tree(page(sources, pages[1])))
    figure = json.dumps(panel_figure(sources, Address(pages[1].sweep, tab="ranks")).draw())  # type: ignore[union-attr]
    assert "<script" not in figure


def test_a_point_shows_scores_costs_layers_and_the_command(sources: Sources) -> None:
    view = view_of(sources, "finished")
    point: FrontPoint = view.points[0]
    made = tree(page(sources, at(sources, "finished", point=point.record.number)))
    read = text(made)
    assert f"autorank export {view.directory} --point {point.record.number}" in read
    assert f"{point.test_score:.2f} %" in read
    assert {"scores", "costs", "layers", "export", "pin", "command"} <= ids(made)
    assert all(layer.name in read for layer in point.record.layers)
    assert "slower" in read  # the first point of the samples has a layer that got slower


def test_a_trial_that_is_not_on_the_front_cannot_be_exported(sources: Sources) -> None:
    view = view_of(sources, "finished")
    front = {p.record.number for p in view.points}
    other: TrialRecord = next(r for r in view.contents.records if r.number not in front and r.status == "complete")
    made = tree(page(sources, at(sources, "finished", point=other.number)))
    assert "export" not in ids(made)
    assert "Only points on the front" in text(made)


def test_a_bound_in_the_address_picks_the_point_and_says_why(sources: Sources) -> None:
    address = at(sources, "finished", need=2.0)
    found = standing(sources, address)["selected"][0]
    record = view_of(sources, "finished").point(found).record  # type: ignore[union-attr]
    assert record.kept["macs_kept"] <= 0.5
    assert f"#{record.number}" in text(
        next(n for n in nodes(tree(page(sources, address))) if n["props"].get("id") == "answer")
    )


def test_two_points_and_two_sweeps_stand_side_by_side(sources: Sources) -> None:
    view = view_of(sources, "finished")
    one, two = (p.record.number for p in view.points[:2])
    made = tree(page(sources, at(sources, "finished", point=one, pin=two)))
    assert {"point-pair", "pair-figures", "pair-differences", "swap", "unpin"} <= ids(made)
    pair = Address(view.key, view_of(sources, "lower").key)
    made = tree(page(sources, pair))
    assert {"pair-head", "pair-figures", "panel-figure"} <= ids(made)
    drawn = panel_figure(sources, pair)
    assert drawn is not None
    assert "% of the dense score" in drawn.draw()["layout"]["yaxis"]["title"]["text"]


def test_only_what_changed_is_made_again() -> None:
    made: list[str] = []

    def section(name: str, shows: str, within: str = "") -> Section:
        return Section(shows, lambda: made.append(name) or name, within)

    first = {"head": section("head", "1"), "table": section("table", "1"), "row": section("row", "1", "table")}
    assert changed(first, shown(first)) == {}
    assert made == []
    assert changed({**first, "row": section("row", "2", "table")}, shown(first)) == {"row": "row"}
    whole = {**first, "table": section("table", "2"), "row": section("row", "2", "table")}
    assert changed(whole, shown(first)) == {"table": "table"}


def test_a_new_trial_changes_what_the_browser_asks_for_and_nothing_else_does(tmp_path: Path, sources: Sources) -> None:
    library = Library([tmp_path])
    with Growing(tmp_path / "live", 20) as sweep:
        sweep.begin()
        sweep.grow(5)
        library.poll()
        growing = Sources(library, sources.exports, sources.runs)
        address = Address(library.sweeps()[0].key)
        before = standing(growing, address)
        library.poll()
        assert standing(growing, address) == before
        sweep.grow(1)
        library.poll()
        after = standing(growing, address)
    assert after["place"] == before["place"]
    assert after["fresh"] != before["fresh"]
    assert after["front"] != before["front"]


def test_what_takes_long_is_made_aside_and_kept() -> None:
    from threading import Event

    aside, go = Aside(2), Event()
    assert aside.latest("a", 1, lambda: go.wait(10)) is None
    assert aside.latest("a", 1, lambda: pytest.fail("it is under way")) is None
    go.set()
    aside._pool.shutdown(wait=True)
    assert aside.latest("a", 1, lambda: pytest.fail("it is there")) == (1, True)
    assert aside.done == 1


def test_what_is_made_aside_may_be_done_at_once() -> None:
    aside = Aside(2)
    for number in range(500):
        aside.latest(number, 0, lambda: None)
    aside._pool.shutdown(wait=True)
    assert aside.done == 500


@pytest.fixture(scope="module")
def client(sources: Sources) -> Any:
    return make_dash(sources, "/dashboard/").server.test_client()


def call(client: Any, outputs: list[str], inputs: dict[str, Any], state: dict[str, Any]) -> Any:
    """Ask for a callback as the browser does."""

    def split(name: str, value: Any = None) -> dict[str, Any]:
        element, _, prop = name.rpartition(".")
        return {"id": element, "property": prop, "value": value}

    one = len(outputs) == 1
    listed = [{k: v for k, v in split(name).items() if k != "value"} for name in outputs]
    return client.post(
        "/_dash-update-component",
        json={
            "output": outputs[0] if one else f"..{'...'.join(outputs)}..",
            "outputs": listed[0] if one else listed,
            "inputs": [split(*item) for item in inputs.items()],
            "state": [split(*item) for item in state.items()],
            "changedPropIds": list(inputs)[:1],
        },
    )


@pytest.mark.parametrize(
    "search", ["", "?sweep=no", "?sweep=%00&point=x", "?sweep=a&with=b"], ids=["list", "unknown", "wrong", "pair"]
)
def test_the_server_answers_any_address(client: Any, search: str) -> None:
    assert client.get(f"/standing{search}").status_code == 200
    state = {"url.search": search, "dark.data": True}
    answer = call(client, ["main.children", "shown.data"], {"place.data": "x"}, state)
    assert answer.status_code == 200
    assert client.get(f"/{search}").status_code == 200


def test_the_figure_comes_in_the_theme_that_is_asked_for(client: Any, sources: Sources) -> None:
    search = {"url.search": at(sources, "finished").link(), "front-known.data": None}
    grounds = []
    for dark in (True, False):
        answer = call(client, ["front-base.data"], {"front-shows.data": "x", "dark.data": dark}, search)
        grounds.append(answer.get_json()["response"]["front-base"]["data"]["layout"]["paper_bgcolor"])
    assert len(set(grounds)) == 2


def told(figure: dict[str, Any]) -> list[str]:
    """The texts of a figure's trials."""
    return [text for trace in figure["data"] if "customdata" in trace for text in trace["text"] if text]


def test_the_browser_is_told_of_each_trial_once(tmp_path: Path) -> None:
    library, address = Library([tmp_path]), Address()
    with Growing(tmp_path / "sweep", 12) as growing:
        growing.begin()
        seen: list[list[str]] = []
        known = None
        for _ in range(2):
            growing.grow(6)
            library.poll()
            figure = drawings.front(library.sweeps()[0], address, False, known)
            known = figure["known"]
            seen.append(told(figure))
        growing.end()
    library.poll()
    whole = told(drawings.front(library.sweeps()[0], address, False))
    assert all(seen)
    assert not set(seen[0]) & set(seen[1])
    assert len(seen[0]) + len(seen[1]) == len(whole)
    assert told(drawings.front(library.sweeps()[0], address, False, known)) == whole  # measured since


@pytest.mark.parametrize(
    "known", [None, "x", [], {}, {"whose": "x", "count": 5}, {"whose": [], "count": "5"}], ids=repr
)
def test_a_browser_that_knows_nothing_of_this_sweep_is_told_all(sources: Sources, known: Any) -> None:
    view = view_of(sources, "finished")
    assert told(drawings.front(view, Address(), False, known)) == told(drawings.front(view, Address(), False))


@pytest.mark.parametrize("count", ["5", -5, 1e9, None, True], ids=repr)
def test_a_wrong_count_of_known_trials_breaks_nothing(sources: Sources, count: Any) -> None:
    view = view_of(sources, "finished")
    known = {**drawings.front(view, Address(), False)["known"], "count": count}
    assert drawings.front(view, Address(), False, known)["data"]


def test_an_export_that_cannot_be_says_why(client: Any, sources: Sources) -> None:
    view = view_of(sources, "finished")
    search = {"url.search": at(sources, "finished", point=view.points[0].record.number).link()}
    state = {**search, "export-formats.value": [], "exports.data": {}}
    answer = call(client, ["exports.data"], {"export.n_clicks": 1}, state).get_json()["response"]["exports"]["data"]
    assert [value for value in answer.values() if value.startswith("!")]
    followed = call(
        client,
        ["export-state.children", "export-tick.disabled", "export.disabled"],
        {"exports.data": answer, "export-tick.n_intervals": 0},
        search,
    ).get_json()["response"]
    assert "at least one" in text(followed["export-state"]["children"])
    assert followed["export-tick"]["disabled"] is True
