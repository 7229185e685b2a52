"""What a browser asks for every second, in one small answer: whether anything looks different from what it shows."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import drawings, listing, pair_page, panels, sweep_page
from .address import Address
from .choosing import chosen
from .sections import token

if TYPE_CHECKING:
    from .server import Sources

PAGES: dict[str, ModuleType] = {"list": listing, "sweep": sweep_page, "pair": pair_page}
"""Kind of page → its module, with the functions `page` and `sections`."""


def place_of(sources: Sources, address: Address) -> str:
    """Return which page it is; another one when a sweep appears that was not there, or goes away."""
    there = [sources.library.get(key) is not None for key in (address.sweep, address.other) if key]
    return token(address.identity, there)


def title(sources: Sources, address: Address) -> str:
    """Return the title of the page."""
    views = [sources.library.get(key) for key in (address.sweep, address.other) if key]
    names = [view.name if view else "no such sweep" for view in views]
    return " · ".join([*([" and ".join(names)] if names else []), "autorank"])


def standing(sources: Sources, address: Address) -> dict[str, Any]:
    """Return what the browser compares with what it knows.

    Returns
    -------
    dict
        ``place`` and ``title`` of the page; ``fresh``, ``front`` and ``panel``, which differ when its sections, the
        figure of the front or that of the open tab look different; ``selected``, the chosen trial and the pinned one.
    """
    sections = PAGES[address.page].sections(sources, address)
    view = sources.library.get(address.sweep) if address.page == "sweep" else None
    return {
        "place": place_of(sources, address),
        "title": title(sources, address),
        "fresh": token([(name, section.shows) for name, section in sections.items()]),
        "front": front_shows(sources, address) if view else "",
        "panel": token(drawing.shows) if (drawing := panel_figure(sources, address)) else "",
        "selected": [chosen(view, address).number if view else None, address.pin],
    }


def front_shows(sources: Sources, address: Address) -> str:
    """Return what the figure of the front shows."""
    view = sources.library.get(address.sweep)
    return token(view.key, view.version, drawings.axes_of(view, address), address.hide, address.skip) if view else ""


def panel_figure(sources: Sources, address: Address) -> drawings.Drawing | None:
    """Return the figure beside or below the main one; None where the page has none."""
    if address.page == "pair":
        return pair_page.figure(sources, address)
    return panels.figure(sources.library.get(address.sweep), address) if address.page == "sweep" else None
