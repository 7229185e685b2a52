"""Answers of an earlier sweep that hold in a new one, so that a second target costs only what is new."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from autorank.errors import SweepError
from autorank.journal import read
from autorank.remotedir import opened
from autorank.types import SweepHeader, TrialRecord, model_bops

SAME = ("recovery", "quantization", "seed", "validation", "calibration", "threads")
"""Settings on which the outcome of a trial depends besides its plan."""


def borrowed(directory: Path | str, header: SweepHeader) -> tuple[TrialRecord, ...]:
    """Return the trials of an earlier sweep that give the same outcome in a new one; failed ones are tried again.

    Early stopping and latencies are matters of a sweep, so stopped trials are left out, and latencies are not borrowed.

    Parameters
    ----------
    directory : path
        Of the earlier sweep, or its URL.
    header : SweepHeader
        Of the new one.

    Raises
    ------
    SweepError
        There is no sweep, or its model, weights, data or recovery are others.
    """
    try:
        contents = read(opened(directory))
    except SweepError as error:
        raise SweepError(f"reuse: {error}") from None
    before = contents.header
    if before is None:
        raise SweepError(f"reuse: the sweep in {directory} has no trials yet")
    if dict(before.fingerprint) != dict(header.fingerprint):
        raise SweepError(f"reuse: the sweep in {directory} had another model, other weights or other data")
    for key in SAME:
        if before.config.get(key, header.config.get(key)) != header.config.get(key):  # older sweeps lack some keys
            raise SweepError(
                f"reuse: the sweep in {directory} had {key} = {before.config.get(key)}, this one has "
                f"{header.config.get(key)}; with the same {key} its trials can be reused"
            )
    if any(o.name == "latency_kept" for o in header.objectives) or any(
        c.name == "latency_kept" for c in header.constraints
    ):
        raise SweepError("reuse: latencies are measured anew in every sweep, so trials cannot be reused for them")
    return tuple(_with_bops(record, header) for record in contents.records if record.status == "complete")


def _with_bops(record: TrialRecord, header: SweepHeader) -> TrialRecord:
    """Return a record with bit operations, which the earlier sweep may not have counted, where this one does."""
    if record.cost is None or header.dense_cost.bops is None:
        return record
    bops = model_bops(header.dense_cost.macs, record.layers)
    kept = {**record.kept, "bops_kept": bops / header.dense_cost.bops}
    return replace(record, cost=replace(record.cost, bops=bops), kept=kept)
