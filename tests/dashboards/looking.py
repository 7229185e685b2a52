"""What a person sees and does on the dashboard's pages, in the words of the tests."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

MARKS = """[...document.querySelectorAll(`#front .scatterlayer .trace`)]
    .filter(drawn => drawn.__data__[0].trace.customdata)
    .reduce((sum, drawn) => sum + drawn.querySelectorAll(".points path").length, 0)"""
_RANGE = "JSON.stringify(document.querySelector('#front .js-plotly-plot').layout.xaxis.range)"
_PLACE = """([id, number]) => {
    const figure = document.querySelector(`#${id} .js-plotly-plot`);
    if (!figure?._fullData) return null;
    for (const trace of figure._fullData) {
        const at = [...(trace.customdata || [])].indexOf(number);
        if (at < 0) continue;
        const {xaxis, yaxis} = figure._fullLayout, box = figure.getBoundingClientRect();
        const across = figure._fullLayout[trace.xaxis.replace("x", "xaxis")] || xaxis;
        const up = figure._fullLayout[trace.yaxis.replace("y", "yaxis")] || yaxis;
        return [box.x + across._offset + across.d2p(trace.x[at]), box.y + up._offset + up.d2p(trace.y[at])];
    }
    return null;
}"""


def until(true: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    """Wait for something that is true, and return it; the limit only keeps a broken build from hanging."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


def home(page: Any, served: Any) -> dict[str, str]:
    """Open the list; return the address of each sweep by its name."""
    page.goto(served.dashboard)
    page.wait_for_selector("table.list th[scope=row] a")
    return keys(page)


def keys(page: Any) -> dict[str, str]:
    """Return name → query of the sweeps that are listed."""
    links = page.locator("table.list th[scope=row] > a")
    found = links.evaluate_all("links => links.map(link => [link.textContent, link.getAttribute('href')])")
    return dict(found)


def look(page: Any, served: Any, query: str, **more: object) -> None:
    """Open a sweep's page and wait for its figure."""
    page.goto(served.dashboard + query + "".join(f"&{name}={value}" for name, value in more.items()))
    page.wait_for_selector("#front .scatterlayer .points path")


def wait(page: Any, true: str, arg: object = None) -> None:
    """Wait for an expression that may use `arg`; as a function, since the pages allow no text to be run as script."""
    page.wait_for_function(f"arg => ({true})", arg=arg)


def marks(page: Any) -> int:
    """Return how many trials are drawn in the figure of the front."""
    return int(page.evaluate(f"() => {MARKS}"))


def click_point(page: Any, number: int, figure: str = "front") -> None:
    """Click the mark of a trial as a mouse does."""
    page.locator(f"#{figure}").scroll_into_view_if_needed()
    x, y = until(lambda: page.evaluate(_PLACE, [figure, number]), f"mark {number}")
    page.mouse.move(x - 3, y - 3)
    page.mouse.move(x, y)
    page.wait_for_selector(f"#{figure} .hoverlayer .hovertext", state="attached")
    page.mouse.click(x, y)


def shown_range(page: Any) -> str:
    """Return from where to where the figure of the front goes across."""
    return str(page.evaluate(f"() => {_RANGE}"))


def zoom(page: Any) -> str:
    """Draw a box in the figure of the front, and return what it then shows."""
    page.locator("#front").scroll_into_view_if_needed()
    before, area = shown_range(page), page.locator("#front .nsewdrag").bounding_box()
    page.mouse.move(area["x"] + 20, area["y"] + 20)
    page.mouse.down()
    page.mouse.move(area["x"] + area["width"] - 20, area["y"] + area["height"] - 20, steps=4)
    page.mouse.up()
    wait(page, f"{_RANGE} !== arg", before)
    return shown_range(page)


def query(page: Any) -> dict[str, str]:
    """Return what the address bar says."""
    return {name: values[-1] for name, values in parse_qs(urlsplit(page.url).query).items()}


def wait_for_query(page: Any, **values: object) -> None:
    """Wait until the address says this; None for what it must not say."""
    wanted = {name: None if value is None else str(value) for name, value in values.items()}
    wait(page, "Object.entries(arg).every(([name, v]) => new URLSearchParams(location.search).get(name) === v)", wanted)


def wait_for_axes(page: Any, across: str, up: str, figure: str = "front") -> None:
    """Wait until this is written at the axes."""
    title = "(document.querySelector(`#${arg[0]} .g-%stitle text`)?.textContent || '')"
    wait(page, f"{title % 'x'}.startsWith(arg[1]) && {title % 'y'} === arg[2]", [figure, across, up])


@contextlib.contextmanager
def listening(page: Any) -> Iterator[list[str]]:
    """Collect what the browser complains about, dialogs, and requests that leave the server."""
    said: list[str] = []
    hosts: set[str] = set()

    def dialog(found: Any) -> None:
        said.append(f"dialog: {found.message}")
        found.dismiss()

    def asked(request: Any) -> None:
        place = urlsplit(request.url)
        if place.scheme not in ("data", "blob"):
            hosts.add(place.netloc)

    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("dialog", dialog)
    page.on("request", asked)
    yield said
    said += [f"asked {sorted(hosts)}"] if len(hosts) > 1 else []


def ratio(ink: str, ground: str) -> float:
    """Return the contrast of two CSS colours ``rgb(r, g, b)``, as WCAG defines it."""

    def light(colour: str) -> float:
        parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((light(ink), light(ground)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def texts(page: Any) -> list[dict[str, Any]]:
    """Return every text that is seen, with its colour, what it stands on, and its size."""
    found: str = page.evaluate(
        """() => {
        const seen = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        const opaque = colour => { const part = colour.match(/[\\d.]+/g); return part.length < 4 || part[3] > 0.99; };
        while (walk.nextNode()) {
            const node = walk.currentNode, element = node.parentElement, text = node.textContent.trim();
            if (!text || element.closest("svg, script, .unseen, .skip, dialog:not([open]), details:not([open]) > div"))
                continue;
            const box = element.getBoundingClientRect(), style = getComputedStyle(element);
            if (!box.width || style.visibility === "hidden") continue;
            let ground = element;
            while (ground && !opaque(getComputedStyle(ground).backgroundColor)) ground = ground.parentElement;
            const below = getComputedStyle(ground || document.body).backgroundColor;
            seen.push({text, ink: style.color, ground: below, size: parseFloat(style.fontSize)});
        }
        return JSON.stringify(seen);
    }"""
    )
    return json.loads(found)  # type: ignore[no-any-return]
