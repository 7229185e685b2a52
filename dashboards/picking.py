"""Which point of a front fits what somebody can lose or needs, in the words of a page; and how to get it."""

from __future__ import annotations

import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from autorank.errors import AutorankError, EmptyFrontError
from autorank.front import cost_name, in_short, score_text, select
from autorank.types import FrontPoint, SweepHeader

from .library import SweepView


@dataclass(frozen=True)
class Picked:
    """What a rule picks.

    Attributes
    ----------
    point : FrontPoint or None
        None when no point fits.
    reason : str
        One line that says why it is this one, or why it is none and which is nearest.
    nearest : FrontPoint or None
        The point that misses the bound least, where none fits.
    """

    point: FrontPoint | None
    reason: str
    nearest: FrontPoint | None = None


def pick_by_drop(view: SweepView, points_lost: float) -> Picked:
    """Pick the cheapest point that loses at most so much score, as ``autorank export --max-drop`` does."""
    header = view.contents.header
    if header is None or not view.points:
        return _nothing_yet(view)
    unit = "" if header.metric != "accuracy" else " point" if points_lost == 1 else " points"
    bound = f"loses at most {points_lost:.3g}{unit}"
    return _picked(view, header, f"cheapest point that {bound}", f"no point {bound}", max_drop=points_lost)


def pick_by_factor(view: SweepView, times_fewer_macs: float) -> Picked:
    """Pick the best point with so many times fewer MACs, as ``autorank export --max-macs`` does with the inverse."""
    header = view.contents.header
    if header is None or not view.points:
        return _nothing_yet(view)
    if not (math.isfinite(times_fewer_macs) and times_fewer_macs >= 1):
        return Picked(None, f"times fewer MACs must be a number of at least 1, not {times_fewer_macs:g}")
    bound = f"{times_fewer_macs:.3g}× fewer MACs"
    return _picked(view, header, f"best point with {bound}", f"no point has {bound}", max_macs=1 / times_fewer_macs)


def export_command(view: SweepView, number: int) -> str:
    """Return the command that exports a point, as a shell takes it in any directory."""
    return f"autorank export {_quoted(view.directory)} --point {number}"


def _quoted(path: Path) -> str:
    """Return a path as one word for a shell, with nothing in it that cannot be seen."""
    if str(path).isprintable():
        return shlex.quote(str(path))
    seen = (
        c if c.isprintable() and c not in "\\'" else "".join(f"\\x{b:02x}" for b in os.fsencode(c)) for c in str(path)
    )
    return f"$'{''.join(seen)}'"


def _nothing_yet(view: SweepView) -> Picked:
    return Picked(None, view.why or "no point is on the front yet")


def _picked(
    view: SweepView,
    header: SweepHeader,
    fits: str,
    misses: str,
    *,
    max_drop: float | None = None,
    max_macs: float | None = None,
) -> Picked:
    try:
        point = select(
            view.points,
            dense=header.dense,
            direction=header.direction,
            objectives=header.objectives,
            max_drop=max_drop,
            max_macs=max_macs,
        )
    except EmptyFrontError as error:
        nearest = None if error.nearest is None else view.point(error.nearest)
        about = f"; the nearest is {_about(header, nearest)}" if nearest else ""
        return Picked(None, misses + about, nearest)
    except AutorankError as error:
        return Picked(None, str(error))
    return Picked(point, f"the {fits}: {_about(header, point)}")


def _about(header: SweepHeader, point: FrontPoint) -> str:
    """Return ``#12 (92.50 → 91.80, 2.08× fewer MACs)``, with the cost that the front is about where that is another."""
    record, cost = point.record, cost_name(header.objectives)
    macs = record.kept.get("macs_kept")
    if not macs or record.score is None:
        return f"#{record.number} ({in_short(record, cost, header.dense.score)})"
    more = "" if cost == "macs_kept" else in_short(record, cost).removeprefix(score_text(record.score))
    scores = f"{score_text(header.dense.score)} → {score_text(record.score)}"
    return f"#{record.number} ({scores}, {1 / macs:.2f}× fewer MACs{more})"
