"""Modules that decomposed layers are made of, against PyTorch's own."""

import pytest
import torch
from torch import nn

from autorank.formats.running import Bias, GroupedLinear, Pad, SummedConv, convolution
from autorank.formats.steps import AxisWork, Move, idle


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize(("axes", "dense"), [(1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)], ids=["1d", "2d", "3d"])
def test_one_output_per_group_is_the_grouped_convolution(axes, dense, stride, dilation, mode, bias):
    work = (AxisWork(3, stride, dilation, 1, 1),) * axes
    _, found = convolution(3, 4, 1, work, False, mode, bias)
    assert isinstance(found, SummedConv)
    torch.manual_seed(0)
    reference = dense(
        12, 3, 3, stride=stride, dilation=dilation, padding=1, padding_mode=mode, groups=3, bias=bias
    ).double()
    found = found.to_empty(device="cpu").double()
    found.load_state_dict(reference.state_dict())
    x = torch.randn(2, 12, *(7,) * axes, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(found(x), reference(x))
    torch.testing.assert_close(found(x[0]), reference(x[0]))
    grads = [torch.autograd.grad(m(x).square().sum(), [x, m.weight]) for m in (found, reference)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("groups", "into", "out", "kernel"), [(1, 4, 1, 3), (3, 1, 1, 3), (3, 4, 2, 3), (3, 4, 1, 1)], ids=str
)
def test_other_steps_are_plain_convolutions(groups, into, out, kernel):
    _, found = convolution(groups, into, out, (AxisWork(kernel),) * 2, False, "zeros", False)
    assert type(found) is nn.Conv2d


@pytest.mark.parametrize(
    ("move", "expected"),
    [
        (Move((), ("one", "a", "b"), (), ("a", "one", "b")), True),
        (Move(("one",), ("a",), (), ("a", "one")), True),
        (Move(("a",), ("one", "b"), ("a", "one"), ("b",)), True),
        (Move((), ("a", "b"), (), ("b", "a")), False),
        (Move((), ("a", "b"), ("a",), ("b",)), False),
    ],
    ids=["reordered", "from the batch", "to the batch", "swapped", "folded"],
)
def test_a_move_of_indices_of_size_one_changes_nothing(move, expected):
    assert idle(move, {"one": 1, "a": 2, "b": 3}) is expected


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (lambda: nn.Sequential(nn.Conv2d(12, 4, 1), Bias(4, 2)), (2, 12, 5, 5)),
        (lambda: convolution(3, 4, 1, (AxisWork(3),) * 2, False, "zeros", True)[1], (2, 12, 5, 5)),
        (lambda: GroupedLinear(3, 4, 2, True), (2, 12)),
    ],
    ids=["bias", "summed", "grouped linear"],
)
def test_mixed_precision_gives_the_type_that_pytorchs_layers_give(module, shape):
    module = module().to_empty(device="cpu")
    x = torch.ones(shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == nn.Linear(shape[-1], 2)(x).dtype == torch.bfloat16


def test_modules_print_what_they_do():
    shown = [str(Pad([(1, 2)], "reflect")), str(Bias(4, 2)), str(GroupedLinear(3, 4, 2, True))]
    assert shown == ["Pad([1, 2], mode=reflect)", "Bias(4)", "GroupedLinear(blocks=3, into=4, out=2, bias=True)"]
