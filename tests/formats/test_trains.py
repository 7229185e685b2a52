"""Tensor train, tensor ring and tensor chain: what they are, what they share with other formats, and their spaces."""

import itertools
import math

import pytest
import torch

from autorank import formats
from autorank.formats.spatial_cores import spatial_cores
from autorank.space import build_space, read_space
from autorank.testing.cases import make, random
from autorank.types import Cost, ModelProfile

NAMES = ("tensor_train", "tensor_ring", "tensor_chain")
LOOPS = NAMES[1:]


def layer(out=8, into=6, kernel=(3, 3), stride=1, groups=1, size=8, kind="conv2d"):
    shape = (out, into // groups, *kernel)
    return make(kind, shape, (size,) * len(kernel), stride=stride, padding=1, groups=groups, bias=False).spec


def error(name, weight, spec, rank, **options):
    fmt, chosen = formats.get(name), tuple(sorted(options.items()))
    factors = fmt.fit(weight, spec, rank, chosen)
    return float((fmt.reconstruct(factors, spec, rank, chosen) - weight).norm() / weight.norm())


def decaying(spec, seed=0):
    """Return a weight with falling spectra, as trained ones have."""
    weight = random(spec.weight_shape, seed)
    for axis, n in enumerate(spec.weight_shape[:2]):
        scale = torch.arange(1, n + 1, dtype=torch.float64) ** -0.7
        basis = torch.linalg.qr(random((n, n), seed + axis + 1))[0] * scale
        weight = torch.tensordot(basis, weight.movedim(axis, 0), 1).movedim(0, axis)
    return weight


# What they are


def test_tensor_train_is_the_product_of_its_cores():
    spec, rank, options = layer(), (4, 5), (("inner", 1.0),)
    fmt = formats.get("tensor_train")
    f = fmt.fit(random(spec.weight_shape, 0), spec, rank, options)
    shapes = {"input": (1, 4, 6, 1, 1), "spatial_0": (1, 4, 4, 3, 1), "spatial_1": (1, 5, 4, 1, 3)}
    assert {name: tuple(x.shape) for name, x in f.items()} == {**shapes, "output": (1, 8, 5, 1, 1)}
    product = torch.einsum(
        "as,bah,cbw,tc->tshw",
        f["input"][0, :, :, 0, 0],
        f["spatial_0"][0, :, :, :, 0],
        f["spatial_1"][0, :, :, 0],
        f["output"][0, :, :, 0, 0],
    )
    torch.testing.assert_close(fmt.reconstruct(f, spec, rank, options), product)


@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_the_trace_of_the_product_of_their_cores(name):
    spec, rank, options = layer(), (3, 4), (("closing", 2),)
    fmt = formats.get(name)
    f = fmt.fit(random(spec.weight_shape, 0), spec, rank, options)
    a = f["input"][0, :, :, 0, 0].reshape(2, 3, 6)
    c = f["output"][0, :, :, 0, 0].reshape(8, 2, 4)
    if name == "tensor_chain":
        assert tuple(f["spatial_0"].shape) == (1, 4, 3, 3, 3)
        middle = f["spatial_0"][0].permute(1, 0, 2, 3)
    else:
        assert tuple(f["spatial_0"].shape) == (1, 3, 3, 3, 1)
        assert tuple(f["spatial_1"].shape) == (1, 4, 3, 1, 3)
        middle = torch.einsum("bah,cbw->achw", f["spatial_0"][0, :, :, :, 0], f["spatial_1"][0, :, :, 0])
    product = torch.einsum("pas,achw,tpc->tshw", a, middle, c)
    torch.testing.assert_close(fmt.reconstruct(f, spec, rank, options), product)


# What they share with others


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d"])
def test_tensor_train_with_large_inner_bonds_is_tucker2(kind):
    spec = layer(8, 6, (3, 2, 2)[: int(kind[4])], size=6, kind=kind)
    weight = decaying(spec)
    for r_in, r_out in [(2, 3), (4, 4), (6, 3), (6, 8)]:
        options = (("inner", 3.0),)
        assert [s.axes for s in formats.get("tensor_train").steps(spec, (r_in, r_out), options) if s.axes] == [
            tuple(range(len(spec.kernel)))
        ]
        ours = error("tensor_train", weight, spec, (r_in, r_out), inner=3.0)
        assert ours == pytest.approx(error("tucker2", weight, spec, (r_out, r_in)), rel=2e-3, abs=1e-6)


def test_tensor_train_without_ends_is_spatial_svd():
    spec = layer()
    weight = decaying(spec)
    bond = round(math.sqrt(6 * 8))
    fmt = formats.get("tensor_train")
    assert [s.factor for s in fmt.steps(spec, (6, 8), (("inner", 1.0),))] == ["spatial_0", "spatial_1"]
    ours = error("tensor_train", weight, spec, (6, 8), inner=1.0)
    assert ours == pytest.approx(error("spatial_svd", weight, spec, (bond,), first="h"), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_largest_ranks_lose_nothing_where_the_bonds_suffice(name):
    spec = layer(5, 4)
    options = {"inner": 3.0} if name != "tensor_chain" else {}
    assert error(name, random(spec.weight_shape, 0), spec, (4, 5), **options) < 2e-3


@pytest.mark.parametrize("closing", [2, 3])
@pytest.mark.parametrize(("name", "open_ended"), [("tensor_chain", "tucker2"), ("tensor_ring", "tensor_train")])
def test_the_closing_bond_lowers_the_error(name, open_ended, closing):
    spec = layer(12, 12)
    weight = decaying(spec)
    for rank in [(2, 2), (4, 4), (3, 5)]:
        plain = error(open_ended, weight, spec, rank[::-1] if open_ended == "tucker2" else rank)
        assert error(name, weight, spec, rank, closing=closing) < 0.97 * plain
        assert error(name, weight, spec, rank, closing=1) == pytest.approx(plain, rel=1e-2)


@pytest.mark.shared
@pytest.mark.parametrize("name", LOOPS)
def test_real_kernels_are_stable(name, shared_dir):
    """The sensitivity of a fitted loop stays near the least that its tensor can have: that of random cores."""
    from safetensors.torch import load_file

    weight = load_file(shared_dir / "models" / "resnet20-cifar10jpeg.safetensors")["layer1.1.conv1.weight"].double()
    weight = weight / weight.norm()
    spec = layer(16, 16)
    fmt, options = formats.get(name), (("closing", 2),)
    factors = fmt.fit(weight, spec, (4, 4), options)
    assert fmt.sensitivity(factors, spec, (4, 4), options) < 1000


# How spatial axes are shared out


@pytest.mark.parametrize(
    ("kernel", "stride", "ends", "axes"),
    [
        ((3, 3), 1, (8, 8), ((0,), (1,))),
        ((3, 3), 2, (8, 8), ((0,), (1,))),
        ((3, 3), 3, (8, 8), ((0, 1),)),
        ((5, 5), 2, (8, 8), ((0,), (1,))),
        ((2, 2), 1, (8, 8), ((0, 1),)),
        ((2, 2), 2, (8, 8), ((0, 1),)),
        ((3, 1), 1, (8, 8), ((0, 1),)),
        ((1, 3, 1), 1, (8, 8), ((0, 1, 2),)),
        ((3, 1, 3), 1, (8, 8), ((0, 1), (2,))),
        ((3, 3, 3), 1, (8, 8), ((0,), (1,), (2,))),
        ((3, 3), 1, (64, 4), ((0, 1),)),
    ],
    ids=str,
)
def test_axes_share_a_core_where_that_takes_fewer_macs(kernel, stride, ends, axes):
    spec = layer(64, 64, kernel, stride, kind=f"conv{len(kernel)}d")
    assert spatial_cores(spec, *ends, 1.0).axes == axes


@pytest.mark.parametrize("inner", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["conv2d", "conv_transpose2d", "conv3d"])
def test_inner_bonds_and_costs_grow_with_the_outer_ones(kind, stride, inner):
    spec = layer(48, 24, (3, 3, 2)[: int(kind[-2])], stride, size=12, kind=kind)
    ring = formats.get("tensor_ring")
    costs = [ring.cost(spec, (n, 2 * n), (("closing", 2), ("inner", inner))).macs for n in range(1, 25)]
    assert all(a < b * 1.02 for a, b in itertools.pairwise(costs))
    for a, b in itertools.product((1, 3, 17), repeat=2):
        cores = spatial_cores(spec, a, b, inner)
        for n, axes in enumerate(cores.axes):  # no bond is larger than its neighbours can fill
            size = math.prod(spec.kernel[x] for x in axes)
            if n > 0:
                assert cores.bonds[n] <= a * math.prod(spec.kernel[x] for g in cores.axes[:n] for x in g)
            if n + 1 < len(cores.axes):
                assert cores.bonds[n + 1] <= size * max(cores.bonds[n], b)


# Refusals and candidates


@pytest.mark.parametrize(
    ("name", "kind", "shape", "hint"),
    [
        ("tensor_train", "linear", (8, 8), "kronecker"),
        ("tensor_train", "conv2d", (8, 8, 1, 1), "channel_svd"),
        ("tensor_chain", "linear", (8, 8), "channel_svd"),
        ("tensor_ring", "linear", (8, 8), "kronecker"),
        ("tensor_ring", "conv1d", (8, 8, 3), "tensor_chain"),
        ("tensor_ring", "conv2d", (8, 8, 3, 1), "tensor_chain"),
    ],
)
def test_refusals_name_the_format_to_take(name, kind, shape, hint):
    reason = formats.get(name).supports(make(kind, shape, (8,) * max(1, len(shape) - 2)).spec)
    assert reason is not None
    assert reason.startswith(kind)
    assert hint in reason


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("channels", "kind", "stride"),
    [
        (16, "conv2d", 1),
        (32, "conv2d", 2),
        (64, "conv2d", 1),
        (512, "conv2d", 1),
        (32, "conv3d", 1),
        (32, "conv_transpose2d", 2),
    ],
)
def test_shipped_space_covers_the_macs(name, channels, kind, stride):
    """Every option set has candidates near each of 0.2, 0.3, 0.4, 0.5 and 0.6 of the dense MACs."""
    spec = layer(channels, channels, (3,) * int(kind[-2]), stride, size=8, kind=kind)
    profile = ModelProfile((spec,), (), Cost(spec.macs, spec.params, 4 * spec.params))
    space = build_space(read_space(name), profile)
    found: dict[object, list[float]] = {}
    for candidate in space.layers[0].candidates:
        assert candidate.cost.macs < spec.macs or candidate.cost.params < spec.params
        options = tuple(o for o in candidate.choice.options if o[0] != "whiten")
        found.setdefault(options, []).append(candidate.cost.macs / spec.macs)
    assert len(found) == 2
    top = 0.35 if (name, kind) == ("tensor_train", "conv3d") else 0.65
    for shares in found.values():
        for target in (s for s in (0.2, 0.3, 0.4, 0.5, 0.6) if s < top):
            assert min(abs(share - target) for share in shares) < 0.09 if channels == 16 else 0.05
