"""What the surrogate learns, held against planted weights and plans that it has not seen."""

import numpy as np
import pytest

from autorank.strategies.surrogate import Surrogate, Tables, Trials, gain_of, limited, log_drop

LAYERS, WIDTH = 8, 9


def made_up(seed=0, rules=0):
    """Losses that fall along the candidates from harsh to mild, two formats in turn."""
    rng = np.random.default_rng(seed)
    losses = np.zeros((LAYERS, WIDTH))
    losses[:, 1:] = rng.uniform(0.2, 1.0, (LAYERS, 1)) * np.linspace(1.0, 0.1, WIDTH - 1) ** 2
    formats = np.full((LAYERS, WIDTH), -1)
    formats[:, 1:] = np.arange(WIDTH - 1) % 2
    extra = np.zeros((rules, LAYERS, WIDTH))
    extra[:, :, 1:] = rng.uniform(0.0, 1.0, (rules, LAYERS, WIDTH - 1))
    return Tables(losses, formats, extra)


def observed(tables, weights, count, seed, power=1.0, noise=0.0):
    """Trials of random plans whose drop is a power of the sum with planted weights."""
    rng = np.random.default_rng(seed)
    vectors = rng.integers(1, WIDTH, (count, LAYERS))
    drop = (weights * tables.losses)[np.arange(LAYERS), vectors].sum(axis=1)
    logs = power * np.log(0.3 * drop) + noise * rng.standard_normal(count)
    shares = vectors.mean(axis=1) / WIDTH
    return Trials(vectors, shares, logs, np.full(count, 0.01), np.zeros(count, dtype=np.int64))


def ranked(a, b):
    """Spearman's rank correlation."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def planted(kind, seed=3):
    rng = np.random.default_rng(seed)
    if kind == "layers":
        return np.repeat(np.exp(0.6 * rng.standard_normal((LAYERS, 1))), WIDTH, axis=1)
    if kind == "formats":
        return np.where(np.arange(-1, WIDTH - 1) % 2 == 0, 1.6, 0.6)[None, :] * np.ones((LAYERS, 1))
    return np.ones((LAYERS, WIDTH))


@pytest.mark.parametrize("kind", ["layers", "formats"])
def test_planted_weights_are_recovered(kind):
    tables, weights = made_up(), planted(kind)
    surrogate = Surrogate(tables, observed(tables, weights, 80, 1))
    found = (surrogate.weighted() / np.where(tables.losses > 0, tables.losses, 1.0))[:, 1:]
    # The common factor belongs to the link, so weights are compared up to it.
    error = np.log(found) - np.log(weights[:, 1:])
    assert np.std(error) < 0.35 * np.std(np.log(weights[:, 1:]))


@pytest.mark.parametrize("kind", ["none", "layers", "formats"])
@pytest.mark.parametrize("count", [4, 10, 30])
@pytest.mark.parametrize("power", [0.8, 1.3])
def test_held_out_plans_are_ranked_no_worse_than_by_the_prior(kind, count, power):
    tables, weights = made_up(), planted(kind)
    held_out = observed(tables, weights, 200, 9, power)
    prior = Surrogate(tables).predict(held_out.vectors, held_out.shares)[0]
    learned = [
        Surrogate(tables, observed(tables, weights, count, seed, power, noise=0.03)).predict(
            held_out.vectors, held_out.shares
        )[0]
        for seed in range(4)
    ]
    before = ranked(prior, held_out.logs)
    after = np.mean([ranked(mean, held_out.logs) for mean in learned])
    assert after > before - 0.01
    if kind != "none" and count == 30:
        assert after > before + 0.02


def test_spread_of_predictions_shrinks_with_trials_and_covers_the_truth():
    tables, weights = made_up(), planted("layers")
    held_out = observed(tables, weights, 200, 9)
    spreads = []
    for count in (5, 20, 80):
        mean, spread = Surrogate(tables, observed(tables, weights, count, 1)).predict(held_out.vectors, held_out.shares)
        assert np.mean(np.abs(mean - held_out.logs) < 3 * spread) > 0.9
        spreads.append(spread.mean())
    assert spreads == sorted(spreads, reverse=True)


def test_cheap_rungs_teach_the_weights_of_the_full_fidelity():
    tables, weights = made_up(), planted("layers")
    held_out = observed(tables, weights, 200, 9)
    few, many = observed(tables, weights, 6, 1), observed(tables, weights, 60, 2)
    both = Trials(
        np.concatenate([few.vectors, many.vectors]),
        np.concatenate([few.shares, many.shares]),
        np.concatenate([few.logs, 1.2 * many.logs + 1.0]),  # a rung of its own scale
        np.concatenate([few.spreads, many.spreads]),
        np.concatenate([few.rungs, many.rungs + 1]),
    )
    alone = Surrogate(tables, few).predict(held_out.vectors, held_out.shares)[0]
    helped = Surrogate(tables, both).predict(held_out.vectors, held_out.shares)[0]
    assert ranked(helped, held_out.logs) > ranked(alone, held_out.logs)
    assert np.abs(helped - held_out.logs).mean() < np.abs(alone - held_out.logs).mean()


def test_tables_drawn_from_the_posterior_scatter_around_its_mean():
    tables, weights = made_up(rules=2), planted("layers")
    surrogate = Surrogate(tables, observed(tables, weights, 40, 1))
    rng = np.random.default_rng(0)
    drawn = np.log(np.stack([surrogate.drawn(rng)[:, 1:] for _ in range(400)]))
    wide = np.log(np.stack([Surrogate(tables).drawn(rng)[:, 1:] for _ in range(400)]))
    assert np.abs(drawn.mean(axis=0) - np.log(surrogate.weighted()[:, 1:])).mean() < 0.1
    assert drawn.std(axis=0).mean() < wide.std(axis=0).mean() * 1.5
    assert np.isfinite(drawn).all()


@pytest.mark.parametrize("dense", [92.0, 0.4, -0.3], ids=["accuracy", "small", "a-loss-turned"])
def test_drop_and_gain_are_inverse(dense):
    gains = dense - abs(dense) * np.array([0.05, 0.3, 0.7])
    logs, spreads = log_drop(gains, dense)
    assert gain_of(logs, dense) == pytest.approx(gains)
    assert (np.diff(logs) > 0).all()
    assert (np.diff(spreads) < 0).all()


def test_scores_beyond_reason_stay_finite():
    for dense in (92.0, -0.3):
        logs, spreads = log_drop(np.array([dense + 5.0, dense, -1e9, dense - 1e9]), dense)
        assert np.isfinite(logs).all()
        assert np.isfinite(spreads).all()
        assert np.isfinite(gain_of(logs, dense)).all()


def test_equal_plans_and_dense_layers_are_learned_without_trouble():
    tables = made_up()
    vectors = np.zeros((6, LAYERS), dtype=np.int64)
    vectors[:, 0] = 3
    trials = Trials(vectors, np.full(6, 0.9), np.full(6, -2.0), np.full(6, 0.1), np.zeros(6, dtype=np.int64))
    mean, spread = Surrogate(tables, trials).predict(np.zeros((1, LAYERS), dtype=np.int64), np.ones(1))
    assert np.isfinite(mean).all()
    assert np.isfinite(spread).all()


def test_thinning_keeps_the_latest_and_spreads_over_the_rest():
    assert limited([1, 2, 3], 5) == [1, 2, 3]
    kept = limited(list(range(100)), 10)
    assert len(kept) == 10
    assert kept[-5:] == [95, 96, 97, 98, 99]
    assert kept[:5] == [0, 19, 38, 57, 76]
