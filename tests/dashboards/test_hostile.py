"""Names, addresses and requests that somebody made up to do harm."""

from __future__ import annotations

import http.client
import json
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from autorank.journal import Journal
from autorank.types import Choice, Plan
from tests.dashboards import looking
from tests.dashboards.samples import BEGAN, DENSE, front_points, sweep_header, write_sweep
from tests.sweep_samples import records

pytestmark = pytest.mark.browser

PAYLOADS = {
    "image": '<img src=x onerror="window.hacked=1">',
    "script": "</script><script>window.hacked=1</script>",
    "link": '<a href="javascript:window.hacked=1">here</a>',
    "address": "javascript:window.hacked=1//",
    "markup": "<b>bold</b><br><sub>low</sub><i>x</i>",
    "formula": r"$\frac{1}{2}$ $$\href{javascript:window.hacked=1}{x}$$",
    "template": "%{x} {{7*7}} ${window.hacked=1} %{customdata}",
    "markdown": "[here](javascript:window.hacked=1) ![x](http://evil.example/x.png)",
    "drawing": '"><svg onload=window.hacked=1><use href=http://evil.example/x>',
    "terminal": "\x1b[31mred\x1b[0m\x07\r\nnext",
    "backwards": "\u202egnp.exe\u2066\u200b",
    "long": "x" * 5000,
}


