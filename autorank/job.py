"""One trial to run, as the driver hands it to a worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from autorank.errors import TrialError
from autorank.gate import Gate
from autorank.types import Fidelity, Plan, TrialRecord, Want, lineage_of, trial_key


@dataclass(frozen=True, slots=True)
class Job:
    """One trial to run: everything that its outcome depends on besides the sweep's settings."""

    number: int
    plan: Plan
    fidelity: Fidelity
    gate: Gate | None = None
    parent: Job | None = None
    pull: float = 0.0
    probe: bool = False
    want: Want = ""

    @property
    def lineage(self) -> str:
        """Hash of where its weights come from; empty for the dense model."""
        return lineage_of(self.parent.key if self.parent else "", self.pull)

    @property
    def key(self) -> str:
        """Name of what is evaluated, as in `TrialRecord.key`."""
        return trial_key(self.plan, self.fidelity, self.lineage)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary."""
        return {
            "number": self.number,
            "plan": self.plan.to_json(),
            "fidelity": asdict(self.fidelity),
            "gate": asdict(self.gate) if self.gate else None,
            "parent": self.parent.to_json() if self.parent else None,
            "pull": self.pull,
            "probe": self.probe,
            "want": self.want,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """Rebuild a job from `to_json`."""
        gate = data["gate"]
        if gate is not None:
            seen = tuple((float(score), tuple(costs)) for score, costs in gate["seen"])
            gate = Gate(**{**gate, "seen": seen, "costs": tuple(gate["costs"])})
        parent = cls.from_json(data["parent"]) if data.get("parent") else None
        return cls(
            data["number"],
            Plan.from_json(data["plan"]),
            Fidelity(**data["fidelity"]),
            gate,
            parent,
            data.get("pull", 0.0),
            data.get("probe", False),
            data.get("want", ""),
        )


def job_of(record: TrialRecord, records: Mapping[int, TrialRecord]) -> Job:
    """Return the job that gave this record; `records` holds, by number, those that it descends from.

    Raises
    ------
    TrialError
        A trial that it descends from is not among them.
    """
    parent = None
    if record.parent is not None:
        if record.parent not in records:
            raise TrialError(f"trial {record.number} started from trial {record.parent}, which is not in the journal")
        parent = job_of(records[record.parent], records)
    fidelity = record.target or record.fidelity
    return Job(record.number, record.plan, fidelity, None, parent, record.pull, record.probe, record.want)
