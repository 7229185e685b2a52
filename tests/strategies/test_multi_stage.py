"""MUSCO's stages: ranks from the spectra of trained kernels, parents, budgets, stalls and failures."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from autorank import formats, strategies
from autorank.plan import apply, undecomposed
from autorank.solvers import hooi
from autorank.solvers.vbmf import spectrum
from autorank.strategies import WAIT
from autorank.testing.cases import random
from autorank.testing.strategies import (
    MADE_UP_DENSE,
    MADE_UP_FULL,
    TWO,
    StrategyContract,
    made_up_record,
    made_up_space,
    run,
)
from autorank.types import Choice, Constraint, LayerSpec, Objective, Plan, Proposal, TrialRecord
from tests.strategies.test_vbmf import GRID, layer_of, space_of

FINE = tuple(range(1, 32))


class TestMultiStage(StrategyContract):
    name = "multi-stage"
    exhaustive = False
    seeded = False


class TestMultiStageByGroups(TestMultiStage):
    options = {"group": 3, "stages": 100}  # noqa: RUF012


class TestMultiStageToTheEnd(TestMultiStage):
    options = {"stall": "end", "epsilon": 50.0}  # noqa: RUF012


def make(space, constraints=(), objectives=TWO, **options):
    return strategies.make(
        "multi-stage", space, objectives, constraints, 0, options, dense=MADE_UP_DENSE, fidelity=MADE_UP_FULL
    )


def record_of(space, proposal, number=0, found=None, status="complete", score=90.0):
    """Return a made-up outcome with a score and with the EVBMF ranks that were found in the trained kernels."""
    record = replace(made_up_record_of(space, proposal, number, status), score=score if status == "complete" else None)
    measured = {name: tuple(map(float, ranks)) for name, ranks in (found or {}).items()}
    return replace(record, measured=measured if status == "complete" else {})


def made_up_record_of(space, proposal, number, status):
    cost = space.cost(proposal.plan)
    fidelity = MADE_UP_FULL if status == "complete" else replace(MADE_UP_FULL, steps=0)
    return TrialRecord(number, proposal.plan, fidelity, status, cost=cost, kept=cost.kept(space.dense), reason="oh")


def kept(space, proposal):
    return space.cost(proposal.plan).kept(space.dense)["macs_kept"]


def stages(strategy, space, found=None, limit=200, **more):
    """Run to the end; `found` gives the EVBMF ranks measured in a stage from its number and its plan's choices."""
    proposals = []
    while isinstance(proposal := strategy.ask(), Proposal):
        assert strategy.ask() is WAIT
        proposals.append(proposal)
        ranks = found(len(proposals), proposal.plan.choices) if found else None
        strategy.tell(proposal, record_of(space, proposal, len(proposals), ranks, **more))
        assert len(proposals) < limit
    assert proposal is None
    assert strategy.ask() is None
    assert strategy.ended
    return proposals


def ranks_of(proposal, name="a"):
    return proposal.plan.choices[name].rank


def test_ranks_follow_the_spectra_of_the_trained_kernels():
    space = space_of(layer_of("a", 32, (8, 12), FINE, ("tucker2",)))
    found = [(5, 10), (4, 4), (0, 6), (9, 9)]
    strategy = make(space, least=2, stall="end")
    proposals = stages(strategy, space, lambda n, _: {"a": found[n - 1]})
    # 32 − 0.8·24 = 12.8 and 32 − 0.8·20 = 16, and so on from there; what EVBMF does not find stays.
    assert [ranks_of(p) for p in proposals] == [(12, 16), (6, 11), (4, 5)]
    assert strategy.ended == "no layer has a cheaper candidate that holds its weakened EVBMF ranks (stall=end)"


def test_every_stage_starts_from_the_one_before_and_asks_for_spectra():
    space = space_of(*(layer_of(name, 32, (8, 12), FINE) for name in "abc"))
    proposals = stages(make(space, stages=5), space, lambda n, _: dict.fromkeys("abc", (8 - n, 12 - n)))
    assert len(proposals) == 5
    assert [p.parent for p in proposals] == [None, *proposals[:-1]]
    assert all(p.want == "spectra" and not p.probe and p.fidelity is None and p.pull == 0.0 for p in proposals)
    costs = [kept(space, p) for p in proposals]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == len(costs)


