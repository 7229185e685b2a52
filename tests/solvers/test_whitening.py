"""Input statistics against unfold and plain sums; the whitened fit against reduced-rank regression."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from autorank import formats
from autorank.errors import DataError, ModelError
from autorank.layout import canonical_weight, stored_weight
from autorank.solvers import moments, whitening
from autorank.solvers.whitening import LayerStats, collect, output_error, square_root
from autorank.testing.cases import Case, dense, few, grid, make, random
from autorank.types import LayerSpec

WHITEN = (("shrink", 0.0), ("whiten", "input"))


def wrap(case, weight=None):
    """Return a model whose layer `block.layer` is the case's."""
    layer = dense(case.spec, random(case.spec.weight_shape, 7).float() if weight is None else weight)
    model = nn.Sequential()
    model.add_module("block", nn.Sequential())
    model.block.add_module("layer", layer)
    if case.spec.bias:
        nn.init.zeros_(layer.bias)
    return model


def stats_of(case, x, **kwargs):
    return collect(wrap(case), [case.spec], [(x,)], **kwargs)["block.layer"]


@pytest.mark.parametrize("case", grid()[::3] + few(), ids=lambda case: case.id)
def test_statistics_predict_the_power_of_the_layers_output(case):
    # An independent check of padding, stride, dilation, groups and order: Σ y² = count · tr(W Σ Wᵀ) for the real layer.
    x = case.input(3, dtype=torch.float32) + 0.3
    model = wrap(case)
    stats = collect(model, [case.spec], [(x,)])["block.layer"]
    g = case.spec.groups
    weight = canonical_weight(model.block.layer.weight.detach().double(), case.spec)
    weight = weight.reshape(g, case.spec.out_channels // g, -1)
    y = model(x).detach().double()
    predicted = stats.count * ((weight @ stats.covariance.double()) * weight).sum()
    assert stats.count == y.numel() // case.spec.out_channels
    assert float(predicted) == pytest.approx(float(y.square().sum()), rel=1e-4)


TRANSPOSED = [case for case in grid() if case.spec.transposed]


APART = [case for case in TRANSPOSED if case.spec.kernel == case.spec.stride and not any(case.spec.output_padding)]


@pytest.mark.parametrize("case", APART, ids=lambda case: case.id)
def test_statistics_of_a_transposed_convolution_without_overlap_are_those_of_its_pixels(case):
    """Every output position sees one pixel through one kernel position: the patch is that pixel, there, or zero."""
    x, g = case.input(3, dtype=torch.float32), case.spec.groups
    pixels = x.flatten(2).unflatten(1, (g, -1)).permute(1, 0, 3, 2).flatten(1, 2).double()
    places = math.prod(case.spec.kernel)
    expected = torch.kron(pixels.mT @ pixels / pixels.shape[1], torch.eye(places)) / places
    torch.testing.assert_close(stats_of(case, x).covariance, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", TRANSPOSED[::4], ids=lambda case: case.id)
def test_patches_of_a_transposed_convolution_by_brute_force(case):
    """The patch of an output position holds what each weight is multiplied with there: found weight by weight."""
    x = case.input(2)
    d = len(case.spec.kernel)
    patches = moments.patches(x, case.spec).flip(*range(2, 2 + d)).flatten(2 + d)
    layer = wrap(case).block.layer.double()
    channels = case.spec.weight_shape[1]
    with torch.no_grad():
        for column in range(channels * patches.shape[-1]):
            unit = torch.zeros(case.spec.out_channels, channels * patches.shape[-1], dtype=torch.float64)
            unit[0, column] = 1
            layer.weight.copy_(stored_weight(unit.reshape(case.spec.weight_shape), case.spec))
            seen = patches[:, column // patches.shape[-1], ..., column % patches.shape[-1]]
            torch.testing.assert_close(layer(x)[:, 0], seen)


@pytest.mark.parametrize("case", [few()[i] for i in (1, 2, 3, 7)], ids=lambda case: case.id)
def test_statistics_of_many_small_blocks_are_the_same(case, monkeypatch):
    x = case.input(5, dtype=torch.float32)
    whole = stats_of(case, x)
    monkeypatch.setattr(moments, "CHUNK", 200)
    parts = stats_of(case, x)
    assert parts.count == whole.count
    torch.testing.assert_close(parts.covariance, whole.covariance)


def test_batches_add_up_and_runs_repeat():
    case = few()[2]
    x = case.input(6, dtype=torch.float32)
    model = wrap(case)
    one = collect(model, [case.spec], [(x,)])["block.layer"]
    parts = [collect(model, [case.spec], [(x[:2],), (x[2:],)])["block.layer"] for _ in range(2)]
    assert torch.equal(parts[0].covariance, parts[1].covariance)
    assert parts[0].count == one.count
    torch.testing.assert_close(parts[0].covariance, one.covariance)


def test_input_of_a_linear_layer():
    case = make("linear", (4, 5), (3,))
    x = case.input(6, dtype=torch.float32)
    rows = x.reshape(-1, 5).double()
    torch.testing.assert_close(stats_of(case, x).covariance[0], (rows.T @ rows / 18).float())


def test_reduced_against_loops():
    s, kernel, groups = 3, (2, 3, 2), 2
    n = s * math.prod(kernel)
    half = random((groups, n, n), 0)
    full = (half @ half.mT).reshape(groups, s, *kernel, s, *kernel)
    stats = LayerStats(full.reshape(groups, n, n), 1)
    # over S and the middle axis, averaged over the others
    expected = torch.zeros(groups, s, 3, s, 3, dtype=torch.float64)
    for a in range(2):
        for c in range(2):
            expected += full[:, :, a, :, c, :, a, :, c] / 4
    torch.testing.assert_close(stats.reduced(kernel, (1,)), expected.reshape(groups, 9, 9))
    torch.testing.assert_close(stats.reduced(kernel, (0, 1, 2)), stats.covariance)
    channels = sum(full[:, :, a, b, c, :, a, b, c] for a in range(2) for b in range(3) for c in range(2)) / 12
    torch.testing.assert_close(stats.reduced(kernel, ()), channels)


@pytest.mark.parametrize(
    ("spec", "shape", "length", "factorised"),
    [
        (LayerSpec("block.layer", "linear", (4, 60_000)), (60_000,), 60_000, False),
        (
            LayerSpec("block.layer", "conv2d", (4, 30_000, 1, 2), (1, 1), (0, 0), "zeros", (1, 1)),
            (30_000, 1, 3),
            30_000,
            True,
        ),
    ],
    ids=["linear", "channels of a convolution"],
)
def test_too_many_channels_keep_their_variances_only(spec, shape, length, factorised):
    # A covariance would take 14 GB (in float32) for the first and 3.6 GB for the second.
    case = Case(spec, shape[1:])
    x = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 2, length).reshape(
        -1, *([1] * len(shape[1:]))
    )
    weight = random(spec.weight_shape, 7).float()
    model = wrap(case, weight)
    stats = collect(model, [spec], [(x,)])["block.layer"]
    assert (stats.diagonal, stats.factorised) == (True, factorised)
    assert tuple(stats.covariance.shape) == (1, length)
    rows = x if x.ndim == 2 else torch.cat([x[..., :2], x[..., 1:]], 0).movedim(1, -1).reshape(-1, length)
    torch.testing.assert_close(stats.covariance[0], rows.square().mean(0))
    axes = (0, 1) if factorised else ()
    reduced = stats.reduced(spec.kernel, axes)
    assert torch.equal(reduced[0], stats.covariance[0].repeat_interleave(2 if factorised else 1))
    fmt = formats.get("channel_svd")
    approx = fmt.reconstruct(fmt.fit(weight, spec, (2,), WHITEN, stats), spec, (2,))
    plain = fmt.reconstruct(fmt.fit(weight, spec, (2,)), spec, (2,))
    # By hand: the weight with scaled columns, its best approximation of rank two, the columns scaled back.
    scale = reduced[0].double().sqrt()
    u, s, v = torch.linalg.svd(weight.double().reshape(4, -1) * scale, full_matrices=False)
    torch.testing.assert_close(approx.reshape(4, -1).double(), u[:, :2] * s[:2] @ v[:2] / scale, rtol=1e-3, atol=1e-4)
    assert output_error(weight, approx, stats) == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-4)
    assert output_error(weight, approx, stats) < output_error(weight, plain, stats)


def test_deviations_are_the_diagonal_of_the_root():
    variances = torch.tensor([[1.0, 0.0, 4.0], [0.0, 0.0, 0.0], [1e-30, 2e-30, 0.0]])
    for shrink in (0.0, 1e-3, 1.0):
        expected = square_root(variances.diag_embed(), shrink).diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(whitening.deviations(variances, shrink), expected)


# Every k-th position


def test_many_positions_are_thinned_out_and_the_covariance_stays():
    # A layer of ResNet-20's size: 32 x 32 positions of 16 channels, smooth inputs whose borders are padded with zeros.
    case = make("conv2d", (16, 16, 3, 3), (32, 32), padding=1)
    x = nn.functional.avg_pool2d(random((128, 16, 34, 34), 0).float(), 3, 1) + 0.2
    x *= torch.linspace(0.5, 1.5, 32)  # a column of the image is not like another
    halves = [(x[:64],), (x[64:],)]
    found = collect(wrap(case), [case.spec], halves)["block.layer"]
    given = collect(wrap(case), [case.spec], iter(halves), examples=128)["block.layer"]
    every = collect(wrap(case), [case.spec], iter(halves))["block.layer"]
    assert every.count == 128 * 1024
    assert 20_000 <= found.count <= 30_000
    assert torch.equal(found.covariance, given.covariance)
    error = (found.covariance - every.covariance).norm() / every.covariance.norm()
    assert error < 0.02
    weight = random(case.spec.weight_shape, 3).float()
    fmt = formats.get("channel_svd")
    errors = [
        output_error(weight, fmt.reconstruct(fmt.fit(weight, case.spec, (8,), WHITEN, s), case.spec, (8,)), every)
        for s in (every, found)
    ]
    assert errors[1] <= 1.01 * errors[0]


def test_what_is_taken_does_not_depend_on_the_batches():
    case = make("conv2d", (4, 2, 3, 3), (48, 48), padding=1)
    x = random((60, 2, 48, 48), 0).float()
    model = wrap(case)
    whole = collect(model, [case.spec], [(x,)], examples=60)["block.layer"]
    parts = collect(model, [case.spec], [(part,) for part in x.split(20)], examples=60)["block.layer"]
    assert whole.count == parts.count < 60 * 48 * 48
    torch.testing.assert_close(whole.covariance, parts.covariance)


@pytest.mark.parametrize("positions", [1, 7, 196, 1024, 112 * 112, 30030])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0, 2.0, 14.0, 112.5, 900.0])
def test_every_position_is_visited_equally_often(positions, ratio):
    stride = moments.stride_of(ratio * 1000, 1000, positions)
    assert 1 <= stride <= max(1, ratio)
    places = torch.arange(0, stride * positions, stride) % positions
    assert torch.equal(places.bincount(minlength=positions), torch.ones(positions, dtype=torch.long))