def write_hostile(directory: Path, payload: str, number: int) -> None:
    """Write a sweep that says `payload` wherever a sweep may say anything."""
    head = sweep_header(
        f"{number} {payload}", 12, BEGAN + number, strategy=payload, model=payload, space={payload: payload}
    )
    head = replace(head, metric=payload, versions={payload: payload})
    done = []
    for record in records(sweep_header("x"), 12, number):
        choices = {
            f"{name} {payload}": Choice(payload, choice.rank, ((payload, payload),))
            for name, choice in record.plan.layers
        }
        layers = record.layers and tuple(
            replace(layer, name=name, choice=choice)
            for layer, (name, choice) in zip(record.layers, choices.items(), strict=False)
        )
        said = {"worker": payload, "versions": head.versions, "reason": record.reason and payload}
        done.append(replace(record, plan=Plan.of(choices), layers=layers, **said))
    with Journal(directory) as journal:
        journal.write_header(head)
        for record in done:
            journal.write_trial(record)
        journal.write_front(front_points(head, tuple(done)), DENSE)
        journal.write_end(payload, {"search": 30.0})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    for number, payload in enumerate(PAYLOADS.values()):
        write_hostile(root / "sweeps" / f"{number} {payload[:80].replace('/', '|')}", payload, number)
    write_sweep(root / "sweeps" / "plain", 20, seed=5)
    return root


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Where the server makes temporary files."""
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def served(serve, root, exports):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(exports))
        return serve("sweeps", directory=root)


@pytest.fixture(scope="module")
def sweeps(browser, served):
    """Number of the payload → query of its sweep; and "plain"."""
    context = browser.new_context()
    page = context.new_page()
    looking.home(page, served)
    looking.wait(page, "!document.querySelector('.chip.reading')")
    found = {name.split()[0]: query for name, query in looking.keys(page).items()}
    context.close()
    return found


@pytest.fixture(autouse=True)
def _quiet(page, served):
    with looking.listening(page) as said:
        yield
    assert not said
    assert "Traceback" not in served.errors.read_text()


HARM = """() => {
    const found = [];
    if (window.hacked !== undefined) found.push("a script ran");
    for (const name of ["img", "iframe", "object", "embed", "base", "form", "use", "svg a", "math", "mjx-container",
                        ".MathJax", "main b", "main i", "main sub", "main br", "svg tspan[style*=bold]", "sub"])
        for (const one of document.querySelectorAll(name)) found.push(one.outerHTML.slice(0, 200));
    for (const one of document.querySelectorAll("*"))
        for (const {name, value} of one.attributes)
            if (/^on/i.test(name) || (/href|src|action/i.test(name) && /^\\s*(javascript|data:text)|evil/i.test(value)))
                found.push(`${one.tagName} ${name}=${value.slice(0, 100)}`);
    for (const one of document.querySelectorAll("script"))
        if (one.textContent.includes("hacked") || (one.src && new URL(one.src).host !== location.host))
            found.push(one.outerHTML.slice(0, 200));
    if (/[\\u202a-\\u202e\\u2066-\\u2069\\u0007\\u001b]/.test(document.body.textContent)) found.push("controls");
    if (document.documentElement.scrollWidth > document.documentElement.clientWidth) found.push("too wide");
    return found;
}"""


class TestNames:
    def test_the_list_shows_them_as_text(self, page, served):
        names = looking.home(page, served)
        assert len(names) == len(PAYLOADS) + 1
        for kind in ("image", "script", "link", "markup", "formula", "template", "markdown"):
            assert any(PAYLOADS[kind] in name for name in names), kind
        assert max(map(len, names)) <= 400
        assert page.evaluate(HARM) == []

    @pytest.mark.parametrize("kind", ["image", "script", "markup", "formula", "template", "long"])
    def test_every_part_of_a_sweep_shows_them_as_text(self, page, served, sweeps, kind):
        number = list(PAYLOADS).index(kind)
        looking.look(page, served, sweeps[str(number)])
        assert page.evaluate(HARM) == []
        page.wait_for_selector("#panel-figure .heatmaplayer image")
        first = int(page.locator("#members a").first.inner_text().lstrip("#").split()[0])
        looking.click_point(page, first)
        page.wait_for_selector("#point #layers")
        assert page.evaluate(HARM) == []
        if kind in ("image", "markup", "formula"):
            assert PAYLOADS[kind][:40] in page.locator("#layers").inner_text()
            assert PAYLOADS[kind][:20] in page.locator("#front .g-ytitle").text_content()
        if kind not in ("image", "formula", "long"):
            return
        page.click("#pin")
        page.locator("#members a").nth(1).click()
        page.wait_for_selector("#point-pair #pair-figures")
        assert page.evaluate(HARM) == []
        page.click("#tab-importance")
        page.wait_for_selector("#panel-figure .plot-container")
        assert page.evaluate(HARM) == []

    @pytest.mark.parametrize("kind", ["image", "formula"])
    def test_two_sweeps_side_by_side(self, page, served, sweeps, kind):
        number = str(list(PAYLOADS).index(kind))
        page.goto(f"{served.dashboard}{sweeps['plain']}&with={sweeps[number].partition('=')[2]}")
        page.wait_for_selector("#pair-differences")
        page.wait_for_selector("#panel-figure .scatterlayer .trace")
        assert page.evaluate(HARM) == []
        assert PAYLOADS[kind][:40] in page.locator("#pair-differences").inner_text()


class TestAddresses:
    @pytest.mark.parametrize(
        ("query", "told"),
        [
            pytest.param("?sweep=../../etc/passwd", "no such sweep", id="path"),
            pytest.param("?sweep=%00%ff%f0", "no such sweep", id="bytes"),
            pytest.param(f"?sweep={quote(PAYLOADS['image'])}", "no such sweep", id="markup"),
            pytest.param("?sweep=" + "y" * 30_000, "no such sweep", id="long"),
            pytest.param("?with=x", "Sweeps", id="half a pair"),
            pytest.param("?%3Cscript%3Ewindow.hacked=1%3C/script%3E", "Sweeps", id="script"),
            pytest.param("?" + "&".join(f"a{i}=1" for i in range(500)), "Sweeps", id="many"),
            pytest.param("PLAIN&point=1e9", "plain", id="point as a float"),
            pytest.param("PLAIN&point=99999", "no trial #99999", id="point that is none"),
            pytest.param("PLAIN&point=-1&pin=--", "plain", id="negative"),
            pytest.param("PLAIN&point=%D9%A1", "plain", id="digits of another script"),
            pytest.param("PLAIN&lose=nan&need=inf", "plain", id="not a number"),
            pytest.param("PLAIN&lose=1e308", "plain", id="everything may be lost"),
            pytest.param("PLAIN&need=1e308", "plain", id="nothing may be left"),
            pytest.param("PLAIN&x=__class__&y=score%00&tab=../point", "plain", id="axes and tabs"),
            pytest.param("PLAIN&x=score&y=score", "plain", id="twice the same axis"),
            pytest.param(f"PLAIN&hide={quote(PAYLOADS['script'])}&skip=full&skip=partial", "plain", id="filters"),
            pytest.param("PLAIN&with=../x", "not there", id="other sweep"),
            pytest.param("PLAIN&with=KEY", "Two sweeps", id="with itself"),
        ],
    )
    def test_what_makes_no_sense_is_a_calm_line(self, page, served, sweeps, query, told):
        plain = sweeps["plain"]
        page.goto(served.dashboard + query.replace("PLAIN", plain).replace("KEY", plain.partition("=")[2]))
        page.locator("main").get_by_text(told).first.wait_for()
        looking.wait(page, "!document.querySelector('main [data-dash-is-loading]')")
        assert page.evaluate(HARM) == []
        assert page.locator("#offline").inner_text() == ""


def ask(address: str, path: str, body: object = None) -> tuple[int, str]:
    """Ask the server without a browser; return status and text."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    data = None if body is None else json.dumps(body)
    connection.request("POST" if data else "GET", path, data, {"Content-Type": "application/json"} if data else {})
    answer = connection.getresponse()
    text = answer.read().decode("utf-8", "replace")
    connection.close()
    return answer.status, text


