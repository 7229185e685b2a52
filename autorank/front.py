"""The front of a sweep: which finished trials count, which of them nobody beats, and which one to take.

The geometry is in `autorank.pareto`, the reading of objectives and constraints in `autorank.objectives`; both are
re-exported here. Nothing in these files needs more than the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autorank.errors import ConfigError, EmptyFrontError
from autorank.objectives import COSTS, parse_constraint, parse_objectives
from autorank.pareto import hypervolume, knee, non_dominated, point_dominates
from autorank.types import Constraint, Direction, Evaluation, Fidelity, FrontPoint, Objective, SweepHeader, TrialRecord

__all__ = [
    "COSTS",
    "Recommendation",
    "best_first",
    "dominates",
    "eligible",
    "front_of",
    "hypervolume",
    "knee",
    "non_dominated",
    "parse_constraint",
    "parse_objectives",
    "point_dominates",
    "recommend",
    "reference_point",
    "select",
    "values",
]

WORDS = {
    "macs_kept": "of the MACs",
    "params_kept": "of the parameters",
    "bytes_kept": "of the bytes",
    "latency_kept": "of the latency",
    "bops_kept": "of the bit operations",
}
"""How a ratio is read aloud."""


def values(record: TrialRecord, objectives: Sequence[Objective]) -> tuple[float | None, ...]:
    """Return the record's value for every objective; None where it has none."""
    return tuple(record.value(objective.name) for objective in objectives)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def dominates(a: TrialRecord, b: TrialRecord, objectives: Sequence[Objective]) -> bool:
    """Say whether record `a` is nowhere worse than `b` and somewhere better; a record without a value never is."""
    directions = [objective.direction for objective in objectives]
    return point_dominates(values(a, objectives), values(b, objectives), directions)


def reference_point(objectives: Sequence[Objective], dense: Evaluation | float) -> tuple[float, ...]:
    """Return the worst corner against which the hypervolume of a sweep is taken.

    Ratios end at 1, the dense model. A score ends where the whole dense score is lost: at 0 when more is better and the
    dense score is positive, at twice the dense score when less is better. So the corner depends on no trial, and
    volumes of different sweeps on the same model compare.

    Parameters
    ----------
    objectives : sequence of Objective
    dense : Evaluation or float
        The dense model on validation data, or its score alone.

    Returns
    -------
    tuple of float
        One value per objective.
    """
    score = dense.score if isinstance(dense, Evaluation) else float(dense)
    size = abs(score) or 1.0
    worst = {"max": score - size, "min": score + size}
    return tuple(worst[o.direction] if o.name == "score" else 1.0 for o in objectives)


def eligible(
    records: Iterable[TrialRecord], constraints: Sequence[Constraint] = (), fidelity: Fidelity | None = None
) -> list[TrialRecord]:
    """Return the records that may be on a front: complete, at full fidelity, within every constraint.

    Parameters
    ----------
    records : iterable of TrialRecord
    constraints : sequence of Constraint
        A record that lacks a constrained value does not meet the constraint.
    fidelity : Fidelity, optional
        The full fidelity of the sweep; by default the highest that any complete record reached, so that scores before
        and after a fine-tune are never compared.
    """
    complete = [record for record in records if record.status == "complete" and not record.probe]
    if fidelity is None:
        fidelity = max((record.fidelity for record in complete), default=Fidelity())
    return [
        record
        for record in complete
        if record.fidelity == fidelity
        and all(
            (value := record.value(c.name)) is not None and math.isfinite(value) and c.violation(value) <= 0
            for c in constraints
        )
    ]


def front_of(
    records: Iterable[TrialRecord],
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint] = (),
    fidelity: Fidelity | None = None,
) -> tuple[TrialRecord, ...]:
    """Return the non-dominated records, best score first; of records with equal values the first.

    Only complete records at full fidelity that meet every constraint take part (see `eligible`).
    """
    able = sorted(eligible(records, constraints, fidelity), key=lambda record: record.number)
    directions = [objective.direction for objective in objectives]
    front = [able[i] for i in non_dominated([values(record, objectives) for record in able], directions)]
    return best_first(front, objectives)


def best_first(records: Iterable[TrialRecord], objectives: Sequence[Objective]) -> tuple[TrialRecord, ...]:
    """Return records in the order of a front: the best score first, of equal ones the first."""
    direction: Direction = next((o.direction for o in objectives if o.name == "score"), "max")
    return tuple(sorted(records, key=lambda r: (-_gain(r.score, direction), r.number)))


