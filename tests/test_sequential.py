"""Fits in the order of the layers: against known kernels, the dense model, and fits that know nothing of each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autorank import formats
from autorank.errors import DataError
from autorank.formats.replacing import description
from autorank.layout import canonical_weight
from autorank.plan import apply
from autorank.profiling import profile
from autorank.sequential import Moments, apply_in_order
from autorank.solvers import whitening
from autorank.types import Choice, LayerSpec, Plan
from tests.models import ZOO, make, output

NETWORKS = [name for name in ZOO if len(profile(*make(name)).layers) > 1]
LAYERS = {
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1, stride=(2, 1), bias=False), (5, 4, 9, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, dilation=2, bias=False), (5, 4, 9, 8)),
    "conv1d": (nn.Conv1d(3, 5, 4, padding=2, padding_mode="circular", bias=False), (8, 3, 20)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, bias=False), (9, 4, 6, 5)),
    "linear": (nn.Linear(7, 4, bias=False), (30, 3, 7)),
}


def whole(spec: LayerSpec) -> Choice:
    """The first format that takes a layer, at a rank that leaves nothing out."""
    for name in formats.names():
        fmt = formats.get(name)
        if fmt.nested and fmt.supports(spec) is None:
            return Choice(name, fmt.max_rank(spec), fmt.variants(spec)[0])
    raise AssertionError(spec)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_nearest_kernel_is_the_one_that_made_the_outputs(kind: str) -> None:
    layer, shape = LAYERS[kind]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    spec = description(layer)
    moments = Moments(spec, 1)
    moments.add(x, layer(x).detach())
    kernel = canonical_weight(layer.weight.detach(), spec)
    torch.testing.assert_close(moments.nearest(torch.zeros_like(kernel), 0.0).float(), kernel, rtol=1e-3, atol=1e-4)
    assert moments.error(kernel) < 1e-3


@pytest.mark.parametrize("kind", LAYERS)
def test_the_error_is_that_of_the_outputs(kind: str) -> None:
    layer, shape = LAYERS[kind]
    x, y = (
        torch.randn(s, generator=torch.Generator().manual_seed(1)) for s in (shape, layer(torch.zeros(shape)).shape)
    )
    spec = description(layer)
    moments = Moments(spec, 1)
    moments.add(x, y)
    measured = float((layer(x) - y).detach().norm() / y.norm())
    assert moments.error(canonical_weight(layer.weight.detach(), spec)) == pytest.approx(measured, rel=1e-4)


def test_a_strong_hold_leaves_the_kernel_as_it_is() -> None:
    layer, shape = LAYERS["conv2d"]
    moments = Moments(description(layer), 1)
    x = torch.randn(shape)
    moments.add(x, torch.randn_like(layer(x)))
    kernel = layer.weight.detach()
    torch.testing.assert_close(moments.nearest(kernel, 1e6).float(), kernel, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_at_full_rank_the_model_is_the_dense_one(name: str) -> None:
    model, inputs = make(name)
    layers = profile(model, inputs).layers
    plan = Plan.of({spec.name: whole(spec) for spec in layers})
    other, results = apply_in_order(model, plan, [inputs], specs=layers, hold=0.1)
    torch.testing.assert_close(output(other, inputs), output(model, inputs), rtol=1e-3, atol=1e-3)
    assert [result.name for result in results] == [name for name, _ in plan.layers]
    assert all(result.rank_kept == 1.0 for result in results)
    assert {name: m.training for name, m in model.named_modules()}.items() <= {
        name: m.training for name, m in other.named_modules()
    }.items()


def chain() -> tuple[nn.Module, tuple[LayerSpec, ...], list[tuple[Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts: list[nn.Module] = []
        for inputs, outputs in ((3, 16), (16, 16), (16, 16), (16, 16)):
            parts += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)).eval()
    batches = [(torch.randn(32, 3, 12, 12, generator=generator),) for _ in range(3)]
    return model, profile(model, batches[0]).layers, batches


@pytest.mark.parametrize(("passes", "left"), [(1, 1.0), (2, 0.96), (32, 0.92)], ids=["once", "twice", "each"])
def test_errors_that_came_before_are_undone_in_part(passes: int, left: float) -> None:
    model, layers, batches = chain()
    options = (("first", "h"), ("whiten", "input"))
    plan = Plan.of({spec.name: Choice("spatial_svd", (6,), options) for spec in layers if spec.kernel})
    stats = whitening.collect(model, layers, batches)
    apart, _ = apply(model, plan, specs=layers, stats=stats)
    ordered, _ = apply_in_order(model, plan, batches, specs=layers, stats=stats, passes=passes, hold=0.01)
    fresh = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        wrong = [float((other[:7](fresh) - model[:7](fresh)).norm()) for other in (apart, ordered)]
    if passes == 1:  # nothing came before: the same fits
        assert wrong[1] == pytest.approx(wrong[0], rel=1e-3)
    else:
        assert wrong[1] < left * wrong[0]


def test_the_dense_model_stays_as_it_is_and_the_same_call_gives_the_same_bits() -> None:
    model, layers, batches = chain()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = Plan.of({spec.name: whole(spec) for spec in layers})
    first, second = (apply_in_order(model, plan, batches, specs=layers)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_layers_with_long_patches_are_fitted_as_ever() -> None:
    model, layers, batches = chain()
    plan = Plan.of({spec.name: Choice("tucker2", (3, 2)) for spec in layers if spec.kernel})
    other, results = apply_in_order(model, plan, batches, specs=layers, max_patch=1)
    reference, same = apply(model, plan, specs=layers)
    assert results == same
    torch.testing.assert_close(other(*batches[0]), reference(*batches[0]))


def test_no_examples_are_refused() -> None:
    model, layers, _ = chain()
    with pytest.raises(DataError, match="calibration batch"):
        apply_in_order(model, Plan.of({}), [], specs=layers)