@pytest.mark.parametrize("index", [1, 2, 3, 5])
def test_layers_over_the_limit_keep_the_average_over_the_kernel(index):
    case = few()[index]
    x = case.input(3, dtype=torch.float32)
    full, small = stats_of(case, x), stats_of(case, x, max_patch=case.spec.weight_shape[1])
    assert small.factorised
    assert not full.factorised
    assert small.count == full.count
    channels = full.reduced(case.spec.kernel, ())
    torch.testing.assert_close(small.covariance, channels)
    axes = tuple(range(len(case.spec.kernel)))
    eye = torch.eye(math.prod(case.spec.kernel))
    torch.testing.assert_close(
        small.reduced(case.spec.kernel, axes), torch.stack([torch.kron(block, eye) for block in channels])
    )


# The closed form


@pytest.mark.parametrize("case", [few()[i] for i in (0, 1, 2, 4)], ids=lambda case: case.id)
def test_whitened_channel_svd_is_reduced_rank_regression(case):
    spec = case.spec
    model = wrap(case)
    trailing = [1] * len(spec.kernel)
    x = case.input(40, dtype=torch.float32) * torch.linspace(0.1, 3, spec.in_channels).reshape(-1, *trailing)
    stats = collect(model, [spec], [(x,)])["block.layer"]
    weight = model.block.layer.weight.detach()
    fmt = formats.get("channel_svd")
    top = fmt.max_rank(spec)[0]
    g = spec.groups
    for rank in range(1, top + 1):
        # Reduced-rank regression (Izenman 1975) of the layer's own outputs: the residual is the tail of Y's spectrum.
        y = model(x).detach().double()
        y = (
            y.reshape(-1, spec.out_channels)
            if spec.kind == "linear"
            else y.movedim(1, -1).reshape(-1, spec.out_channels)
        )
        tails = [torch.linalg.svdvals(part)[rank:].square().sum() for part in y.chunk(g, dim=1)]
        optimum = float((sum(tails) / y.square().sum()).sqrt())

        def error(options, rank=rank):
            factors = fmt.fit(weight, spec, (rank,), options, stats)
            approx = fmt.reconstruct(factors, spec, (rank,), options)
            swapped = wrap(case, approx)
            with torch.no_grad():
                y = model(x).double()
                measured = float((swapped(x).double() - y).norm() / y.norm())
            assert output_error(weight, approx, stats) == pytest.approx(measured, rel=1e-3, abs=1e-5)
            return measured

        assert error(WHITEN) == pytest.approx(optimum, rel=1e-3, abs=1e-5)
        assert error(WHITEN) <= error(()) + 1e-5


