"""Trials that only sleep, for `scaling.py`; a module of its own, so that Ray's workers can import it."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autorank.job import Job
from autorank.trial import TrialContext
from autorank.types import Cost, LayerResult, TrialRecord


@dataclass(frozen=True)
class Simulated(TrialContext):
    """What trials share; `sleep` is how long each takes, in seconds."""

    sleep: float = 0.0

    def runner(self, fetch: Callable[[Path], bool] | None = None) -> Any:
        """Return what runs trials in one process."""
        return Sleeper(self)


class Sleeper:
    """Runs simulated trials."""

    def __init__(self, context: Simulated) -> None:
        self._context = context
        self._dense = {spec.name: spec for spec in context.specs}

    def run(self, job: Job) -> TrialRecord:
        """Sleep; return a record of the plan with made-up results, the same for the same plan."""
        started = time.time()
        time.sleep(self._context.sleep)
        chance, dense = random.Random(job.plan.plan_id), self._context.dense_cost
        share = chance.uniform(0.1, 1.0)
        layers = tuple(
            LayerResult(name, choice, chance.random(), 10_000, 500, 50_000, 2_000, chance.random(), chance.random())
            for name, choice in job.plan.layers
        )
        cost = Cost(int(dense.macs * share), int(dense.params * share), int(dense.bytes * share))
        score = 90 * share**0.2 + chance.random()
        return TrialRecord(
            number=job.number,
            plan=job.plan,
            fidelity=job.fidelity,
            target=job.fidelity,
            status="complete",
            score=score,
            score_before=score,
            score_bn=score,
            loss=1.0,
            cost=cost,
            kept=cost.kept(dense),
            layers=layers,
            seconds={"other": time.time() - started},
            started=started,
            worker=f"{socket.gethostname()}:{os.getpid()}",
        )
