"""How quick the dashboard is, measured in a browser: 50 sweeps, one of 1,000 trials of 20 layers that grows meanwhile.

The sweeps are made up on disk; the server is `autorank dashboard` in a process of its own, the browser Chromium without
a window. Times are those of the page: from the beginning of the navigation, of the press of a key or button, or of the
request that asks for news, until the browser has drawn what was waited for.

python benchmarks/dashboard.py [--quick] [--json FILE] [--repeat 7] [--idle 60]
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import ROOT, arguments, finish

sys.path.insert(0, str(ROOT))
PROBE = Path(__file__).with_name("dashboard_probe.js")
FIRST_VIEW_S, UPDATE_S = 2.0, 0.5
BIG = "sweep-big"
MEGABYTE = 1e6


class Report:
    """Rows of a table, and the same as named figures."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}

    def times(self, name: str, seconds: Sequence[float], aim: float | None = None) -> None:
        """Print median and range of some times and, where there is an aim, what part of it they take."""
        middle = statistics.median(seconds)
        row = {"median_s": round(middle, 3), "least_s": round(min(seconds), 3), "most_s": round(max(seconds), 3)}
        said = f"{middle:8.3f} s  ({min(seconds):.3f} to {max(seconds):.3f}, {len(seconds)} times)"
        if aim is not None:
            row |= {"aim_s": aim, "ratio": round(middle / aim, 3)}
            said += f"  {middle / aim:.2f} of the aim" + ("  MISSED" if middle > aim else "")
        self.figures[name] = row
        print(f"{name:62} {said}", flush=True)

    def value(self, name: str, value: float, unit: str) -> None:
        """Print one figure."""
        self.figures[name] = {"value": round(value, 4), "unit": unit}
        print(f"{name:62} {value:8.3g} {unit}", flush=True)


