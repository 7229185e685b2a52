"""What the user writes for objectives and constraints, read into `Objective` and `Constraint`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from autorank.errors import ConfigError, did_you_mean
from autorank.types import Constraint, Direction, Objective

COSTS = {
    "macs": "macs_kept",
    "params": "params_kept",
    "bytes": "bytes_kept",
    "latency": "latency_kept",
    "bops": "bops_kept",
}
"""Short name of each cost → name of its ratio to the dense model."""


def _resolve(name: str, metric: str, where: str) -> str:
    """Return ``score`` or a ``*_kept`` name for what the user wrote; ConfigError listing what is allowed."""
    wanted = name.strip().lower()
    if wanted in ("score", metric.lower()):
        return "score"
    if wanted in COSTS:
        return COSTS[wanted]
    if wanted in COSTS.values():
        return wanted
    allowed = list(dict.fromkeys(["score", metric, *COSTS, *COSTS.values()]))
    hint = "; did you mean macs? one of them is two FLOPs" if wanted == "flops" else did_you_mean(wanted, allowed)
    raise ConfigError(f"{where}: unknown name {name.strip()!r}{hint}; allowed are {', '.join(allowed)}")


def parse_objectives(
    objectives: str | Sequence[str], metric: str = "accuracy", direction: Direction = "max"
) -> tuple[Objective, ...]:
    """Read the axes of the front, for example ``"accuracy,macs"``.

    Parameters
    ----------
    objectives : str or sequence of str
        Names, separated by commas when it is one text: the metric's own name or ``score``, and ``macs``, ``params``,
        ``bytes``, ``latency``, ``bops`` or their ``*_kept`` names.
    metric : str
        The task's name for its score.
    direction : {"max", "min"}
        Whether a larger or a smaller score is better. Costs are always to be made small.

    Returns
    -------
    tuple of Objective
        Two or three, in the order given.

    Raises
    ------
    ConfigError
        An unknown name, the same axis twice, fewer than two or more than three, or no score among them.
    """
    names = objectives.split(",") if isinstance(objectives, str) else list(objectives)
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"objectives: {objectives!r} is not a list of names such as {metric},macs")
    names = [name for name in names if name.strip()]
    resolved = [_resolve(name, metric, "objectives") for name in names]
    for i, name in enumerate(resolved):
        if name in resolved[:i]:
            first = names[resolved.index(name)].strip()
            raise ConfigError(f"objectives: {names[i].strip()!r} is the same axis as {first!r}; name each one once")
    if len(resolved) not in (2, 3):
        raise ConfigError(
            f"objectives: {len(resolved)} given, two or three are needed, "
            f"for example {metric},macs or {metric},macs,params"
        )
    if "score" not in resolved:
        raise ConfigError(
            f"objectives: {', '.join(names)} has no score; add {metric}, or the smallest model always wins"
        )
    return tuple(Objective(name, direction if name == "score" else "min") for name in resolved)


_CONSTRAINT = re.compile(r"\s*([A-Za-z_][\w .-]*?)\s*(<=|>=|==|=<|=>|<|>|=|≤|≥)\s*(\S+?)\s*(%?)\s*")


def parse_constraint(text: str, metric: str = "accuracy") -> Constraint:
    """Read a bound such as ``macs_kept<=0.5``, ``macs<=50%`` or ``score>=90``.

    Parameters
    ----------
    text : str
        Name, ``<=`` or ``>=``, number. Ratios are between 0 and 1, or percent with a ``%``.
    metric : str
        The task's name for its score, accepted beside ``score``.

    Returns
    -------
    Constraint

    Raises
    ------
    ConfigError
        The text is no such bound; the message says what is allowed.
    """
    where = f"constraint {text!r}" if isinstance(text, str) else f"constraint {text!r} (not a text)"
    match = _CONSTRAINT.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ConfigError(f"{where}: write it as name<=number or name>=number, for example macs_kept<=0.5")
    name, operator, number, percent = match.groups()
    operator = {"≤": "<=", "≥": ">="}.get(operator, operator)
    if operator not in ("<=", ">="):
        raise ConfigError(f"{where}: operator {operator!r} is not known; allowed are <= and >=")
    resolved = _resolve(name, metric, where)
    try:
        bound = float(number)
    except ValueError:
        raise ConfigError(f"{where}: {number!r} is not a number") from None
    if not math.isfinite(bound):
        raise ConfigError(f"{where}: the bound must be finite")
    if resolved == "score":
        if percent and metric.lower() != "accuracy":
            raise ConfigError(f"{where}: write the bound on {metric} as a plain number, without %")
    else:
        if percent:
            bound /= 100
        if not 0 < bound <= 1:
            raise ConfigError(
                f"{where}: {resolved} is a ratio to the dense model, above 0 and at most 1; "
                "write for example 0.5 or 50%"
            )
    return Constraint(resolved, "<=" if operator == "<=" else ">=", bound)
