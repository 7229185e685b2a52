"""The figures of the pages: made once for what they show, not once for each look."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from autorank import plotting
from autorank.importance import importance_of
from autorank.scene import AXES, Scene, scene
from autorank.types import SweepHeader, TrialRecord

from .address import Address
from .sections import Aside, Kept, token

if TYPE_CHECKING:
    from .library import SweepView

Figure = plotting.Figure

ACCENT = "#D55E00"
"""The colour of what is chosen."""

KINDS = {"full": "full fidelity", "partial": "lower fidelity", "pruned": "stopped early"}

_scenes = Kept(24)
_figures = Kept(48)
_numbers = Kept(24)

aside = Aside(24)
"""What takes seconds."""


def available(view: SweepView) -> tuple[str, ...]:
    """Return what may stand on an axis: the score, and every ratio that some trial has."""

    def look() -> tuple[str, ...]:
        records = view.contents.records
        return tuple(n for n in AXES if n in ("score", "macs_kept") or any(_finite(r.value(n)) for r in records))

    return _numbers.get(("axes", view.key, view.version), look)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def axes_of(view: SweepView, address: Address) -> tuple[str, str]:
    """Return what x and y show: what the address says, if it can be shown, else the usual."""
    usual = usual_axes(view)
    able = available(view)
    x, y = address.x if address.x in able else usual[0], address.y if address.y in able else usual[1]
    return (x, y) if x != y else usual


def usual_axes(view: SweepView) -> tuple[str, str]:
    """Return what x and y show when nobody says so."""
    header = view.contents.header
    costs = [o.name for o in header.objectives if o.name != "score"] if header else []
    able = available(view)
    return next((name for name in costs if name in able), "macs_kept"), "score"


def record_of(view: SweepView, number: int | None) -> TrialRecord | None:
    """Return a trial by its number; None where there is none."""
    if number is None:
        return None
    table = _numbers.get(
        ("records", view.key, view.version), lambda: {record.number: record for record in view.contents.records}
    )
    return table.get(number)


def scene_of(view: SweepView, axes: tuple[str, str]) -> Scene | None:
    """Return what the figure of the front shows; None while the sweep says nothing."""
    header = view.contents.header
    if header is None:
        return None
    return _scenes.get((view.key, view.version, axes), lambda: scene(header, view.contents.records, view.points, axes))


def front(view: SweepView, address: Address, dark: bool, known: Any = None) -> Figure:
    """Return the figure of the front, without the formats and the kinds of trials that the address hides.

    Most of a figure are the texts to hover, so the browser keeps them: `known` is what an earlier figure said under
    ``known``, and the texts of the trials until then are left out.
    """
    axes = axes_of(view, address)
    whole = scene_of(view, axes)
    if whole is None:
        return shown(nothing("No trial yet."), dark, "")

    records = view.contents.records
    measured = [(p.record.number, p.test_score, p.latency_ms) for p in view.points if p.test_score is not None]
    whose = token(view.key, view.created, measured)
    count = known.get("count") if isinstance(known, dict) and known.get("whose") == whose else 0
    told = {record.number for record in records[:count]} if isinstance(count, int) and count > 0 else set()

    def draw() -> Figure:
        marks = tuple(m for m in whole.marks if m.group not in address.hide and m.kind not in address.skip)
        return fitted(plotting.pareto_figure(replace(whole, marks=marks), told))

    figure = drawn(("front", view.key, view.version, axes, address.hide, address.skip, len(told)), draw)
    return {**shown(figure, dark, token(view.key, axes)), "known": {"whose": whose, "count": len(records)}}


def drawn(key: Hashable, draw: Callable[[], Figure]) -> Figure:
    """Return a figure, drawn only if it is not kept under `key`."""
    return _figures.get(key, draw)


def fitted(figure: Figure, **margins: int) -> Figure:
    """Return a figure for a place on a page that has a heading of its own."""
    layout = {k: v for k, v in figure["layout"].items() if k != "title"}
    below = any("yshift" in annotation for annotation in layout.get("annotations", ()))  # a remark under the axis
    margin = {"l": 60, "r": 12, "t": 30, "b": 78 if below else 54, **margins}
    return {"data": figure["data"], "layout": {**layout, "margin": margin}}


@dataclass(frozen=True)
class Drawing:
    """A figure to be made: what it shows (equal for equal figures), how long a zoom stays, and how it is made."""

    shows: object
    stays: str
    draw: Callable[[], Figure]


def _kept(shows: tuple[Hashable, ...], stays: tuple[object, ...], draw: Callable[[], Figure]) -> Drawing:
    return Drawing(shows, token(stays), lambda: drawn(shows, draw))


def growth(view: SweepView) -> Drawing:
    """Return the figure of the hypervolume."""
    header, records = view.contents.header, view.contents.records
    if header is None:
        return Drawing((), "", lambda: nothing("No trial yet."))
    shows = ("growth", view.key, len(records), view.created)
    return _kept(shows, shows[:2], lambda: fitted(plotting.hypervolume_figure(header, records)))


def rank_map(view: SweepView, number: int | None, pin: int | None) -> Drawing:
    """Return the map of what each layer keeps along the front, with the chosen and the pinned member outlined."""
    header, front = view.contents.header, view.points
    if header is None or not front:
        return Drawing(("ranks",), "", lambda: nothing("No point on the front yet."))
    members = tuple(p.record.number for p in front)
    shows = ("ranks", view.key, members, number, pin)

    def draw() -> Figure:
        figure = fitted(plotting.rank_map_figure(header, front), r=4)
        columns = list(figure["data"][0]["x"]) if figure["data"] else []
        outlined = (
            (columns.index(f"#{n}"), dash) for n, dash in ((number, "solid"), (pin, "dot")) if f"#{n}" in columns
        )
        figure["layout"]["shapes"] = [
            {
                "type": "rect",
                "xref": "x",
                "yref": "paper",
                "x0": column - 0.5,
                "x1": column + 0.5,
                "y0": 0,
                "y1": 1,
                "line": {"width": 3, "color": ACCENT, "dash": dash},
            }
            for column, dash in outlined
        ]
        return figure

    return _kept(shows, shows[:3], draw)


def importance(view: SweepView) -> Drawing:
    """Return the figure of what the choices explain: the latest that there is, while a newer one is worked out."""
    header, records = view.contents.header, view.contents.records
    if header is None or not records:
        return Drawing(("importance",), "", lambda: nothing("No trial yet."))
    what = ("importance", view.key, view.created)
    # While trials go on, only when there are some more: with each of them it would keep a core busy.
    step = max(len(records) // 50, 1) if view.state.stage == "running" else 1
    found = aside.latest(what, len(records) // step * step, lambda: importance_of(header, records))
    if found is None:
        return Drawing((*what, "waits"), "", lambda: nothing("Being worked out; this takes some seconds."))
    count, result = found
    if result is None:
        return Drawing((*what, "none"), "", lambda: nothing("This cannot be worked out for these trials."))
    return _kept((*what, count), what, lambda: fitted(plotting.importance_figure(result)))


def curves(view: SweepView, header: SweepHeader, records: Sequence[TrialRecord]) -> Drawing:
    """Return the figure of the fine-tune of some trials."""
    shows = ("curves", view.key, tuple(record.number for record in records))
    return _kept(shows, shows, lambda: fitted(plotting.curve_figure(header, records)))


def nothing(text: str) -> Figure:
    """Return a figure that says why it is empty; `text` is ours, never a name."""
    hidden = {"visible": False}
    said = {"text": text, "xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5, "showarrow": False}
    return {"data": [], "layout": {"xaxis": hidden, "yaxis": hidden, "annotations": [said], "font": {"size": 13}}}


def shown(figure: Figure, dark: bool, stays: str) -> Figure:
    """Return a figure as the page shows it: in its theme, its zoom kept as long as `stays` is the same."""
    made: dict[str, Any] = plotting.themed(figure, dark)
    return {**made, "layout": {**made["layout"], "uirevision": stays}}
