"""What the rooms of autorank pass each other: frozen dataclasses, standard library only.

Ratios are named for what they are (``macs_kept`` is compressed divided by dense), and MACs are multiply-accumulates.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Scalar = str | int | float | bool
Kind = Literal["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"]
Status = Literal["complete", "pruned", "failed"]
Direction = Literal["max", "min"]


def canonical_json(value: object) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True, slots=True)
class CallSize:
    """One call of a layer in the profiled forward pass.

    Attributes
    ----------
    batch : int
        Size of the batch dimension seen by the layer (1 unless the model folds other dimensions into it).
    input, output : tuple of int
        Spatial sizes before and after the layer; for a linear layer the leading dimensions after the batch.
    """

    batch: int
    input: tuple[int, ...]
    output: tuple[int, ...]

    @property
    def positions(self) -> int:
        """Number of output positions of this call."""
        return self.batch * math.prod(self.output)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Everything about one layer that a format needs to know, without the weights.

    Attributes
    ----------
    name : str
        Qualified module name in the model.
    kind : Kind
    weight_shape : tuple of int
        (T, S/groups, K1, ..., Kd) as PyTorch stores it; (T, S) for a linear layer.
    stride, dilation : tuple of int
        One entry per spatial dimension (empty for a linear layer).
    padding : tuple of int or str
        One entry per spatial dimension, or ``"same"`` / ``"valid"``.
    padding_mode : str
        ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
    groups : int
    bias : bool
    calls : tuple of CallSize
        The calls seen in one forward pass of one example; empty when the spec was read off a module without running it.
    dtype : str
        Number type of the weight, as PyTorch names it without ``torch.``.
    """

    name: str
    kind: Kind
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    padding_mode: str = "zeros"
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = False
    calls: tuple[CallSize, ...] = ()
    dtype: str = "float32"

    @property
    def out_channels(self) -> int:
        """T, the number of output channels over all groups."""
        return self.weight_shape[0]

    @property
    def in_channels(self) -> int:
        """S, the number of input channels over all groups."""
        return self.weight_shape[1] * self.groups

    @property
    def kernel(self) -> tuple[int, ...]:
        """(K1, ..., Kd), the spatial sizes of the kernel; empty for a linear layer."""
        return self.weight_shape[2:]

    @property
    def weight_count(self) -> int:
        """Number of weights, bias not counted."""
        return math.prod(self.weight_shape)

    @property
    def params(self) -> int:
        """Number of parameters of the dense layer, bias included."""
        return self.weight_count + (self.out_channels if self.bias else 0)

    @property
    def macs(self) -> int:
        """MACs of the dense layer over all its calls for one example."""
        return self.weight_count * sum(call.positions for call in self.calls)


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """A layer that is never decomposed, and the reason in words."""

    name: str
    type: str
    reason: str
    params: int = 0
    macs: int = 0


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model costs for one example.

    Attributes
    ----------
    macs : int
        Multiply-accumulates of convolutions, linear maps and matrix products (normalisation layers not counted).
    params : int
        Number of parameters.
    bytes : int
        Bytes of the parameters as stored.
    latency_ms : float or None
        Measured or predicted milliseconds; None when latency was not asked for.
    """

    macs: int
    params: int
    bytes: int
    latency_ms: float | None = None

    def kept(self, dense: Cost) -> dict[str, float]:
        """Return this cost divided by `dense`: ``macs_kept``, ``params_kept``, ``bytes_kept`` and ``latency_kept``."""
        kept = {
            "macs_kept": self.macs / max(dense.macs, 1),
            "params_kept": self.params / max(dense.params, 1),
            "bytes_kept": self.bytes / max(dense.bytes, 1),
        }
        if self.latency_ms is not None and dense.latency_ms:
            kept["latency_kept"] = self.latency_ms / dense.latency_ms
        return kept


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """The decomposable layers of a model in forward order, its dense cost, and what is left alone and why."""

    layers: tuple[LayerSpec, ...]
    left_alone: tuple[LeftAlone, ...]
    dense: Cost
    unsupported_ops: tuple[tuple[str, int], ...] = ()

    def layer(self, name: str) -> LayerSpec:
        """Return the spec of the layer called `name`; KeyError when there is none."""
        for spec in self.layers:
            if spec.name == name:
                return spec
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class Choice:
    """How one layer is written: format, rank and format options; bits are None for floating point."""

    format: str
    rank: tuple[int, ...]
    options: tuple[tuple[str, Scalar], ...] = ()
    weight_bits: int | None = None
    activation_bits: int | None = None

    def option(self, name: str, default: Scalar) -> Scalar:
        """Return the value of the format option `name`, or `default`."""
        return dict(self.options).get(name, default)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary; empty fields are left out."""
        data: dict[str, Any] = {"format": self.format, "rank": list(self.rank)}
        if self.options:
            data["options"] = dict(self.options)
        for bits in ("weight_bits", "activation_bits"):
            if getattr(self, bits) is not None:
                data[bits] = getattr(self, bits)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Choice:
        """Rebuild a choice from `to_json`; unknown keys raise KeyError, wrong types TypeError or ValueError."""
        unknown = set(data) - {"format", "rank", "options", "weight_bits", "activation_bits"}
        if unknown:
            raise KeyError(f"unknown key {sorted(unknown)[0]!r} in a layer's choice")
        if not isinstance(data["format"], str):
            raise TypeError(f"format must be a name, not {data['format']!r}")
        rank = data["rank"]
        if not isinstance(rank, list | tuple) or not all(type(r) is int and r > 0 for r in rank):
            raise ValueError(f"rank must be a list of positive whole numbers, not {rank!r}")
        options = data.get("options", {})
        if not isinstance(options, Mapping):
            raise TypeError(f"options must be a mapping, not {options!r}")
        return cls(
            data["format"],
            tuple(rank),
            tuple(sorted(options.items())),
            data.get("weight_bits"),
            data.get("activation_bits"),
        )

    def __str__(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.options)
        return f"{self.format}({'×'.join(map(str, self.rank))}{'; ' + options if options else ''})"


