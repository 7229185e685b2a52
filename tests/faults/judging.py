"""What a fault may and may not do to a sweep: an undisturbed one, and the differences to it."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from autorank.journal import JournalContents, read
from tests.faults.catalogue import Fault, signature_of
from tests.faults.disks import memory_group
from tests.faults.mlflow_server import Server
from tests.faults.sweeps import TRIALS, Scene, essence, front, numbers


@dataclass(frozen=True)
class Findings:
    """What came of a disturbed sweep; all is well when `wrong` is empty."""

    fault: str
    executor: str
    how: str
    seconds: float
    drivers: int
    kept: int
    told: tuple[str, ...]
    wrong: tuple[str, ...]


class Undisturbed:
    """Sweeps without a fault, one for each strategy, run when they are first needed."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._known: dict[str, tuple[JournalContents, list[tuple[Any, ...]]]] = {}

    def __call__(self, settings: Mapping[str, Any]) -> tuple[JournalContents, list[tuple[Any, ...]]]:
        """Return what the journal says, and the front."""
        wanted = {key: settings[key] for key in ("strategy", "pruning") if key in settings}
        name = str(wanted.get("strategy", "default"))
        if name not in self._known:
            with Scene(self._place / f"undisturbed-{name}", {**wanted, "executor": "inline"}) as scene:
                scene.search()
                scene.finish()
                self._known[name] = read(scene.sweep), front(scene.sweep)
        return self._known[name]


def examine(
    fault: Fault, place: Path, rng: Random, undisturbed: Undisturbed, executor: str, server: Server | None = None
) -> Findings:
    """Run a sweep under a fault, and judge it."""
    begun = time.monotonic()
    wanted, wanted_front = undisturbed(fault.settings)
    settings = {**fault.settings, "executor": executor}
    if fault.tracked and server is not None:
        settings |= {"tracking": True, "tracking_uri": server.uri}
    wrong: list[str] = []
    lost = set[int]()
    with Scene(place, settings) as scene, memory_group(scene, "fill" in fault.victim):
        scene.server = server
        if fault.victim.startswith("once:"):
            scene.trap(fault.victim.removeprefix("once:"))
        elif fault.victim:
            victim = signature_of(rng.choice(wanted.records))
            scene.trap(fault.victim, victim)
            lost = {record.number for record in wanted.records if signature_of(record) == victim}
        try:
            fault.disturb(scene, rng)
        except AssertionError as error:
            wrong.append(" ".join(str(error).split())[-600:])
        else:
            wrong += _differences(scene, fault, wanted, wanted_front, lost)
        if left := scene.orphans():
            wrong.append(f"{len(left)} processes are left")
        said = "\n".join(driver.said for driver in scene.drivers)
        drivers, kept, how = len(scene.drivers), len(scene.witnessed), scene.how
    told = tuple(line for line in said.splitlines() if fault.told and re.search(fault.told, line))
    if fault.told and not 1 <= len(told) <= max(fault.times, len(lost)):
        wrong.append(f"the user was told {len(told)} times")
    if "Traceback" in said:
        wrong.append("the user saw a traceback")
    return Findings(fault.name, executor, how, round(time.monotonic() - begun, 1), drivers, kept, told, tuple(wrong))


def _differences(
    scene: Scene,
    fault: Fault,
    wanted: JournalContents,
    wanted_front: list[tuple[Any, ...]],
    failed: set[int],
) -> list[str]:
    """Compare a sweep that was disturbed with one that was not, but for the trials that must have failed."""
    wrong = []
    found = read(scene.sweep)
    twice = len(numbers(scene.sweep)) - len(set(numbers(scene.sweep)))
    if twice:
        wrong.append(f"{twice} trials are in the journal twice")
    now = {record.number: record.started for record in found.records}
    if any(now.get(number) != started for number, started in scene.witnessed.items()):
        wrong.append("a finished trial was lost or run again")
    if {record.number for record in found.records if record.status == "failed"} != failed:
        wrong.append("other trials failed than those that had to")
    here, there = essence(found.records), essence(wanted.records)
    if {n: v for n, v in here.items() if n not in failed} != {n: v for n, v in there.items() if n not in failed}:
        wrong.append("the records are not those of an undisturbed sweep")
    if not failed and front(scene.sweep) != wanted_front:
        wrong.append("the front is not that of an undisturbed sweep")
    if failed and {point[0] for point in wanted_front} - failed - {point[0] for point in front(scene.sweep)}:
        wrong.append("points of the front are missing")
    if fault.tracked and found.header is not None:
        stand = scene.server.trials(found.header.sweep_id)
        if stand != Counter(range(TRIALS)):
            wrong.append(f"MLflow has runs of trials {dict(stand)}")
    if len(found.records) != TRIALS:
        wrong.append(f"{len(found.records)} trials instead of {TRIALS}")
    return wrong
