"""Figures and tables against brute force, the parsed page and the decoded picture."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from autorank import figures
from autorank.captions import counted, group_of, plan_text, score_label
from autorank.front import front_of, hypervolume, knee, recommend, reference_point, values
from autorank.run_values import public, without_secrets
from autorank.scene import OKABE_ITO, hypervolumes, scene
from autorank.types import Choice, Constraint, FrontPoint, Plan
from tests.sweep_samples import HOSTILE, header, points, records

CASES = {
    "none": (header(), 0),
    "one": (header(), 1),
    "many": (header(), 60),
    "three-objectives": (header(objectives=("score", "macs_kept", "latency_kept")), 40),
    "less-is-better": (header(direction="min", metric="mse"), 40),
    "score-alone": (header(objectives=("score",)), 20),
    "costs-alone": (header(objectives=("macs_kept", "latency_kept")), 20),
    "hostile": (header(sweep_id=HOSTILE, metric=f"$\\frac{{ 精度 {HOSTILE}\n\x00 $"), 20),
    "nothing-eligible": (header(constraints=(Constraint("macs_kept", "<=", 0.0),)), 20),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    head, count = request.param
    done = records(head, count)
    return head, done, front_of(done, head.objectives, head.constraints)


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)


def figure_in(text: str) -> dict:
    return json.loads(re.search(r"^const figure = (.*);$", text, re.MULTILINE).group(1))


def test_page_is_one_file_that_may_load_nothing(case):
    head, done, front = case
    for text in (figures.pareto_html(head, done, front), figures.hypervolume_html(head, done)):
        page = _Page(text)
        tags = [tag for tag, _ in page.tags]
        assert tags == [
            "html",
            "head",
            "meta",
            "meta",
            "meta",
            "meta",
            "title",
            "style",
            "script",
            "body",
            "div",
            "script",
        ]
        assert not any({"src", "href"} & set(attrs) or any(a.startswith("on") for a in attrs) for _, attrs in page.tags)
        policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
        assert "default-src 'none'" in policy
        assert "http" not in policy
        assert "showSendToCloud: false" in text
        assert "alert(1)</script" not in text.lower()


def test_page_shows_every_trial_with_values_once(case):
    head, done, front = case
    figure = figure_in(figures.pareto_html(head, done, front))
    numbers = [n for trace in figure["data"] for n in trace.get("customdata", [])]
    drawn = [r.number for r in done if r.status != "failed"]
    assert sorted(numbers) == sorted(drawn)
    names = {trace["name"] for trace in figure["data"]}
    assert "dense model" in names
    assert ("recommended" in names) == any(r.score is not None for r in front)


def test_texts_of_the_user_are_escaped_for_plotly():
    head = header()
    done = records(head, 12)
    figure = figure_in(figures.pareto_html(head, done, points(head, done)))
    texts = [text for trace in figure["data"] for text in trace.get("text", [])]
    assert any("&lt;script&gt;alert(1)&lt;/script&gt;" in text for text in texts)
    assert not any("<script" in text for text in texts)
    assert any("test " in text for text in texts)


def test_pictures_decode_and_are_the_same_each_time(case):
    head, done, front = case
    for draw in (lambda: figures.pareto_png(head, done, front), lambda: figures.hypervolume_png(head, done)):
        first = draw()
        image = Image.open(io.BytesIO(first))
        image.load()
        assert image.format == "PNG"
        assert image.size == (1440, 840)
        assert len(image.convert("RGB").getcolors(1 << 21)) > 10
        assert draw() == first


def test_every_member_of_the_front_is_drawn_in_its_colour():
    head = header()
    done = records(head, 60)
    front = front_of(done, head.objectives)
    shown = scene(head, done, front)
    image = Image.open(io.BytesIO(figures.pareto_png(head, done, front))).convert("RGB")
    left, right, bottom, top = 0.085, 0.085 + 0.69, 0.115, 0.115 + 0.745
    last = {(round(m.x, 2), round(m.y, 1)): m for m in shown.marks if m.on_front}  # overlapping ones hide each other
    right_colour = 0
    for mark in last.values():
        x = left + (right - left) * (mark.x - shown.x.low) / (shown.x.high - shown.x.low)
        y = bottom + (top - bottom) * (mark.y - shown.y.low) / (shown.y.high - shown.y.low)
        pixel = image.getpixel((round(x * image.width), round((1 - y) * image.height)))
        right_colour += "#{:02X}{:02X}{:02X}".format(*pixel) == mark.colour
    assert right_colour >= 0.8 * len(last)


@pytest.mark.parametrize("mixed", [False, True], ids=["one-fidelity", "two-fidelities"])
@pytest.mark.parametrize(
    ("objectives", "constraints"),
    [
        (("score", "macs_kept"), ()),
        (("score", "macs_kept"), (Constraint("macs_kept", "<=", 0.6),)),
        (("score", "macs_kept", "latency_kept"), ()),
    ],
    ids=["two", "constrained", "three"],
)
def test_hypervolumes_equal_those_of_every_prefix(objectives, constraints, mixed):
    head = header(objectives=objectives, constraints=constraints)
    done = records(head, 40, seed=3, mixed_fidelity=mixed)
    directions = [o.direction for o in head.objectives]
    corner = reference_point(head.objectives, head.dense)
    expected = [
        hypervolume(
            [values(r, head.objectives) for r in front_of(done[: i + 1], head.objectives, constraints)],
            corner,
            directions,
        )
        for i in range(len(done))
    ]
    assert hypervolumes(head, done) == pytest.approx(expected)
    assert max(expected) > 0


def test_scene_marks_what_front_says():
    head = header()
    done = records(head, 60)
    front = front_of(done, head.objectives)
    shown = scene(head, done, front)
    assert {m.number for m in shown.marks if m.on_front} == {r.number for r in front}
    assert shown.recommended.number == recommend(front, head.dense.score, "max", 1.0, head.objectives).record.number
    assert shown.knee.number == front[knee([values(r, head.objectives) for r in front], ["max", "min"])].number
    assert shown.dense == (1.0, head.dense.score)
    assert {m.kind for m in shown.marks} == {"full", "pruned"}
    assert set(shown.groups.values()) <= {*OKABE_ITO, "#CC79A7"}
    assert f"{sum(r.status == 'failed' for r in done)} failed" in shown.note
    assert shown.y.low < min(r.score for r in front)
    assert shown.y.high > head.dense.score


@pytest.mark.parametrize("direction", ["max", "min"])
def test_staircase_is_the_border_of_what_is_attained(direction):
    head = header(direction=direction, metric="m")
    done = records(head, 60)
    shown = scene(head, done, front_of(done, head.objectives))
    sign = 1 if direction == "max" else -1
    best = lambda x: max((sign * m.y for m in shown.marks if m.on_front and m.x <= x), default=-math.inf)  # noqa: E731
    corners = shown.line
    assert len(corners) == 2 * sum(m.on_front for m in shown.marks) - 1
    assert all(a[0] <= b[0] and (a[0] == b[0] or a[1] == b[1]) for a, b in itertools.pairwise(corners))
    for (x, y), (x2, _) in zip(corners[::2], [*corners[1::2], (math.inf, 0)], strict=True):
        between = (x + x2) / 2 if math.isfinite(x2) else x + 1
        assert best(between) == sign * y


def test_third_objective_is_the_area_of_the_mark():
    head = header(objectives=("score", "macs_kept", "latency_kept"))
    done = records(head, 30)
    shown = scene(head, done, ())
    kept = {r.number: r.kept.get("latency_kept") for r in done}
    ordered = sorted(shown.marks, key=lambda m: kept[m.number])
    assert [m.size for m in ordered] == sorted(m.size for m in ordered)
    assert (ordered[0].size, ordered[-1].size) == (0.0, 1.0)
    assert "latency kept" in shown.third


@pytest.mark.parametrize(
    ("metric", "direction", "label"),
    [
        ("accuracy", "max", "validation accuracy (%)"),
        ("psnr", "max", "validation psnr (dB)"),
        ("mse", "min", "validation mse (lower is better)"),
        ("f1", "max", "validation f1"),
    ],
)
def test_score_axis_says_unit_and_direction(metric, direction, label):
    assert score_label(header(metric=metric, direction=direction)) == label


def test_cost_axis_says_what_is_divided_by_what():
    head = header()
    assert scene(head, (), ()).x.label == "MACs kept (compressed ÷ dense)"


def test_far_outliers_do_not_squeeze_the_front():
    head = header()
    done = records(head, 40)
    low = replace(done[0], number=99, status="complete", score=-5000.0, kept={"macs_kept": 0.9})
    shown = scene(head, (*done, low), front_of(done, head.objectives))
    assert shown.y.low > 0
    assert any(m.number == 99 for m in shown.marks)


def test_front_table_holds_the_points():
    head = header()
    head = replace(head, dense_cost=replace(head.dense_cost, latency_ms=2.0))
    done = records(head, 24)
    front = points(head, done)
    table = figures.front_table(head, front)
    assert tuple(table.columns) == figures.FRONT_COLUMNS
    assert table["number"].tolist() == [p.record.number for p in front]
    assert table["drop"].tolist() == pytest.approx([92.5 - p.record.score for p in front])
    assert table["test_score"].tolist() == [p.test_score for p in front]
    assert table["latency_kept"].tolist() == pytest.approx([1.5 / 2.0] * len(front))
    assert table["slower_layers"].tolist() == [HOSTILE] + [""] * (len(front) - 1)
    assert table["plan_id"].tolist() == [p.record.plan_id for p in front]


def test_front_table_without_measurements():
    head = header(direction="min", metric="mse")
    done = records(head, 24)
    bare = FrontPoint(replace(next(r for r in done if r.status == "complete"), kept={"macs_kept": 0.5}))
    row = figures.front_table(head, [bare]).iloc[0]
    assert row["drop"] == pytest.approx(bare.record.score - 0.3)
    assert all(math.isnan(row[name]) for name in ("test_score", "params_kept", "latency_ms", "latency_kept"))
    assert len(figures.front_table(head, [])) == 0


def test_layer_table_holds_the_layers():
    done = records(header(), 12)
    record = next(r for r in done if r.status == "complete")
    table = figures.layer_table(record)
    assert tuple(table.columns) == figures.LAYER_COLUMNS
    assert table["layer"].tolist() == [layer.name for layer in record.layers]
    assert table["macs_kept"].tolist() == pytest.approx([layer.macs / 4e6 for layer in record.layers])
    assert table["latency_kept"].tolist() == pytest.approx([0.8] * len(record.layers))
    assert table["options"].unique().tolist() == ["whiten=input"]
    assert table["sensitivity"].tolist() == [layer.sensitivity for layer in record.layers]
    assert table["sensitivity"].notna().all()
    assert len(figures.layer_table(replace(record, layers=()))) == 0


def test_plans_in_short():
    svd, tucker = Choice("spatial_svd", (3,)), Choice("tucker2", (2, 2))
    assert plan_text(Plan.of({"a": svd, "b": tucker, "c": tucker})) == "tucker2×2 spatial_svd×1"
    assert plan_text(Plan()) == "dense"


@pytest.mark.parametrize(
    ("formats", "group"),
    [(("a", "a", "b"), "a"), (("a", "b"), "mixed"), (("b",), "b"), ((), "dense")],
    ids=["most", "none-has-most", "one", "no-layer"],
)
def test_group_without_layer_results_counts_layers(formats, group):
    plan = Plan.of({f"l{i}": Choice(name, (1,)) for i, name in enumerate(formats)})
    assert group_of(replace(records(header(), 1)[0], plan=plan, layers=())) == group


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://u:p@h:1/x", "http://h:1/x"),
        ("cannot reach postgresql://u:p@ss@h/db now", "cannot reach postgresql://h/db now"),
        ("https://h/x?token=abc&y=1", "https://h/x?token=***&y=1"),
        ("sqlite:////a/b@c/mlflow.db", "sqlite:////a/b@c/mlflow.db"),
        ("mail me@home", "mail me@home"),
    ],
)
def test_addresses_lose_their_secrets(text, shown):
    assert public(text) == shown


def test_settings_lose_their_secrets():
    settings = {"a": {"hf_token": "x", "uri": ["http://u:p@h"]}, "n": 1, "password": ""}
    assert without_secrets(settings) == {"a": {"hf_token": "***", "uri": ["http://h"]}, "n": 1, "password": ""}


def test_importing_figures_imports_no_drawing_library():
    code = (
        "import sys, autorank.figures, autorank.tracking\n"
        "heavy = {'matplotlib', 'plotly', 'pandas', 'mlflow', 'torch', 'numpy'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("number", "text"),
    [(7, "7"), (999, "999"), (1000, "1.00 k"), (999_600, "999.60 k"), (40_551_040, "40.55 M"), (4.1e9, "4.10 G")],
)
def test_counts_in_short(number, text):
    assert counted(number) == text
