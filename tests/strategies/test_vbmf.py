"""EVBMF ranks in one shot: which candidate holds them, the series of weakenings, and budgets."""

import math
from dataclasses import replace

import pytest
import torch

from autorank import strategies
from autorank.errors import ConfigError
from autorank.solvers.hooi import tucker2
from autorank.solvers.vbmf import spectrum
from autorank.space import Candidate, LayerCandidates, SearchSpace
from autorank.strategies.catalog import Catalog
from autorank.strategies.vbmf import Holding, weakened
from autorank.testing.cases import random
from autorank.testing.strategies import TWO, StrategyContract, made_up_record, made_up_space, run
from autorank.types import (
    CallSize,
    Choice,
    Constraint,
    Cost,
    Errors,
    LayerCost,
    LayerSpec,
    Objective,
    Plan,
    Proposal,
    Spectrum,
)


class TestVbmf(StrategyContract):
    name = "vbmf"
    exhaustive = False
    seeded = False


def tail(size, decay):
    energies = [math.exp(-decay * r) for r in range(size)]
    return *(sum(energies[r:]) / sum(energies) for r in range(size)), 0.0


def layer_of(name, channels, vbmf, grid, formats=("tucker2", "channel_svd"), whitenings=("none",), kernel=3, decay=0.2):
    """Return a layer whose candidates have the costs of their formats and the errors that its spectrum gives them."""
    size = (8, 8) if kernel > 1 else ()
    kind = "conv2d" if kernel > 1 else "linear"
    shape = (channels, channels, *([kernel] * len(size)))
    ones = (1,) * len(size)
    spec = LayerSpec(name, kind, shape, ones, ones, dilation=ones, calls=(CallSize(1, size, size),))
    positions, out = kernel**2 if kernel > 1 else 1, tail(channels, decay)
    candidates = []
    for w, whiten in enumerate(whitenings):
        options = () if whiten == "none" else (("whiten", whiten),)
        # Whitening costs error of the weight and saves error of the output.
        for r in grid:
            if "channel_svd" in formats:
                params, error = r * channels * (positions + 1), math.sqrt(out[r])
                errors = Errors(error * (1 + 0.2 * w), error * (1 - 0.1 * w), error**2 * (1 - 0.1 * w))
                cost = LayerCost(params * max(1, math.prod(size)), params)
                candidates.append(Candidate(Choice("channel_svd", (r,), options), cost, None, errors))
            for s in grid if "tucker2" in formats else ():
                params, error = channels * (r + s) + r * s * positions, math.sqrt(min(1.0, out[r] + out[s]))
                errors = Errors(error * (1 + 0.2 * w), error * (1 - 0.1 * w), error**2 * (1 - 0.1 * w))
                cost = LayerCost(params * max(1, math.prod(size)), params)
                candidates.append(Candidate(Choice("tucker2", (r, s), options), cost, None, errors))
    candidates = [c for c in candidates if c.cost.macs < spec.macs]
    candidates.sort(key=lambda c: (c.cost.macs, c.cost.params, c.choice.format, repr(c.choice.options), c.choice.rank))
    return LayerCandidates(spec, tuple(candidates), None, Spectrum(out, out, vbmf))


def space_of(*layers):
    macs, params = sum(x.spec.macs for x in layers) + 1000, sum(x.spec.params for x in layers) + 100
    return SearchSpace(tuple(layers), (), Cost(macs, params, 4 * params))


def holding_of(*layers):
    return Holding(Catalog(space_of(*layers), (), "macs_kept", 0))


@pytest.mark.parametrize(
    ("present", "found", "weakening", "least", "expected"),
    [
        (64, 10, 1.0, 1, 10),
        (64, 10, 0.8, 1, 20),
        (64, 10, 0.5, 1, 37),
        (64, 10, 1.4, 1, 1),
        (64, 10, 1.1, 1, 4),
        (64, 10, 1.4, 8, 8),
        (64, 0, 1.0, 1, 64),
        (16, 16, 1.0, 1, 16),
        (16, 20, 1.0, 1, 16),
        (3, 1, 1.0, 8, 3),
        (10, 7, 0.9, 1, 7),
        (10, 5, 0.6, 1, 7),
        (30, 3, 1 / 3, 1, 21),
    ],
)
def test_weakened_ranks(present, found, weakening, least, expected):
    assert weakened(present, found, weakening, least) == expected