def test_no_layer_ever_gets_dearer_and_decomposed_ones_keep_their_format():
    space = made_up_space()
    strategy = make(space, stages=100, least=1)
    proposals = stages(strategy, space)
    for before, after in pairwise(proposals):
        old, new = before.plan.choices, after.plan.choices
        assert set(old) <= set(new)
        for name, choice in old.items():
            by = space.by_name[name].by_choice
            assert by[new[name]].cost.macs <= by[choice].cost.macs
            # Another format only where the own one has nothing cheaper.
            cheapest = min((c for c in by if c.format == choice.format), key=lambda c: by[c].cost.macs)
            assert new[name].format == choice.format or choice == cheapest
    assert strategy.ended == "every layer is at its cheapest candidate"


def test_groups_go_round_in_forward_order():
    space = space_of(*(layer_of(name, 32, (8, 8), FINE, ("tucker2",)) for name in "abcde"))
    strategy = make(space, group=2, stages=5)
    proposals = stages(strategy, space, lambda n, _: dict.fromkeys("abcde", (4, 4)))
    changed = []
    for before, after in zip([None, *proposals], proposals, strict=False):
        old = before.plan.choices if before else {}
        changed.append("".join(n for n, c in after.plan.choices.items() if old.get(n) != c))
    assert changed == ["ab", "cd", "ae", "bc", "de"]


def test_a_layer_that_cannot_shrink_leaves_its_place_in_the_group_to_the_next():
    layers = [layer_of("a", 32, (0, 0), FINE), layer_of("b", 32, (8, 8), FINE), layer_of("c", 32, (8, 8), FINE)]
    first = make(space_of(*layers), group=1).ask()
    assert set(first.plan.choices) == {"b"}


def test_a_stage_at_full_weakening_is_plain_evbmf_where_the_grid_has_it():
    space = space_of(layer_of("a", 32, (8, 12), FINE, ("tucker2",)))
    assert ranks_of(make(space, weakening=1.0).ask()) == (8, 12)
    assert ranks_of(make(space, weakening=0.5).ask()) == (20, 22)


def test_the_grid_has_no_rank_between_the_present_and_the_weakened_one():
    """With ranks 4 and 24 only, (12, 16) stays at 24; plain EVBMF is no way out either, so it is a rung."""
    space = space_of(layer_of("a", 32, (8, 12), (4, 22), ("tucker2",)))
    proposals = stages(make(space, stages=20), space)
    assert [ranks_of(p) for p in proposals] == [(22, 22), (4, 22), (4, 4)]
    ended = make(space, stages=20, stall="end")
    assert [ranks_of(p) for p in stages(ended, space)] == [(22, 22)]
    assert "stall=end" in ended.ended


def test_a_stall_is_left_by_plain_evbmf_before_any_signal_is_cut():
    space = space_of(layer_of("a", 32, (8, 8), (8, 16), ("tucker2",)))
    strategy = make(space, weakening=0.5)
    first = strategy.ask()  # 20: nothing on the grid has it and is cheaper than dense, plain EVBMF is
    assert ranks_of(first) == (8, 8)


def test_a_stage_that_would_save_next_to_nothing_is_no_stage():
    big, small = layer_of("big", 64, (20, 20), FINE, ("tucker2",)), layer_of("small", 8, (2, 2), FINE[:7], ("tucker2",))
    space = space_of(big, small)
    for stall in ("rung", "end"):
        strategy = make(space, stages=2, least=1, stall=stall)
        # EVBMF has an end in the big layer, and goes on in one that does not matter.
        first, second = stages(strategy, space, lambda n, p: {"big": p["big"].rank, "small": (1, 1)})
        assert (ranks_of(first, "big") == ranks_of(second, "big")) == (stall == "end")


def test_layers_without_an_opinion_of_evbmf_wait_for_the_others():
    space = space_of(layer_of("quiet", 32, (0, 0), GRID), layer_of("loud", 32, (8, 8), GRID))
    proposals = stages(make(space, stages=100, least=2), space)
    with_quiet = [n for n, p in enumerate(proposals) if "quiet" in p.plan.choices]
    loud = [p.plan.choices["loud"] for p in proposals]
    assert with_quiet[0] > 1
    assert len(set(loud[with_quiet[0] :])) == 1  # the other one was at its end before


