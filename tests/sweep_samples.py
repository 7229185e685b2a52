"""Sweeps made up for the tests of figures and tracking: every status, both directions, hostile names."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from autorank.front import front_of
from autorank.types import (
    Choice,
    Constraint,
    Cost,
    DenseFigures,
    Evaluation,
    Fidelity,
    FrontPoint,
    LayerResult,
    LeftAlone,
    Objective,
    Plan,
    SweepHeader,
    TrialRecord,
)

HOSTILE = "<script>alert(1)</script>"
SECRET = "s3cret"
FULL_RANK = 40
DENSE = DenseFigures(91.5, 2.0, 0.1)
_FORMATS = (("tucker2",), ("spatial_svd",), ("tucker2", "spatial_svd", "channel_svd"))


def header(
    sweep_id: str = "digits-1",
    objectives: tuple[str, ...] = ("score", "macs_kept"),
    direction: str = "max",
    metric: str = "accuracy",
    constraints: tuple[Constraint, ...] = (),
) -> SweepHeader:
    return SweepHeader(
        sweep_id,
        1_700_000_000.0,
        {
            "trials": 40,
            "max_drop": 1.0,
            "tracking_uri": f"https://me:{SECRET}@mlflow.example:5000/",
            "data_args": {"api_key": SECRET, "name": HOSTILE},
            "recovery": {"steps": 100},
            "space": {"rules": ["x" * 3000]},
        },
        metric,
        direction,
        tuple(Objective(name, direction if name == "score" else "min") for name in objectives),
        constraints,
        Evaluation(92.5 if direction == "max" else 0.3, 0.3, 500),
        Cost(41_000_000, 272_000, 1_088_000, None, 1024 * 41_000_000),
        ({"name": "conv1", "kind": "conv2d"},),
        (LeftAlone("up", "ConvTranspose2d", HOSTILE),),
        versions={"torch": "2.13.0"},
    )


def records(head: SweepHeader, count: int, seed: int = 0, mixed_fidelity: bool = False) -> tuple[TrialRecord, ...]:
    rng = random.Random(seed)
    made = []
    for number in range(count):
        formats = rng.choice(_FORMATS)
        names = [HOSTILE, *(f"stage{i}.conv" for i in range(8))]
        choices = {name: Choice(rng.choice(formats), (rng.randint(4, 32),), (("whiten", "input"),)) for name in names}
        kept = 0.15 + 0.8 * rng.random()
        loss = 40 * math.exp(-7 * (kept - 0.1)) + 3 * rng.random()
        score = head.dense.score - loss if head.direction == "max" else head.dense.score + loss / 60
        status = ("complete", "complete", "pruned", "complete", "failed", "complete")[number % 6]
        fidelity = Fidelity(rng.choice([20, 100]) if mixed_fidelity else 100)
        record = TrialRecord(number, Plan.of(choices), fidelity, status, started=head.created + 5 * number)
        if status == "failed":
            reason = f"the loss became NaN at step 12 {HOSTILE} http://me:{SECRET}@host/x"
            made.append(replace(record, reason=reason, seconds={"fit": 0.5}))
            continue
        layers = tuple(
            LayerResult(
                name, choice, 0.1, int(4e6 * kept), 3000, 4_000_000, 5000, 0.08, 40.0, 0.2, 0.25, full_rank=(FULL_RANK,)
            )
            for name, choice in choices.items()
        )
        record = replace(
            record,
            score=score,
            score_before=score - 20,
            score_bn=score - 9,
            loss=0.4,
            cost=Cost(int(41e6 * kept), int(272e3 * kept), int(1e6 * kept), None, int(41e6 * 1024 * kept / 4)),
            kept={
                "macs_kept": kept,
                "params_kept": kept,
                "bytes_kept": kept,
                "latency_kept": 0.3 + 0.7 * rng.random(),
                "bops_kept": kept / 4,
            },
            layers=layers,
            curve=((0, 2.0), (50, 1.0), (99, 0.5)),
            seconds={"fit": 0.5, "tune": 4.0},
            worker="host:1",
            versions=head.versions,
        )
        if status == "pruned":
            record = replace(record, fidelity=Fidelity(0), curve=(), reason="hopeless before the fine-tune")
        made.append(record)
    order = list(made)
    rng.shuffle(order)  # trials do not finish in the order in which they began
    return tuple(order)


def points(head: SweepHeader, done: tuple[TrialRecord, ...]) -> tuple[FrontPoint, ...]:
    front = front_of(done, head.objectives, head.constraints)
    return tuple(FrontPoint(r, r.score - 0.25, 1.5, 0.05, (HOSTILE,) if i == 0 else ()) for i, r in enumerate(front))