@pytest.mark.parametrize("name", ["spatial_svd", "tucker2"])
def test_whitening_helps_on_correlated_images(name):
    # Not an optimum for these formats (they whiten by a part of the patch covariance), but far better than nothing.
    case = make("conv2d", (16, 12, 3, 3), (16, 16), padding=1)
    mix = random((12, 12), 3) * torch.logspace(0, -1.5, 12, dtype=torch.float64)
    x = torch.einsum("cd,bdhw->bchw", mix.float(), nn.functional.avg_pool2d(random((8, 12, 18, 18), 4).float(), 3, 1))
    weight = random(case.spec.weight_shape, 5).float()
    model = wrap(case, weight)
    stats = collect(model, [case.spec], [(x,)])["block.layer"]
    fmt = formats.get(name)
    for plain in fmt.variants(case.spec):
        rank = tuple(top // 2 for top in fmt.max_rank(case.spec, plain))
        errors = [
            output_error(weight, fmt.reconstruct(fmt.fit(weight, case.spec, rank, o, stats), case.spec, rank, o), stats)
            for o in (plain, tuple(sorted((*plain, ("whiten", "input")))))
        ]
        assert errors[1] < 0.8 * errors[0]


# Roots


@pytest.mark.parametrize("shrink", [0.0, 1e-3, 0.5, 1.0])
def test_square_root(shrink):
    half = random((2, 6, 6), 0)
    cov = half @ half.mT
    root = square_root(cov, shrink)
    rho = max(shrink, whitening.MIN_SHRINK)
    mean = cov.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    torch.testing.assert_close(root @ root.mT, (1 - rho) * cov + rho * mean * torch.eye(6, dtype=torch.float64))
    assert torch.equal(root, root.tril())


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30])
def test_square_root_of_a_rank_one_covariance_can_be_inverted(scale):
    v = random((1, 5, 1), 0)
    cov = (v @ v.mT * scale).float()
    root = square_root(cov, 0.0)
    inverse = torch.linalg.solve_triangular(root, torch.eye(5, dtype=torch.float64)[None], upper=False)
    assert torch.isfinite(inverse).all()
    torch.testing.assert_close(inverse @ root, torch.eye(5, dtype=torch.float64)[None])