def test_a_candidate_costs_seven_to_nine_tenths_of_the_last_when_evbmf_has_nothing_to_say():
    layer = layer_of("a", 32, (0, 0), FINE, ("channel_svd",))
    space = space_of(layer)
    proposals = stages(make(space, stages=100), space)
    macs = [layer.spec.macs, *(layer.by_choice[p.plan.choices["a"]].cost.macs for p in proposals)]
    assert all(0.7 <= b / a <= 0.9 for a, b in pairwise(macs[:7]))
    assert macs[-1] == min(c.cost.macs for c in layer.candidates)


# Budgets


@pytest.mark.parametrize("bound", [0.6, 0.3, 0.12])
@pytest.mark.parametrize("options", [{}, {"group": 1, "stages": 60}, {"stages": 1}, {"stages": 2}], ids=str)
def test_stages_go_on_until_the_budget_is_met(bound, options):
    space = space_of(*(layer_of(name, 32, (20, 24), FINE) for name in "abcd"))
    strategy = make(space, (Constraint("macs_kept", "<=", bound),), **options)
    proposals = stages(strategy, space, lambda n, _: dict.fromkeys("abcd", (12, 12)))
    costs = [kept(space, p) for p in proposals]
    assert [p.probe for p in proposals] == [cost > bound for cost in costs] == [True] * (len(costs) - 1) + [False]
    assert costs[-1] > 0.85 * bound  # the weakest stage that meets it
    assert len(costs) <= options.get("stages", 10)
    assert strategy.ended == f"stage {len(costs)} meets macs_kept<={bound}"


def test_a_budget_that_the_dense_model_meets_is_no_end():
    space = space_of(*(layer_of(name, 32, (8, 8), FINE) for name in "ab"))
    assert len(stages(make(space, (Constraint("macs_kept", "<=", 1.0),), stages=4), space)) == 4


def test_bounds_from_below_are_kept():
    space = space_of(*(layer_of(name, 32, (8, 8), FINE) for name in "abcd"))
    strategy = make(space, (Constraint("macs_kept", ">=", 0.3),))
    proposals = stages(strategy, space)
    assert proposals
    assert all(kept(space, p) >= 0.3 and not p.probe for p in proposals)
    assert strategy.ended == "there is no further stage within macs_kept>=0.3 that was not tried"
    window = (Constraint("macs_kept", ">=", 0.4), Constraint("macs_kept", "<=", 0.45))
    last = stages(make(space, window), space)[-1]
    assert 0.4 <= kept(space, last) <= 0.45


def test_a_budget_that_a_stalled_rule_does_not_meet():
    space = space_of(layer_of("a", 32, (0, 0), GRID), layer_of("b", 32, (8, 8), GRID))
    bound = (Constraint("macs_kept", "<=", 0.2),)
    assert kept(space, stages(make(space, bound), space)[-1]) <= 0.2
    strategy = make(space, bound, stall="end")
    proposals = stages(strategy, space)
    # Even then a budget is a budget: it is met at the least predicted loss.
    assert kept(space, proposals[-1]) <= 0.2
    assert "meets" in strategy.ended


# Ends and failures


@pytest.mark.parametrize("direction", ["max", "min"])
def test_epsilon(direction):
    space = space_of(*(layer_of(name, 32, (8, 12), FINE) for name in "ab"))
    objectives = (Objective("score", direction), TWO[1])
    sign = 1.0 if direction == "max" else -1.0
    dense = replace(MADE_UP_DENSE, score=sign * 92.0)
    strategy = strategies.make("multi-stage", space, objectives, (), 0, {"epsilon": 1.5}, dense=dense)
    for number, score in enumerate((93.0, 90.6, 90.5, 90.4)):
        proposal = strategy.ask()
        assert isinstance(proposal, Proposal)
        strategy.tell(proposal, record_of(space, proposal, number, score=sign * score))
    assert strategy.ask() is None
    assert strategy.ended == "stage 4 loses 1.6 against the dense model, more than epsilon=1.5"


def test_without_a_dense_score_epsilon_is_never_passed():
    space = space_of(layer_of("a", 32, (8, 12), FINE))
    strategy = strategies.make("multi-stage", space, TWO, (), 0, {"epsilon": 0.1, "stages": 3})
    assert len(stages(strategy, space, score=1.0)) == 3
    assert strategy.ended == "all 3 stages were done (stages=3)"


