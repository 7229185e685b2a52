"""One search, one line: what was proposed, in which order, what came of it and how long it took."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from efficiency_strategies import Given
from efficiency_tasks import LONG, setting

import autorank
from autorank import strategies
from autorank.evaluate import evaluate
from autorank.front import reference_point
from autorank.recover import Recovery, Teacher, fine_tune
from autorank.tasks import Task
from autorank.types import DenseFigures, FrontPoint, Plan, TrialRecord

Row = dict[str, Any]
"""One line of the file of runs."""

TARGETS = (0.7, 0.5, 0.35, 0.2)
"""MACs kept of the points that are trained for long."""
_ROOM = 0.005


def read(path: Path) -> list[Row]:
    """Return the lines of a file of runs; a line that a killed process left unfinished is skipped."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path}: a line that is no JSON is skipped")
    return rows


def append(path: Path | None, row: Row) -> None:
    """Add a line, in one write, so that several processes may share the file."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


@contextmanager
def _unmeasured_front() -> Iterator[None]:
    """Leave out what a sweep measures at its end: latencies of layers and test scores take longer than short searches.

    The points of the final front get their test scores from `finals`.
    """

    def skipped(front: Sequence[TrialRecord], *_args: Any, **_more: Any) -> tuple[tuple[FrontPoint, ...], DenseFigures]:
        return tuple(FrontPoint(record) for record in front), DenseFigures()

    with mock.patch("autorank.driver.measure_front", skipped):
        yield


def _sweep_directory(base: Path, name: str, steps: int, shown: str, seed: int) -> Path:
    """Return a new sweep directory whose cache is that of all sweeps with the same trials.

    So every candidate is fitted once for all searches, and what one of them runs first it does not pay alone.
    """
    fits = base / "caches" / "fits"
    # The dense model's outputs for the fine-tune belong to one seed; all the rest is common.
    cache = base / "caches" / (f"{name}-{steps}-{seed}" if steps else name)
    for path in (fits, cache, base / "sweeps"):
        path.mkdir(parents=True, exist_ok=True)
    directory = base / "sweeps" / f"{name}-{steps}-{shown}-{seed}-{time.strftime('%H%M%S')}"
    directory.mkdir()
    for link, target in ((cache / "fits", fits), (directory / "cache", cache)):
        if not link.is_symlink():
            link.symlink_to(target)
    return directory


def search(
    task: Task,
    name: str,
    level: str,
    strategy: str,
    seed: int,
    trials: int,
    base: Path,
    *,
    space: str = "default",
    steps: int | None = None,
    lookahead: int = 1,
    max_time: float | None = None,
    peer: Sequence[Row] = (),
    label: str | None = None,
    options: dict[str, Any] | None = None,
) -> Row:
    """Run one search and return its line.

    Parameters
    ----------
    task : Task
    name : str
        Of the task.
    level : {"none", "short"}
    strategy : str
        With `peer` only the name under which the plans are listed.
    seed, trials : int
    base : Path
        The sweep's directory is made below it and kept: the long fine-tune begins with its weights.
    space : str
    steps : int, optional
        Fine-tune steps instead of the level's.
    lookahead : int
        Proposals that may be in flight; 1 lets every strategy know all outcomes so far.
    max_time : float, optional
        Seconds after which the search ends.
    peer : sequence of mapping
        Figures of a peer, whose plans are then run instead of a strategy's.
    label : str, optional
        Another name for the strategy, when it runs with other options.
    options : mapping, optional
        Of the strategy.
    """
    how = setting(name, level, steps)
    shown = label or strategy
    directory = _sweep_directory(base.resolve(), name, how.recovery["steps"], shown, seed)
    chosen = "given" if peer else strategy
    processor = _processor_seconds()
    # A peer may give one answer to several budgets.
    Given.plans = tuple(dict.fromkeys(Plan.from_json(row["plan"]) for row in peer))
    before = {
        # AIMET scores its candidates once for all budgets; each budget then takes a little more.
        "evaluations": max((row.get("evaluations_of_scores", 0) for row in peer), default=0),
        "seconds": sum(row["seconds"] for row in peer),
    }
    torch.set_num_threads(1)
    with _unmeasured_front():
        result = autorank.search(
            task,
            space=space,
            strategy={"name": chosen, "options": options or {}},
            trials=len(Given.plans) + 1 if peer else trials,
            seed=seed,
            executor="inline",
            tracking=False,
            progress=False,
            workers=1,
            lookahead=lookahead,
            threads=1,
            max_time=max_time,
            recovery=how.recovery,
            calibration=how.calibration,
            sweep_dir=str(directory),
        )
    header = result.header
    full = how.recovery["steps"]
    return {
        "kind": "search",
        "task": name,
        "level": level,
        "steps": full,
        "strategy": shown,
        "needs": sorted(strategies.get(chosen).needs),
        "options": options or {},
        "seed": seed,
        "trials": len(Given.plans) if peer else trials,
        "space": space,
        "lookahead": lookahead,
        "validation": task.size("validation"),
        "dense": header.dense.score,
        "reference": list(reference_point(header.objectives, header.dense)),
        "directions": [objective.direction for objective in header.objectives],
        "prepare_s": result.seconds["prepare"],
        "search_s": result.seconds["search"],
        "processor_s": _processor_seconds() - processor,
        "before": before,
        "ended": result.ended,
        "records": [_outcome(record, full) for record in sorted(result.records, key=lambda r: r.number)],
        "sweep": str(directory),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor_seconds() -> float:
    """Return the processor's seconds of this process and of its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _outcome(record: TrialRecord, full: int) -> Row:
    complete = record.status == "complete" and not record.probe and record.fidelity.steps == full
    return {
        "point": complete and record.score is not None,
        "probe": record.probe,
        "status": record.status,
        "steps": record.fidelity.steps,
        "score": record.score,
        "macs_kept": record.kept.get("macs_kept"),
        "seconds": round(sum(record.seconds.values()), 4),
        **({"reason": record.reason} if record.status == "failed" else {}),
    }


