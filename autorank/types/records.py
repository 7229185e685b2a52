"""What trials and sweeps leave behind: records, the front, the header of a journal."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from autorank.types.decoding import decoded, finite
from autorank.types.layers import Cost, LeftAlone, bit_operations
from autorank.types.plans import Choice, Fidelity, Plan, Want, trial_key

LATEST = 253402300800.0
"""The end of the year 9999 in Unix time, beyond which no date can be written."""
_ALWAYS_KEPT = frozenset(["macs_kept", "params_kept", "bytes_kept"])
_KEPT = _ALWAYS_KEPT | {"latency_kept", "bops_kept"}
_LINEAGE = re.compile("([0-9a-f]{12})?")

Status = Literal["complete", "pruned", "failed"]
Direction = Literal["max", "min"]


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
class Evaluation:
    """Score (the task's metric) and mean loss over one split."""

    score: float
    loss: float
    examples: int = 0


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
        Expected squared error of the weight under noise of variance one on every entry of the factors; None in
        records of versions that did not report it.
    macs, params : int
        Cost of the decomposed layer; macs_dense, params_dense those of the dense one.
    latency_ms, latency_dense_ms : float or None
        Measured time of the layer alone, when latency was asked for.
    loss_increase : float or None
        Predicted rise of the loss, ½·tr(GΔΣΔᵀ); None without gradient statistics.
    full_rank : tuple of int or None
        The rank with which the format writes every weight of this shape exactly, entry by entry as in the choice; None
        in records of versions that did not report it.
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
    loss_increase: float | None = None
    full_rank: tuple[int, ...] | None = None

    @property
    def rank_kept(self) -> float | None:
        """Geometric mean of rank ÷ full rank over the entries of the rank; None where the full rank is not known."""
        if not self.full_rank or len(self.full_rank) != len(self.choice.rank):
            return None
        shares = [rank / max(full, 1) for rank, full in zip(self.choice.rank, self.full_rank, strict=True)]
        return math.prod(shares) ** (1 / len(shares))


def model_bops(dense_macs: int, layers: Iterable[LayerResult]) -> int:
    """Return the bit operations of a model whose dense one has so many MACs, with these layers in their places."""
    found = bit_operations(dense_macs, None, None)
    for layer in layers:
        bits = layer.choice.weight_bits, layer.choice.activation_bits
        found += bit_operations(layer.macs, *bits) - bit_operations(layer.macs_dense, None, None)
    return found


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
        ``macs_kept``, ``params_kept``, ``bytes_kept`` and, where they are known, ``latency_kept`` and ``bops_kept``.
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
    parent : int or None
        Number of the trial with whose weights this one started; None stands for the dense model's.
    lineage : str
        Hash of the trials that it descends from and of its pull; empty when it started from the dense model.
    pull : float
        μ of learned-rank training; 0 for all others.
    probe : bool
        Whether it was only a question on the way: no point of the front.
    want : str
        What was to be measured on the weights at the end.
    measured : mapping of str to tuple of float
        By layer: for ``distances`` the squared distance of the undecomposed kernel to each of the layer's candidates,
        in the order of the space; for ``spectra`` the EVBMF ranks of the kernel's two unfoldings.
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
    parent: int | None = None
    lineage: str = ""
    pull: float = 0.0
    probe: bool = False
    want: Want = ""
    measured: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def plan_id(self) -> str:
        """Hash of the plan."""
        return self.plan.plan_id

    @property
    def key(self) -> str:
        """Name of what was asked for: equal for equal plan, fidelity and lineage; fit for a file's name."""
        return trial_key(self.plan, self.target or self.fidelity, self.lineage)

    def value(self, objective: str) -> float | None:
        """Return the value of `objective`: ``score`` or one of the ``*_kept`` names; None when it is not there."""
        if objective == "score":
            return self.score
        return self.kept.get(objective)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary that `from_json` reads back to an equal record; null for what is not finite."""
        # Not asdict, which copies every value of every layer and would be most of what a trial costs the driver.
        data = _shallow(self)
        for name in ("fidelity", "target", "cost"):
            data[name] = None if data[name] is None else _shallow(data[name])
        data["plan"] = self.plan.to_json()
        data["plan_id"] = self.plan_id
        data["layers"] = [{**_shallow(layer), "choice": layer.choice.to_json()} for layer in self.layers]
        made: dict[str, Any] = finite(data)
        return made

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrialRecord:
        """Rebuild a record; KeyError, TypeError or ValueError when the data is not a record."""
        data = dict(data)
        name = data.pop("plan_id", None)
        plan = Plan.from_json(data["plan"])
        if name is not None and name != plan.plan_id:
            raise ValueError(f"its plan is not plan {name!r}, as it says: one of the two was changed")
        written, choices = data["plan"]["layers"], plan.choices

        def result(layer: Any) -> LayerResult:
            called, choice = layer["name"], layer["choice"]
            # Mostly the plan's own, which need not be read twice: thousands of trials are read while somebody waits.
            known = choices[called] if choice == written.get(called) else Choice.from_json(choice)
            made: LayerResult = decoded(LayerResult, layer, {"choice": known})
            return made

        layers = data.get("layers", ())
        if not isinstance(layers, list | tuple):
            raise ValueError("layers is not a list")
        record: TrialRecord = decoded(cls, data, {"plan": plan, "layers": tuple(map(result, layers))})
        if record.number < 0 or not 0 <= record.started < LATEST or not _LINEAGE.fullmatch(record.lineage):
            raise ValueError("its number, time or lineage is none")  # a lineage is part of a file's name
        if not record.kept.keys() <= _KEPT or (record.cost is not None and not record.kept.keys() >= _ALWAYS_KEPT):
            raise ValueError("kept: has not what belongs to a cost, and nothing else")
        return record


def _shallow(made: Any) -> dict[str, Any]:
    return {name: getattr(made, name) for name in made.__dataclass_fields__}


def tally(records: Collection[TrialRecord]) -> str:
    """Return how many trials there are, in words, with the probes that came on top."""
    probes = sum(record.probe for record in records)
    trials = len(records) - probes
    text = f"{trials} trial{'' if trials == 1 else 's'}"
    return f"{text} and {probes} probe{'' if probes == 1 else 's'}" if probes else text


Runtime = Literal["pytorch", "onnxruntime"]
"""Where the latencies of a front were taken."""


@dataclass(frozen=True, slots=True)
class DenseFigures:
    """The dense model, measured beside the final front: test score, latency and how it was taken."""

    test_score: float | None = None
    latency_ms: float | None = None
    latency_spread_ms: float | None = None
    batch: int = 1
    threads: int = 1
    device: str = "cpu"
    runtime: Runtime = "pytorch"


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

    @classmethod
    def from_json(cls, data: Mapping[str, Any], records: Mapping[int, TrialRecord]) -> FrontPoint:
        """Rebuild a point from `to_json` and the records by number; KeyError, TypeError or ValueError otherwise."""
        data = dict(data)
        number = data.pop("number")
        if type(number) is not int or number not in records:
            raise ValueError(f"a point of trial {number!r}, which is not there")
        point: FrontPoint = decoded(cls, data, {"record": records[number]})
        return point


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
    started_in : str
        Working directory of the process that started it, where names such as ``python:net:make`` are looked for.
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
    started_in: str = ""

    def measured(self, dense: DenseFigures | None) -> SweepHeader:
        """Return the header with the dense latency that was measured beside the front, where there is one."""
        if dense is None or dense.latency_ms is None:
            return self
        return replace(self, dense_cost=replace(self.dense_cost, latency_ms=dense.latency_ms))

    def with_settings(self, changed: Mapping[str, Any]) -> SweepHeader:
        """Return the header with some settings changed; ValueError when one that is reckoned with is no number."""
        config = {**self.config, **changed}
        for key in ("trials", "max_drop", "seed"):
            value = config.get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"config: {key} is no number")
        return replace(self, config=config)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SweepHeader:
        """Rebuild a header; KeyError, TypeError or ValueError when the data is not one."""
        header: SweepHeader = decoded(cls, data)
        if not 0 <= header.created < LATEST:
            raise ValueError(f"created: {header.created!r} is no time")
        header.with_settings({})
        axes = {axis.name for axis in header.objectives} | {bound.name for bound in header.constraints}
        if unknown := axes - _KEPT - {"score"}:
            raise ValueError(f"{min(unknown)!r} is neither the score nor a cost")
        for row in header.layers:
            shape = row.get("weight_shape", ())
            if not isinstance(row.get("name"), str) or not isinstance(shape, list | tuple):
                raise ValueError("layers: a layer has a name and a shape")
        return header