@pytest.mark.parametrize("status", ["failed", "pruned"])
def test_a_stage_that_failed_is_tried_again_with_another_weakening(status):
    space = space_of(layer_of("a", 32, (8, 12), FINE, ("tucker2",)))
    strategy = make(space)
    first = strategy.ask()
    strategy.tell(first, record_of(space, first))
    asked = []
    for _ in range(2):
        proposal = strategy.ask()
        asked.append(proposal)
        strategy.tell(proposal, record_of(space, proposal, status=status))
    good = strategy.ask()
    assert {p.parent for p in (*asked, good)} == {first}
    # Present ranks (12, 16), found (8, 12): w = 0.8, then 0.4, then 1.2.
    assert [ranks_of(p) for p in (*asked, good)] == [(8, 12), (10, 14), (7, 11)]
    strategy.tell(good, record_of(space, good))
    assert strategy.ask().parent == good


def test_three_failures_in_a_row_are_the_end():
    space = space_of(layer_of("a", 32, (8, 12), FINE))
    strategy = make(space)
    assert len(stages(strategy, space, status="failed")) == 3
    assert strategy.ended == "three trials of stage 1 failed, the last: oh"


def test_a_failed_probe_is_not_asked_again():
    space = space_of(*(layer_of(name, 32, (24, 24), FINE) for name in "ab"))
    strategy = make(space, (Constraint("macs_kept", "<=", 0.2),))
    asked = [strategy.ask()]
    assert asked[0].probe
    strategy.tell(asked[0], record_of(space, asked[0], status="failed"))
    asked.append(strategy.ask())
    assert asked[0].plan != asked[1].plan


def test_a_score_that_is_no_number_is_a_failure():
    space = space_of(layer_of("a", 32, (8, 12), FINE))
    assert len(stages(make(space), space, score=math.nan)) == 3


def test_ranks_that_could_not_be_measured_stay_as_they_were():
    space = space_of(layer_of("a", 32, (8, 12), FINE, ("tucker2",)))
    strategy = make(space, least=1)
    for found in ({}, {"a": (math.nan, 3.0)}, {"a": (5.0,)}, {"z": (1, 1)}):
        proposal = strategy.ask()
        strategy.tell(proposal, record_of(space, proposal, 0, found))
    assert strategy._found == [(8, 12)]


def test_replaying_the_same_answers_gives_the_same_stages():
    space, fates = made_up_space(), {1: "failed", 4: "pruned"}
    first = run(make(space, stages=30, group=4), space, 40, fates=fates)
    again = make(space, stages=30, group=4)
    for record in first:
        proposal = again.ask()
        assert proposal.plan == record.plan
        again.tell(proposal, record)
    assert again.ask() is None
    assert again.ended


def test_a_known_plan_is_not_a_stage_again():
    space = space_of(layer_of("a", 32, (8, 12), FINE, ("tucker2",)))
    known = make(space).ask()
    strategy = make(space)
    strategy.tell(Proposal(known.plan), made_up_record(made_up_space(1), Proposal(Plan()), 0))
    assert strategy.ask().plan != known.plan


def test_one_layer_with_one_candidate():
    space = space_of(layer_of("a", 32, (8, 8), (8,), ("channel_svd",)))
    strategy = make(space)
    assert len(stages(strategy, space)) == 1
    assert strategy.ended == "every layer is at its cheapest candidate"


# Decomposing a decomposed layer again


