"""Early stopping: what is hopeless, and that leaving out what decides nothing changes no decision."""

from __future__ import annotations

import random
from typing import Literal

import pytest

from autorank.gate import Gate, Seen
from autorank.types import Choice, Fidelity, Plan, TrialRecord


@pytest.mark.parametrize(
    ("score", "macs", "stopped"),
    [
        (50.0, 0.9, True),
        (50.0, 0.45, False),
        (88.5, 0.9, False),
        (float("-inf"), 0.5, True),
    ],
    ids=["beaten by three", "beaten by two only", "within the margin", "worst at equal cost"],
)
def test_gate_stops_what_enough_cheaper_trials_beat_clearly(score: float, macs: float, stopped: bool) -> None:
    gate = Gate(((90.0, (0.3,)), (89.0, (0.4,)), (90.0, (0.5,))), ("macs_kept",), patience=3, margin=2.0)
    reason = gate.hopeless(score, {"macs_kept": macs})
    assert bool(reason) is stopped


def test_gate_with_a_metric_where_less_is_better() -> None:
    gate = Gate(((1.0, (0.3,)), (1.2, (0.4,))), ("macs_kept",), patience=2, margin=0.5, direction="min")
    assert gate.hopeless(3.0, {"macs_kept": 0.4})
    assert not gate.hopeless(1.5, {"macs_kept": 0.4})


def ended(number: int, score: float, costs: tuple[float, ...]) -> TrialRecord:
    kept = dict(zip(("macs_kept", "params_kept"), costs, strict=False))
    plan = Plan.of({"a": Choice("cp", (number + 1,))})
    return TrialRecord(number, plan, Fidelity(10, True), "complete", score_bn=score, kept=kept)


@pytest.mark.parametrize("direction", ["max", "min"])
@pytest.mark.parametrize("patience", [1, 3])
@pytest.mark.parametrize("costs", [("macs_kept",), ("macs_kept", "params_kept")], ids=["one cost", "two costs"])
def test_what_is_left_out_changes_no_decision(
    direction: Literal["max", "min"], patience: int, costs: tuple[str, ...]
) -> None:
    chance = random.Random(7)
    seen, everything = Seen(costs, patience, 2.0, direction), []
    for number in range(300):
        # Coarse values, so that there are equal ones.
        entry = float(chance.randrange(40)), tuple(chance.randrange(1, 10) / 10 for _ in costs)
        whole = Gate(tuple(everything), costs, patience, 2.0, direction)
        kept = dict(zip(costs, entry[1], strict=True))
        assert seen.gate().hopeless(entry[0], kept) == whole.hopeless(entry[0], kept)
        seen.add(ended(number, *entry))
        everything.append(entry)
    assert len(seen.gate().seen) < 100


def test_what_says_nothing_is_not_heard() -> None:
    seen = Seen(("macs_kept",), 1, 2.0, "max")
    seen.add(ended(0, float("nan"), (0.1,)))
    seen.add(TrialRecord(1, Plan(), Fidelity(), "failed", reason="x"))
    assert seen.gate().seen == ()
