"""Layers with bits: the structure, calibration, and what plans make of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autorank import formats
from autorank.errors import DataError, ModelError
from autorank.plan import apply, build, kernels, undecomposed
from autorank.quant import QuantizedLeaf, QuantSettings, calibrate, leaves, quantized_layer, with_bits, without_bits
from autorank.types import Choice, Plan
from tests.quant.samples import decomposed_layers, images, network

LAYERS = list(decomposed_layers())
NAIVE = QuantSettings("minmax", "max", False, "nearest")
PLAN = Plan.of(
    {
        "0": Choice("dense", (), (), 8, 8),
        "3": Choice("tucker2", (8, 6), (), 8, 8),
        "8": Choice("channel_svd", (3,), (), 8, 8),
    }
)
FLOAT = Plan.of(
    {name: replace(choice, weight_bits=None, activation_bits=None) for name, choice in PLAN.layers if name != "0"}
)


def relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize(("case", "dense", "choice"), [row[1:] for row in LAYERS], ids=[row[0] for row in LAYERS])
def test_every_format_is_quantized(case: Any, dense: nn.Module, choice: Choice) -> None:
    fmt = formats.get(choice.format)
    plain = fmt.from_layer(dense, choice.rank, choice.options).eval()
    x = case.input(4, dtype=torch.float32)
    expected = plain(x)
    layer = quantized_layer(copy.deepcopy(plain), choice).eval()
    assert torch.equal(layer(x), expected)
    assert len(leaves(layer)) == len(fmt.factor_shapes(case.spec, choice.rank, choice.options))
    calibrate(layer, [(x,)], QuantSettings("minmax", "max", rounding="nearest"))
    assert all(leaf.calibrated for leaf in leaves(layer).values())
    assert 0 < relative(layer(x), expected) < 0.06
    # The weights behind the levels still stand for the layer.
    factors = fmt.factors_of(without_bits(layer), case.spec, choice.rank, choice.options)
    kernel = fmt.reconstruct(factors, case.spec, choice.rank, choice.options)
    before = fmt.reconstruct(
        fmt.factors_of(plain, case.spec, choice.rank, choice.options), case.spec, choice.rank, choice.options
    )
    assert relative(kernel, before) < 0.1


def test_a_plan_with_bits_computes_in_floating_point_until_it_is_calibrated() -> None:
    model, x = network(), images()
    plain, _ = apply(model, FLOAT)
    found, results = apply(model, PLAN)
    assert torch.equal(found(x), plain(x))
    assert [type(found.get_submodule(name)) for name in ("0", "3.core", "8.second")] == [QuantizedLeaf] * 3
    assert (results[0].weight_error, results[0].params, results[0].macs) == (0.0, 324, 0)
    assert torch.equal(with_bits(plain, PLAN)(x), plain(x))
    calibrate(found, [(x,)])
    assert 0 < relative(found(x), plain(x)) < 0.05


def test_a_calibrated_state_loads_onto_what_build_makes() -> None:
    model, x = network(), images()
    found, _ = apply(model, PLAN)
    calibrate(found, [(x,)])
    rebuilt = build(network(1), PLAN)
    rebuilt.load_state_dict(found.state_dict(), strict=True)
    assert torch.equal(rebuilt(x), found(x))


def test_calibration_is_deterministic_and_may_be_repeated_on_an_uncalibrated_copy() -> None:
    x = images()
    first, _ = apply(network(), PLAN)
    second = copy.deepcopy(first)
    calibrate(first, [(x[:16],), (x[16:],)])
    torch.manual_seed(12345)
    calibrate(second, iter([(x[:16],), (x[16:],)]))
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_calibration_leaves_the_mode_the_random_numbers_and_the_statistics() -> None:
    found, _ = apply(network(), PLAN)
    found.train()
    found[4].eval()  # type: ignore[index]
    before = {name: value.clone() for name, value in found.state_dict().items() if "running" in name}
    state = torch.get_rng_state()
    calibrate(found, [(images(),)])
    assert found.training
    assert not found[4].training  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(found.state_dict()[name], value) for name, value in before.items())
    assert not any(module._forward_pre_hooks for module in found.modules())


@pytest.mark.parametrize("batches", [[], [(torch.zeros(0, 3, 9, 9),)]], ids=["no batch", "an empty batch"])
def test_empty_calibration_is_an_error(batches: list[tuple[Tensor, ...]]) -> None:
    found, _ = apply(network(), PLAN)
    with pytest.raises(DataError, match="no example to calibrate"):
        calibrate(found, batches)


def test_batches_are_read_up_to_the_one_that_reaches_the_number_asked_for() -> None:
    x = images(40)

    def more_than_wanted() -> Iterator[tuple[Tensor, ...]]:
        yield (x[:20],)
        yield (x[20:],)
        pytest.fail("a batch was read that nobody asked for")

    first, _ = apply(network(), PLAN)
    second = copy.deepcopy(first)
    calibrate(first, more_than_wanted(), replace(NAIVE, calibration=30))
    calibrate(second, [(x[:20],), (x[20:],)], NAIVE)
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


def test_inputs_that_are_not_finite_are_refused() -> None:
    found, _ = apply(network(), PLAN)
    with pytest.raises(ModelError, match="layer '0' gets inputs that are not finite"):
        calibrate(found, [(images() * float("inf"),)])


def test_a_layer_that_no_example_reaches_keeps_its_input() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    found = with_bits(Half(), Plan.of({name: Choice("dense", (), (), 8, 8) for name in ("used", "idle")}))
    with pytest.warns(UserWarning, match="layer 'idle' got no input"):
        calibrate(found, [(torch.randn(4, 4),)])
    assert [leaf.calibrated for leaf in leaves(found).values()] == [True, False]


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_model_with_bits_is_undecomposed(calibrated: bool) -> None:
    model, x = network(), images()
    plain, _ = apply(model, FLOAT)
    found, _ = apply(model, PLAN)
    if calibrated:
        calibrate(found, [(x,)])
    dense = undecomposed(model, PLAN, found)
    assert not leaves(dense)
    assert list(dense.state_dict()) == list(model.state_dict())
    assert relative(dense(x), plain(x)) < (0.05 if calibrated else 1e-5)
    assert kernels(model, PLAN, found).keys() == {"0", "3", "8"}


def test_trained_layers_are_taken_over_and_calibrated_anew() -> None:
    model, x = network(), images()
    parent, _ = apply(model, PLAN)
    calibrate(parent, [(x,)])
    trained = {name: parent.get_submodule(name) for name, _ in PLAN.layers}
    other = Plan.of({name: replace(choice, weight_bits=4) for name, choice in PLAN.layers})
    child, _ = apply(model, other, trained=trained)
    assert not any(leaf.calibrated for leaf in leaves(child).values())
    assert torch.equal(child(x), without_bits(parent)(x))
    assert all(leaf.calibrated for leaf in leaves(parent).values())


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, None)], ids=str)
def test_all_that_is_done_beats_the_naive_way(bits: tuple[int, int | None]) -> None:
    x = images(64)
    plan = Plan.of({name: replace(c, weight_bits=bits[0], activation_bits=bits[1]) for name, c in PLAN.layers})
    found, _ = apply(network(), plan)
    expected, naive = found(x), copy.deepcopy(found)
    calibrate(naive, [(x,)], NAIVE)
    calibrate(found, [(x,)])
    assert relative(found(x), expected) < relative(naive(x), expected)
