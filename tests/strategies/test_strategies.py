import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from autorank import strategies
from autorank.errors import ConfigError
from autorank.space import Candidate, LayerCandidates, SearchSpace
from autorank.strategies import WAIT, Option, Strategy, Wait
from autorank.strategies.catalog import Catalog
from autorank.testing.strategies import (
    MADE_UP_DENSE,
    MADE_UP_FULL,
    THREE,
    TWO,
    made_up_record,
    made_up_space,
    run,
)
from autorank.types import CallSize, Choice, Constraint, Cost, LayerCost, LayerSpec, Objective, Plan, Proposal


def test_names_and_unknown_name():
    assert {"auto", "knapsack", "tpe", "nsga2", "random"} <= set(strategies.names())
    with pytest.raises(ConfigError, match=r"no strategy 'tep' \(did you mean 'tpe'\?\); there are auto, knapsack, "):
        strategies.make("tep", made_up_space(), TWO)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nsga2", {"popolation": 8}, "unknown option 'popolation' .did you mean 'population'"),
        ("nsga2", {"population": 1}, "population: 1 is not a whole number from 2 to"),
        ("nsga2", {"population": 8.5}, "8.5 is not a whole number"),
        ("tpe", {"startup": True}, "True is not a whole number"),
        ("tpe", {"width": "wide"}, "'wide' is not a number from 0 to 3"),
        ("random", {"noise": float("nan")}, "nan is not a number"),
        ("random", {"seeds": 3}, "unknown option 'seeds'; allowed are noise"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_wrong_options(name, options, message):
    with pytest.raises(ConfigError, match=message):
        strategies.make(name, made_up_space(), TWO, (), 0, options)


def test_register_refuses_a_taken_name():
    class Other(Strategy):
        name = "tpe"

        def ask(self) -> Proposal | Wait | None:
            return WAIT

        def tell(self, proposal, record) -> None:
            pass

    with pytest.raises(ConfigError, match="already"):
        strategies.register(Other)


@pytest.mark.parametrize("value", [3, 3.0])
def test_option_with_a_real_default_takes_whole_numbers(value):
    assert Option(0.5, 0, 5, "x").check(value, "here") == 3


def test_latency_needs_times():
    space = made_up_space()
    with pytest.raises(ConfigError, match="latency"):
        strategies.make("random", space, (TWO[0], Objective("latency_kept", "min")))
    with pytest.raises(ConfigError, match="latency"):
        strategies.make("random", space, TWO, (Constraint("latency_kept", "<=", 0.5),))
    timed = made_up_space(timed=True)
    strategy = strategies.make("random", timed, (TWO[0], Objective("latency_kept", "min")))
    assert len(run(strategy, timed, 10)) == 10


def test_constraints_that_contradict_each_other():
    space = made_up_space(layers=3, ranks=3)
    both = (Constraint("macs_kept", "<=", 0.3), Constraint("params_kept", ">=", 0.9))
    with pytest.raises(ConfigError, match=r"macs_kept<=0.3 and params_kept>=0.9 together"):
        strategies.make("random", space, TWO, both)


@pytest.mark.parametrize("name", [n for n in strategies.names() if n not in ("vbmf", "multi-stage")])
def test_first_plans_cover_the_cost_axis(name):
    space = made_up_space(20)
    records = run(strategies.make(name, space, TWO, dense=MADE_UP_DENSE, fidelity=MADE_UP_FULL), space, 40)
    kept = sorted(r.kept["macs_kept"] for r in records if not r.probe)
    assert kept[0] < 0.25
    assert kept[-1] > 0.75
    assert max(b - a for a, b in pairwise(kept)) < 0.15


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_study_sees_every_outcome_for_what_it_is(name):
    from optuna.trial import TrialState

    space = made_up_space()
    bound = (Constraint("score", ">=", 60.0), Constraint("macs_kept", "<=", 0.7))
    strategy = strategies.make(name, space, THREE, bound, 1)
    fates = {4: "failed", 9: "pruned", 30: "pruned"}
    records = run(strategy, space, 40, workers=4, fates=fates)
    trials = strategy._study.get_trials(deepcopy=False)
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    assert len(complete) == 37
    assert sorted(t.values for t in complete) == sorted(
        [r.score, r.kept["macs_kept"], r.kept["params_kept"]] for r in records if r.status == "complete"
    )
    for trial in complete:
        assert trial.constraints["score>=60"] == pytest.approx(60.0 - trial.values[0])
        assert trial.constraints["macs_kept<=0.7"] <= 0
    assert not any(t.state in (TrialState.RUNNING, TrialState.WAITING) for t in trials)
    for trial in trials:
        if trial.state == TrialState.PRUNED and trial.constraints:
            assert max(trial.constraints.values()) > 0  # a rejected sample, told with how far it misses
    assert sum(t.state == TrialState.PRUNED and not t.constraints for t in trials) == 2


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_known_result_enters_the_study_without_being_asked(name):
    space = made_up_space()
    strategy = strategies.make(name, space, TWO)
    plan = Plan.of({layer.spec.name: layer.candidates[5].choice for layer in space.layers})
    strategy.tell(Proposal(plan), made_up_record(space, Proposal(plan), 0))
    (trial,) = strategy._study.get_trials()
    assert trial.values == [
        made_up_record(space, Proposal(plan), 0).score,
        space.cost(plan).kept(space.dense)["macs_kept"],
    ]


@pytest.mark.parametrize("axis", ["macs_kept", "params_kept", "latency_kept"])
def test_catalog_agrees_with_the_space(axis):
    space = made_up_space(layers=6, timed=True)
    catalog, rng = Catalog(space, (), axis, 7), Random(0)
    for _ in range(50):
        vector = tuple(rng.randrange(len(layer.candidates) + 1) for layer in space.layers)
        plan = catalog.plan(vector)
        assert plan.seed == 7
        assert catalog.vector(plan) == vector
        kept = space.cost(plan).kept(space.dense)
        assert catalog.kept(vector) == kept
        assert catalog.share(vector) == pytest.approx(kept[axis], rel=1e-9)


@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
def test_spread_meets_its_target(target):
    catalog = Catalog(made_up_space(20), (), "macs_kept", 0)
    for seed in range(10):
        assert catalog.share(catalog.spread(target, Random(seed), 0.35)) == pytest.approx(target, abs=0.03)


def test_repair_only_takes_what_it_must():
    space = made_up_space(10)
    catalog = Catalog(space, (Constraint("macs_kept", "<=", 0.5),), "macs_kept", 0)
    plain = Catalog(space, (), "macs_kept", 0)
    for seed in range(10):
        vector = plain.spread(0.8, Random(seed), 0.3)
        repaired = catalog.repair(vector, Random(seed))
        assert 0.42 < catalog.share(repaired) <= 0.5
        assert all(catalog.space.layers[i].candidates for i, k in enumerate(repaired) if k)
    inside = plain.spread(0.3, Random(0), 0.3)
    assert catalog.repair(inside, Random(0)) == inside


def test_every_lists_exactly_the_feasible_plans():
    space = made_up_space(layers=3, ranks=2, formats=2)
    bounds = (Constraint("macs_kept", "<=", 0.6), Constraint("params_kept", ">=", 0.3))
    catalog = Catalog(space, bounds, "macs_kept", 0)
    listed = list(catalog.every())
    everything = [(a, b, c) for a in range(5) for b in range(5) for c in range(5)]
    assert len(set(listed)) == len(listed)
    assert set(listed) == {vector for vector in everything if catalog.feasible(vector)}
    assert 0 < len(listed) < len(everything)


def test_strategies_do_not_import_torch_or_optuna_before_they_need_to():
    code = (
        "import sys; from autorank import strategies; from autorank.testing.strategies import *; "
        "space = made_up_space(); run(strategies.make('random', space, TWO), space, 5); "
        "bad = {'optuna', 'ray', 'mlflow', 'torch'} & set(sys.modules); assert not bad, bad; "
        "run(strategies.make('tpe', space, TWO), space, 20); "
        "assert not {'ray', 'mlflow', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_the_first_plans_leave_layers_alone_that_cost_next_to_nothing(name):
    space = made_up_space(6)
    tiny = space.layers[0]
    small = replace(tiny.spec, weight_shape=(2, 2, 3, 3))
    costs = [LayerCost(c.cost.macs // 64, c.cost.params // 64) for c in tiny.candidates]
    candidates = tuple(replace(c, cost=cost) for c, cost in zip(tiny.candidates, costs, strict=True))
    layers = (replace(tiny, spec=small, candidates=candidates), *space.layers[1:])
    dense = replace(space.dense, macs=sum(layer.spec.macs for layer in layers))
    strategy = strategies.make(name, replace(space, layers=layers, dense=dense), TWO, (), 0)
    first = [strategy.ask().plan.choices for _ in range(3)]
    assert all(small.name not in plan for plan in first)
    assert any(plan for plan in first)


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_few_probes_of_many_variants_are_of_different_formats(name):
    spec = LayerSpec("a", "conv2d", (16, 16, 3, 3), (1, 1), (1, 1), calls=(CallSize(1, (8, 8), (8, 8)),))
    layers = []
    for layer in ("a", "b"):
        found = [
            Candidate(Choice(f"format{f}", (rank,), (("shape", f"{layer}{v}"),)), LayerCost(rank * 9000 + f + v, 100))
            for f in range(9)
            for v in range(6)
            for rank in (2, 4, 8, 14)
        ]
        layers.append(LayerCandidates(replace(spec, name=layer), tuple(sorted(found, key=lambda c: c.cost.macs))))
    space = SearchSpace(tuple(layers), (), Cost(2 * spec.macs, 2 * spec.params, 8 * spec.params))
    tried = []
    for seed in range(6):
        strategy = strategies.make(name, space, TWO, (), seed, {"seeds": 10})
        uniform = [{c.format for c in strategy.ask().plan.choices.values()} for _ in range(7)]
        # Both layers in one format, though a variant is of one layer alone.
        assert all(len(used) == 1 for used in uniform)
        tried.append({form for used in uniform for form in used})
        assert len(tried[-1]) == 7
    assert set().union(*tried) == {f"format{f}" for f in range(9)}


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
@pytest.mark.parametrize("direction", ["max", "min"])
def test_the_variant_that_wins_at_the_middle_is_tried_from_mild_to_harsh(name, direction):
    space = made_up_space(6)
    objectives = (Objective("score", direction), TWO[1])
    strategy = strategies.make(name, space, objectives, (), 0, {"seeds": 8})
    liked = sorted({candidate.choice.format for candidate in space.layers[0].candidates})[1]
    uniform = []
    for number in range(14):
        proposal = strategy.ask()
        formats = {choice.format for choice in proposal.plan.choices.values()}
        if len(formats) == 1:
            uniform.append((formats.pop(), space.cost(proposal.plan).kept(space.dense)["macs_kept"]))
        gain = 90.0 if uniform and uniform[-1][0] == liked else 50.0
        score = gain if direction == "max" else -gain
        strategy.tell(proposal, replace(made_up_record(space, proposal, number), score=score))
    probes, levels = uniform[:3], uniform[3:8]
    assert len({form for form, _ in probes}) == 3
    assert max(kept for _, kept in probes) - min(kept for _, kept in probes) < 0.1
    assert {form for form, _ in levels} == {liked}
    kept = [share for _, share in levels]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 0.7
    assert kept[-1] < 0.35