def _gain(score: float | None, direction: Direction) -> float:
    """Return the score turned so that more is better; minus infinity when there is none."""
    if score is None or not math.isfinite(score):
        return -math.inf
    return score if direction == "max" else -score


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A record worth taking, and why, in words for people."""

    record: TrialRecord
    reason: str


def cost_name(objectives: Sequence[Objective]) -> str:
    """Return the cost by which "cheapest" is meant: the first objective that is not the score."""
    return next((o.name for o in objectives if o.name != "score"), "macs_kept")


def _cheapest(records: Sequence[TrialRecord], cost: str, direction: Direction) -> TrialRecord:
    """Return the record of least cost; of equals the best score, then the first."""

    def key(record: TrialRecord) -> tuple[float, float, int]:
        value = record.value(cost)
        return (value if value is not None else math.inf, -_gain(record.score, direction), record.number)

    return min(records, key=key)


def score_text(score: float) -> str:
    """Return a score with two decimals, or with four digits where two decimals would hide what it is."""
    return f"{score:.2f}" if abs(score) >= 10 or score == 0 else f"{score:.4g}"


def in_short(record: TrialRecord, cost: str, dense: float | None = None) -> str:
    """Describe a record by its score, after the dense one, and a cost: ``88.40 → 87.90, 0.48 of the MACs``."""
    score = "no score" if record.score is None else score_text(record.score)
    value = record.value(cost)
    share = "" if value is None else f", {value:.2f} {WORDS[cost]}"
    return (f"{score_text(dense)} → " if dense is not None else "") + score + share


def recommend(
    records: Iterable[TrialRecord],
    dense_score: float,
    direction: Direction = "max",
    max_drop: float = 1.0,
    objectives: Sequence[Objective] = (),
    unit: str = "points",
) -> Recommendation:
    """Pick the cheapest record that loses at most `max_drop` points against the dense model, else the knee.

    Parameters
    ----------
    records : iterable of TrialRecord
        The front, or any records; those without a finite score are passed over.
    dense_score : float
        Score of the dense model on the same data.
    direction : {"max", "min"}
    max_drop : float
        Largest loss of score, in the metric's own unit, that still counts as close to the dense model.
    objectives : sequence of Objective
        The cost is the first objective that is not the score; ``macs_kept`` when none is given.
    unit : str
        What the score is counted in, for the reason; empty for a metric without a name for it.

    Returns
    -------
    Recommendation

    Raises
    ------
    EmptyFrontError
        There is no record with a score.
    ConfigError
        `max_drop` is negative or not finite.
    """
    _check_drop(max_drop)
    scored = [record for record in records if record.status == "complete" and _finite(record.score)]
    if not scored:
        raise EmptyFrontError("no complete trial to recommend: no trial of this sweep finished with a score")
    cost = cost_name(objectives)
    drop = f"{max_drop:.3g} {unit.removesuffix('s') if max_drop == 1 else unit}".strip()
    near = [r for r in scored if _loss(r, dense_score, direction) <= max_drop + _SLACK]
    if near:
        best = _cheapest(near, cost, direction)
        how = f"cheapest of the points that lose at most {drop} against the dense model"
        return Recommendation(best, f"{how} ({in_short(best, cost, dense_score)})")
    points = [(r.score, r.value(cost)) for r in scored]
    usable = any(_finite(value) for _, value in points)
    best = scored[knee(points, (direction, "min"))] if usable else max(scored, key=lambda r: _gain(r.score, direction))
    how = f"the knee of the front, as no point loses at most {drop} against the dense model"
    return Recommendation(best, f"{how} ({in_short(best, cost, dense_score)})")


def recommended(header: SweepHeader, records: Iterable[TrialRecord]) -> Recommendation:
    """Pick what `recommend` picks by the sweep's own settings: its objectives, and how much score may be lost."""
    drop = header.config.get("max_drop")
    if not (isinstance(drop, int | float) and math.isfinite(drop) and drop >= 0):
        drop = default_drop(header.metric, header.dense.score)
    unit = "points" if header.metric == "accuracy" else ""
    return recommend(records, header.dense.score, header.direction, drop, header.objectives, unit)


def default_drop(metric: str, dense_score: float) -> float:
    """Return the loss of score that counts as small: one point of accuracy, else 2 % of the dense score."""
    return 1.0 if metric == "accuracy" else 0.02 * abs(dense_score)


_SLACK = 1e-9
"""Room for rounding where a user's bound is compared with a difference of scores."""


def _loss(record: TrialRecord, dense: float, direction: Direction) -> float:
    """Return how much worse than the dense model the record's score is."""
    return _gain(dense, direction) - _gain(record.score, direction)


def _check_drop(max_drop: float) -> None:
    if not math.isfinite(max_drop) or max_drop < 0:
        raise ConfigError(f"max-drop must be a number of points of at least 0, not {max_drop:g}")


