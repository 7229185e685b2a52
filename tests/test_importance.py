"""Importance of the choices: scores with known causes, and what is said when there is nothing to say."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from autorank.importance import importance_of
from autorank.types import Choice, Fidelity, Plan, TrialRecord
from tests.sweep_samples import header, records

HEAD = replace(header(), layers=tuple({"name": f"l{i}", "kind": "conv2d"} for i in range(6)))


def sweep(count, score, seed=0):
    """Trials with random plans whose score is `score` of formats and shares of MACs kept by layer."""
    rng = random.Random(seed)
    template = next(r for r in records(HEAD, 12) if r.status == "complete")
    made = []
    for number in range(count):
        formats = {f"l{i}": rng.choice(["tucker2", "spatial_svd", "dense"]) for i in range(6)}
        kept = {name: 1.0 if form == "dense" else rng.uniform(0.1, 0.9) for name, form in formats.items()}
        choices = {name: Choice(form, (4,)) for name, form in formats.items() if form != "dense"}
        layers = tuple(
            replace(template.layers[0], name=name, choice=choice, macs=int(kept[name] * 4e6))
            for name, choice in choices.items()
        )
        made.append(
            replace(template, number=number, plan=Plan.of(choices), layers=layers, score=score(formats, kept, rng))
        )
    return tuple(made)


def rank_of_l2(formats, kept, rng):
    return 90 - 20 * (1 - kept["l2"]) + 0.1 * rng.random()


def format_of_l4(formats, kept, rng):
    return 90 - 20 * (formats["l4"] == "tucker2") + 0.1 * rng.random()


@pytest.mark.parametrize(
    ("score", "layer", "part"), [(rank_of_l2, "l2", "rank"), (format_of_l4, "l4", "format")], ids=["rank", "format"]
)
def test_the_cause_is_found(score, layer, part):
    found = importance_of(HEAD, sweep(80, score))
    assert not found.problem
    assert found.layers[0].layer == layer
    assert getattr(found.layers[0], part) > 0.9
    assert found.layers[0].spread < 0.1
    assert sum(entry.total for entry in found.layers) == pytest.approx(1.0)
    assert [entry.total for entry in found.layers] == sorted((entry.total for entry in found.layers), reverse=True)


def test_shares_follow_the_size_of_the_causes():
    """The variance that a layer causes is the square of its weight, the shares kept being alike."""

    def score(formats, kept, rng):
        return 90 - 20 * (1 - kept["l1"]) - 10 * (1 - kept["l3"]) - 1 * (1 - kept["l5"])

    found = {entry.layer: entry for entry in importance_of(HEAD, sweep(300, score)).layers}
    assert found["l1"].total == pytest.approx(0.8, abs=0.1)
    assert found["l3"].total == pytest.approx(0.2, abs=0.1)
    assert found["l5"].total < 0.05


def test_chance_is_seen_by_its_spread():
    found = importance_of(HEAD, sweep(60, lambda formats, kept, rng: 90 + rng.random()))
    assert found.layers[0].ends[0] < 0.3


def test_the_same_records_give_the_same_shares():
    done = sweep(60, rank_of_l2)
    assert importance_of(HEAD, done) == importance_of(HEAD, done)


def test_only_complete_trials_at_full_fidelity_count():
    done = sweep(60, rank_of_l2)
    others: list[TrialRecord] = [
        *(replace(r, number=r.number + 100, score=5.0, probe=True) for r in done[:20]),
        *(replace(r, number=r.number + 200, score=5.0, status="pruned", fidelity=Fidelity(0)) for r in done[:20]),
        *(replace(r, number=r.number + 300, score=None, status="failed") for r in done[:20]),
    ]
    assert importance_of(HEAD, (*done, *others)) == importance_of(HEAD, done)


@pytest.mark.parametrize(
    ("done", "problem"),
    [
        ((), "0 finished at full fidelity, 30 are needed"),
        (sweep(29, rank_of_l2), "29 finished at full fidelity, 30 are needed"),
        (sweep(40, lambda *_: 90.0), "every trial has the same accuracy"),
        (tuple(replace(r, plan=Plan(), layers=(), score=90.0 + r.number) for r in sweep(40, rank_of_l2)), "no choice"),
    ],
    ids=["none", "few", "same-score", "same-plan"],
)
def test_too_little_to_say_is_said(done, problem):
    found = importance_of(HEAD, done)
    assert problem in found.problem
    assert found.layers == ()


def test_more_layers_need_more_trials():
    many = replace(HEAD, layers=tuple({"name": f"l{i}"} for i in range(20)))
    assert "60 are needed" in importance_of(many, sweep(40, rank_of_l2)).problem
    assert importance_of(many, sweep(60, rank_of_l2)).layers[0].layer == "l2"


def test_of_very_many_trials_an_even_selection_counts():
    assert importance_of(HEAD, sweep(900, rank_of_l2)).layers[0].layer == "l2"