@dataclass(frozen=True, slots=True)
class Plan:
    """Layer name → Choice; a layer that is not named stays dense.

    `layers` is kept sorted by name, so equal plans have equal JSON and equal `plan_id`.
    """

    layers: tuple[tuple[str, Choice], ...] = ()
    seed: int = 0

    @classmethod
    def of(cls, choices: Mapping[str, Choice], seed: int = 0) -> Plan:
        """Make a plan from a mapping."""
        return cls(tuple(sorted(choices.items())), seed)

    @property
    def choices(self) -> dict[str, Choice]:
        """The plan as a mapping from layer name to choice."""
        return dict(self.layers)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary."""
        return {"layers": {name: choice.to_json() for name, choice in self.layers}, "seed": self.seed}

    @property
    def canonical(self) -> str:
        """Canonical JSON text."""
        return canonical_json(self.to_json())

    @property
    def plan_id(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()[:16]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from `to_json`; KeyError, TypeError or ValueError say what is wrong."""
        unknown = set(data) - {"layers", "seed"}
        if unknown:
            raise KeyError(f"unknown key {sorted(unknown)[0]!r} in the plan")
        layers = data["layers"]
        if not isinstance(layers, Mapping):
            raise TypeError(f"layers must be a mapping, not {type(layers).__name__}")
        seed = data.get("seed", 0)
        if type(seed) is not int:
            raise TypeError(f"seed must be a whole number, not {seed!r}")
        choices: dict[str, Choice] = {}
        for name, choice in layers.items():
            if not isinstance(choice, Mapping):
                raise TypeError(f"layer {name!r}: a choice must be a mapping, not {choice!r}")
            choices[name] = Choice.from_json(choice)
        return cls.of(choices, seed)


@dataclass(frozen=True, slots=True, order=True)
class Fidelity:
    """How much work a trial's score rests on: decompose only, + BN statistics, + n fine-tune steps."""

    steps: int = 0
    batch_norm: bool = True

    @property
    def label(self) -> str:
        """A short name: ``decompose``, ``bn`` or ``tune-<steps>``."""
        if self.steps:
            return f"tune-{self.steps}"
        return "bn" if self.batch_norm else "decompose"