def select(
    points: Sequence[FrontPoint],
    *,
    dense: Evaluation | float,
    direction: Direction = "max",
    objectives: Sequence[Objective] = (),
    point: int | str | None = None,
    max_drop: float | None = None,
    min_score: float | None = None,
    max_macs: float | None = None,
) -> FrontPoint:
    """Return the point of the front that a user asks for.

    Parameters
    ----------
    points : sequence of FrontPoint
    dense : Evaluation or float
        The dense model on validation data, or its score alone.
    direction : {"max", "min"}
    objectives : sequence of Objective
        The cost by which "cheapest" is meant is the first that is not the score; ``macs_kept`` when none is given.
    point : int or str, optional
        A trial's number, the start of a plan id (4 digits or more), ``best``, ``cheapest`` or ``knee``. Stands alone.
    max_drop : float, optional
        Take the cheapest point that loses at most this much score against the dense model.
    min_score : float, optional
        Take the cheapest point with at least this score (at most, where a smaller score is better).
    max_macs : float, optional
        Largest ratio of MACs kept; alone, it takes the best score within it.

    Returns
    -------
    FrontPoint
        What `recommend` picks when nothing is asked for.

    Raises
    ------
    EmptyFrontError
        No point meets what was asked for; the message names the nearest.
    ConfigError
        `point` together with a bound, a bound out of range, or a point that is not on the front.
    """
    bounds = {"--max-drop": max_drop, "--min-score": min_score, "--max-macs": max_macs}
    given = [name for name, value in bounds.items() if value is not None]
    if point is not None and given:
        raise ConfigError(f"--point cannot be combined with {given[0]}: name a point or a bound, not both")
    if max_drop is not None:
        _check_drop(max_drop)
    if max_macs is not None and not 0 < max_macs <= 1:
        raise ConfigError(f"--max-macs is a ratio to the dense model, above 0 and at most 1, not {max_macs:g}")
    if min_score is not None and not math.isfinite(min_score):
        raise ConfigError(f"--min-score must be a finite number, not {min_score:g}")
    if not points:
        raise EmptyFrontError("the front is empty: no trial finished within the constraints of the sweep")
    dense_score = dense.score if isinstance(dense, Evaluation) else float(dense)
    by_number = {p.record.number: p for p in points}
    records = [p.record for p in points]
    cost = cost_name(objectives)
    if point is not None:
        return by_number[_named(records, point, cost, direction).number]
    if not given:
        return by_number[recommend(records, dense_score, direction, objectives=objectives).record.number]

    def shortfall(record: TrialRecord) -> tuple[float, ...]:
        """How far each bound is missed; zero where it is met."""
        gain, macs = _gain(record.score, direction), record.value("macs_kept")
        missed = []
        if max_drop is not None:
            missed.append(_gain(dense_score, direction) - gain - max_drop - _SLACK)
        if min_score is not None:
            missed.append(_gain(min_score, direction) - gain - _SLACK)
        if max_macs is not None:
            missed.append((math.inf if macs is None else macs) - max_macs - _SLACK)
        return tuple(max(0.0, value) for value in missed)

    able = [record for record in records if not any(shortfall(record))]
    if able:
        if max_drop is None and min_score is None:
            return by_number[max(able, key=lambda r: (_gain(r.score, direction), -r.number)).number]
        return by_number[_cheapest(able, cost, direction).number]
    # A missed ratio weighs a hundred times a missed point of score, as ratios run to 1 and accuracies to 100.
    weights = [1.0] * (len(given) - (max_macs is not None)) + [100.0] * (max_macs is not None)
    nearest = min(records, key=lambda r: (sum(w * s for w, s in zip(weights, shortfall(r), strict=True)), r.number))
    asked = " ".join(f"{name} {bounds[name]:g}" for name in given)
    raise EmptyFrontError(
        f"no point of the front meets {asked}; the nearest is point {nearest.number} "
        f"({in_short(nearest, 'macs_kept', dense_score)})",
        nearest.number,
    )


def _named(records: Sequence[TrialRecord], point: int | str, cost: str, direction: Direction) -> TrialRecord:
    """Return the record that the user names by number, plan id or place on the front."""
    word = str(point).strip().lower()
    if word == "best":
        return max(records, key=lambda r: (_gain(r.score, direction), -r.number))
    if word == "cheapest":
        return _cheapest(records, cost, direction)
    if word == "knee":
        return records[knee([(r.score, r.value(cost)) for r in records], (direction, "min"))]
    if word.isdecimal() and (found := [r for r in records if r.number == int(word)]):
        return found[0]
    found = [r for r in records if len(word) >= 4 and r.plan_id.startswith(word)]
    if len(found) == 1:
        return found[0]
    on_front = ", ".join(str(number) for number in sorted(r.number for r in records))
    raise ConfigError(
        f"point {str(point)!r} is not on the front; its points are {on_front}; "
        "a plan id, best, cheapest or knee also do"
    )