def test_tucker_candidates_have_both_ranks():
    holding = holding_of(layer_of("a", 32, (8, 8), (4, 8, 12, 16, 24), ("tucker2",)))
    assert holding.choice(0, holding.index(0, (9, 4))).rank == (12, 4)
    assert holding.choice(0, holding.index(0, (4, 9))).rank == (4, 12)
    assert holding.choice(0, holding.index(0, (16, 16))).rank == (16, 16)
    assert holding.index(0, (25, 4)) == 0
    assert holding.index(0, (32, 32)) == 0


def test_the_cheapest_that_has_both_ranks_by_brute_force():
    layer = layer_of("a", 32, (8, 8), (3, 4, 8, 9, 12, 16, 24), ("tucker2",))
    holding = holding_of(layer)
    for out in range(1, 32):
        for into in range(1, 32, 3):
            enough = [c.cost.macs for c in layer.candidates if c.choice.rank[0] >= out and c.choice.rank[1] >= into]
            index = holding.index(0, (out, into))
            assert (layer.candidates[index - 1].cost.macs if index else None) == (min(enough) if enough else None)


def test_other_formats_have_no_larger_error_than_tucker_is_expected_to_make():
    layer = layer_of("a", 32, (8, 8), tuple(range(1, 29)), ("channel_svd",))
    holding = holding_of(layer)
    for out, into in ((8, 8), (4, 20), (20, 4), (32, 8)):
        bound = math.sqrt(1 - (1 - layer.spectrum.out_tail[out]) * (1 - layer.spectrum.in_tail[into]))
        assert holding.bound(0, (out, into)) == pytest.approx(bound)
        expected = min(c.choice.rank for c in layer.candidates if c.errors.weight <= bound * (1 + 1e-6))
        assert holding.choice(0, holding.index(0, (out, into))).rank == expected


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_the_bound_is_near_what_tucker_reaches(noise):
    """Above it, and by less than a fifth, from kernels of low rank to nothing but noise."""
    shape = (32, 24, 9)
    u, v = random((32, 8), 0), random((24, 6), 1)
    kernel = torch.einsum("oik,to,si->tsk", random((8, 6, 9), 2), u, v)
    kernel = kernel / kernel.norm() + noise * random(shape, 3) / math.sqrt(math.prod(shape))
    weight = kernel.reshape(32, 24, 3, 3)
    ones = (1, 1)
    spec = LayerSpec("a", "conv2d", (32, 24, 3, 3), ones, ones, dilation=ones, calls=(CallSize(1, (8, 8), (8, 8)),))
    cheap = Candidate(Choice("tucker2", (1, 1)), LayerCost(1, 1), None, Errors(0.9))
    holding = holding_of(LayerCandidates(spec, (cheap,), None, spectrum(weight)))
    for ranks in ((4, 3), (6, 6), (12, 10), (20, 4)):
        core, _, _ = tucker2(kernel[None], ranks)
        error = math.sqrt(max(0.0, 1 - float((core.norm() / kernel.norm()) ** 2)))
        assert error - 1e-6 <= holding.bound(0, ranks) <= 1.2 * error + 1e-6


def test_a_matrix_is_truncated_once():
    """Both unfoldings of a linear layer are the same matrix: SVD at the EVBMF rank is what is wanted."""
    holding = holding_of(layer_of("a", 64, (10, 10), tuple(range(1, 30)), ("channel_svd",), kernel=1))
    assert holding.choice(0, holding.index(0, (10, 10))).rank == (10,)


def test_the_cheapest_of_all_formats_or_of_one():
    layer = layer_of("a", 32, (8, 8), (4, 8, 12, 16, 24))
    holding = holding_of(layer)
    index = {form: holding.index(0, (8, 8), form) for form in ("tucker2", "channel_svd", "")}
    cost = {form: layer.candidates[k - 1].cost.macs for form, k in index.items()}
    assert cost[""] == min(cost["tucker2"], cost["channel_svd"])
    assert holding.choice(0, index["channel_svd"]).format == "channel_svd"
    assert holding.index(0, (8, 8), "kronecker") == 0