@dataclass(frozen=True, slots=True)
class LayerResult:
    """What decomposing one layer did, before any fine-tune.

    Attributes
    ----------
    weight_error : float
        ‖W − Ŵ‖ / ‖W‖ (Frobenius).
    output_error : float or None
        Relative root-mean-square error of the layer's output under the input covariance; None without statistics.
    sensitivity : float or None
        Sensitivity of the factors (CP and tensor chain); None where it has no meaning.
    macs, params : int
        Cost of the decomposed layer; macs_dense, params_dense those of the dense one.
    latency_ms, latency_dense_ms : float or None
        Measured time of the layer alone, when latency was asked for.
    """

    name: str
    choice: Choice
    weight_error: float
    macs: int
    params: int
    macs_dense: int
    params_dense: int
    output_error: float | None = None
    sensitivity: float | None = None
    latency_ms: float | None = None
    latency_dense_ms: float | None = None


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One finished trial, as the journal keeps it.

    Attributes
    ----------
    number : int
        Position in the order in which the strategy proposed plans; unique in a sweep.
    plan : Plan
    fidelity : Fidelity
        What was reached: a pruned trial carries the lower fidelity at which it stopped.
    status : Status
    score : float or None
        Metric on validation data after recovery (percent for accuracy); None when the trial failed.
    score_before : float or None
        Metric right after decomposition, before batch-norm statistics and fine-tune.
    score_bn : float or None
        Metric after batch-norm re-estimation was decided, before the fine-tune.
    loss : float or None
        Validation loss that belongs to `score`.
    cost : Cost or None
    kept : mapping
        ``macs_kept``, ``params_kept``, ``bytes_kept`` and, with latency, ``latency_kept``.
    layers : tuple of LayerResult
    curve : tuple of (step, loss)
        Fine-tune loss, thinned to at most 50 points.
    seconds : mapping
        Wall time by phase: fit, batch_norm, tune, evaluate, other.
    reason : str
        Why it failed or was pruned; empty otherwise.
    target : Fidelity or None
        What was asked for, where it is not what was reached.
    worker : str
        Host and process that ran it.
    started : float
        Unix time.
    versions : mapping
        Versions of the libraries that shaped the result.
    """

    number: int
    plan: Plan
    fidelity: Fidelity
    status: Status
    score: float | None = None
    score_before: float | None = None
    score_bn: float | None = None
    loss: float | None = None
    cost: Cost | None = None
    kept: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[LayerResult, ...] = ()
    curve: tuple[tuple[int, float], ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    target: Fidelity | None = None
    worker: str = ""
    started: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def plan_id(self) -> str:
        """Hash of the plan."""
        return self.plan.plan_id

    def value(self, objective: str) -> float | None:
        """Return the value of `objective`: ``score`` or one of the ``*_kept`` names; None when it is not there."""
        if objective == "score":
            return self.score
        return self.kept.get(objective)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary that `from_json` reads back to an equal record."""
        data = asdict(self)
        data["plan"] = self.plan.to_json()
        data["plan_id"] = self.plan_id
        data["layers"] = [{**asdict(layer), "choice": layer.choice.to_json()} for layer in self.layers]
        data["kept"], data["seconds"] = dict(self.kept), dict(self.seconds)
        data["versions"] = dict(self.versions)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrialRecord:
        """Rebuild a record; KeyError, TypeError or ValueError when the data is not a record."""
        data = dict(data)
        data.pop("plan_id", None)
        data["plan"] = Plan.from_json(data["plan"])
        data["fidelity"] = Fidelity(**data["fidelity"])
        if data.get("target") is not None:
            data["target"] = Fidelity(**data["target"])
        if data.get("cost") is not None:
            data["cost"] = Cost(**data["cost"])
        data["layers"] = tuple(
            LayerResult(**{**layer, "choice": Choice.from_json(layer["choice"])}) for layer in data.get("layers", ())
        )
        data["curve"] = tuple((int(step), float(loss)) for step, loss in data.get("curve", ()))
        return cls(**data)


