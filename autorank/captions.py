"""The words under which sweeps, trials and plans are shown: labels with units, formats in short, hover text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from autorank.types import Choice, FrontPoint, Plan, SweepHeader, TrialRecord, tally

COST_LABELS = {
    "macs_kept": "MACs kept",
    "params_kept": "parameters kept",
    "bytes_kept": "bytes kept",
    "latency_kept": "latency kept",
    "bops_kept": "bit operations kept",
}
UNITS = {"accuracy": "%", "top1": "%", "top5": "%", "psnr": "dB"}
_HOVER_LAYERS = 8


def clean(text: object, limit: int = 120) -> str:
    """Return `text` on one line without control characters, cut to `limit` characters."""
    return _clean(str(text), limit)


# A thousand trials name the same layers and choices again and again.
@lru_cache(maxsize=4096)
def _clean(line: str, limit: int) -> str:
    if not line.isprintable():
        line = "".join(c if c.isprintable() else " " for c in line)
    line = " ".join(line.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


@lru_cache(maxsize=4096)
def choice_text(choice: Choice) -> str:
    """Return a choice in short: ``tucker2(8×4)``."""
    return clean(choice, 50)


def plan_text(plan: Plan) -> str:
    """Return the formats of a plan in short, most used first: ``tucker2×9 spatial_svd×5``, or ``dense``."""
    counts = Counter(choice.called for _, choice in plan.layers)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return " ".join(f"{clean(name, 40)}×{count}" for name, count in ordered) or "dense"


def score_label(header: SweepHeader, split: str = "validation") -> str:
    """Return the label of the score's axis, with its unit where it is known."""
    unit = unit_of(header)
    remarks = [unit] if unit else []
    remarks += ["lower is better"] if header.direction == "min" else []
    return f"{split} {clean(header.metric, 40)}" + (f" ({', '.join(remarks)})" if remarks else "")


def cost_label(name: str) -> str:
    """Return the label of the axis of a ``*_kept`` ratio."""
    return f"{COST_LABELS.get(name, name)} (compressed ÷ dense)"


def unit_of(header: SweepHeader) -> str:
    """Return the unit of the score; empty where it has none that is known."""
    return UNITS.get(header.metric.lower(), "")


def value_label(header: SweepHeader, name: str) -> str:
    """Return the label of an axis: the score's, or that of a ``*_kept`` ratio."""
    return score_label(header) if name == "score" else cost_label(name)


def value_name(header: SweepHeader, name: str) -> str:
    """Return what a record's value is called, without its unit."""
    return clean(header.metric, 40) if name == "score" else COST_LABELS.get(name, name)


def group_of(record: TrialRecord) -> str:
    """Return the format of most of the decomposed layers' dense MACs, or ``mixed`` where none has more than half."""
    weights: Counter[str] = Counter()
    for layer in record.layers:
        weights[layer.choice.format] += layer.macs_dense
    if not sum(weights.values()):
        weights = Counter(choice.format for _, choice in record.plan.layers)
    if not weights:
        return "dense"
    name, most = min(weights.items(), key=lambda item: (-item[1], item[0]))
    return clean(name, 40) if 2 * most > sum(weights.values()) or len(weights) == 1 else "mixed"


def counted(number: float) -> str:
    """Return a count in short: 40,551,040 as ``40.55 M``."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return f"{number:.0f}"


def sweep_text(header: SweepHeader, records: Sequence[TrialRecord], front: int) -> str:
    """Return a sweep in one line: its name, its trials, how many are on the front, the dense model."""
    dense = f"dense: {header.dense.score:.4g} {unit_of(header)}".rstrip()
    cost = f"{counted(header.dense_cost.macs)} MACs, {counted(header.dense_cost.params)} parameters"
    return f"{clean(header.sweep_id, 60)} · {tally(records)}, {front} on the front · {dense}, {cost}"


def not_drawn(records: Sequence[TrialRecord], drawn: int) -> str:
    """Return how many trials a figure leaves out, and why; empty where it shows all."""
    failed = sum(record.status == "failed" for record in records)
    without = len(records) - drawn - failed
    parts = [f"{failed} failed" if failed else "", f"{without} without a value on these axes" if without else ""]
    text = ", ".join(part for part in parts if part)
    return f"not drawn: {text}" if text else ""


def hover(header: SweepHeader, record: TrialRecord, point: FrontPoint | None = None) -> tuple[str, ...]:
    """Return the lines that explain a trial, as plain text (never markup)."""
    unit = unit_of(header)
    lines = [f"trial {record.number} · {plan_text(record.plan)} · {record.fidelity.label}"]
    if record.status == "pruned":
        lines.append("stopped early" + (f": {clean(record.reason)}" if record.reason else ""))
    if record.score is not None:
        lines.append(
            f"{clean(header.metric, 40)} {record.score:.4g} {unit}".rstrip()
            + f" ({record.score - header.dense.score:+.3g} against dense)"
        )
    if record.score_before is not None:
        lines.append(f"before recovery {record.score_before:.4g} {unit}".rstrip())
    if point is not None and point.test_score is not None:
        lines.append(f"test {point.test_score:.4g} {unit}".rstrip())
    lines += [f"{COST_LABELS.get(name) or clean(name)} {value:.3f}" for name, value in record.kept.items()]
    if point is not None and point.latency_ms is not None:
        lines.append(f"measured latency {point.latency_ms:.3g} ms")
    layers = record.plan.layers
    lines += [f"{clean(name, 50)}: {choice_text(choice)}" for name, choice in layers[:_HOVER_LAYERS]]
    if len(layers) > _HOVER_LAYERS:
        lines.append(f"… and {len(layers) - _HOVER_LAYERS} more layers")
    return tuple(lines)