def near(points: Sequence[FrontPoint], target: float) -> FrontPoint | None:
    """Return the point with the best validation score that keeps at most about `target` of the MACs."""
    able = [p for p in points if (p.record.kept.get("macs_kept") or 1.0) <= target + _ROOM]
    return max(able, key=lambda p: p.record.score or 0.0, default=None)


def finals(
    task: Task, run: Row, done: Sequence[Row], cache: Path, *, steps: int = LONG, targets: Sequence[float] = TARGETS
) -> Iterator[Row]:
    """Train points of a search's front for long, from the weights with which the search left them, and test them.

    Parameters
    ----------
    task : Task
        With its test split.
    run : mapping
        Line of a search, whose sweep directory is still there.
    done : sequence of mapping
        Lines that need not be made again.
    cache : Path
        For the dense model's outputs on the training batches, which all points learn from.
    steps : int
    targets : sequence of float
        MACs kept; at each the best point that keeps at most about as much is trained.
    """
    result = autorank.open_sweep(run["sweep"], task)
    scores: dict[int, Row] = {}
    for target in targets:
        key = {k: run[k] for k in ("task", "level", "strategy", "seed", "sweep")} | {"target": target, "long": steps}
        point = near(result.points, target)
        if point is None or any(all(row.get(k) == v for k, v in key.items()) for row in done):
            continue
        begun = time.perf_counter()
        number = point.record.number
        # One point may be the best at several budgets.
        if number not in scores:
            scores[number] = tuned(result.model(point), task, run["task"], cache, steps)
        yield {
            "kind": "final",
            **key,
            "macs_kept": point.record.kept["macs_kept"],
            "searched": point.record.score,
            **scores[number],
            "seconds": time.perf_counter() - begun,
        }


def dense_test(task: Task) -> float:
    """Return the dense model's score on the test split."""
    return evaluate(task.model(), task, "test").score


def tuned(model: torch.nn.Module, task: Task, name: str, cache: Path, steps: int) -> Row:
    """Fine-tune a model as every point of a final front is, and return its scores; batches are those of seed 0."""
    recovery = replace(Recovery(**setting(name, "short").recovery), steps=steps)
    torch.set_num_threads(1)
    teacher = Teacher.build(task, recovery, 0, path=cache / f"teacher-{name}-{steps}.npy")
    fine_tune(model, task, recovery, 0, teacher=teacher)
    return {
        "validation": evaluate(model, task, "validation").score,
        "test": evaluate(model, task, "test").score,
    }
