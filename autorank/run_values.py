"""What a sweep and its trials say in MLflow: names, params, metrics, tags, small files; pure, free of secrets."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from autorank.captions import clean, plan_text
from autorank.figures import layer_table
from autorank.privacy import hidden, without_secrets
from autorank.types import DenseFigures, FrontPoint, SweepHeader, TrialRecord

SWEEP_ID = "autorank.sweep_id"
ROLE = "autorank.role"
NUMBER = "autorank.number"
STATE = "autorank.state"
RECOMMENDED = "autorank.recommended"
REGISTERED = "autorank.registered"
REGISTERED_AS = "autorank.registered_as"
PARENT = "mlflow.parentRunId"
TABLES = "mlflow.loggedArtifacts"
"""Under this tag MLflow lists the artifacts that its UI shows as tables."""

_NAME_LIMIT = 64  # MLflow's list shows about 20 characters until its column is drawn wider
_VALUE_LIMIT = 500  # what every MLflow server takes as the value of a param
_RUN_STATUS = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
_NOTE = (
    "A sweep of autorank; each trial is a nested run. For the front in the list of runs search for "
    "`tags.front = 'true'` and sort by `macs_kept`, or sort all runs by `on_front`.\n\n"
    "| artifact | shows |\n|---|---|\n"
    "| `pareto` | the trade-off: all trials, the front, the recommended point |\n"
    "| `hypervolume` | progress, against trials and against time |\n"
    "| `rank_map` | rank kept per layer along the front |\n"
    "| `layers` | the layers of the recommended point, before and after |\n"
    "| `importance` | which choices the score depends on |\n"
    "| `front` | the points of the front as a table |\n"
    "| `sweep.json` | all settings |\n"
)


@dataclass(frozen=True, slots=True)
class RunValues:
    """One run as it should stand in MLflow.

    Attributes
    ----------
    name : str
    start, end : int
        Unix time in milliseconds; taken from the record, so that writing twice writes the same.
    status : str
        MLflow's word for how the run ended.
    params, tags : dict of str
    metrics : tuple of (key, value, step)
    files : dict
        Name of the artifact → its text.
    """

    name: str
    start: int
    end: int
    status: str
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: tuple[tuple[str, float, int], ...] = ()
    files: dict[str, str] = field(default_factory=dict)


def key(text: str) -> str:
    """Return `text` as a key that MLflow takes."""
    return (re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII).strip("._-/") or "_")[:250]


def short(value: object) -> str:
    """Return `value` as text that fits a param or a tag."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _VALUE_LIMIT else text[: _VALUE_LIMIT - 1] + "…"


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the settings one by one: sections are opened one level, what is deeper stays JSON."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and name != "space":
            yield from ((key(f"{name}.{inner}"), short(item)) for inner, item in value.items() if item is not None)
        elif value is not None:
            yield key(name), short(value)


def milliseconds(seconds: float) -> int:
    """Return a Unix time in milliseconds."""
    return round(1000 * seconds)


def end_of(record: TrialRecord) -> int:
    """Return when a trial ended, in milliseconds of Unix time."""
    return milliseconds(record.started + sum(record.seconds.values()))


def finite(items: Mapping[str, float | None]) -> Iterator[tuple[str, float]]:
    """Yield the items that are finite numbers, under keys that MLflow takes."""
    for name, value in items.items():
        if value is not None and math.isfinite(value):
            yield key(name), float(value)


def sweep_values(header: SweepHeader) -> RunValues:
    """Return what the run of a sweep says before its first trial."""
    settings = without_secrets(header.config)
    start = milliseconds(header.created)
    versions = {key(f"version.{name}"): short(version) for name, version in header.versions.items()}
    about = {
        "metric": header.metric,
        "direction": header.direction,
        "objectives": ", ".join(f"{o.name} ({o.direction})" for o in header.objectives),
        "constraints": ", ".join(map(str, header.constraints)),
        "layers": str(len(header.layers)),
        "layers_left_alone": str(len(header.left_alone)),
    }
    cost = header.dense_cost
    metrics = {
        "dense_score": header.dense.score,
        "dense_loss": header.dense.loss,
        "dense_macs": cost.macs,
        "dense_params": cost.params,
        "dense_bytes": cost.bytes,
        "dense_latency_ms": cost.latency_ms,
    }
    described = without_secrets(header.to_json())
    return RunValues(
        name=clean(header.sweep_id),
        start=start,
        end=start,
        status="RUNNING",
        params={**dict(_flat(settings)), **{name: short(value) for name, value in about.items() if value}},
        tags={
            SWEEP_ID: header.sweep_id,
            ROLE: "sweep",
            STATE: "running",
            TABLES: _tables("front.json", "layers.json"),
            "mlflow.source.name": "autorank",
            "mlflow.note.content": _NOTE,
            **versions,
        },
        metrics=tuple((name, value, 0) for name, value in finite(metrics)),
        files={"sweep.json": json.dumps(described, indent=2, default=str)},
    )


