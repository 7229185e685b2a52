"""The validation split: sizes, proportions, no overlap, seeds; and the private random numbers behind it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autorank.errors import ConfigError, DataError
from autorank.tasks.randomness import PrivateRandom, derive
from autorank.tasks.splits import apportion, split_indices


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_stratified_split(counts, share, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng(seed).shuffle(labels)
    size = min(max(round(share * len(labels)), 1), len(labels) - 1)
    if not 1 <= size <= len(labels) - 1:
        return
    train, validation = split_indices(len(labels), labels, size, seed)
    assert sorted([*train, *validation]) == list(range(len(labels)))
    assert len(validation) == size
    taken = np.bincount(labels[validation], minlength=len(counts))
    quota = np.array(counts) * size / len(labels)
    room = size <= sum(counts) - len(counts)
    if room:
        assert (taken < np.array(counts)).all()
    if room and min(counts) > 1 and share < 0.5:
        assert (np.abs(taken - quota) < 1 + 1e-9).all()


@pytest.mark.parametrize(
    ("counts", "size", "shares"),
    [
        ([50, 30, 20], 10, [5, 3, 2]),
        ([7, 7, 7], 10, [4, 3, 3]),
        ([1, 99], 10, [0, 10]),
        ([1, 1, 8], 9, [1, 1, 7]),
        ([10, 10], 19, [10, 9]),
    ],
    ids=["exact", "ties to the first", "a lone example trains", "hardly any left", "all but one"],
)
def test_apportion(counts, size, shares):
    assert apportion(np.array(counts), size).tolist() == shares


def test_split_depends_on_the_seed_alone():
    labels = np.arange(100) % 5
    first = split_indices(100, labels, 0.2, 3)[1]
    np.random.seed(1)
    assert np.array_equal(first, split_indices(100, labels, 20, 3)[1])
    assert not np.array_equal(first, split_indices(100, labels, 20, 4)[1])


@pytest.mark.parametrize(
    ("size", "kind", "words"),
    [
        (0.0, ConfigError, "between 0 and 1"),
        (1.0, ConfigError, "between 0 and 1"),
        (-0.1, ConfigError, "between 0 and 1"),
        (True, ConfigError, "a number of examples or a fraction"),
        ("half", ConfigError, "not 'half'"),
        (0, DataError, "they allow 1 to 99 examples"),
        (100, DataError, "they allow 1 to 99 examples"),
        (0.001, DataError, "(= 0 examples)"),
        (0.999, DataError, "(= 100 examples)"),
    ],
)
def test_wrong_sizes(size, kind, words):
    with pytest.raises(kind) as caught:
        split_indices(100, None, size, 0)
    assert words in str(caught.value)


def test_private_random_numbers_continue_and_leave_no_trace():
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    whole = PrivateRandom(5)
    with whole:
        expected = [draw() for _ in range(4)]
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    outside = [draw() for _ in range(2)]
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    parts, seen, between = PrivateRandom(5), [], []
    for _ in range(2):
        with parts:
            seen += [draw(), draw()]
        between.append(draw())
    assert seen == expected
    assert between == outside


def test_derived_seeds_differ():
    seeds = {derive(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(-1, 2) != derive(1, 2)
