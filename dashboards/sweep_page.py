"""The page of one sweep: how far it is, its front, the choice of a point, and what belongs to it.

Ids: ``sweep-head``, ``axis-x`` and ``axis-y`` (what the axes show), ``filters-toggle``, ``show-groups`` and
``show-kinds`` (filters), ``front`` (the figure), ``want`` (lose or need) and ``amount`` (the slider with its number),
``answer`` (what was picked, in words), ``members`` (the front as a table; each link is ``member-NUMBER``), ``tabs``
(each link is ``tab-NAME``) and ``panel`` (what the open tab shows, see `panels`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dash import dcc, html

from autorank.captions import clean, counted, plan_text, value_name
from autorank.front import default_drop

from . import drawings, panels, parts
from .address import Address
from .choosing import Chosen, chosen
from .parts import Part
from .sections import Section, Sections, place, seen, token

if TYPE_CHECKING:
    from .library import SweepView
    from .server import Sources

_TABS = {
    "ranks": "Ranks along the front",
    "growth": "Growth of the front",
    "importance": "What matters",
}


def page(sources: Sources, address: Address, dark: bool) -> Part:
    """Return the whole page, its main figure in the dark theme or the light one."""
    view = sources.library.get(address.sweep)
    if view is None:
        return parts.gone("There is no such sweep (any more).")
    found = sections(sources, address)
    return [
        place(found, "sweep-head"),
        html.Div(
            [
                parts.card(
                    html.Div([place(found, "axes"), place(found, "filters")], className="tools"),
                    parts.graph("front", "figure"),
                    **parts.aria(label="Figure of the front"),
                ),
                html.Div(
                    [
                        parts.card(
                            html.H2("Choose a point"),
                            place(found, "choose"),
                            place(found, "measure", className="amount"),
                            place(found, "answer", **parts.aria(live="polite")),
                            className="choose",
                        ),
                        parts.card(place(found, "members"), className="members"),
                    ],
                    className="side",
                ),
            ],
            className="work",
        ),
        place(found, "tabs"),
        place(found, "panel"),
        dcc.Store(id="front-base", data=drawings.front(view, address, dark)),
        seen("sweep", found),
    ]


def sections(sources: Sources, address: Address) -> Sections:
    """Return the parts of the page that change; none when the sweep is gone."""
    view = sources.library.get(address.sweep)
    if view is None:
        return {}
    choice = chosen(view, address)
    link = sources.runs.page(view.contents.header.sweep_id) if view.contents.header else None
    axes, usual = drawings.axes_of(view, address), drawings.usual_axes(view)
    able = drawings.available(view)
    scene = drawings.scene_of(view, axes)
    groups = {mark.group: mark.colour for mark in scene.marks} if scene else {}
    kinds = [kind for kind in drawings.KINDS if scene and any(mark.kind == kind for mark in scene.marks)]
    members = [(p.record.number, p.test_score, p.latency_ms) for p in view.points]
    tab = panels.tab_of(address, choice)
    best = view.recommended.record.number if view.recommended else None
    return {
        "sweep-head": Section(token(view.key, view.version, link), lambda: _head(view, link, address)),
        "axes": Section(token(view.key, able, usual), lambda: _axes(view, able, axes, usual)),
        "filters": Section(token(view.key, groups, kinds), lambda: _filters(groups, kinds, address)),
        "choose": Section(token(view.key, bool(members)), lambda: _choose(view, address)),
        "measure": Section(token(view.key, bool(members), address.need is None), lambda: _measure(view, address)),
        "answer": Section(token(view.key, choice.words, choice.note), lambda: _answer(choice)),
        "members": Section(token(view.key, members, best), lambda: _members(view)),
        "tabs": Section(
            token(view.key, view.header is None, tab, choice.number, address), lambda: _tabs(view, address, choice, tab)
        ),
        "panel": Section(
            token(view.key, view.header is None, tab, panels.shows(view, address, choice, tab)),
            lambda: panels.panel(view, address, choice, tab),
        ),
    }


def _head(view: SweepView, link: str | None, address: Address) -> Part:
    state, header = view.state, view.contents.header
    said = [f"{state.done} of {state.total} trials"] if header else []
    said += [
        f"{count} {what}"
        for count, what in ((state.probes, "probes"), (state.failed, "failed"), (state.pruned, "stopped early"))
        if count
    ]
    said += [f"{parts.left(state)} left"] if parts.left(state) else []
    said += [clean(state.reason, 120)] if state.reason else []
    title = html.Div(
        [
            html.H1(clean(view.name, 120), title=clean(view.name, 400)),
            parts.chip(state),
            html.Div([parts.bar(state), html.Span(" · ".join(said))], className="pace", role="status")
            if header
            else html.Span(parts.STAGES[state.stage][1], className="soft", role="status"),
            html.Div(
                [html.A("Run in MLflow ↗", href=link, id="mlflow-run", target="_blank", rel="noopener")]
                if link
                else [],
                className="links",
            ),
        ],
        className="head row",
    )
    trouble = [html.P(clean(view.problem, 300), className="note-line")] if view.problem else []
    return [title, *trouble, *([_facts(view, address)] if header else [])]


def _facts(view: SweepView, address: Address) -> Part:
    header, best = view.contents.header, view.recommended
    assert header is not None
    dense = header.dense_cost
    facts = [
        parts.fact(
            "Dense model",
            parts.score(header, header.dense.score),
            note=f"{counted(dense.macs)} MACs, {counted(dense.params)} parameters",
        )
    ]
    if best is not None:
        record = best.record
        facts.append(
            parts.fact(
                "Recommended",
                html.A(f"#{record.number}", href=address.link(point=record.number, tab=""), id="recommended"),
                f" {parts.score(header, record.score)} ",
                html.Span(f"({parts.change(header.dense.score, record.score)})", className="soft"),
                note=clean(view.why.partition(" (")[0], 200),
            )
        )
        facts.append(
            parts.fact(
                "It keeps",
                f"{parts.ratio(record.kept.get('macs_kept'))} of the MACs",
                note=f"{parts.ratio(record.kept.get('params_kept'))} of the parameters",
            )
        )
    facts.append(
        parts.fact(
            "On the front",
            str(len(view.points)),
            note=" against ".join(value_name(header, objective.name) for objective in header.objectives),
        )
    )
    return html.Dl(facts, className="facts")


def _axes(view: SweepView, able: tuple[str, ...], axes: tuple[str, str], usual: tuple[str, str]) -> Part:
    header = view.contents.header
    if header is None:
        return []
    options = [{"label": value_name(header, name), "value": name} for name in able]

    def choice(name: str, label: str, value: str) -> Part:
        return html.Div(
            [
                # Dash names the control by the element of this id and by the value.
                html.Label(label, htmlFor=name, id=f"{name}-value-count"),
                dcc.Dropdown(id=name, options=options, value=value, clearable=False, searchable=False),
            ],
            className="pick",
        )

    return [
        choice("axis-y", "Vertical", axes[1]),
        choice("axis-x", "Horizontal", axes[0]),
        dcc.Store(id="usual-axes", data=list(usual)),
    ]


def _filters(groups: dict[str, str], kinds: list[str], address: Address) -> Part:
    if len(groups) < 2 and len(kinds) < 2:
        return []
    hidden = sum(group in address.hide for group in groups) + sum(kind in address.skip for kind in kinds)

    def boxes(name: str, legend: str, options: list[dict[str, Part]], off: tuple[str, ...]) -> Part:
        values = [option["value"] for option in options]
        return html.Fieldset(
            [
                html.Legend(legend),
                dcc.Checklist(id=name, options=options, value=[v for v in values if v not in off]),
            ]
        )

    trials = [{"label": drawings.KINDS[kind], "value": kind} for kind in kinds]
    formats = [
        {
            "label": html.Span([html.Span(className="dot", style={"background": colour}), group]),
            "value": group,
        }
        for group, colour in groups.items()
    ]
    return html.Details(
        [
            html.Summary(f"Filters ({hidden} off)" if hidden else "Filters", id="filters-toggle"),
            html.Div(
                [
                    boxes("show-groups", "Format of most MACs", formats, address.hide),
                    boxes("show-kinds", "Trials", trials, address.skip),
                ],
                className="popover",
            ),
        ],
        className="filters",
    )


def _choose(view: SweepView, address: Address) -> Part:
    header = view.contents.header
    if header is None or not view.points:
        return html.P("Points appear here when the first trials are through.", className="soft")
    word = parts.points_word(header)
    return dcc.RadioItems(
        id="want",
        options=[
            {"label": f"I can lose {'points' if word == 'points' else 'score'}", "value": "lose"},
            {"label": "I need fewer MACs", "value": "need"},
        ],
        value="lose" if address.need is None else "need",
        inline=True,
    )


def _measure(view: SweepView, address: Address) -> Part:
    """Return the slider: how much score may be lost, or how many times fewer MACs there must be."""
    header = view.contents.header
    if header is None or not view.points:
        return []
    small = default_drop(header.metric, header.dense.score) or 1.0
    if address.need is not None:
        least = min((point.record.kept.get("macs_kept") or 1.0) for point in view.points)
        low, top, step = 1.0, max(4.0, math.ceil(min(1 / max(least, 1e-3), 100.0))), 0.1
        mode, label, value = "need", "At least so many times fewer MACs (×)", address.need
    else:
        scores = [point.record.score for point in view.points if point.record.score is not None]
        most = max((abs(header.dense.score - score) for score in scores), default=1.0)
        low, top, step = 0.0, _round_up(max(min(most, 10 * small), 2 * small)), _round_up(small / 50)
        mode, label = "lose", f"At most this loss of score ({parts.points_word(header)})"
        value = small if address.lose is None else address.lose
    return [
        html.Label(label, htmlFor="amount"),
        dcc.Slider(
            id="amount",
            min=low,
            max=top,
            step=step,
            value=round(min(max(value, low), top), 6),
            marks={low: f"{low:g}", top: f"{top:g}"},
            updatemode="mouseup",
            className=mode,
        ),
        dcc.Store(id="usual-amounts", data={"lose": small, "need": 2.0}),
    ]


def _round_up(value: float) -> float:
    """Return the next of 1, 2 and 5 times a power of ten."""
    power: float = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(round(times * power, 9) for times in (1, 2, 5, 10) if times * power >= value * (1 - 1e-9))


def _answer(choice: Chosen) -> Part:
    said = [html.P(choice.words, className="words")] if choice.words else []
    return said + ([html.P(choice.note, className="soft")] if choice.note else [])


def _members(view: SweepView) -> Part:
    """Return the front as a table; which row is chosen and which pinned is for the browser to show."""
    header = view.contents.header
    title = html.H2("On the front")
    if header is None or not view.points:
        return [title, html.P("No point yet.", className="soft")]
    best = view.recommended.record.number if view.recommended else None
    rows = []
    for point in view.points:
        record = point.record
        link = html.A(
            f"#{record.number}" + (" ★" if record.number == best else ""),
            href=Address(view.key, point=record.number).link(),
            id=f"member-{record.number}",
            title=plan_text(record.plan) + (" (recommended)" if record.number == best else ""),
            **parts.data(point=str(record.number)),
        )
        rows.append(
            html.Tr(
                [
                    html.Th(link, scope="row"),
                    parts.cell(parts.score(header, record.score)),
                    parts.cell(parts.change(header.dense.score, record.score)),
                    parts.cell(parts.ratio(record.kept.get("macs_kept"))),
                ]
            )
        )
    columns = (("Point", False), ("Score", True), ("Change", True), ("MACs kept", True))
    table = parts.table(columns, rows, "The front, best score first; arrow keys move along it")
    return [title, html.Div(table, className="scroll", **parts.data(keys="front"))]


def _tabs(view: SweepView, address: Address, choice: Chosen, tab: str) -> Part:
    if view.contents.header is None:
        return []
    names = dict(_TABS)
    if choice.number is not None:
        names = {"point": f"Point #{choice.number}", **names}
        if address.pin is not None and address.pin != choice.number:
            names["compare"] = f"#{choice.number} beside #{address.pin}"
    return html.Nav(
        [
            html.A(
                label,
                href=address.link(tab=name),
                id=f"tab-{name}",
                className="leaf",
                **(parts.aria(current="page") if name == tab else {}),
            )
            for name, label in names.items()
        ],
        className="leaves",
        **parts.aria(label="More on this sweep"),
    )