@dataclass(frozen=True, slots=True)
class Objective:
    """One axis of the front: ``score`` or a ``*_kept`` ratio, and whether more or less is better."""

    name: str
    direction: Direction


@dataclass(frozen=True, slots=True)
class Constraint:
    """A bound such as ``macs_kept<=0.5`` that every point of the front must meet."""

    name: str
    operator: Literal["<=", ">="]
    bound: float

    def violation(self, value: float) -> float:
        """Return how far `value` is beyond the bound; zero or less when it is met."""
        return value - self.bound if self.operator == "<=" else self.bound - value

    def __str__(self) -> str:
        return f"{self.name}{self.operator}{self.bound:g}"


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """A member of the final front: its record, and what is measured once, alone, at the end of the sweep."""

    record: TrialRecord
    test_score: float | None = None
    latency_ms: float | None = None
    latency_spread_ms: float | None = None
    slower_layers: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the measurements with the trial's number in place of its record."""
        data = {k: v for k, v in asdict(self).items() if k != "record"}
        return {"number": self.record.number, **data}


@dataclass(frozen=True, slots=True)
class DenseFigures:
    """The dense model, measured beside the final front: test score, latency and how it was taken."""

    test_score: float | None = None
    latency_ms: float | None = None
    latency_spread_ms: float | None = None
    batch: int = 1
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class LayerCost:
    """MACs (for one example, over all calls of the layer) and parameters (bias included) of one decomposed layer."""

    macs: int
    params: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Score (the task's metric) and mean loss over one split."""

    score: float
    loss: float
    examples: int = 0


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a strategy wants evaluated next.

    Attributes
    ----------
    plan : Plan
    fidelity : Fidelity or None
        None asks for the sweep's full fidelity.
    """

    plan: Plan
    fidelity: Fidelity | None = None


@dataclass(frozen=True, slots=True)
class SweepHeader:
    """First line of a journal: everything about a sweep that is known before its first trial.

    Attributes
    ----------
    sweep_id : str
        Unique name of the sweep.
    created : float
        Unix time.
    config : mapping
        The settings with which the sweep was started, complete enough to start it again.
    metric : str
        Name of the score, for example ``accuracy``.
    direction : Direction
        Whether a larger or a smaller score is better.
    objectives, constraints
        The axes of the front and the bounds on them.
    dense : Evaluation
        The dense model on the validation split.
    dense_cost : Cost
    layers : tuple of mapping
        One mapping per decomposable layer: name, kind, weight_shape, macs, params, candidates (their number).
    left_alone : tuple of LeftAlone
    fingerprint : mapping
        Hashes and sizes that identify weights and data.
    versions : mapping
    """

    sweep_id: str
    created: float
    config: Mapping[str, Any]
    metric: str
    direction: Direction
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]
    dense: Evaluation
    dense_cost: Cost
    layers: tuple[Mapping[str, Any], ...] = ()
    left_alone: tuple[LeftAlone, ...] = ()
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def measured(self, dense: DenseFigures | None) -> SweepHeader:
        """Return the header with the dense latency that was measured beside the front, where there is one."""
        if dense is None or dense.latency_ms is None:
            return self
        return replace(self, dense_cost=replace(self.dense_cost, latency_ms=dense.latency_ms))

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SweepHeader:
        """Rebuild a header; KeyError, TypeError or ValueError when the data is not one."""
        data = dict(data)
        data["objectives"] = tuple(Objective(**o) for o in data["objectives"])
        data["constraints"] = tuple(Constraint(**c) for c in data["constraints"])
        data["dense"], data["dense_cost"] = Evaluation(**data["dense"]), Cost(**data["dense_cost"])
        data["layers"] = tuple(data.get("layers", ()))
        data["left_alone"] = tuple(LeftAlone(**item) for item in data.get("left_alone", ()))
        return cls(**data)
