"""Pages, pictures and tables against the records, the parsed page and the decoded picture."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image
from plotly.offline import get_plotlyjs

from autorank import figures
from autorank.captions import counted, group_of, plan_text
from autorank.front import front_of
from autorank.privacy import public, without_secrets
from autorank.scene import scene
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


HEAD = ["html", "head", "meta", "meta", "meta", "meta", "title", "style"]


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
    pages = [figures.pareto_html(head, done, front), figures.hypervolume_html(head, done)]
    pages += [figures.rank_map_html(head, front), figures.importance_html(head, done)]
    pages = [text.replace(get_plotlyjs(), "") for text in pages]  # millions of characters that are not ours
    for text in pages:
        tags = [tag for tag, _ in _Page(text).tags]
        assert tags == [*HEAD, "script", "body", "div", "script"]
        assert "showSendToCloud: false" in text
    pages += [figures.layers_html(head, record) for record in done[:2]]
    for text in pages:
        page = _Page(text)
        assert not any({"src", "href"} & set(attrs) or any(a.startswith("on") for a in attrs) for _, attrs in page.tags)
        policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
        assert "default-src 'none'" in policy
        assert "http" not in policy
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


DRAWINGS = {
    "pareto": figures.pareto_png,
    "hypervolume": lambda head, done, front: figures.hypervolume_png(head, done),
    "rank-map": lambda head, done, front: figures.rank_map_png(head, front),
    "importance": lambda head, done, front: figures.importance_png(head, done),
    "layers": lambda head, done, front: figures.layers_png(head, front[0]) if front else None,
}


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS.keys())
def test_pictures_decode(case, draw):
    picture = draw(*case)
    if picture is None:
        return
    image = Image.open(io.BytesIO(picture))
    image.load()
    assert image.format == "PNG"
    assert image.width == 1440
    assert len(image.convert("RGB").getcolors(1 << 21)) > 10


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS.keys())
def test_pictures_are_the_same_each_time(draw):
    head = header()
    done = records(head, 60)
    front = front_of(done, head.objectives)
    assert draw(head, done, front) == draw(head, done, front)


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
    assert table["bops_kept"].tolist() == [p.record.kept["bops_kept"] for p in front]
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


def test_the_layers_of_a_point_stand_in_a_table_that_keys_can_sort():
    head = header()
    done = records(head, 12)
    point = points(head, done)[0]
    page = _Page(figures.layers_html(head, point))
    tags = [tag for tag, _ in page.tags]
    assert tags[: len(HEAD)] == HEAD
    columns = tags.count("button")
    assert columns == tags.count("th") == 13
    assert tags.count("td") == columns * (len(point.record.layers) + 2)  # conv1, left dense, and the sum
    own = {"main", "h1", "p", "div", "table", "thead", "tbody", "tfoot", "tr", "th", "td", "button"}
    assert set(tags) == {*HEAD, "body", "script", *own}
    values = [float(attrs["data-value"]) for tag, attrs in page.tags if tag == "td" and "data-value" in attrs]
    assert sum(layer.macs for layer in point.record.layers) in values
    assert sum(attrs.get("class") == "flagged" for tag, attrs in page.tags if tag == "td") == 1
    image = Image.open(io.BytesIO(figures.layers_png(head, point)))
    image.load()
    assert image.format == "PNG"


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
