"""What is kept between fits: bounded, the same answers, never somebody else's."""

import pytest
import torch

from autorank.solvers.kept import Digests, Kept


def entry(size):
    return {"x": torch.zeros(size, dtype=torch.uint8)}


def test_what_was_not_asked_for_longest_goes_first():
    kept, made = Kept(limit=100), []

    def ask(key, size=40):
        return kept.get(key, lambda: made.append(key) or entry(size))

    for key in ("a", "b", "a", "c", "a", "b"):
        ask(key)
    assert made == ["a", "b", "c", "b"]
    assert kept.bytes <= 100
    assert len(ask("large", 101)["x"]) == 101
    ask("large", 101)
    assert made[-2:] == ["large", "large"]
    ask("b")
    assert made[-1] == "large"
    kept.clear()
    assert kept.bytes == 0
    ask("b")
    assert made[-1] == "b"


def test_an_error_keeps_nothing():
    kept = Kept()

    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        kept.get("key", fail)
    assert len(kept.get("key", lambda: entry(3))["x"]) == 3


def test_digests_follow_the_content():
    digests = Digests()
    tensor = torch.arange(6.0)
    before = digests(tensor)
    assert digests(tensor.clone()) == before
    assert digests(tensor.reshape(2, 3)) != before
    assert digests(tensor.double()) != before
    tensor.mul_(2)
    assert digests(tensor) == digests(tensor.clone()) != before
