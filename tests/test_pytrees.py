"""Tensors inside structures: found in one order, replaced in the same, everything else left as it is."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch

from autorank.measure import count
from autorank.pytrees import map_tensors, tensors


@dataclass
class Plain:
    first: Any
    second: Any = "text"


@dataclass(frozen=True)
class Frozen:
    first: Any

    def __post_init__(self) -> None:
        assert float(self.first[0].sum()) >= 0, "only sums from 0 may be given by the user"


@dataclass
class Both(OrderedDict):
    """A mapping and a dataclass at once, as the outputs of model libraries are."""

    logits: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        self.update({key: value for key, value in vars(self).items() if value is not None})


class Attributed(dict):
    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words


Pair = namedtuple("Pair", "left right")


ONE, TWO = torch.tensor(1), torch.tensor([2.0])


def attributed() -> Attributed:
    made = Attributed("kept")
    made[3] = ONE
    return made


CASES: dict[str, tuple[Any, list[torch.Tensor]]] = {
    "tensor": (ONE, [ONE]),
    "none": (None, []),
    "class": (Plain, []),
    "list": ([ONE, "x", TWO], [ONE, TWO]),
    "tuples": ((ONE, (TWO, 3.5)), [ONE, TWO]),
    "named tuple": (Pair(TWO, ONE), [TWO, ONE]),
    "mapping": ({"b": ONE, "a": [TWO]}, [ONE, TWO]),
    "ordered": (OrderedDict([(2, ONE), (1, TWO)]), [ONE, TWO]),
    "default": (defaultdict(list, {"x": ONE}), [ONE]),
    "mapping of its own": (attributed(), [ONE]),
    "read-only": (MappingProxyType({1: ONE}), [ONE]),
    "dataclass": (Plain({"x": ONE}, TWO), [ONE, TWO]),
    "frozen dataclass": (Frozen((ONE,)), [ONE]),
    "mapping and dataclass": (Both(logits=ONE), [ONE]),
}


@pytest.mark.parametrize("name", CASES)
def test_tensors_are_found_and_replaced_in_one_order(name: str) -> None:
    value, expected = CASES[name]
    found = list(tensors(value))
    assert len(found) == len(expected)
    assert all(a is b for a, b in zip(found, expected, strict=True))
    seen: list[torch.Tensor] = []

    def negate(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return -x

    changed = map_tensors(value, negate)
    assert all(a is b for a, b in zip(seen, found, strict=True))
    assert type(changed) is type(value)
    assert [x.tolist() for x in tensors(changed)] == [(-x).tolist() for x in expected]
    assert all(a is b for a, b in zip(tensors(value), found, strict=True)), "the value itself was changed"


def test_what_else_there_is_stays() -> None:
    changed = map_tensors(Plain(ONE), lambda x: x + 1)
    assert (changed.second, int(changed.first)) == ("text", 2)
    assert map_tensors(attributed(), lambda x: x).words == "kept"
    both = map_tensors(Both(logits=ONE), lambda x: x + 1)
    assert int(both.logits) == int(both["logits"]) == 2
    assert both.hidden is None
    assert map_tensors(defaultdict(list), lambda x: x)["new"] == []


def test_costs_of_a_model_that_returns_a_dataclass() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> Plain:
            return Plain(self.linear(x))

    assert count(Net(), (torch.zeros(2, 3),))[0].macs == 15
