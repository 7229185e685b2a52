"""Plans: a format and a rank for every layer, in canonical JSON, and how far a plan is evaluated."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from autorank.types.layers import Scalar


def canonical_json(value: object) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def whitens(options: tuple[tuple[str, Scalar], ...], side: Literal["input", "output"]) -> bool:
    """Say whether format options ask for a fit weighted by the layer's inputs or by the gradients at its outputs."""
    return dict(options).get("whiten", "none") in (side, "both")


_CHOICE_KEYS = frozenset(["format", "rank", "options", "weight_bits", "activation_bits"])


DENSE = "dense"
"""What stands for the format of a layer that keeps its kernel and has bits."""

WEIGHT_BITS = (8, 6, 4)
"""Bits that weights may have: per channel, symmetric."""

ACTIVATION_BITS = (8,)
"""Bits that activations may have: per tensor, affine."""


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

    def whitens(self, side: Literal["input", "output"]) -> bool:
        """Say whether the fit is weighted by the layer's inputs or by the gradients at its outputs."""
        return whitens(self.options, side)

    @property
    def bits(self) -> str:
        """The bits in the usual short form, such as ``W4A8``; empty for floating point."""
        named = (("W", self.weight_bits), ("A", self.activation_bits))
        return "".join(f"{letter}{bits}" for letter, bits in named if bits is not None)

    @property
    def in_float(self) -> Choice:
        """The choice without bits."""
        return replace(self, weight_bits=None, activation_bits=None)

    @property
    def called(self) -> str:
        """The format with its bits: ``tucker2`` or ``tucker2 W8A8``."""
        return f"{self.format} {self.bits}".rstrip()

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
        if not _CHOICE_KEYS.issuperset(data):
            raise KeyError(f"unknown key {sorted(set(data) - _CHOICE_KEYS)[0]!r} in a layer's choice")
        if not isinstance(data["format"], str):
            raise TypeError(f"format must be a name, not {data['format']!r}")
        rank = data.get("rank", ()) if data["format"] == DENSE else data["rank"]
        if not isinstance(rank, list | tuple) or not all(type(r) is int and r > 0 for r in rank):
            raise ValueError(f"rank must be a list of positive whole numbers, not {rank!r}")
        options = data.get("options", {})
        if type(options) is not dict and not isinstance(options, Mapping):
            raise TypeError(f"options must be a mapping, not {options!r}")
        for key, value in options.items():
            if not isinstance(value, (str, int, float)) or (type(value) is float and not math.isfinite(value)):
                raise ValueError(f"option {key!r} must be a text, a finite number, true or false, not {value!r}")
        for bits in ("weight_bits", "activation_bits"):
            if data.get(bits) is not None and (type(data[bits]) is not int or not 1 <= data[bits] <= 64):
                raise ValueError(f"{bits} must be a whole number from 1 to 64, not {data[bits]!r}")
        return cls(
            data["format"],
            tuple(rank),
            tuple(sorted(options.items())),
            data.get("weight_bits"),
            data.get("activation_bits"),
        )

    def __str__(self) -> str:
        parts = ["×".join(map(str, self.rank)), ",".join(f"{k}={v}" for k, v in self.options), self.bits]
        return f"{self.format}({'; '.join(filter(None, parts))})"


@dataclass(frozen=True)
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

    @property
    def has_bits(self) -> bool:
        """Whether some layer is quantized."""
        return any(choice.weight_bits is not None for _, choice in self.layers)

    @property
    def in_float(self) -> Plan:
        """The plan without bits; layers that keep their kernel are not in it."""
        decomposed = {name: choice for name, choice in self.layers if choice.format != DENSE}
        return Plan.of(
            {name: choice.in_float for name, choice in decomposed.items()},
            self.seed,
        )

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary."""
        return {"layers": {name: choice.to_json() for name, choice in self.layers}, "seed": self.seed}

    @property
    def canonical(self) -> str:
        """Canonical JSON text."""
        return canonical_json(self.to_json())

    @cached_property
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
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2³² − 1, not {seed}")
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


Want = Literal["", "distances", "spectra"]


def trial_key(plan: Plan, fidelity: Fidelity, lineage: str = "") -> str:
    """Return a name for what a trial evaluates, fit for a file's name."""
    raw = "raw" if fidelity.steps and not fidelity.batch_norm else ""
    return "-".join(filter(None, [plan.plan_id, fidelity.label, raw, lineage]))


def lineage_of(parent_key: str, pull: float = 0.0) -> str:
    """Return the hash that stands for where a trial's weights come from; empty for the dense model's own."""
    if not parent_key and not pull:
        return ""
    return hashlib.sha256(f"{parent_key}|{pull!r}".encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a strategy wants evaluated next.

    Attributes
    ----------
    plan : Plan
    fidelity : Fidelity or None
        None asks for the sweep's full fidelity.
    parent : Proposal or None
        An earlier proposal of the sweep with whose weights this one starts, instead of the dense model's: a layer with
        the same choice keeps its trained factors, any other is fitted to the kernel that the trained ones stand for.
    pull : float
        Above 0, μ of learned-rank training: the network is trained undecomposed, from the parent's undecomposed
        weights, with (μ/2)·Σ‖W − Ŵ‖² towards its decomposed copy; that copy is then fitted again and scored.
    probe : bool
        A cheap question on the way: it is no point of the front, keeps no weights and does not count as a trial.
    want : {"", "distances", "spectra"}
        What is measured on the weights with which the trial ends, for `TrialRecord.measured`.
    """

    plan: Plan
    fidelity: Fidelity | None = None
    parent: Proposal | None = None
    pull: float = 0.0
    probe: bool = False
    want: Want = ""
