"""The default search: keeps the contract, starts from the predicted front, learns, and ends by itself."""

from dataclasses import replace

import pytest

from autorank import strategies
from autorank.front import hypervolume, reference_point
from autorank.strategies.auto import Auto
from autorank.testing.strategies import (
    MADE_UP_DENSE,
    MADE_UP_FULL,
    THREE,
    TWO,
    StrategyContract,
    made_up_record,
    made_up_space,
    run,
)
from autorank.types import Constraint, Objective, Proposal

if "auto" not in strategies.names():
    strategies.register(Auto)


class TestContract(StrategyContract):
    name = "auto"
    options = {"patience": 0}  # noqa: RUF012
    exhaustive = True


class TestContractWithRungs(StrategyContract):
    name = "auto"
    options = {"patience": 0, "rungs": 3, "sampler": "nsga2"}  # noqa: RUF012
    exhaustive = True