def test_square_root_of_an_indefinite_covariance_lifts_it():
    # float32 sums can leave eigenvalues below zero
    basis, _ = torch.linalg.qr(random((1, 4, 4), 0))
    cov = basis @ torch.diag(torch.tensor([1.0, 0.5, 1e-3, -1e-2], dtype=torch.float64)) @ basis.mT
    root = square_root(cov, 1e-3)
    values = torch.linalg.eigvalsh(root @ root.mT)
    assert values.min() > 0
    assert torch.equal(root, root.tril())
    assert (root.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert float(values.max()) == pytest.approx(1, rel=2e-3)


def test_square_root_of_dead_inputs_is_the_identity():
    cov = torch.zeros(2, 3, 3)
    cov[1] = torch.eye(3) * 4
    expected = torch.stack([torch.eye(3), 2 * torch.eye(3)]).double()
    torch.testing.assert_close(square_root(cov, 0.0), expected)


def test_output_error_corner_cases():
    weight = random((4, 3, 3), 0)
    stats = LayerStats(torch.eye(9)[None], 1)
    assert output_error(weight, weight, stats) == 0
    assert output_error(weight, torch.zeros_like(weight), stats) == pytest.approx(1)
    assert output_error(torch.zeros_like(weight), torch.zeros_like(weight), stats) == 0
    dead = LayerStats(torch.zeros(1, 9, 9), 1)
    assert output_error(weight, torch.zeros_like(weight), dead) == 0
    channels = LayerStats(torch.eye(3)[None] * 2, 1, factorised=True)
    other = random((4, 3, 3), 1)
    assert output_error(weight, other, channels) == pytest.approx(output_error(weight, other, stats))


# Collecting


class Net(nn.Module):
    """Two inputs, a shared layer, dropout, batch norm, a layer that is never called, a keyword call."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(4)
        self.idle = nn.Linear(4, 4)
        self.fail = False

    def forward(self, a, b):
        y = self.drop(self.norm(self.shared(a))) + self.shared(input=b)
        if self.fail:
            raise RuntimeError("broken")
        return y


SPECS = [LayerSpec("shared", "linear", (4, 4), bias=True), LayerSpec("idle", "linear", (4, 4), bias=True)]


def test_several_inputs_shared_layers_and_a_model_left_as_it_was():
    torch.manual_seed(0)
    net = Net().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    a, b = torch.randn(5, 4), torch.randn(5, 4)
    stats = collect(net, SPECS, [(a, b)])
    assert set(stats) == {"shared"}, "a layer that no batch reached has no statistics"
    assert stats["shared"].count == 10
    rows = torch.cat([a, b])
    torch.testing.assert_close(stats["shared"].covariance[0], rows.T @ rows / 10)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_no_hooks_are_left_after_an_error():
    net = Net()
    net.fail = True
    with pytest.raises(RuntimeError, match="broken"):
        collect(net, SPECS, [(torch.randn(5, 4), torch.randn(5, 4))])
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_wrong_use_is_said_in_a_line():
    net = Net()
    with pytest.raises(DataError, match="no calibration batch"):
        collect(net, SPECS, [])
    with pytest.raises(ModelError, match="'gone'"):
        collect(net, [LayerSpec("gone", "linear", (4, 4))], [])
    nan = torch.full((5, 4), float("nan"))
    with pytest.raises(ModelError, match=r"'shared'.*not finite"):
        collect(net, SPECS, [(nan, nan)])


def test_one_example_without_a_batch_dimension():
    case = make("conv2d", (4, 3, 3, 3), (5, 6))
    x = case.input(1, dtype=torch.float32)
    torch.testing.assert_close(stats_of(case, x[0]).covariance, stats_of(case, x).covariance)


def test_half_precision_models_are_summed_in_full_precision():
    case = make("linear", (4, 5), ())
    x = case.input(7).bfloat16()
    stats = collect(wrap(case).bfloat16(), [case.spec], [(x,)])["block.layer"]
    torch.testing.assert_close(stats.covariance[0], x.float().T @ x.float() / 7)


# Files


def test_files_round_trip(tmp_path):
    case = few()[1]
    x = case.input(3, dtype=torch.float32)
    limits = {"full": 4608, "factorised": case.spec.weight_shape[1], "diagonal": 1}
    stats = {name: stats_of(case, x, max_patch=limit) for name, limit in limits.items()}
    assert [item.covariance.ndim for item in stats.values()] == [3, 3, 2]
    # One name is how a careless file would call the gradients of another; and not every layer has them.
    stats["full.gradient"] = LayerStats(random((1, 3, 3), 2).float(), 9, gradient=random((1, 4, 4), 3).float())
    stats["diagonal"] = replace(stats["diagonal"], gradient=random((1, 4), 4).float())
    whitening.save(stats, tmp_path / "stats.safetensors")
    loaded = whitening.load(tmp_path / "stats.safetensors")
    assert loaded.keys() == stats.keys()
    for name, item in stats.items():
        assert torch.equal(loaded[name].covariance, item.covariance)
        assert (loaded[name].count, loaded[name].factorised) == (item.count, item.factorised)
        if item.gradient is None:
            assert loaded[name].gradient is None
        else:
            assert torch.equal(loaded[name].gradient, item.gradient)


def test_files_that_are_something_else(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(DataError, match="missing"):
        whitening.load(tmp_path / "missing.safetensors")
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(DataError, match="not a file of layer statistics"):
        whitening.load(tmp_path / "text")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(DataError, match="not a file of layer statistics"):
        whitening.load(tmp_path / "weights")