class Server:
    """What the system says of the server's process."""

    def __init__(self, pid: int) -> None:
        self._place = Path("/proc") / str(pid)

    def processor(self) -> float:
        """Return the seconds of processor time so far."""
        fields = (self._place / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Return the resident megabytes."""
        line = next(x for x in (self._place / "status").read_text().splitlines() if x.startswith("VmRSS"))
        return int(line.split()[1]) * 1024 / MEGABYTE

    def read(self) -> int:
        """Return how many bytes it has read so far, from files of any kind."""
        return int((self._place / "io").read_text().splitlines()[0].split()[1])


def make_sweeps(root: Path, sweeps: int, large: int, small: int, spare: int) -> Any:
    """Write the sweeps; return the large one, open, with `spare` more trials that can have a mark."""
    from dataclasses import replace

    from tests.dashboards.samples import BEGAN, Growing, widened, write_many

    write_many(root, sweeps - 1, small, small)
    growing = Growing(root / BIG, large + 2 * spare)
    growing.header = replace(growing.header, created=BEGAN + 3600 * sweeps)
    marked = [record for record in growing.records if record.score is not None][-spare:]
    others = [record for record in growing.records if record not in marked][:large]
    growing.records = tuple(widened(record, 20) for record in (*others, *marked))
    growing.__enter__()
    growing.begin()
    growing.grow(large)
    return growing


@contextmanager
def served(root: Path, port: int) -> Iterator[tuple[str, Server, float]]:
    """Run the dashboard; also return its process and the seconds from the command to its first answer."""
    from autorank.dashboards.pictures import serving

    begun = time.monotonic()
    with serving(root / "sweeps", port) as (process, address):
        urllib.request.urlopen(address).read()
        yield address, Server(process.pid), time.monotonic() - begun


def free_port() -> int:
    """Return a port that nobody uses: the same one each time, so that the browser knows the files again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def fresh_page(browser: Any) -> Iterator[Any]:
    """Open a page of a browser that has nothing in its cache."""
    context = browser.new_context(viewport={"width": 1366, "height": 768})
    context.add_init_script(path=PROBE)
    page = context.new_page()
    yield page
    context.close()


def until(page: Any, name: str, argument: object = None) -> float:
    """Return the second since the navigation began at which a condition of the probe was drawn."""
    return page.evaluate("([name, argument]) => probe.until(name, argument)", [name, argument]) / 1e3


def view(page: Any, address: str, name: str, argument: object) -> float:
    """Go to an address; return the seconds until it is drawn."""
    page.goto(address, wait_until="commit")
    return until(page, name, argument)


def gesture(page: Any, act: Callable[[], Any], name: str, argument: object = None) -> float:
    """Do something by mouse or keyboard; return the seconds from the press until its effect is drawn."""
    act()
    return until(page, name, argument) - page.evaluate("probe.pressed()") / 1e3


def first_views(browser: Any, root: Path, report: Report, restarts: int, sweeps: int, trials: int) -> tuple[str, int]:
    """Measure starts of the server and first looks; return the query of the large sweep's page, and the port."""
    starts, query, port = [], "", free_port()
    found: dict[str, list[float]] = {
        f"{browsers}: {page}": []
        for browsers in ("new browser", "server just started", "warm")
        for page in ("the list", "all marks of the large sweep")
    }

    def look(browsers: str, page: Any, address: str) -> None:
        if not browsers.startswith("server") or len(starts) % 2:
            found[f"{browsers}: the list"].append(view(page, address, "read", sweeps))
        if not browsers.startswith("server") or not len(starts) % 2:
            found[f"{browsers}: all marks of the large sweep"].append(view(page, address + query, "marks", trials))

    with fresh_page(browser) as known:
        for number in range(restarts + 1):
            with served(root, port) as (address, _, start):
                if number == 0:
                    view(known, address, "read", sweeps)
                    query = known.get_by_role("link", name=BIG).get_attribute("href")
                    for _ in range(3):  # a browser keeps compiled scripts from the second visit on
                        view(known, address + query, "marks", trials)
                    continue
                starts.append(start)
                look("server just started", known, address)
                look("warm", known, address)
                with fresh_page(browser) as new:
                    found["new browser: the list"].append(view(new, address, "read", sweeps))
                with fresh_page(browser) as new:
                    found["new browser: all marks of the large sweep"].append(
                        view(new, address + query, "marks", trials)
                    )
    report.times("from the command to the first answer", starts)
    for name, seconds in found.items():
        if seconds:
            report.times(f"first view, {name}", seconds, FIRST_VIEW_S)
    return query, port


def costs(page: Any, since: float, drawn: float) -> tuple[float, float]:
    """Return the seconds from the question whether there is news to their drawing, and the bytes sent for them."""
    asked = page.evaluate("([since, drawn]) => probe.asked(since, drawn)", [since, 1e3 * drawn])
    sent = page.evaluate("(since) => probe.sent(since)", since)
    return drawn - asked / 1e3, sum(size for name, size, _ in sent if name != "standing")


def update(page: Any, growing: Any) -> tuple[float, float, float]:
    """Append a trial; return seconds of the update itself, from the file to the screen, and bytes sent for it."""
    since = page.evaluate("performance.now()")
    number = growing.records[growing.done].number
    begun = time.time()
    growing.grow(1)
    drawn = until(page, "mark", number)
    page.wait_for_timeout(300)  # the rest of what this trial changes
    own, sent = costs(page, since, drawn)
    return own, page.evaluate("performance.timeOrigin") / 1e3 + drawn - begun, sent


def updates(page: Any, growing: Any, report: Report, address: str, repeat: int, tabs: Sequence[str]) -> None:
    """Measure updates of the large sweep's page with each of the tabs open."""
    for tab in tabs:
        chosen = f"&point={growing.records[0].number}" if tab == "point" else ""
        view(page, f"{address}&tab={tab}{chosen}", "marks", 1)
        page.wait_for_timeout(2500)
        found = [update(page, growing) for _ in range(repeat)]
        report.times(f"update, tab {tab}: request to drawn", [own for own, _, _ in found], UPDATE_S)
        report.times(f"update, tab {tab}: journal to drawn, pauses included", [whole for _, whole, _ in found])
        report.value(f"update, tab {tab}: sent", statistics.median(size for _, _, size in found) / 1e3, "kB")


def list_updates(page: Any, growing: Any, report: Report, address: str, repeat: int) -> None:
    """Measure updates of the list."""
    found = []
    for _ in range(repeat):
        since = page.evaluate("performance.now()")
        growing.grow(1)
        drawn = until(page, "cell", f"{growing.done} / {growing.header.config['trials']}")
        found.append(costs(page, since, drawn))
    report.times("update of the list: request to drawn", [own for own, _ in found], UPDATE_S)
    report.value("update of the list: sent", statistics.median(size for _, size in found) / 1e3, "kB")


def gestures(page: Any, report: Report, address: str, repeat: int, trials: int) -> None:
    """Measure clicks on points, other axes, and the slider."""
    view(page, address, "marks", trials)
    page.wait_for_timeout(1500)
    numbers = [int(row.inner_text().split()[0][1:]) for row in page.locator('[data-keys="front"] tbody tr').all()]
    clicks, axes, tabs = [], [], []
    for number in numbers[1 :: max(len(numbers) // repeat, 1)][:repeat]:
        page.wait_for_timeout(700)  # or it is a double click
        place = page.evaluate("(number) => probe.place(number)", number)
        before = page.evaluate("document.querySelector('#point h2')?.textContent || ''")
        clicks.append(gesture(page, lambda at=place: page.mouse.click(*at), "point", before))
    report.times("click on a point: its layers are shown", clicks)
    for _ in range(max(repeat // 2, 1)):
        for label in ("parameters", "MACs"):
            page.locator("#axis-x").click()
            option = page.get_by_role("option").filter(has_text=label).first
            axes.append(gesture(page, option.click, "axis", label))
    report.times("other axes: the figure is drawn", axes)
    for name, words in (("ranks", "cheapest first"), ("growth", "hypervolume"), ("importance", "share")):
        for again in range(2):
            page.locator("#tab-point").click()
            page.wait_for_timeout(700)
            tabs.append((name, again, gesture(page, page.locator(f"#tab-{name}").click, "panel", words)))
            if not again:
                report.times(f"tab {name}, the first time", [tabs[-1][2]])
    report.times("a tab that was open before", [seconds for _, again, seconds in tabs if again])


def idle(page: Any, server: Server, report: Report, seconds: float) -> float:
    """Measure an idle server with a page open; return the bytes that it reads per second."""
    page.wait_for_timeout(3000)
    since, used, read = page.evaluate("performance.now()"), server.processor(), server.read()
    page.wait_for_timeout(1e3 * seconds)
    sent = page.evaluate("(since) => probe.sent(since)", since)
    report.value("idle, a page open: processor time per minute", (server.processor() - used) * 60 / seconds, "s")
    report.value("idle, a page open: requests per minute", len(sent) * 60 / seconds, "requests")
    report.value("idle, a page open: sent per request", statistics.mean(size for _, size, _ in sent), "bytes")
    report.value("memory of the server", server.memory(), "MB")
    return (server.read() - read) / seconds


def reading(page: Any, server: Server, growing: Any, report: Report, quiet: float, trials: int) -> None:
    """Measure what is read for some new trials, beside what is read anyway."""
    path = growing.directory / "journal.jsonl"
    begun, size, read = time.monotonic(), path.stat().st_size, server.read()
    for _ in range(trials):
        growing.grow(1)
        page.wait_for_timeout(1500)
    appended = path.stat().st_size - size
    spent = server.read() - read - quiet * (time.monotonic() - begun)
    report.value("the journal", size / MEGABYTE, "MB")
    report.value("read per appended byte, beside what is read anyway", spent / appended, "bytes")
    report.value("read for a new trial, of the journal", spent / trials / size, "")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--idle", type=float, default=60.0, help="seconds of watching an idle server")
    parser.add_argument("--only", default="first,updates,gestures,idle", help="parts to measure, with commas between")
    args = parser.parse_args()
    sweeps, large, small, restarts = 50, 1000, 100, 2 * args.repeat
    tabs: tuple[str, ...] = ("ranks", "growth", "importance", "point")
    if args.quick:
        restarts, tabs, args.only = 1, tabs[-2:], args.only.replace("gestures,", "")
        sweeps, large, small, args.repeat, args.idle = 10, 200, 20, 1, 4.0
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit("this needs playwright: pip install playwright")
    from autorank.dashboards.pictures import BROWSERS, FLAGS

    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if chromium is None:
        sys.exit("this needs a Chromium, and none was found")
    report, wanted = Report(), args.only.split(",")
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        root = Path(scratch)
        growing = make_sweeps(root / "sweeps", sweeps, large, small, 6 * args.repeat + 10)
        marks = sum(record.score is not None for record in growing.records[:large])
        size = sum(path.stat().st_size for path in root.glob("sweeps/*/journal.jsonl")) / MEGABYTE
        print(f"{sweeps} sweeps of {small} trials, one of them of {large} with 20 layers: journals of {size:.1f} MB\n")
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        query, port = first_views(browser, root, report, restarts if "first" in wanted else 1, sweeps, marks)
        with served(root, port) as (address, process, _), fresh_page(browser) as page:
            view(page, address, "read", sweeps)
            if "updates" in wanted:
                list_updates(page, growing, report, address, args.repeat)
                updates(page, growing, report, address + query, args.repeat, tabs)
            if "gestures" in wanted:
                gestures(page, report, address + query, args.repeat, marks)
            if "idle" in wanted:
                view(page, address + query, "marks", marks)
                quiet = idle(page, process, report, args.idle)
                reading(page, process, growing, report, quiet, args.repeat)
        browser.close()
        growing.journal.close()
    finish(args, report.figures)


if __name__ == "__main__":
    main()
