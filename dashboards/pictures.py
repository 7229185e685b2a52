"""Makes the pictures of the documentation: the dashboard on real sweeps, in a real browser.

python dashboards/pictures.py SWEEPS_DIR --out docs/pictures [--sweep NAME]

The dashboard is started in the directory above SWEEPS_DIR, as its reader would do it. Needs Playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, SCALE = 1366, 768, 1.5
MOST_BYTES = 150_000
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


@contextmanager
def serving(sweeps: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the dashboard until the block ends; gives its process and address.

    Parameters
    ----------
    sweeps : Path
    port : int
        0 takes a free one.
    """
    command = [sys.executable, "-m", "autorank.cli", "dashboard", sweeps.name, "--port", str(port), "--no-browser"]
    process = subprocess.Popen(
        command,
        cwd=sweeps.parent,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    try:
        found = next(filter(None, (re.match(r"dashboard: +(\S+)", line) for line in process.stdout)), None)
        if found is None:
            sys.exit("the dashboard did not start")
        yield process, found[1]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
        process.stdout.close()


def small_png(raw: bytes, most: int = MOST_BYTES) -> bytes:
    """Return a picture in few colours, so few that it takes at most so many bytes where that can be had."""
    from PIL import Image

    whole = Image.open(io.BytesIO(raw)).convert("RGB")
    made = raw
    for colours in (256, 128, 64, 32):
        written = io.BytesIO()
        whole.quantize(colours, dither=Image.Dither.NONE).save(written, "PNG", optimize=True)
        made = written.getvalue()
        if len(made) <= most:
            break
    return made


class _Camera:
    """A page, and the directory that its pictures go to."""

    def __init__(self, page: Any, out: Path) -> None:
        self.page, self.out = page, out

    def settle(self) -> None:
        """Wait until figures and tables are drawn and nothing moves any more."""
        self.page.wait_for_load_state("networkidle")
        self.page.mouse.move(0, HEIGHT - 1)  # off everything that would say something about itself
        before = b""
        while before != (before := self.page.screenshot()):
            self.page.wait_for_timeout(400)

    def take(self, name: str, down_to: str = "") -> None:
        """Take the picture ``name.png``, down to an element where one is named."""
        self.settle()
        box = self.page.locator(down_to).bounding_box() if down_to else None
        height = min(HEIGHT, int(box["y"] + box["height"]) + 24) if box else HEIGHT
        path = self.out / f"{name}.png"
        path.write_bytes(small_png(self.page.screenshot(clip={"x": 0, "y": 0, "width": WIDTH, "height": height})))
        print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


def take_all(page: Any, address: str, out: Path, sweep: str = "") -> None:
    """Walk through the pages as a reader would, and take a picture of each.

    Parameters
    ----------
    page : playwright.sync_api.Page
    address : str
        Of the dashboard.
    out : Path
    sweep : str
        Name of the sweep to show; the newest without it.
    """
    camera = _Camera(page, out)
    page.goto(address)
    page.wait_for_selector("#sweeps tbody th a")
    page.add_style_tag(content="html { scrollbar-gutter: auto !important }")  # there is no scroll bar in a picture
    camera.take("list", down_to="#sweeps")

    links = page.locator("#sweeps tbody th a")
    (links.filter(has_text=sweep) if sweep else links).first.click()
    page.wait_for_selector("#front .scatterlayer .point")
    camera.take("sweep")
    page.locator("#theme").click()
    page.locator("#theme").click()
    camera.take("sweep-dark")
    page.locator("#theme").click()

    def below(tab: str) -> None:
        page.evaluate(f"document.getElementById('{tab}').scrollIntoView()")

    page.locator("#recommended").click()
    page.wait_for_selector("#point")
    camera.settle()
    below("tabs")
    camera.take("point")
    page.locator("#tab-ranks").click()
    page.wait_for_selector("#panel-figure .heatmaplayer image")
    camera.settle()
    below("tabs")
    camera.take("ranks")
    page.evaluate("window.scrollTo(0, 0)")
    page.locator("#tab-point").click()
    page.locator("#pin").click()
    rows = page.locator('[data-keys="front"] tbody tr a')
    rows.nth(min(rows.count() - 1, rows.count() // 2 + 1)).click()
    page.wait_for_selector("#point-pair")
    camera.settle()
    below("tabs")
    camera.take("compare")


def main(arguments: list[str] | None = None) -> None:
    """Take the pictures that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweeps", type=Path, help="directory with one or more finished sweeps")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="where the PNG files go")
    parser.add_argument("--sweep", default="", help="name of the sweep to show (default: the newest)")
    args = parser.parse_args(arguments)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit("the pictures need Playwright: pip install playwright")
    if browser is None:
        sys.exit("the pictures need Chromium, and none was found")
    if not args.sweeps.is_dir():
        sys.exit(f"there is no directory {args.sweeps}")
    args.out.mkdir(parents=True, exist_ok=True)
    with serving(args.sweeps.resolve()) as (_, address), sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=list(FLAGS))
        page = chromium.new_page(
            viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=SCALE, color_scheme="light"
        )
        take_all(page, address, args.out, args.sweep)
        chromium.close()


if __name__ == "__main__":
    main()
