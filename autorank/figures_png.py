"""The still figures of a whole sweep as PNG: the front, the hypervolume."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autorank.figures_png_base import INK, SOFT, canvas, plain, png, styled
from autorank.growth import Growth
from autorank.scene import OKABE_ITO, Kind, Mark, Scene

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SYMBOLS: dict[Kind, str] = {"full": "o", "partial": "s", "pruned": "x"}
_KINDS: dict[Kind, str] = {"full": "full fidelity", "partial": "lower fidelity", "pruned": "stopped early"}


def _area(mark: Mark) -> float:
    if mark.kind != "full":
        return 26.0
    return 24.0 + 2 * mark.size * 52.0 + (16.0 if mark.on_front else 0.0)


def _inside(scene: Scene, mark: Mark) -> bool:
    return scene.x.low <= mark.x <= scene.x.high and scene.y.low <= mark.y <= scene.y.high


def _draw_trials(axes: Axes, scene: Scene) -> None:
    for kind in ("pruned", "partial", "full"):
        for front in (False, True):
            marks = [m for m in scene.marks if m.kind == kind and m.on_front == front and _inside(scene, m)]
            if not marks:
                continue
            colours = [mark.colour for mark in marks]
            axes.scatter(
                [mark.x for mark in marks],
                [mark.y for mark in marks],
                s=[_area(mark) for mark in marks],
                marker=_SYMBOLS[kind],
                # A cross has no inside: its lines take the colour of the face.
                facecolors="none" if kind == "partial" else colours,
                edgecolors=None if kind == "pruned" else INK if front else colours,
                linewidths=1.3 if front or kind != "full" else 0,
                alpha=1.0 if front else 0.6 if kind == "full" else 0.5,
                zorder=5 if front else 3,
            )


def _label(axes: Axes, mark: Mark, text: str, offset: tuple[float, float]) -> None:
    axes.annotate(
        text,
        (mark.x, mark.y),
        xytext=offset,
        textcoords="offset points",
        fontsize=9.5,
        color=INK,
        va="center",
        ha="left" if offset[0] > 0 else "right",
        arrowprops={"arrowstyle": "-", "color": SOFT, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 8},
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        zorder=8,
    )


def _draw_markings(axes: Axes, scene: Scene) -> None:
    if scene.line:
        xs, ys = zip(*scene.line, strict=True)
        axes.plot(xs, ys, color=INK, linewidth=1.3, zorder=4, solid_joinstyle="round")
    axes.axhline(scene.dense[1], color=SOFT, linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)
    axes.scatter([scene.dense[0]], [scene.dense[1]], s=90, marker="P", color=INK, zorder=6)
    knee, best = scene.knee, scene.recommended
    if knee:
        axes.scatter([knee.x], [knee.y], s=_area(knee) + 190, marker="D", facecolors="none", edgecolors=INK, zorder=6)
    if best:
        axes.scatter([best.x], [best.y], s=_area(best) + 330, marker="*", facecolors="none", edgecolors=INK, zorder=6)
    for mark, text in scene.labels:
        right, up = scene.free_side(mark)
        _label(axes, mark, text, (right * 28, up * 28))


def _legend(figure: Figure, axes: Axes, scene: Scene) -> None:
    from matplotlib.lines import Line2D

    def dot(label: str, marker: str, colour: str, face: str | None = None, size: float = 7) -> Line2D:
        return Line2D(
            [],
            [],
            linestyle="",
            marker=marker,
            markersize=size,
            markerfacecolor=colour if face is None else face,
            markeredgecolor=colour,
            label=plain(label),
        )

    formats = [dot(group, "o", colour) for group, colour in scene.groups.items()]
    kinds = {m.kind for m in scene.marks}
    marks = [Line2D([], [], color=INK, linewidth=1.3, label="front")] if scene.line else []
    marks.append(dot("dense model", "P", INK, size=8))
    marks += [dot("knee", "D", INK, "none", 8)] if scene.knee else []
    marks += [dot("recommended", "*", INK, "none", 11)] if scene.recommended else []
    for kind in _KINDS:
        if kind in kinds and (len(kinds) > 1 or kind != "full"):
            marks.append(dot(_KINDS[kind], _SYMBOLS[kind], SOFT, "none" if kind == "partial" else None, 6))
    top = 0.865
    for title, handles in (("format of most MACs", formats), ("", marks)):
        if not handles:
            continue
        legend = figure.legend(
            handles=handles,
            title=title or None,
            loc="upper left",
            bbox_to_anchor=(0.785, top),
            frameon=False,
            fontsize=9,
            title_fontsize=9,
            alignment="left",
            labelcolor=INK,
            handletextpad=0.5,
        )
        legend.get_title().set_color(SOFT)
        top -= 0.034 * len(handles) + 0.075


def pareto_image(scene: Scene) -> bytes:
    """Return the Pareto figure as PNG."""
    figure, axes = canvas(scene.title, scene.subtitle, scene.x.label, scene.y.label)
    axes.set_xlim(scene.x.low, scene.x.high)
    axes.set_ylim(scene.y.low, scene.y.high)
    _draw_trials(axes, scene)
    _draw_markings(axes, scene)
    _legend(figure, axes, scene)
    outside = sum(not _inside(scene, mark) for mark in scene.marks)
    notes = [f"marker area: {scene.third}"] if scene.third else []
    notes += [f"{outside} outside the frame"] if outside else []
    notes += [scene.note] if scene.note else []
    figure.text(0.98, 0.02, plain(" · ".join(notes)), fontsize=8.5, color=SOFT, ha="right")
    if not scene.marks:
        axes.text(0.5, 0.3, "no finished trial yet", transform=axes.transAxes, ha="center", color=SOFT, fontsize=12)
    return png(figure)


def hypervolume_image(shown: Growth) -> bytes:
    """Return the hypervolume against finished trials and against time as PNG."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = canvas(shown.title, shown.subtitle, "", "hypervolume of the front")
    axes.set_position((0.075, 0.115, 0.435, 0.745))
    second = figure.add_axes((0.545, 0.115, 0.435, 0.745), sharey=axes)
    styled(second)
    second.tick_params(labelleft=False)
    for panel, (label, values) in zip((axes, second), shown.panels, strict=True):
        panel.set_xlabel(label, fontsize=10.5, color=INK, labelpad=7)
        panel.plot(values, shown.volumes, color=OKABE_ITO[0], linewidth=1.8, drawstyle="steps-post")
        panel.fill_between(values, shown.volumes, step="post", color=OKABE_ITO[0], alpha=0.1, linewidth=0)
        panel.xaxis.set_major_locator(MaxNLocator(integer=values is not shown.times))
        panel.set_xlim(0, max([*values, 1e-9]) * 1.02)
    axes.set_ylim(0, max([*shown.volumes, 1e-9]) * 1.06)
    if not shown.volumes:
        figure.text(0.5, 0.5, "no finished trial yet", ha="center", color=SOFT, fontsize=12)
    return png(figure)
