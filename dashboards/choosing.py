"""Which point of a sweep is looked at, and why, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autorank.captions import clean

from . import drawings, parts
from .address import Address
from .picking import pick_by_drop, pick_by_factor

if TYPE_CHECKING:
    from .library import SweepView


@dataclass(frozen=True)
class Chosen:
    """The trial that is looked at (None without one), what is to be said about it, and a remark."""

    number: int | None = None
    words: str = ""
    note: str = ""


def chosen(view: SweepView, address: Address) -> Chosen:
    """Return the trial that the address names, or else the one that its bound picks."""
    header = view.contents.header
    if header is None:
        return Chosen()
    if address.point is not None:
        record = drawings.record_of(view, address.point)
        if record is None:
            return Chosen(note=f"There is no trial #{address.point} in this sweep.")
        change = parts.change(header.dense.score, record.score)
        kept = record.kept.get("macs_kept")
        said = [f"{parts.score(header, record.score)} ({change} against dense)"] if record.score is not None else []
        said += [f"{1 / kept:.2f}× fewer MACs"] if kept else []
        off = "" if view.point(record.number) else "It is not on the front."
        return Chosen(record.number, f"#{record.number}: {', '.join(said) or record.status}", off)
    if not view.points:
        return Chosen()
    if address.need is not None:
        picked = pick_by_factor(view, address.need)
    elif address.lose is not None:
        picked = pick_by_drop(view, address.lose)
    else:
        return Chosen(note="Move the slider, or take a point in the figure or in the list.")
    number = picked.point.record.number if picked.point else None
    return Chosen(number, clean(picked.reason[:1].upper() + picked.reason[1:], 400))