def conv(t, s, kernel=(3, 3), groups=1):
    ones = (1,) * len(kernel)
    return LayerSpec("a", "conv2d", (t, s // groups, *kernel), ones, ones, dilation=ones, groups=groups, bias=True)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("first", "second"), [((12, 10), (7, 5)), ((24, 10), (7, 5)), ((12, 10), (12, 4)), ((20, 16), (6, 16))], ids=str
)
def test_the_core_decomposed_again_is_the_fit_of_the_reconstructed_kernel(first, second, groups):
    """MUSCO merges HOOI of the core into the outer 1×1 factors; fitting the kernel anew gives the same layer."""
    fmt, spec = formats.get("tucker2"), conv(24 * groups, 20 * groups, groups=groups)
    trained = fmt.fit(random(spec.weight_shape, 1), spec, first)
    # Training leaves neither orthonormal bases nor an ordered core.
    trained = {name: f + 0.2 * f.std() * random(tuple(f.shape), n + 2) for n, (name, f) in enumerate(trained.items())}
    kernel = fmt.reconstruct(trained, spec, first)
    anew = fmt.reconstruct(fmt.fit(kernel, spec, second), spec, second)

    core, u, v = merged(trained, second, (24, 20))
    again = torch.einsum("goik,gto,gsi->gtsk", core, u, v).reshape(spec.weight_shape)
    error = [float((kernel.double() - found.double()).norm() / kernel.norm()) for found in (anew, again)]
    assert error[0] == pytest.approx(error[1], rel=1e-5)
    # The fit stops when six digits of its error stand; where it does not stop, it is the same kernel.
    whole = kernel.double().reshape(groups, 24, 20, 9)
    core, u, v = hooi.tucker2(whole, second, max_iterations=2000, tolerance=1e-15)
    core = core if u is None else torch.einsum("goik,gto->gtik", core, u)
    core = core if v is None else torch.einsum("gtik,gsi->gtsk", core, v)
    assert float((core.reshape(spec.weight_shape) - again).norm() / kernel.norm()) < 1e-5


def merged(trained, rank, sizes):
    """Decompose the core of trained Tucker-2 factors again, and merge the new bases into the outer ones."""
    core = trained["core"].double().flatten(3)
    groups = core.shape[0]
    eye = [torch.eye(size, dtype=torch.float64).expand(groups, size, size) for size in sizes]
    u = trained["output"].double().flatten(2) if "output" in trained else eye[0]
    v = trained["input"].double().flatten(2).mT if "input" in trained else eye[1]
    # HOOI of the core measures the kernel's error only behind orthonormal bases.
    (u, over_u), (v, over_v) = torch.linalg.qr(u), torch.linalg.qr(v)
    core = torch.einsum("goik,gpo,gqi->gpqk", core, over_u, over_v)
    core, new_u, new_v = hooi.tucker2(core, rank, max_iterations=2000, tolerance=1e-15)
    return core, u if new_u is None else u @ new_u, v if new_v is None else v @ new_v


def test_a_stage_keeps_the_trained_bias_and_decomposes_the_trained_kernel():
    dense = torch.nn.Sequential(torch.nn.Conv2d(20, 24, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(24, 8, 3))
    first = Plan.of({"0": Choice("tucker2", (16, 12))})
    second = Plan.of({"0": Choice("tucker2", (8, 6)), "2": Choice("tucker2", (4, 6))})
    model, _ = apply(dense, first)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.1 * random(tuple(parameter.shape), number).float()
    whole = undecomposed(dense, first, model)
    x = random((2, 20, 9, 9), 3).float()
    assert torch.allclose(whole(x), model(x), atol=1e-4)
    assert torch.equal(whole[0].bias, list(model[0].children())[-1].bias)

    again, results = apply(whole, second)
    assert [layer.choice.rank for layer in results] == [(8, 6), (4, 6)]
    assert torch.equal(list(again[0].children())[-1].bias, whole[0].bias)
    trained = {name: child.weight.detach()[None] for name, child in model[0].named_children()}
    core, u, v = merged(trained, (8, 6), (24, 20))
    kernel = torch.einsum("goik,gto,gsi->gtsk", core, u, v).reshape(24, 20, 3, 3).float()
    expected = torch.nn.functional.conv2d(x, kernel, whole[0].bias, 2, 1).detach()
    found = again[0](x).detach()
    assert float((found - expected).norm() / expected.norm()) < 0.02  # HOOI stops at six digits of its error


def test_spectra_of_a_trained_kernel_shrink_the_ranks_that_it_has():
    """EVBMF of the whole kernel would find exactly the ranks that its factors have, and MUSCO would stop there."""
    fmt, spec = formats.get("tucker2"), conv(48, 48)
    signal = fmt.reconstruct(fmt.fit(random(spec.weight_shape, 0), spec, (6, 8)), spec, (6, 8))
    noise = random(spec.weight_shape, 1)
    kernel = signal + 0.5 * noise * signal.norm() / noise.norm()
    decomposed = fmt.reconstruct(fmt.fit(kernel, spec, (24, 24)), spec, (24, 24))
    assert spectrum(decomposed).vbmf == spectrum(kernel).vbmf == (6, 8)
