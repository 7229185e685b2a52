"""What belongs to a sweep or to a point of it, one tab at a time.

Ids: ``panel-figure`` (the figure of the open tab), and those of `point_page` and `pair_page`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dash import html

from . import drawings, pair_page, parts, point_page
from .address import Address
from .choosing import Chosen, chosen
from .parts import Part

if TYPE_CHECKING:
    from .library import SweepView

_NOTES = {
    "ranks": "How much of each layer every member of the front keeps, cheapest first. "
    "A click on a column takes its point.",
    "growth": "The hypervolume is the part of the plane that the front beats: when it no longer grows, the search has "
    "found what it will find.",
    "importance": "How much of the differences between trials each choice explains.",
}


def tab_of(address: Address, choice: Chosen) -> str:
    """Return the open tab: the one that the address names where there is such a thing, else what fits the choice."""
    pair = choice.number is not None and address.pin is not None and address.pin != choice.number
    possible = {"point": choice.number is not None, "compare": pair}
    if address.tab and possible.get(address.tab, True):
        return address.tab
    return "compare" if pair else "point" if choice.number is not None else "ranks"


def shows(view: SweepView, address: Address, choice: Chosen, tab: str) -> object:
    """Return what a tab's text depends on; its figure is brought up to date by itself."""
    if tab == "point":
        return choice.number, address.pin, address.link(), repr(_measured(view, choice.number))
    if tab == "compare":
        return choice.number, address.pin, repr(_measured(view, choice.number)), repr(_measured(view, address.pin))
    return ()


def _measured(view: SweepView, number: int | None) -> object:
    """Return what may yet be measured of a trial, and of the dense model."""
    point = view.point(number) if number is not None else None
    return (point.test_score, point.latency_ms, view.contents.dense) if point else drawings.record_of(view, number)


def panel(view: SweepView, address: Address, choice: Chosen, tab: str) -> Part:
    """Return what a tab shows."""
    if view.contents.header is None:
        return []
    if tab == "point" and choice.number is not None:
        return point_page.panel(view, address, choice.number)
    if tab == "compare" and choice.number is not None and address.pin is not None:
        return pair_page.points_panel(view, address, choice.number, address.pin)
    return parts.card(
        html.P(_NOTES[tab], className="soft"), parts.graph("panel-figure", "figure tall"), className="panel"
    )


def figure(view: SweepView | None, address: Address) -> drawings.Drawing | None:
    """Return the figure of the open tab; None where it has none."""
    if view is None or (header := view.contents.header) is None:
        return None
    choice = chosen(view, address)
    tab = tab_of(address, choice)
    if tab == "growth":
        return drawings.growth(view)
    if tab == "importance":
        return drawings.importance(view)
    if tab == "ranks":
        return drawings.rank_map(view, choice.number, address.pin)
    numbers = (choice.number, address.pin) if tab == "compare" else (choice.number,)
    found = [drawings.record_of(view, number) for number in numbers]
    return drawings.curves(view, header, [record for record in found if record is not None])