def test_whitening_decides_what_is_lost_and_not_which_rank_is_needed():
    plain = holding_of(layer_of("a", 32, (8, 8), (4, 8, 12, 16)))
    both = holding_of(layer_of("a", 32, (8, 8), (4, 8, 12, 16), whitenings=("none", "input")))
    for form in ("tucker2", "channel_svd"):
        for ranks in ((8, 8), (5, 9), (4, 4)):
            one, other = plain.choice(0, plain.index(0, ranks, form)), both.choice(0, both.index(0, ranks, form))
            assert one.rank == other.rank
            assert other.options == (("whiten", "input"),)


@pytest.mark.parametrize("form", ["tucker2", "channel_svd"])
def test_ranks_of_a_candidate(form):
    layer = layer_of("a", 32, (8, 8), (4, 8, 12, 16), (form,))
    holding = holding_of(layer)
    assert holding.ranks(0, 0) == (32, 32)
    for k, candidate in enumerate(layer.candidates, start=1):
        ranks = holding.ranks(0, k)
        if form == "tucker2":
            assert ranks == candidate.choice.rank
        else:
            assert ranks[0] == ranks[1] >= candidate.choice.rank[0]
            assert holding.bound(0, ranks) >= candidate.errors.weight
            assert holding.bound(0, (ranks[0] + 1, ranks[1] + 1)) < candidate.errors.weight


def series(space, constraints=(), **options):
    strategy = strategies.make("vbmf", space, TWO, constraints, 0, options)
    proposals = []
    while isinstance(proposal := strategy.ask(), Proposal):
        proposals.append(proposal)
    assert proposal is None
    return strategy, [p.plan.choices for p in proposals]


def kept(space, choices):
    return space.cost(Plan.of(choices)).kept(space.dense)["macs_kept"]


GRID = (2, 4, 6, 8, 10, 12, 16, 20, 24, 28)


def test_plain_evbmf_comes_first_and_the_series_lies_around_it():
    space = space_of(layer_of("a", 32, (8, 12), GRID), layer_of("b", 32, (4, 6), GRID))
    strategy, plans = series(space, step=0.25, harshest=1.25, least=2, lines="mixed")
    holding = Holding(Catalog(space, (), "macs_kept", 0))
    at = [{"a": (8, 12), "b": (4, 6)}, {"a": (14, 17), "b": (11, 12)}, {"a": (2, 7), "b": (2, 2)}]
    for choices, ranks in zip(plans, at, strict=False):
        assert choices == {n: holding.choice(i, holding.index(i, ranks[n])) for i, n in enumerate("ab")}
    costs = [kept(space, choices) for choices in plans]
    assert costs[2] < costs[0] < costs[1] < max(costs[3:])
    assert len(plans) == 5
    assert strategy.ended == "all 5 plans of the series of EVBMF ranks were proposed"


def test_single_format_lines_follow_the_mixture():
    space = space_of(layer_of("a", 32, (8, 12), GRID), layer_of("b", 48, (4, 6), GRID))
    _, both = series(space)
    _, mixed = series(space, lines="mixed")
    _, single = series(space, lines="single")
    assert both[: len(mixed)] == mixed
    assert all(choices in both for choices in single)
    formats = [{choice.format for choice in choices.values()} for choices in single]
    assert all(len(used) == 1 for used in formats)
    assert {used.pop() for used in formats} == {"tucker2", "channel_svd"}


def test_layers_in_which_evbmf_finds_nothing_or_nothing_is_large_enough_stay_dense():
    noise, coarse = layer_of("noise", 32, (0, 0), GRID), layer_of("coarse", 32, (26, 26), (4, 8))
    space = space_of(noise, coarse, layer_of("good", 32, (8, 8), GRID))
    strategy, plans = series(space, lines="mixed", harshest=1.0)
    assert set().union(*plans) == {"good"}
    assert strategy.ended.endswith("; it finds nothing to cut in 1 of 3 layers")