class TestRequests:
    @pytest.mark.parametrize("path", ["/dashboard/", "/dashboard/standing"])
    def test_an_address_of_100_kilobytes(self, served, path):
        try:
            status, text = ask(served.dashboard, f"{path}?sweep={'z' * 100_000}")
        except ConnectionError:  # refused, and closed, before all of it was sent
            status, text = 400, ""
        assert status < 500
        assert "Traceback" not in text
        assert ask(served.dashboard, path)[0] == 200

    @pytest.mark.parametrize("path", ["passwd", "0" * 32, "..", "plain-1.zip", "a" * 5000])
    def test_an_archive_that_nobody_made_is_not_found(self, served, path):
        status, text = ask(served.dashboard, f"/dashboard/archive/{path}")
        assert status == 404
        assert "journal" not in text

    @pytest.mark.parametrize(
        ("search", "formats"),
        [
            pytest.param("PLAIN&point=OFF", ["onnx"], id="not on the front"),
            pytest.param("PLAIN&point=9999", ["onnx"], id="no trial"),
            pytest.param("PLAIN&point=../../x", ["onnx"], id="a path as number"),
            pytest.param("?sweep=../../etc&point=1", ["onnx"], id="a path as sweep"),
            pytest.param("PLAIN&point=ON", ["../../x"], id="a path as format"),
            pytest.param("PLAIN&point=ON", ["onnx", "--out=/tmp/x"], id="an option as format"),
            pytest.param("PLAIN&point=ON", [], id="no format"),
            pytest.param("OTHER&point=999", ["onnx"], id="another sweep's point"),
            pytest.param("", ["onnx"], id="nothing"),
        ],
    )
    def test_a_forged_export_is_refused(self, served, sweeps, root, exports, search, formats):
        from autorank.sweep import open_sweep

        found = open_sweep(root / "sweeps" / "plain")
        front = {point.record.number for point in found.points}
        off = next(record.number for record in found.records if record.number not in front)
        search = search.replace("PLAIN", sweeps["plain"]).replace("OTHER", sweeps["0"])
        search = search.replace("OFF", str(off)).replace("ON", str(min(front)))
        files = sorted(root.rglob("*"))
        body = {
            "output": "exports.data",
            "outputs": {"id": "exports", "property": "data"},
            "inputs": [{"id": "export", "property": "n_clicks", "value": 1}],
            "changedPropIds": ["export.n_clicks"],
            "state": [
                {"id": "url", "property": "search", "value": search},
                {"id": "export-formats", "property": "value", "value": formats},
                {"id": "exports", "property": "data", "value": {}},
            ],
        }
        status, text = ask(served.dashboard, "/dashboard/_dash-update-component", body)
        assert status in (200, 204)
        tokens = json.loads(text)["response"]["exports"]["data"].values() if text else ()
        assert all(token.startswith("!") for token in tokens)
        assert sorted(root.rglob("*")) == files
        assert not list(exports.glob("autorank-export-*"))
