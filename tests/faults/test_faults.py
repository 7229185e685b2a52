"""Faults injected for real: nothing finished is lost, nothing runs twice, nothing is left behind, one line says it.

A handful of those that `benchmarks/faults.py` draws from.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.faults.catalogue import FAULTS, INLINE, RAY
from tests.faults.judging import Undisturbed, examine
from tests.faults.mlflow_server import Server

# All in one process: they share the undisturbed sweeps and MLflow's server.
pytestmark = pytest.mark.xdist_group("faults")

HERE = [
    ("worker killed", RAY),
    ("driver killed", RAY),
    ("raylet killed", RAY),
    ("terminated", RAY),
    ("hang in a library", RAY),
    ("MLflow gone", RAY),
    ("Ctrl-C twice", INLINE),
    ("half a line", INLINE),
    ("full disk", INLINE),
    ("read-only", INLINE),
    ("damaged fits", INLINE),
    ("damaged weights", INLINE),
    ("exits", INLINE),
    ("two drivers", INLINE),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("mlflow")) as started:
        yield started


@pytest.mark.parametrize(("name", "executor"), HERE, ids=[f"{name}, {executor}" for name, executor in HERE])
def test_a_sweep_survives(
    name: str, executor: str, undisturbed: Undisturbed, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fault = next(fault for fault in FAULTS if fault.name == name)
    running = request.getfixturevalue("server") if fault.tracked else None
    found = examine(fault, tmp_path / "scene", Random(name), undisturbed, executor, running)
    assert not found.wrong, found


def test_no_fault_has_the_name_of_another() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names)
    assert {name for name, _ in HERE} <= set(names)
