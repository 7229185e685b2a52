"""The pages as a person goes through them: addresses, axes, filters, comparison, themes, keyboard."""

from __future__ import annotations

import itertools
import re

import pytest

from autorank.sweep import open_sweep
from tests.dashboards import looking
from tests.dashboards.samples import BEGAN, write_sweep

pytestmark = pytest.mark.browser

LABELS = {
    "score": "validation accuracy (%)",
    "macs_kept": "MACs kept (compressed ÷ dense)",
    "params_kept": "parameters kept (compressed ÷ dense)",
    "bytes_kept": "bytes kept (compressed ÷ dense)",
    "latency_kept": "latency kept (compressed ÷ dense)",
}
GROUNDS = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two finished sweeps and one that was killed."""
    root = tmp_path_factory.mktemp("browsing")
    write_sweep(root / "sweeps" / "alpha", 40, seed=1)
    write_sweep(root / "sweeps" / "beta", 60, seed=2, created=BEGAN + 3600, strategy="nsga2")
    write_sweep(root / "sweeps" / "gamma", 20, seed=3, created=BEGAN + 7200, ended="", measured=False)
    return root


@pytest.fixture(scope="module")
def served(serve, root):
    return serve("sweeps", directory=root)


@pytest.fixture(scope="module")
def numbers(root):
    """The front of alpha, best score first."""
    return [point.record.number for point in open_sweep(root / "sweeps" / "alpha").points]


@pytest.fixture(scope="module")
def sweeps(browser, served):
    """Name → query of each sweep."""
    context = browser.new_context()
    found = looking.home(context.new_page(), served)
    context.close()
    return found


@pytest.fixture(autouse=True)
def _quiet(page):
    """No page complains in the console, breaks its rules, opens a dialog, or asks another server."""
    with looking.listening(page) as said:
        yield
    assert not said


class TestList:
    def test_newest_first_with_their_states(self, page, served):
        assert list(looking.home(page, served)) == ["gamma", "beta", "alpha"]
        page.wait_for_selector(".chip.reading", state="detached")
        chips = page.locator("td .chip")
        assert chips.all_inner_texts() == ["stopped", "ended", "ended"]
        signs = chips.evaluate_all("all => all.map(chip => getComputedStyle(chip, '::before').content)")
        assert signs[0] != signs[1] == signs[2]  # a sign of its own shape, beside the colour

    def test_a_name_is_found_by_a_part_of_it(self, page, served):
        looking.home(page, served)
        page.keyboard.press("/")
        page.keyboard.type("ALP")
        looking.wait(page, "document.querySelectorAll('table.list tbody tr').length === 1")
        assert list(looking.keys(page)) == ["alpha"]
        page.fill("#filter", "nothing like it")
        page.get_by_text("No sweep has such a name.").wait_for()


class TestAddresses:
    def test_back_forward_and_bookmarks_show_what_was_seen(self, page, served, numbers, browser):
        looking.home(page, served)
        page.get_by_role("link", name="alpha").click()
        page.wait_for_selector("#front .points path")
        page.click(f"#member-{numbers[1]}")
        page.get_by_role("heading", name=f"Point #{numbers[1]}").wait_for()
        page.click("#tab-growth")
        looking.wait_for_query(page, tab="growth", point=numbers[1])
        bookmark = page.url
        page.go_back()
        page.get_by_role("heading", name=f"Point #{numbers[1]}").wait_for()
        page.go_back()
        page.wait_for_selector("#point", state="detached")
        page.go_back()
        page.wait_for_selector("table.list")
        assert page.title() == "autorank"
        page.go_forward()
        page.wait_for_selector("#front")
        looking.wait(page, "document.title === 'alpha · autorank'")
        page.goto(bookmark)
        page.wait_for_selector("#panel-figure .scatterlayer .trace")
        assert page.locator("#tab-growth").get_attribute("aria-current") == "page"
        assert page.locator("#tab-point").inner_text() == f"Point #{numbers[1]}"

    def test_the_rank_map_takes_the_point_of_a_column(self, page, served, sweeps, numbers):
        looking.look(page, served, sweeps["alpha"], tab="ranks")
        page.wait_for_selector("#panel-figure .heatmaplayer image")
        page.locator("#panel-figure").scroll_into_view_if_needed()
        area = page.locator("#panel-figure .nsewdrag").bounding_box()
        cheapest = area["x"] + area["width"] / len(numbers) / 2, area["y"] + area["height"] / 2
        page.mouse.move(cheapest[0] - 2, cheapest[1])
        page.mouse.move(*cheapest)
        page.wait_for_selector("#panel-figure .hoverlayer .hovertext", state="attached")
        page.mouse.click(*cheapest)
        looking.wait_for_query(page, point=numbers[-1], tab="ranks")
        page.wait_for_selector("#panel-figure .shapelayer path")


class TestAxes:
    def test_any_two_values_with_their_units(self, page, served, sweeps):
        """One choice at a time, as somebody would, until every pair was seen."""
        looking.look(page, served, sweeps["alpha"])
        drawn = looking.marks(page)
        shown = {"x": "macs_kept", "y": "score"}
        wanted = {frozenset(pair) for pair in itertools.combinations(LABELS, 2)} - {frozenset(shown.values())}
        while wanted:
            axis, value = next(
                (
                    (axis, value)
                    for axis in "xy"
                    for value in LABELS
                    if frozenset({value, shown["y" if axis == "x" else "x"]}) in wanted
                ),
                ("x", sorted(min(wanted, key=sorted))[0]),
            )
            other = "y" if axis == "x" else "x"
            if value == shown[other]:  # then they change places
                shown[other] = shown[axis]
            shown[axis] = value
            wanted.discard(frozenset(shown.values()))
            page.click(f"#axis-{axis}")
            page.locator(f".dash-dropdown-option:has(input[value={value}])").click()
            looking.wait_for_axes(page, LABELS[shown["x"]], LABELS[shown["y"]])
            assert looking.marks(page) == drawn
        asked = looking.query(page)
        assert {"x": asked["x"], "y": asked["y"]} == shown

    def test_every_figure_says_what_its_axes_are(self, page, served, sweeps, numbers):
        looking.look(page, served, sweeps["alpha"], point=numbers[0], tab="ranks")
        for tab, across, up in (
            ("ranks", "trial, cheapest first", "layer"),
            ("growth", "finished trials", "hypervolume"),
            ("point", "step", "loss"),
        ):
            page.click(f"#tab-{tab}")
            said = "document.querySelector('#panel-figure .g-%stitle text')?.textContent.includes(arg[%d])"
            looking.wait(page, f"{said % ('x', 0)} && {said % ('y', 1)}", [across, up])

    def test_formats_and_kinds_that_are_switched_off_are_not_drawn(self, page, served, sweeps):
        looking.look(page, served, sweeps["alpha"])
        everything = looking.marks(page)
        page.click("#filters-toggle")
        group = page.locator("#show-groups label").first
        name = group.inner_text()
        group.click()
        looking.wait_for_query(page, hide=name)
        looking.wait(page, "!document.querySelector('#front .js-plotly-plot').data.some(t => t.name === arg)", name)
        looking.wait(page, f"{looking.MARKS} < arg", everything)
        fewer = looking.marks(page)
        assert fewer < everything
        page.locator("#show-kinds label", has_text="stopped early").click()
        looking.wait(page, "location.search.includes('skip=pruned')")
        looking.wait(page, f"{looking.MARKS} < arg", fewer)
        page.get_by_text("Filters (2 off)").wait_for()
        page.keyboard.press("Escape")
        assert page.locator("details.filters").get_attribute("open") is None
        assert page.evaluate("() => document.activeElement.id") == "filters-toggle"
        page.reload()
        page.wait_for_selector("#front .points path")
        assert looking.marks(page) < fewer
        page.go_back()
        looking.wait(page, f"{looking.MARKS} === arg", fewer)


class TestComparing:
    def test_two_points(self, page, served, sweeps, numbers):
        looking.look(page, served, sweeps["alpha"], point=numbers[0])
        page.click("#pin")
        looking.wait_for_query(page, pin=numbers[0])
        looking.click_point(page, numbers[3])
        page.wait_for_selector("#point-pair")
        looking.wait_for_query(page, pin=numbers[0], point=numbers[3])
        table = page.locator("#pair-figures")
        heads = " ".join(table.locator("thead th").all_inner_texts())
        assert f"#{numbers[0]}" in heads
        assert f"#{numbers[3]}" in heads
        page.click("#swap")
        looking.wait_for_query(page, pin=numbers[3], point=numbers[0])
        page.click("#unpin")
        looking.wait_for_query(page, pin=None)
        page.wait_for_selector("#point")

    def test_two_sweeps(self, page, served):
        looking.home(page, served)
        assert page.locator("#compare").is_disabled()
        for name in ("alpha", "beta"):
            page.get_by_role("checkbox", name=f"compare {name}").check()
        page.click("#compare:enabled")
        page.get_by_role("heading", name="Two sweeps compared").wait_for()
        looking.wait(page, "document.querySelectorAll('#panel-figure .scatterlayer .trace').length >= 2")
        looking.wait_for_axes(page, LABELS["macs_kept"], LABELS["score"], "panel-figure")
        differing = page.locator("#pair-differences").inner_text()
        assert "strategy" in differing
        assert "nsga2" in differing
        page.go_back()
        page.wait_for_selector("table.list")


class TestThemes:
    COLOURS = """(tick => tick && [
        getComputedStyle(document.querySelector(".card")).backgroundColor, getComputedStyle(tick).fill,
    ])(document.querySelector("#front .xtick text"))"""

    def wait(self, page, theme):
        dark = theme == "dark"
        looking.wait(
            page,
            f"(found => found && found[0] === arg[0] && parseInt(found[1].slice(4)) > 127 === arg[1])({self.COLOURS})",
            [GROUNDS[theme], dark],
        )
        ground, ink = page.evaluate(f"() => {self.COLOURS}")
        assert looking.ratio(ink, ground) >= 4.5

    def test_page_and_figure_follow_the_system_until_told(self, page, served, sweeps):
        looking.look(page, served, sweeps["alpha"])
        self.wait(page, "light")
        page.emulate_media(color_scheme="dark")
        self.wait(page, "dark")
        page.click("#theme")
        page.get_by_role("button", name="Theme: light").wait_for()
        self.wait(page, "light")
        page.reload()
        self.wait(page, "light")
        page.locator("#theme").press("t")
        page.get_by_role("button", name="Theme: dark").wait_for()
        page.emulate_media(color_scheme="light")
        self.wait(page, "dark")
        page.goto(served.dashboard)
        page.wait_for_selector("table.list")
        assert page.evaluate("() => document.documentElement.dataset.theme") == "dark"

    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_every_text_can_be_read(self, page, served, sweeps, numbers, theme):
        page.emulate_media(color_scheme=theme)
        for where in (
            "",
            f"{sweeps['alpha']}&point={numbers[0]}",
            f"{sweeps['alpha']}&point={numbers[0]}&pin={numbers[2]}",
        ):
            page.goto(served.dashboard + where)
            page.wait_for_selector("#point-pair" if "pin" in where else "#point" if where else "table.list")
            faint = [
                text
                for text in looking.texts(page)
                if looking.ratio(text["ink"], text["ground"]) < (3 if text["size"] >= 18.66 else 4.5)
            ]
            assert not faint


class TestKeyboard:
    NAMED = """() => (one => one === document.body ? null
        : one.id || `${one.getAttribute("role")} ${one.className} ${one.textContent}`)(document.activeElement)"""
    SEEN = """() => {
        const one = document.activeElement, box = one.getBoundingClientRect();
        return box.width > 0 && [one, one.parentElement].map(getComputedStyle).some(style =>
            style.boxShadow !== "none" || (style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0));
    }"""

    def test_tab_reaches_every_control_and_shows_where_it_is(self, page, served, sweeps, numbers):
        looking.look(page, served, sweeps["alpha"], point=numbers[0])
        page.wait_for_selector("#point #export")
        page.evaluate("() => document.activeElement.blur()")
        reached: list[str] = []
        for _ in range(60):
            page.keyboard.press("Tab")
            name = page.evaluate(self.NAMED)
            if name is None or name in reached[:1]:
                break
            assert page.evaluate(self.SEEN), f"focus is not seen on {name}"
            reached.append(name)
        for wanted in (
            *("skip", "home", "go-list", "go-mlflow", "theme", "help-open", "axis-y", "axis-x", "filters-toggle"),
            *("tab-ranks", "tab-growth", "tab-importance", "pin", "command", "copy-command", "export"),
            f"member-{numbers[0]}",
        ):
            assert wanted in reached
        assert any(name.startswith("slider") for name in reached)
        assert sum(name.startswith("member-") for name in reached) == 1  # the arrow keys do the rest

    def test_arrows_and_letters_move_along_the_front(self, page, served, sweeps, numbers):
        looking.look(page, served, sweeps["alpha"], point=numbers[0])
        page.focus(f"#member-{numbers[0]}")
        for key, at in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("End", -1), ("Home", 0)):
            page.keyboard.press(key)
            looking.wait_for_query(page, point=numbers[at])
            looking.wait(page, "document.activeElement.id === arg", f"member-{numbers[at]}")
            page.locator(f"#member-{numbers[at]}[aria-current=true]").wait_for()
        page.keyboard.press("j")
        looking.wait_for_query(page, point=numbers[1])
        page.locator(f"#member-{numbers[1]}[aria-current=true]").wait_for()
        page.keyboard.press("k")
        looking.wait_for_query(page, point=numbers[0])
        page.wait_for_selector(f"#point h2:text('Point #{numbers[0]}')")
        page.keyboard.press("p")
        looking.wait_for_query(page, pin=numbers[0])
        page.keyboard.press("?")
        page.get_by_role("dialog", name="Keyboard shortcuts").wait_for()
        page.keyboard.press("Escape")
        page.get_by_role("dialog", name="Keyboard shortcuts").wait_for(state="hidden")
        page.keyboard.press("l")
        page.wait_for_selector("table.list")

    def test_the_command_is_copied(self, page, served, sweeps, numbers, root):
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        looking.look(page, served, sweeps["alpha"], point=numbers[0])
        page.wait_for_selector("#command")
        page.keyboard.press("c")
        page.get_by_role("button", name="Copied").wait_for()
        copied = page.evaluate("() => navigator.clipboard.readText()")
        assert copied == f"autorank export {root / 'sweeps' / 'alpha'} --point {numbers[0]}"


class TestForEverybody:
    def test_every_control_has_a_name(self, page, served, sweeps, numbers):
        looking.look(page, served, sweeps["alpha"], point=numbers[0])
        page.wait_for_selector("#point #export")
        snapshot = page.locator("body").aria_snapshot()
        roles = (
            "button|link|checkbox|radio|slider|spinbutton|textbox|searchbox|combobox|listbox|progressbar|dialog|table"
        )
        nameless = [
            line for line in snapshot.splitlines() if re.match(rf"\s*- (?:{roles})(?: \[[^\]]*\])*(?::.*)?$", line)
        ]
        assert not nameless

    def test_headings_and_language(self, page, served, sweeps, numbers):
        for where in ("", f"{sweeps['alpha']}&point={numbers[0]}"):
            page.goto(served.dashboard + where)
            page.wait_for_selector("#point" if where else "table.list")
            assert page.locator("h1").count() == 1
            levels = [
                int(tag[1])
                for tag in page.locator("h1, h2, h3").evaluate_all(
                    "all => all.filter(one => one.getClientRects().length).map(one => one.tagName)"
                )
            ]
            assert levels[0] == 1
            assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
            assert page.evaluate("() => document.documentElement.lang") == "en"
            assert page.locator("main").count() == 1

    @pytest.mark.parametrize("width", [1366, 1280])
    def test_a_laptop_shows_it_without_scrolling_sideways(self, page, served, sweeps, numbers, width):
        page.set_viewport_size({"width": width, "height": 768})
        one = f"{sweeps['alpha']}&point={numbers[0]}"
        pair = f"{sweeps['alpha']}&with={sweeps['beta'].partition('=')[2]}"
        for where, what in (
            ("", "table.list"),
            (one, "#point"),
            (f"{one}&pin={numbers[1]}", "#point-pair"),
            (pair, "#pair-body table"),
        ):
            page.goto(served.dashboard + where)
            page.wait_for_selector(what)
            wide, seen = page.evaluate(
                "() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            )
            assert wide <= seen
            edges = page.locator("main > *").evaluate_all("all => all.map(one => one.getBoundingClientRect().right)")
            assert max(edges) <= width
        looking.look(page, served, one)
        page.wait_for_selector("#point")
        figure = page.locator("#front").bounding_box()
        assert figure["y"] + figure["height"] <= 768  # the whole front without scrolling down
        amount = page.locator("#amount").bounding_box()
        assert amount["y"] + amount["height"] <= 768
