"""What a sweep starts from and ends with, in MLflow's words: data, dense model, recommended model; free of secrets."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autorank.captions import clean
from autorank.privacy import public, without_secrets
from autorank.run_values import key, short
from autorank.types import SweepHeader

CONTEXTS = {"train": "training", "validation": "validation", "test": "test"}
"""Split → MLflow's word for what it is used for."""

_NAME_LIMIT = 200
Example = Sequence[tuple[str, Sequence[int]]]
"""Type and shape of each input of the network, the batch dimension first."""


@dataclass(frozen=True, slots=True)
class DataInput:
    """One split of the data as an MLflow dataset; `source`, `schema` and `profile` are JSON."""

    name: str
    digest: str
    source_type: str
    source: str
    schema: str
    profile: str
    context: str


@dataclass(frozen=True, slots=True)
class ModelInput:
    """The dense model as an MLflow model that is kept elsewhere: its figures, not its files."""

    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Package:
    """A model to register.

    Attributes
    ----------
    name : str
        Of the registered model.
    key : str
        Tells it from other models of the same sweep: what was registered once is not registered again.
    number : int
        Trial that it comes from.
    folder : Path
        MLflow model directory.
    tags : mapping
        Of the version.
    metrics : mapping
        Of the model, as they stand at its trial.
    """

    name: str
    key: str
    number: int
    folder: Path
    tags: Mapping[str, str]
    metrics: Mapping[str, float]


def datasets(header: SweepHeader, example: Example = ()) -> tuple[DataInput, ...]:
    """Return the splits that a sweep uses, told apart by their fingerprints.

    Parameters
    ----------
    header : SweepHeader
    example : sequence of (type, shape)
        Of the network's inputs; none: no schema.
    """
    name = clean(header.fingerprint.get("task") or "data", _NAME_LIMIT)
    found = []
    for split, context in CONTEXTS.items():
        said = header.fingerprint.get(split)
        if said is None:
            continue
        size = said.get("size") if isinstance(said, Mapping) else None
        profile = {"num_rows": size} if isinstance(size, int) else {}
        found.append(
            DataInput(name, _digest(said), *_source(header, split), _schema(example), json.dumps(profile), context)
        )
    return tuple(found)


def dense_model(header: SweepHeader) -> ModelInput:
    """Return the trained network that the sweep makes smaller."""
    settings = without_secrets(header.config)
    about = {name: settings.get(name) for name in ("model", "model_args", "weights")}
    cost = header.dense_cost
    counts = {"macs": cost.macs, "params": cost.params, "bytes": cost.bytes, "layers": len(header.layers)}
    weights = header.fingerprint.get("model")
    return ModelInput(
        name=clean(re.sub(r"[/:.%\"']+", "-", f"dense {public(str(header.config.get('model') or ''))}".strip()), 100),
        params={key(name): short(value) for name, value in {**about, **counts}.items() if value},
        tags={"weights_hash": short(weights)} if weights else {},
        metrics={"dense_score": header.dense.score, "dense_loss": header.dense.loss},
    )


def _digest(said: Any) -> str:
    """Return a hash of a split's fingerprint, as short as MLflow wants it."""
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _source(header: SweepHeader, split: str) -> tuple[str, str]:
    """Return type and content of where the data come from, in a form that MLflow's own classes read."""
    spec = header.config.get("data")
    if not isinstance(spec, str):
        return "code", json.dumps({"tags": {"split": split, "made by": "a task made in Python"}})
    scheme, _, rest = public(spec).partition(":")
    if scheme == "hf":
        parts: dict[str, Any] = dict.fromkeys(("config_name", "data_dir", "data_files", "revision"))
        return "hugging_face", json.dumps({"path": rest, "split": split, **parts})
    if scheme in ("parquet", "imagefolder"):
        return "local", json.dumps({"uri": rest})
    return "code", json.dumps({"tags": {"split": split, "data": public(spec)}})


def _schema(example: Example) -> str:
    """Return the network's inputs in MLflow's form, any number of examples at once."""
    if not example:
        return ""
    named = len(example) > 1
    columns = [
        {
            "type": "tensor",
            "tensor-spec": {"dtype": kind, "shape": [-1, *shape[1:]]},
            **({"name": f"input_{index}"} if named else {}),
        }
        for index, (kind, shape) in enumerate(example)
    ]
    return json.dumps({"mlflow_tensorspec": {"features": json.dumps(columns), "targets": None}})
