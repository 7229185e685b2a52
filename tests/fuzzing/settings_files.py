"""The files of settings: of a sweep, and of a search space."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st

from autorank import strategies
from autorank.config import SweepConfig, make_config, read_config
from autorank.objectives import parse_constraint, parse_objectives
from autorank.prepare import resolve_device
from autorank.profiling import profile
from autorank.space import build_space, read_space
from autorank.types import ModelProfile
from tests.fuzzing.common import WILD, Target, alike, as_yaml, attempt, held, near, tried
from tests.tiny import network

_COUNTS = st.integers(1, 60)
SECTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "strategy": {"name": st.sampled_from(["auto", "random", "tpe"]), "options": st.just({})},
    "recovery": {
        "steps": st.integers(0, 200),
        "lr": st.floats(1e-6, 1e-3),
        "optimizer": st.sampled_from(["sgd", "adamw"]),
        "distill": st.floats(0, 1),
        "batch_norm": st.sampled_from(["auto", "always", "never"]),
    },
    "pruning": {"patience": st.integers(0, 9), "margin": st.floats(0, 9)},
    "latency": {"batch": _COUNTS, "threads": _COUNTS},
}
_SWEEP: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["python:a.b:c", "timm:resnet18"]),
    "model_args": st.dictionaries(st.sampled_from("abc"), st.integers(0, 9) | st.booleans(), max_size=2),
    "weights": st.just("w.safetensors"),
    "data": st.sampled_from(["digits", "parquet:there", "hf:x"]),
    "data_args": st.just({"image_size": 32}),
    "validation": st.floats(0.01, 0.9) | st.integers(1, 500).map(float),
    "space": st.sampled_from(["default", "mine.yaml"]),
    "trials": _COUNTS,
    "max_time": st.floats(1, 1e6),
    "objectives": st.sampled_from([["score", "macs"], ["accuracy", "params", "macs"]]),
    "constraints": st.sampled_from([[], ["macs_kept<=0.5"]]),
    "seed": st.integers(0, 2**32 - 1),
    "device": st.sampled_from(["auto", "cpu"]),
    "executor": st.sampled_from(["ray", "inline"]),
    "workers": _COUNTS,
    "threads": _COUNTS,
    "sweep_dir": st.just("sweeps/a"),
    "tracking": st.booleans(),
    "tracking_uri": st.sampled_from(["http://h:5000", "sqlite:///x.db"]),
    "experiment": st.text(st.characters(categories=["L"]), min_size=1, max_size=9),
    "calibration": _COUNTS,
    "max_drop": st.floats(0, 9),
    "reuse": st.just("/sweeps/b"),
    **{name: st.fixed_dictionaries({}, optional=keys) for name, keys in SECTIONS.items()},
}
_VALID_SWEEP = st.fixed_dictionaries({}, optional=_SWEEP)
_CLOSE_SWEEP = near({**_SWEEP, **{name: near(keys) for name, keys in SECTIONS.items()}})


def check_sweep_file(data: bytes, valid: bool, folder: Path) -> bool:
    path = folder / "sweep.yaml"
    path.write_bytes(data)
    config: SweepConfig | None = attempt(lambda: read_config(path, {}))
    if config is None:
        held(not valid, "a valid file is refused")
        return False
    said = yaml.safe_load(data.decode())
    dump = config.model_dump(mode="json")
    held(set(said) <= set(SweepConfig.model_fields), "an unknown key is ignored")
    for section in SECTIONS:
        if isinstance(said.get(section), Mapping):
            held(set(said[section]) <= set(dump[section]), f"an unknown key of {section} is ignored")
    if valid:
        held(alike({**said, "reuse": dump["reuse"]}, dump), "a value is not what the file says")
    held(make_config(json.loads(json.dumps(dump, allow_nan=False))) == config, "the journal would keep other settings")
    path.write_bytes(as_yaml(dump))
    held(attempt(lambda: read_config(path, {})) == config, "written again it is another sweep")
    attempt(lambda: strategies.get(config.strategy.name).checked(config.strategy.options))
    attempt(lambda: parse_objectives(config.objectives, "accuracy", "max"))
    attempt(lambda: [parse_constraint(text, "accuracy") for text in config.constraints])
    attempt(lambda: resolve_device(config.device))
    return True


_SHARES = st.lists(st.floats(0.01, 1), min_size=1, max_size=3, unique=True)
_RANK_COUNTS = st.lists(st.integers(1, 99), min_size=1, max_size=3, unique=True)
_GRID = st.one_of(st.builds(lambda v: {"fractions": v}, _SHARES), st.builds(lambda v: {"counts": v}, _RANK_COUNTS))
_RANKS = st.one_of(
    _GRID,
    st.builds(lambda v: {"macs_kept": v}, _SHARES),
    st.builds(lambda v: {"modes": v}, st.dictionaries(st.sampled_from(["R", "R_out", "R_in"]), _GRID, min_size=1)),
)
_FORMATS = st.lists(
    st.sampled_from(["channel_svd", "tucker2", {"name": "spatial_svd", "first": ["h", "w"]}]), min_size=1, max_size=3
)
_SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "ranks": _RANKS,
    "whiten": st.lists(st.sampled_from(["none", "input", "output", "both"]), min_size=1, unique=True),
    "multiple_of": st.integers(1, 16),
    "max_candidates": st.integers(1, 20),
    "formats": _FORMATS,
}
_MATCH: dict[str, st.SearchStrategy[Any]] = {
    "name": st.lists(st.sampled_from(["0", "3", "re:[0-9]", "type:conv*", "*"]), min_size=1, unique=True),
    "kind": st.lists(st.sampled_from(["conv2d", "linear"]), min_size=1, unique=True),
    "kernel": st.just([[3, 3]]),
}
_RULE = st.builds(
    lambda match, rest: {"match": match, **rest},
    st.fixed_dictionaries({}, optional=_MATCH).filter(bool),
    st.fixed_dictionaries({}, optional=_SETTINGS),
)
_SPACE: dict[str, st.SearchStrategy[Any]] = {
    "defaults": st.fixed_dictionaries({}, optional=_SETTINGS),
    "dense": st.lists(st.sampled_from(["0", "re:8", "type:linear"]), unique=True, max_size=2),
    "rules": st.lists(_RULE, max_size=2),
}
_VALID_SPACE = st.fixed_dictionaries({"version": st.just(1)}, optional=_SPACE)
_CLOSE_SPACE = near(
    {
        **_SPACE,
        "version": st.just(1),
        "defaults": near({**_SETTINGS, "ranks": near({"fractions": _SHARES, "counts": _RANK_COUNTS})}),
        "rules": st.lists(near({**_SETTINGS, "match": near(_MATCH)}), max_size=2),
    }
)


@cache
def _profile() -> ModelProfile:
    return profile(network(), (torch.zeros(1, 3, 8, 8),))


def check_space_file(data: bytes, valid: bool, folder: Path) -> bool:
    path = folder / "space.yaml"
    path.write_bytes(data)
    space = attempt(lambda: read_space(path))
    if space is None:
        held(not valid, "a valid file is refused")
        return False
    said = yaml.safe_load(data.decode())
    dump = space.model_dump(mode="json", exclude_none=True)
    held(set(said) <= {"version", "defaults", "dense", "rules"}, "an unknown key is ignored")
    if valid:
        for section in (said.get("defaults", {}), *said.get("rules", ())):
            if "formats" in section:
                section["formats"] = [one if isinstance(one, Mapping) else {"name": one} for one in section["formats"]]
        held(alike(said, dump), "a value is not what the file says")
    again = read_space(json.loads(json.dumps(dump, allow_nan=False)))
    held(again.model_dump() == space.model_dump(), "the journal would keep another space")
    path.write_bytes(as_yaml(dump))
    held(attempt(lambda: read_space(path)) == space, "written again it is another space")
    attempt(lambda: build_space(space, _profile()))
    return True


SWEEP_FILE = Target(
    "sweep file",
    tried(_VALID_SWEEP.map(as_yaml), _CLOSE_SWEEP.map(as_yaml), WILD.map(as_yaml)),
    check_sweep_file,
)


SPACE_FILE = Target(
    "space file",
    tried(_VALID_SPACE.map(as_yaml), _CLOSE_SPACE.map(as_yaml), WILD.map(as_yaml)),
    check_space_file,
)