def _tables(*names: str) -> str:
    return json.dumps([{"path": name, "type": "table"} for name in names])


def trial_name(record: TrialRecord) -> str:
    """Return a run name that says what the trial is, the most telling first: ``#12 0.48 MACs tucker2×9 cp×2``."""
    macs = record.kept.get("macs_kept")
    words = [
        f"#{record.number}",
        "probe" if record.probe else "",
        "" if macs is None else f"{macs:.2f} MACs",
        "" if record.status == "complete" else record.status,
        _formats(record),
    ]
    return clean(" ".join(words), _NAME_LIMIT)


def _formats(record: TrialRecord) -> str:
    """Return the two formats that a plan uses most, and how many more there are."""
    counts = Counter(choice.called for _, choice in record.plan.layers)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = f" +{len(ordered) - 2}" if len(ordered) > 2 else ""
    return (" ".join(f"{name}×{count}" for name, count in ordered[:2]) or "dense") + more


def trial_values(record: TrialRecord, sweep_id: str, volume: float | None = None) -> RunValues:
    """Return what the run of a trial says; `volume` is the hypervolume of the front when the trial had ended."""
    metrics: dict[str, float | None] = {
        "score": record.score,
        "score_before": record.score_before,
        "score_bn": record.score_bn,
        "loss": record.loss,
        "hypervolume": volume,
        **record.kept,
        **_worst_layer(record),
        **{f"seconds.{phase}": value for phase, value in record.seconds.items()},
    }
    if record.cost is not None:
        metrics |= {
            "macs": record.cost.macs,
            "params": record.cost.params,
            "bytes": record.cost.bytes,
            "latency_predicted_ms": record.cost.latency_ms,
        }
    curve = ((step, loss) for step, loss in record.curve if math.isfinite(loss))
    tags = {
        SWEEP_ID: sweep_id,
        ROLE: "trial",
        NUMBER: str(record.number),
        "status": record.status,
        "fidelity": record.fidelity.label,
        "plan_id": record.plan_id,
        "mlflow.source.name": "autorank",
        TABLES: _tables("layers.json"),
    }
    tags |= {"probe": "yes"} if record.probe else {}
    tags |= {"starts_from": str(record.parent)} if record.parent is not None else {}
    tags |= {"reason": short(hidden(record.reason))} if record.reason else {}
    tags |= {"worker": short(record.worker)} if record.worker else {}
    return RunValues(
        name=trial_name(record),
        start=milliseconds(record.started),
        end=end_of(record),
        status=_RUN_STATUS[record.status],
        params={
            "formats": short(plan_text(record.plan)),
            "decomposed_layers": str(len(record.plan.layers)),
            "fidelity": record.fidelity.label,
            "seed": str(record.plan.seed),
        },
        tags=tags,
        metrics=(
            *((name, value, 0) for name, value in finite(metrics)),
            *(("tune_loss", float(loss), step) for step, loss in curve),
        ),
        files={
            "plan.json": json.dumps(record.plan.to_json(), indent=2),
            "layers.json": layer_table(record).to_json(orient="split", index=False),
        },
    )


def _worst_layer(record: TrialRecord) -> dict[str, float | None]:
    """Return the largest errors and the largest sensitivity of a trial's layers; the table has those of each layer."""
    names = ("weight_error", "output_error", "sensitivity", "loss_increase")
    found = {name: [getattr(layer, name) for layer in record.layers] for name in names}
    return {
        f"{name}_max": max((value for value in values if value is not None), default=None)
        for name, values in found.items()
    }


def point_values(point: FrontPoint, dense: DenseFigures | None) -> tuple[dict[str, float], dict[str, str]]:
    """Return the metrics and the tags that the final measurement adds to a member of the front.

    Its ``latency_kept`` takes the place of the predicted one that the trial may have.
    """
    dense_ms = dense.latency_ms if dense else None
    metrics = {
        "test_score": point.test_score,
        "latency_ms": point.latency_ms,
        "latency_spread_ms": point.latency_spread_ms,
        "latency_kept": point.latency_ms / dense_ms if point.latency_ms and dense_ms else None,
    }
    if dense is None or dense.runtime == "pytorch":
        metrics["slower_layers"] = float(len(point.slower_layers))
        return dict(finite(metrics)), {"slower_layers": short(", ".join(point.slower_layers)) or "none"}
    # In ONNX Runtime only whole models are timed.
    return dict(finite(metrics)), {"latency_runtime": dense.runtime}


def reason_of(error: Exception) -> str:
    """Return an error of MLflow in a few words, without secrets."""
    text = " ".join(hidden(str(error) or type(error).__name__).split())
    for sign, words in (
        ("Connection refused", "connection refused"),
        ("timed out", "no answer in time"),
        ("Name or service not known", "there is no such host"),
        ("database is locked", "the database is locked by another program"),
    ):
        if sign in text:
            return words
    return text if len(text) <= 160 else text[:159] + "…"
