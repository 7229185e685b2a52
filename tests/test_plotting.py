"""Figures as dictionaries: against plotly's own schema, the records, and what the themes promise."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest

from autorank import plotting
from autorank.front import front_of
from autorank.growth import growth, hypervolumes
from autorank.importance import importance_of
from autorank.layermap import PARAMS_LABEL, RANK_LABEL, layer_map
from autorank.layerrows import layer_rows
from autorank.scene import scene
from autorank.types import Choice, Plan
from tests.sweep_samples import FULL_RANK, HOSTILE, header, points, records

CASES = {
    "none": (header(), 0),
    "one": (header(), 1),
    "many": (header(), 60),
    "less-is-better": (header(direction="min", metric="mse"), 40),
    "hostile": (header(sweep_id=HOSTILE, metric=f"$\\frac{{ {HOSTILE}\n\x00 $"), 20),
}
KINDS = ("pareto", "hypervolume", "rank_map", "importance", "curve")


def figures_of(head, done):
    front = front_of(done, head.objectives, head.constraints)
    return {
        "pareto": plotting.pareto_figure(scene(head, done, front)),
        "hypervolume": plotting.hypervolume_figure(head, done),
        "rank_map": plotting.rank_map_figure(head, front),
        "importance": plotting.importance_figure(importance_of(head, done)),
        "curve": plotting.curve_figure(head, done),
    }


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def drawn(request):
    head, count = request.param
    return figures_of(head, records(head, count))


@pytest.mark.parametrize("kind", KINDS)
def test_plotly_knows_every_attribute_and_all_is_json(drawn, kind):
    from plotly.graph_objects import Figure

    figure = drawn[kind]
    Figure(copy.deepcopy(figure))  # refuses attributes and values that it does not know
    text = json.dumps(figure, allow_nan=False)
    assert "<script" not in text
    assert json.loads(text) == figure


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_theme_sets_ink_ground_and_grid_and_leaves_the_figure_alone(drawn, kind, dark):
    from plotly.graph_objects import Figure

    figure = drawn[kind]
    before = copy.deepcopy(figure)
    made = plotting.themed(figure, dark)
    assert figure == before
    Figure(copy.deepcopy(made))
    layout = made["layout"]

    def bright(colour):
        return sum(int(colour[i : i + 2], 16) for i in (1, 3, 5)) > 3 * 128

    assert bright(layout["paper_bgcolor"]) == bright(layout["plot_bgcolor"]) != dark
    assert bright(layout["font"]["color"]) == dark
    axes = [name for name in layout if name.startswith(("xaxis", "yaxis"))]
    assert axes
    assert all(bright(layout[name]["gridcolor"]) != dark for name in axes)
    for old, new in zip(before["data"], made["data"], strict=True):
        if old.get("meta") == "ink":
            assert bright((new.get("line") or new["marker"]["line"])["color"]) == dark
        else:
            assert new == old


def test_every_axis_says_what_it_shows(drawn):
    for name, figure in drawn.items():
        for key, axis in figure["layout"].items():
            if key.startswith(("xaxis", "yaxis")) and axis.get("visible", True) and key != "yaxis2":
                assert axis["title"]["text"], (name, key)


@pytest.mark.parametrize(
    ("seconds", "unit", "size"),
    [(2, "seconds", 1), (30, "minutes", 60), (3600, "hours", 3600), (86400, "days", 86400)],
)
def test_hypervolume_stands_against_trials_and_against_time(seconds, unit, size):
    head = header()
    done = [
        replace(r, started=head.created + i * seconds, seconds={"fit": 0.25 * seconds, "tune": 0.5 * seconds})
        for i, r in enumerate(records(head, 30))
    ]
    figure = plotting.hypervolume_figure(head, done)
    volumes = list(hypervolumes(head, done))
    by_trial, by_time = figure["data"]
    assert by_trial["y"] == by_time["y"] == volumes
    assert by_trial["x"] == list(range(1, 31))
    assert by_time["x"] == pytest.approx([(i + 0.75) * seconds / size for i in range(30)])
    assert unit in figure["layout"]["xaxis2"]["title"]["text"]


def test_time_never_goes_back_and_begins_at_nothing():
    """Clocks of workers differ, and trials that were taken over from an earlier sweep ended before this one began."""
    head = header()
    done = records(head, 30)
    earlier = [replace(r, started=head.created - 1e6) if i % 7 == 0 else r for i, r in enumerate(done)]
    times = growth(head, earlier).times
    assert list(times) == sorted(times)
    assert times[0] == 0


def test_rank_map_holds_the_rank_kept_of_every_layer_along_the_front():
    head = header()
    done = records(head, 60)
    front = points(head, done)
    shown = layer_map(head, front)
    ordered = sorted((p.record for p in front), key=lambda r: r.kept["macs_kept"])
    assert shown.numbers == tuple(r.number for r in ordered)
    assert shown.label == RANK_LABEL
    assert shown.layers[0] == "conv1"
    assert all(cell.kept == 1.0 and "left dense" in cell.hover for cell in shown.rows[0])
    for name, row in zip(shown.layers[1:], shown.rows[1:], strict=True):
        assert [cell.kept for cell in row] == pytest.approx([r.plan.choices[name].rank[0] / FULL_RANK for r in ordered])
        for record, cell in zip(ordered, row, strict=True):
            choice, text = record.plan.choices[name], " ".join(cell.hover)
            assert f"{choice.format}, rank {choice.rank[0]} of {FULL_RANK}" in text
            assert f"#{record.number}" in text
            assert "MACs kept" in text
            assert "output error 0.08" in text
    trace = plotting.rank_map_figure(head, front)["data"][0]
    assert trace["z"] == [[cell.kept for cell in row] for row in shown.rows]
    assert trace["x"] == [f"#{n}" for n in shown.numbers]
    assert trace["customdata"] == [list(shown.numbers)] * len(shown.layers)


def test_several_ranks_count_by_their_geometric_mean():
    head = header()
    record = next(r for r in records(head, 12) if r.status == "complete")
    layer = replace(record.layers[0], choice=Choice("tucker2", (8, 5)), full_rank=(16, 40))
    record = replace(record, plan=Plan.of({layer.name: layer.choice}), layers=(layer,))
    assert layer_map(head, [record]).rows[1][0].kept == pytest.approx(math.sqrt(8 / 16 * 5 / 40))


def test_without_full_ranks_the_map_shows_parameters_and_says_so():
    head = header()
    done = records(head, 12)
    old = [
        replace(r, layers=tuple(replace(layer, full_rank=None) for layer in r.layers))
        for r in front_of(done, head.objectives)
    ]
    shown = layer_map(head, old)
    assert shown.label == PARAMS_LABEL
    assert "full ranks are not in this journal" in shown.note
    assert all(cell.kept == 0.6 for row in shown.rows[1:] for cell in row)


def test_a_layer_without_a_result_is_a_gap():
    head = header()
    record = replace(next(r for r in records(head, 12) if r.status == "complete"), layers=())
    shown = layer_map(head, [record])
    assert [row[0].kept for row in shown.rows] == [1.0] + [None] * len(record.plan.layers)
    assert "not reported" in shown.note


def test_layers_whose_names_are_cut_to_the_same_text_keep_their_rows():
    head = header()
    record = next(r for r in records(head, 12) if r.status == "complete")
    names = ["x" * 200 + end for end in "ab"]
    layers = tuple(replace(record.layers[0], name=name) for name in names)
    record = replace(record, plan=Plan.of({layer.name: layer.choice for layer in layers}), layers=layers)
    trace = plotting.rank_map_figure(head, [record])["data"][0]
    assert trace["y"] == [0, 1, 2]


def test_curves_are_those_of_the_records():
    head = header()
    done = records(head, 24)
    tuned = [r for r in done if r.curve]
    figure = plotting.curve_figure(head, done)
    assert [list(zip(t["x"], t["y"], strict=True)) for t in figure["data"]] == [list(r.curve) for r in tuned]
    assert len({(t["line"]["color"], t["line"]["dash"]) for t in figure["data"]}) == len(tuned)
    assert f"{len(done) - len(tuned)} without a fine-tune" in figure["layout"]["xaxis"]["title"]["text"]
    alone = plotting.curve_figure(head, tuned[:1])["layout"]["title"]["subtitle"]["text"]
    assert all(f"{score:.4g}" in alone for score in (tuned[0].score_before, tuned[0].score_bn, tuned[0].score))
    none = plotting.curve_figure(head, [r for r in done if not r.curve])
    assert none["data"] == []
    assert none["layout"]["annotations"][0]["text"] == "no fine-tune ran"


def test_a_loss_that_is_no_number_is_a_gap():
    head = header()
    record = replace(records(head, 1)[0], curve=((0, 1.0), (1, math.nan), (2, math.inf)))
    assert plotting.curve_figure(head, [record])["data"][0]["y"] == [1.0, None, None]


def test_layer_rows_are_what_the_record_says():
    head = replace(header(), layers=({"name": "conv1", "kind": "conv2d", "macs": 700, "params": 30},))
    done = records(head, 12)
    point = points(head, done)[0]
    table = layer_rows(head, point)
    by_name = {row[0].text: row for row in table.rows}
    assert next(iter(by_name)) == "conv1"
    assert [entry.text for entry in by_name["conv1"][1:6]] == ["dense", "–", "700", "700", "1.000"]
    for layer in point.record.layers:
        row = {column.heading: entry for column, entry in zip(table.columns, by_name[layer.name], strict=True)}
        assert (row["MACs before"].value, row["MACs after"].value) == (layer.macs_dense, layer.macs)
        assert row["MACs kept"].value == pytest.approx(layer.macs / layer.macs_dense)
        assert row["parameters kept"].value == pytest.approx(0.6)
        assert (row["weight error"].value, row["output error"].value, row["sensitivity"].value) == (0.1, 0.08, 40.0)
        assert (row["before (ms)"].value, row["after (ms)"].value) == (0.25, 0.2)
        assert row["time kept"].value == pytest.approx(0.8)
        assert row["time kept"].flagged == ("slower" in row["time kept"].text) == (layer.name in point.slower_layers)
    macs = sum(layer.macs for layer in point.record.layers) + 700
    assert table.total[4].value == macs
    assert table.total[5].value == pytest.approx(macs / (9 * 4_000_000 + 700))


def test_slower_layers_are_flagged_without_a_final_measurement_too():
    head = header()
    record = next(r for r in records(head, 12) if r.status == "complete")
    layers = (replace(record.layers[0], latency_ms=0.5), *record.layers[1:])
    flags = [row[-1].flagged for row in layer_rows(head, replace(record, layers=layers)).rows]
    assert flags == [False, True] + [False] * 8


def test_latency_has_no_columns_where_none_was_measured():
    head = header()
    record = next(r for r in records(head, 12) if r.status == "complete")
    plain = replace(record, layers=tuple(replace(layer, latency_ms=None) for layer in record.layers))
    table = layer_rows(head, plain)
    assert "not measured" in table.note
    assert not any("ms" in column.heading for column in table.columns)
