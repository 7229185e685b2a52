"""report.json of an export: what it takes to run its sweep or its one trial again, and to tell whether all is equal.

`autorank.search(**report["settings"])`, with a `sweep_dir` of its own, is the sweep again: the same seed, the same
number of trials in flight, the same space. Its outcome is the same where `versions`, `fingerprint` and `machine` are.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autorank.comparing import Check
from autorank.front import front_of
from autorank.privacy import MASK, to_keep, without_secrets
from autorank.types import DenseFigures, FrontPoint, SweepHeader, TrialRecord
from autorank.types.decoding import finite

VERSION = 1
"""Raised when what report.json holds changes."""


def described(
    header: SweepHeader,
    point: FrontPoint,
    *,
    records: Sequence[TrialRecord] = (),
    dense: DenseFigures | None = None,
    files: Sequence[Path] = (),
    checks: Sequence[Check] = (),
    versions: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the content of report.json, without secrets: those in the settings are ``***``.

    Parameters
    ----------
    header : SweepHeader
    point : FrontPoint
        The one that is exported.
    records : sequence of TrialRecord
        Of the sweep, for its front and for the trials from whose weights the point's started.
    dense : DenseFigures, optional
    files : sequence of Path
        What the export wrote; named with size and SHA-256.
    checks : sequence of Check
    versions : mapping of str to str, optional
        Libraries that wrote the files.
    """
    known = {record.number: record for record in records}
    front = front_of(records, header.objectives, header.constraints)
    sweep = header.to_json()
    report = {
        "report": VERSION,
        "sweep": {
            key: sweep[key] for key in ("sweep_id", "created", "metric", "direction", "objectives", "constraints")
        },
        "settings": to_keep(header.config),
        "seeds": {"sweep": header.config.get("seed"), "plan": point.record.plan.seed},
        "fingerprint": without_secrets(header.fingerprint, MASK),
        "versions": {**header.versions, **point.record.versions, **(versions or {})},
        "machine": {"system": platform.system(), "machine": platform.machine(), "device": header.config.get("device")},
        "dense": {"validation": sweep["dense"], "cost": sweep["dense_cost"], "test": asdict(dense) if dense else None},
        "trial": without_secrets(point.record.to_json(), MASK),
        "measured": {key: value for key, value in point.to_json().items() if key != "number"},
        "lineage": [_step(record) for record in ancestors(point.record, known)],
        "trials": len(records),
        "front": [
            {"number": r.number, "plan_id": r.plan_id, "key": r.key, "score": r.score, "kept": dict(r.kept)}
            for r in front
        ],
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files},
        "checks": [asdict(check) for check in checks],
    }
    made: dict[str, Any] = finite(report)
    return made


def ancestors(record: TrialRecord, known: Mapping[int, TrialRecord]) -> list[TrialRecord]:
    """Return the trials from whose weights a trial started, the first one first, as far as they are known."""
    found: list[TrialRecord] = []
    while record.parent is not None and record.parent in known and len(found) < len(known):
        record = known[record.parent]
        found.append(record)
    return found[::-1]


def _step(record: TrialRecord) -> dict[str, Any]:
    data = record.to_json()
    names = ("number", "plan", "plan_id", "fidelity", "target", "parent", "lineage", "pull", "probe")
    return {name: data[name] for name in names}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