def test_evbmf_that_finds_nothing_anywhere_says_so():
    strategy, plans = series(space_of(layer_of("a", 32, (0, 0), GRID)))
    assert plans == []
    assert strategy.ended == "EVBMF ranks lead to no new plan; it finds nothing to cut in 1 of 1 layers"


@pytest.mark.parametrize("bound", [0.7, 0.5, 0.3, 0.15])
def test_the_weakest_that_meets_a_budget_comes_first(bound):
    space = space_of(*(layer_of(name, 32, (6, 8), tuple(range(1, 30))) for name in "abcd"))
    constraint = Constraint("macs_kept", "<=", bound)
    _, plans = series(space, (constraint,), lines="mixed")
    costs = [kept(space, choices) for choices in plans]
    assert max(costs) <= bound
    # A hundredth of w less would have been too dear.
    free = strategies.make("vbmf", space, TWO)
    weaker = [space.cost(free.catalog.plan(free._plan(w / 100))).kept(space.dense)["macs_kept"] for w in range(1, 300)]
    assert costs[0] == next(c for c in weaker if c <= bound) == max(c for c in weaker if c <= bound)


def test_a_window_is_met():
    space = space_of(*(layer_of(name, 32, (6, 8), tuple(range(1, 30))) for name in "abcd"))
    window = (Constraint("macs_kept", ">=", 0.4), Constraint("macs_kept", "<=", 0.5))
    _, plans = series(space, window)
    assert plans
    assert all(0.4 <= kept(space, choices) <= 0.5 for choices in plans)


def test_a_budget_beyond_evbmf_is_met_at_the_least_predicted_loss():
    space = space_of(layer_of("noise", 32, (0, 0), GRID), layer_of("signal", 32, (8, 8), GRID))
    strategy, plans = series(space, (Constraint("macs_kept", "<=", 0.4),), lines="mixed")
    assert len(plans) == 1
    assert set(plans[0]) == {"noise", "signal"}
    assert strategy.ended


def test_scores_of_which_less_is_better_and_failures_change_nothing():
    space = made_up_space()
    expected = [r.plan for r in run(strategies.make("vbmf", space, TWO), space, 30)]
    falling = (Objective("score", "min"), TWO[1])
    fates = dict.fromkeys(range(0, 30, 2), "failed")
    assert [r.plan for r in run(strategies.make("vbmf", space, falling), space, 30, 4, -1.0, fates)] == expected


def test_another_cost_axis_orders_by_that_cost():
    space = space_of(*(layer_of(name, 32, (6, 8), GRID) for name in "ab"))
    objectives = (TWO[0], Objective("params_kept", "min"))
    strategy = strategies.make("vbmf", space, objectives, (Constraint("params_kept", "<=", 0.4),))
    assert space.cost(strategy.ask().plan).kept(space.dense)["params_kept"] <= 0.4


def test_known_plans_are_left_out():
    space = made_up_space()
    first = strategies.make("vbmf", space, TWO).ask()
    strategy = strategies.make("vbmf", space, TWO)
    strategy.tell(Proposal(first.plan), made_up_record(space, first, 0))
    assert strategy.ask().plan != first.plan


def test_a_space_without_spectra_is_refused():
    space = space_of(layer_of("a", 32, (8, 8), GRID))
    bare = replace(space, layers=tuple(replace(layer, spectrum=None) for layer in space.layers))
    with pytest.raises(ConfigError, match="EVBMF ranks need the spectrum of every layer, and 'a' has none"):
        strategies.make("vbmf", bare, TWO)


def test_candidates_whose_errors_are_unknown_are_no_choice_except_for_tucker():
    layer = layer_of("a", 32, (8, 8), GRID)
    blind = replace(layer, candidates=tuple(replace(c, errors=None) for c in layer.candidates))
    holding = holding_of(blind)
    assert holding.index(0, (8, 8), "channel_svd") == 0
    assert holding.choice(0, holding.index(0, (8, 8))).rank == (8, 8)
