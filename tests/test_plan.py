"""Applying plans: against the dense model with the same weights, costs against the count, and what is refused."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from autorank import formats
from autorank.copying import model_copy
from autorank.errors import FormatError, ModelError, PlanError
from autorank.fitcache import FitCache
from autorank.layout import canonical_weight, stored_weight
from autorank.measure import count
from autorank.plan import apply, build, check
from autorank.profiling import profile
from autorank.solvers import whitening
from autorank.solvers.gradients import collect_gradients, fisher_loss
from autorank.types import Choice, LayerSpec, Plan
from tests.models import ZOO, make, output

DECOMPOSABLE = [name for name in ZOO if profile(*make(name)).layers]


def random_choice(spec: LayerSpec, chance: random.Random) -> Choice:
    name = chance.choice([n for n in formats.names() if formats.get(n).supports(spec) is None])
    fmt = formats.get(name)
    options = chance.choice([o for o in fmt.variants(spec) if fmt.supports(spec, o) is None])
    return Choice(name, tuple(chance.randint(1, top) for top in fmt.max_rank(spec, options)), options)


def random_plan(layers: tuple[LayerSpec, ...], seed: int) -> Plan:
    chance = random.Random(seed)
    return Plan.of({s.name: random_choice(s, chance) for s in layers if chance.random() < 0.8}, seed)


def with_dense_weights(model: nn.Module, plan: Plan, specs: tuple[LayerSpec, ...]) -> nn.Module:
    """The same approximation, run by the dense layers themselves."""
    copied = model_copy(model)
    for spec in specs:
        if spec.name in plan.choices:
            choice, fmt = plan.choices[spec.name], formats.get(plan.choices[spec.name].format)
            weight = copied.get_submodule(spec.name).weight.data
            dense = canonical_weight(weight, spec)
            factors = fmt.fit(dense, spec, choice.rank, choice.options, None, plan.seed)
            weight.copy_(stored_weight(fmt.reconstruct(factors, spec, choice.rank, choice.options), spec))
    return copied


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", DECOMPOSABLE)
def test_the_changed_model_is_the_dense_one_with_approximated_weights(name: str, seed: int) -> None:
    model, inputs = make(name)
    layers = profile(model, inputs).layers
    plan = random_plan(layers, seed)
    changed, results = apply(model, plan, specs=layers)
    reference = with_dense_weights(model, plan, layers)
    torch.testing.assert_close(output(changed, inputs), output(reference, inputs), rtol=1e-4, atol=1e-4)
    for result in results:
        dense = model.get_submodule(result.name).weight.detach().double()
        approx = reference.get_submodule(result.name).weight.detach().double()
        assert result.weight_error == pytest.approx(float((dense - approx).norm() / dense.norm()), abs=1e-5)
        spec = next(spec for spec in layers if spec.name == result.name)
        whole = formats.get(result.choice.format).max_rank(spec, result.choice.options)
        assert result.full_rank == whole
        shares = [math.log(rank / full) for rank, full in zip(result.choice.rank, whole, strict=True)]
        assert result.rank_kept == pytest.approx(math.exp(statistics.mean(shares)))
        assert result.output_error is None
        assert result.sensitivity is not None
        assert result.sensitivity > 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", DECOMPOSABLE)
def test_closed_forms_over_a_plan_are_the_count_of_the_built_model(name: str, seed: int) -> None:
    model, inputs = make(name)
    found = profile(model, inputs)
    plan = random_plan(found.layers, 10 + seed)
    changed, results = apply(model, plan, specs=found.layers)
    cost, _ = count(changed, inputs)
    assert cost.macs == found.dense.macs + sum(r.macs - r.macs_dense for r in results)
    assert cost.params == found.dense.params + sum(r.params - r.params_dense for r in results)
    assert cost.bytes == 4 * cost.params


@pytest.mark.parametrize("name", DECOMPOSABLE)
def test_the_model_that_is_given_stays_as_it_is(name: str) -> None:
    model, inputs = make(name)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    identities = {n: id(m) for n, m in model.named_modules()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    layers = profile(model, inputs).layers
    changed, _ = apply(model, random_plan(layers, 1), specs=layers)
    build(model, random_plan(layers, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert identities == {n: id(m) for n, m in model.named_modules()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    mine = {p.data_ptr() for p in model.parameters()}
    assert not mine & {p.data_ptr() for p in changed.parameters()}


def test_layers_that_the_plan_does_not_name_stay_dense_and_bit_equal() -> None:
    model, inputs = make("tiny_conv")
    layers = profile(model, inputs).layers
    changed, results = apply(model, Plan.of({"conv2": Choice("channel_svd", (3,))}), specs=layers)
    assert [result.name for result in results] == ["conv2"]
    assert type(changed.conv1) is nn.Conv2d
    assert torch.equal(changed.conv1.weight, model.conv1.weight)
    assert torch.equal(changed.fc.weight, model.fc.weight)
    assert torch.equal(changed.bn1.running_mean, model.bn1.running_mean)


def test_an_empty_plan_gives_an_equal_copy() -> None:
    model, inputs = make("tiny_conv")
    changed, results = apply(model, Plan())
    assert results == ()
    assert changed is not model
    assert torch.equal(output(changed, inputs), output(model, inputs))


def test_a_shared_module_is_decomposed_once_and_stays_shared() -> None:
    model, inputs = make("shared_residual")
    layers = profile(model, inputs).layers
    changed, results = apply(model, Plan.of({"block.0": Choice("tucker2", (6, 5))}), specs=layers)
    assert changed.again is changed.block
    assert len(results) == 1

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.inner = nn.ModuleDict({"b": self.a})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["b"](self.a(x))

    twice, _ = apply(Twice(), Plan.of({"a": Choice("channel_svd", (2,))}))
    assert twice.a is twice.inner["b"]
    assert isinstance(twice.a, nn.Sequential)


def test_tied_weights_stay_tied() -> None:
    model, inputs = make("tied")
    changed, _ = apply(model, Plan.of({"inner": Choice("channel_svd", (4,))}), specs=profile(model, inputs).layers)
    assert changed.decoder.weight is changed.embed.weight


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_mode_is_kept_layer_by_layer(training: bool) -> None:
    model, _ = make("tiny_conv")
    model.train(training)
    model.conv2.train(not training)
    plan = Plan.of({"conv1": Choice("channel_svd", (2,)), "conv2": Choice("channel_svd", (2,))})
    for changed in (apply(model, plan)[0], build(model, plan)):
        assert changed.training is training
        assert {m.training for m in changed.conv1.modules()} == {training}
        assert {m.training for m in changed.conv2.modules()} == {not training}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_number_type_is_kept(dtype: torch.dtype) -> None:
    model = make("tiny_conv")[0].to(dtype)
    plan = Plan.of({"conv2": Choice("tucker2", (4, 4))})
    for changed in (apply(model, plan)[0], build(model, plan)):
        assert {p.dtype for p in changed.conv2.parameters()} == {dtype}
    bias = next(p for n, p in apply(model, plan)[0].conv2.named_parameters() if n.endswith("bias"))
    assert torch.equal(bias, model.conv2.bias)


def test_frozen_parameters_stay_frozen() -> None:
    model, _ = make("tiny_conv")
    model.conv2.weight.requires_grad_(False)
    model.fc.bias.requires_grad_(False)
    plan = Plan.of({"conv2": Choice("tucker2", (4, 4)), "fc": Choice("channel_svd", (4,))})
    for changed in (apply(model, plan)[0], build(model, plan)):
        for layer, frozen in (("conv2", "weight"), ("fc", "bias")):
            for name, parameter in changed.get_submodule(layer).named_parameters():
                assert parameter.requires_grad is not name.endswith(frozen), name
    assert not apply(model, plan)[0].conv1.weight.grad_fn


def test_a_decomposed_model_can_be_decomposed_again_and_keeps_its_bias() -> None:
    model, inputs = make("conv1d")
    once, _ = apply(model, Plan.of({"b": Choice("channel_svd", (14,))}))
    found = profile(once, inputs)
    inner = [s for s in found.layers if s.name.startswith("b.")]
    assert inner
    twice_plan = Plan.of({s.name: random_choice(s, random.Random(0)) for s in found.layers})
    twice, results = apply(once, twice_plan, specs=found.layers)
    reference = with_dense_weights(once, twice_plan, found.layers)
    torch.testing.assert_close(output(twice, inputs), output(reference, inputs), rtol=1e-4, atol=1e-4)
    assert {s.name for s in inner} < {r.name for r in results}
    biases = [p for n, p in twice.b.named_parameters() if n.endswith("bias")]
    assert len(biases) == 1
    assert torch.equal(biases[0], model.b.bias)
    cost, _ = count(twice, inputs)
    assert cost.macs == found.dense.macs + sum(r.macs - r.macs_dense for r in results)


def test_the_model_itself_may_be_the_layer() -> None:
    model = nn.Linear(16, 16)
    changed, _ = apply(model, Plan.of({"": Choice("channel_svd", (16 // 3,))}))
    assert isinstance(changed, nn.Sequential)
    assert changed(torch.randn(2, 16)).shape == (2, 16)


@pytest.mark.parametrize("name", DECOMPOSABLE)
def test_weights_of_a_changed_model_load_into_the_built_structure(name: str) -> None:
    model, inputs = make(name)
    plan = random_plan(profile(model, inputs).layers, 3)
    changed, _ = apply(model, plan)
    bare = build(make(name, seed=9)[0], plan)
    bare.load_state_dict(changed.state_dict())
    assert torch.equal(output(bare, inputs), output(changed, inputs))


def test_build_is_a_function_of_the_seed_and_layers_differ() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    choices = {"0": Choice("channel_svd", (4,)), "1": Choice("channel_svd", (4,))}
    first, again, other = (build(model, Plan.of(choices, seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not any(torch.equal(first[k], other[k]) for k in first if k.endswith("weight"))
    weights = [v for k, v in first.items() if k.endswith("weight")]
    assert not torch.equal(weights[0], weights[2])


def test_whitened_plans_use_the_statistics_of_their_layer() -> None:
    model, _ = make("tiny_conv")
    batches = [(torch.randn(8, 3, 12, 10).cumsum(-1),)]
    layers = profile(model, batches[0]).layers
    stats = whitening.collect(model, layers, batches)
    plain = Plan.of({"conv2": Choice("channel_svd", (4,))})
    white = Plan.of({"conv2": Choice("channel_svd", (4,), (("whiten", "input"),))})
    _, (a,) = apply(model, plain, specs=layers, stats=stats)
    changed, (b,) = apply(model, white, specs=layers, stats=stats)
    assert b.output_error < a.output_error
    assert b.weight_error > a.weight_error
    # The error of the output, measured on the very inputs that the statistics were taken from.
    with torch.no_grad():
        x = torch.relu(model.bn1(model.conv1(batches[0][0])))
        zero = model.conv2.bias[:, None, None]
        dense = model.conv2(x) - zero
        error = (changed.conv2(x) - zero - dense).norm() / dense.norm()
    assert b.output_error == pytest.approx(float(error), rel=1e-3)


def test_input_statistics_are_not_enough_for_a_plan_that_whitens_outputs() -> None:
    model, inputs = make("tiny_conv")
    layers = profile(model, inputs).layers
    stats = whitening.collect(model, layers, [inputs])
    plan = Plan.of({"conv2": Choice("channel_svd", (4,), (("whiten", "both"),))})
    with pytest.raises(PlanError, match="'conv2': its choice has whiten=both, and there are no gradient statistics"):
        apply(model, plan, specs=layers, stats=stats)
    losses = [(inputs, lambda y: fisher_loss(y, torch.Generator().manual_seed(0)))]
    whole = {k: replace(stats[k], gradient=g) for k, g in collect_gradients(model, layers, losses).items()}
    _, (layer,) = apply(model, plan, specs=layers, stats=whole)
    assert layer.choice.whitens("output")


def test_a_cache_does_not_change_the_outcome(tmp_path: object) -> None:
    model, inputs = make("padding_modes")
    layers = profile(model, inputs).layers
    plan = random_plan(layers, 4)
    bare, _ = apply(model, plan, specs=layers)
    for cache in (FitCache(tmp_path), FitCache(None)):  # type: ignore[arg-type]
        first, results = apply(model, plan, specs=layers, cache=cache)
        second, again = apply(model, plan, specs=layers, cache=cache)
        assert results == again
        for key, value in bare.state_dict().items():
            assert torch.equal(value, first.state_dict()[key])
            assert torch.equal(value, second.state_dict()[key])


CHANNEL = Choice("channel_svd", (2,))


@pytest.mark.parametrize(
    ("network", "layer", "choice", "words"),
    [
        ("tiny_conv", "conv3", CHANNEL, "the model has no layer 'conv3'; nearest: 'conv2', 'conv1'"),
        ("tiny_conv", "zzz", CHANNEL, "the model has no layer 'zzz'; nearest: 'conv1', 'conv2', 'fc'"),
        ("tiny_conv", "bn1", CHANNEL, "'bn1' is a BatchNorm2d; only convolution and linear layers"),
        ("tiny_conv", "", CHANNEL, "'' is a TinyConv; only convolution and linear layers"),
        ("shared_residual", "again.0", CHANNEL, "'again.0' is the same module as 'block.0'; name it 'block.0'"),
        ("generator", "crop", CHANNEL, "'crop' is left alone: the profile does not list it"),
        ("tied", "decoder", CHANNEL, "'decoder' cannot be decomposed: its weight is tied to embed.weight"),
        ("reparametrised", "old", CHANNEL, "'old' cannot be decomposed: its weight is computed from other tensors"),
        ("subclasses", "own", CHANNEL, "'own' cannot be decomposed: StandardisedConv2d has its own forward"),
        ("attention", "attention.out_proj", CHANNEL, "a part of MultiheadAttention"),
        ("never_called", "unused", CHANNEL, "'unused' is left alone: the profile does not list it"),
        ("tiny_conv", "conv1", Choice("svd", (2,)), "layer 'conv1': there is no format 'svd', known: channel_svd"),
        ("tiny_conv", "fc", Choice("spatial_svd", (2,)), "'fc', format spatial_svd: linear: spatial_svd splits"),
        ("tiny_conv", "conv1", Choice("channel_svd", (17,)), "rank (17,) is out of range, allowed: R from 1 to 16"),
        ("tiny_conv", "conv1", Choice("channel_svd", (0,)), "allowed: R from 1 to 16"),
        ("tiny_conv", "conv1", Choice("channel_svd", (2, 2)), "rank (2, 2) is out of range, allowed: R from 1"),
        ("tiny_conv", "conv1", Choice("tucker2", (2,)), "allowed: R_out from 1 to 16, R_in from 1 to 3"),
        ("tiny_conv", "conv1", Choice("channel_svd", (2,), (("colour", 1),)), "unknown option 'colour', known:"),
        ("tiny_conv", "conv1", Choice("channel_svd", (2,), (("whiten", "out"),)), "must be one of none, input"),
        ("tiny_conv", "conv1", Choice("spatial_svd", (2,), (("first", "x"),)), "option first must be one of h, w"),
        ("tiny_conv", "conv1", Choice("channel_svd", (2,), (("whiten", "input"),)), "no input statistics for it"),
        ("tiny_conv", "conv1", Choice("channel_svd", (2,), (("whiten", "output"),)), "no gradient statistics for it"),
        ("tiny_conv", "conv1", Choice("channel_svd", (2,), (("whiten", "both"),)), "no input and gradient statistics"),
        ("tiny_conv", "conv1", Choice("channel_svd", (2,), (), 5), "weight_bits must be 8 or 6 or 4, not 5"),
        ("tiny_conv", "conv1", Choice("channel_svd", (2,), (), 8, 4), "activation_bits must be 8, not 4"),
        ("tiny_conv", "conv1", Choice("channel_svd", (2,), (), None, 8), "activation_bits need weight_bits"),
        ("tiny_conv", "conv1", Choice("dense", ()), "format 'dense' needs weight_bits"),
        ("tiny_conv", "conv1", Choice("dense", (2,), (), 8), "keeps the kernel, so it has no rank and no options"),
        ("tiny_conv", "conv1", Choice("dense", (), (("whiten", "both"),), 8), "has no rank and no options"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_any_work(
    network: str, layer: str, choice: Choice, words: str
) -> None:
    model, inputs = make(network)
    with pytest.raises(PlanError) as error:
        apply(model, Plan.of({layer: choice}), specs=profile(model, inputs).layers)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_plan_is_refused_before_a_single_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("fitted")

    monkeypatch.setattr(FitCache, "get_or_fit", never)
    model, _ = make("tiny_conv")
    with pytest.raises(PlanError):
        apply(model, Plan.of({"conv1": CHANNEL, "fc": Choice("channel_svd", (11,))}))


def test_a_model_without_layers_says_so() -> None:
    with pytest.raises(PlanError, match="has no layer 'a'; it has none to decompose"):
        check(nn.ReLU(), Plan.of({"a": CHANNEL}))


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_a_layer_with_hooks_is_refused_rather_than_losing_them(kind: str) -> None:
    model, _ = make("tiny_conv")
    getattr(model.conv2, f"register_{kind}_hook")(lambda *args: None)
    with pytest.raises(PlanError, match="'conv2' cannot be decomposed: it has hooks"):
        check(model, Plan.of({"conv2": CHANNEL}))
    apply(model, Plan.of({"conv1": CHANNEL}))


def test_a_profile_of_another_model_is_noticed() -> None:
    model, inputs = make("tiny_conv")
    spec = profile(model, inputs).layers[0]
    other = LayerSpec(spec.name, spec.kind, (8, 3, 3, 3), spec.stride, spec.padding, dilation=spec.dilation)
    with pytest.raises(PlanError, match=r"has a weight of shape \(16, 3, 3, 3\), its profile says \(8, 3, 3, 3\)"):
        check(model, Plan.of({spec.name: CHANNEL}), specs=(other,))


def test_a_weight_that_is_not_finite_is_an_error_that_names_the_layer() -> None:
    model, _ = make("tiny_conv")
    model.conv1.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(FormatError, match="'conv1'"):
        apply(model, Plan.of({"conv1": CHANNEL}))


def test_a_model_that_cannot_be_copied() -> None:
    model, _ = make("tiny_conv")
    model.generator = (i for i in range(3))
    with pytest.raises(ModelError, match="cannot be deep-copied"):
        apply(model, Plan.of({"conv1": CHANNEL}))


def test_a_layer_of_zeros() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    nn.init.zeros_(model[0].weight)
    changed, (result,) = apply(model, Plan.of({"0": CHANNEL}))
    assert result.weight_error == 0
    assert torch.equal(changed(torch.randn(3, 16)), model[0].bias.expand(3, 16))


@pytest.mark.parametrize("how", ["apply", "build"])
@pytest.mark.parametrize("d", [2, 3])
def test_the_memory_format_of_the_weights_is_kept(d: int, how: str) -> None:
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[d]
    convolution = {2: nn.Conv2d, 3: nn.Conv3d}[d]
    plan = Plan.of({"0": Choice("tucker2", (6, 5)), "2": Choice("channel_svd", (4,))})
    for last in (True, False):
        model = nn.Sequential(convolution(8, 8, 3, padding=1), nn.ReLU(), convolution(8, 8, 3, padding=1))
        model = model.to(memory_format=layout) if last else model  # type: ignore[call-overload]
        changed = apply(model, plan)[0] if how == "apply" else build(model, plan)
        kernels = [p for p in changed.parameters() if p.ndim > 1 and max(p.shape[2:]) > 1]
        assert len(kernels) == 2
        assert all(p.is_contiguous(memory_format=layout) == last for p in kernels)
        x = torch.randn(2, 8, *[5] * d)
        y = changed(x.contiguous(memory_format=layout) if last else x)
        if d == 2:  # in three dimensions PyTorch's own layers do not keep it on the CPU
            assert y.is_contiguous(memory_format=layout) == last
        torch.testing.assert_close(y, changed.to(memory_format=torch.contiguous_format)(x))
