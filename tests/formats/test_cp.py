"""What CP and Tucker-CP say about layers, how they merge steps, and what their fits are."""

import math
from dataclasses import replace

import pytest
import torch

from autorank import formats
from autorank.solvers import cp as solver
from autorank.testing.cases import few, random

SPECS = {case.spec.kind: case.spec for case in few()}


def conv(out, into, kernel):
    spec = next(case.spec for case in few() if case.spec.kind == f"conv{len(kernel)}d" and case.spec.groups == 1)
    return replace(spec, weight_shape=(out, into, *kernel))


@pytest.mark.parametrize("name", ["cp", "tucker_cp"])
def test_two_modes_are_refused(name):
    for spec in (SPECS["linear"], conv(8, 6, (1, 1))):
        assert "channel_svd" in formats.get(name).supports(spec)


def test_split_needs_two_axes():
    fmt = formats.get("cp")
    for spec in (conv(8, 6, (3, 1)), SPECS["conv1d"]):
        assert "spatial=whole" in fmt.supports(spec, (("spatial", "split"),))
        assert fmt.variants(spec) == ((("spatial", "whole"),),)


def test_split_is_the_product_of_the_axes():
    fmt, spec, options = formats.get("cp"), conv(8, 6, (3, 2)), (("spatial", "split"),)
    shapes = fmt.factor_shapes(spec, (5,), options)
    factors = {name: random(shape, i) for i, (name, shape) in enumerate(shapes.items())}
    expected = torch.einsum(
        "rs,rh,rw,tr->tshw",
        factors["input"].reshape(5, 6),
        factors["spatial1"].reshape(5, 3),
        factors["spatial2"].reshape(5, 2),
        factors["output"].reshape(8, 5),
    )
    torch.testing.assert_close(fmt.reconstruct(factors, spec, (5,), options), expected)


def test_the_fit_is_the_solvers():
    fmt, spec = formats.get("cp"), conv(8, 6, (3, 3))
    weight = random(spec.weight_shape, 0)
    approx = fmt.reconstruct(fmt.fit(weight, spec, (7,)), spec, (7,))
    expected = float(solver.cp(weight.flatten(2)[None], 7).error)
    assert float((approx - weight).norm() / weight.norm()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("rank", [(2, 2, 6), (2, 6, 6), (8, 2, 6), (8, 6, 6), (7, 5, 3), (4, 3, 12)], ids=str)
def test_pairs_are_merged_where_that_has_fewer_parameters(rank):
    fmt, spec = formats.get("tucker_cp"), conv(8, 6, (3, 3))
    r_out, r_in, r = rank
    shapes = fmt.factor_shapes(spec, rank)
    least = min(6 * r, r_in * (6 + r)) + 9 * r + min(8 * r, r_out * (8 + r))
    assert sum(math.prod(shape) for shape in shapes.values()) == least


def test_merged_on_both_sides_it_is_cp():
    spec = conv(8, 6, (3, 3))
    weight = random(spec.weight_shape, 0)
    ours = formats.get("tucker_cp").fit(weight, spec, (8, 6, 5))
    theirs = formats.get("cp").fit(weight, spec, (5,))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
