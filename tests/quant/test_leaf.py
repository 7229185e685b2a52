"""A quantized leaf: what it computes, what it keeps, and that it survives copying, saving and moving."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autorank.formats.running import GroupedLinear, SummedConv
from autorank.quant import QuantizedLeaf, calibrate, leaves
from autorank.quant.leaf import can_be_quantized
from autorank.testing.cases import random
from autorank.weightfile import read_weights, write_weights


def grouped_linear() -> nn.Module:
    module = GroupedLinear(2, 3, 4, True)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)  # type: ignore[arg-type]
    return module


def summed() -> nn.Module:
    more = {"transposed": False, "output_padding": (0, 0), "padding_mode": "reflect", "bias": False}
    module = SummedConv(6, 2, (3, 3), (1, 1), (1, 1), (1, 1), groups=2, **more)  # type: ignore[arg-type]
    nn.init.normal_(module.weight)
    return module


MODULES = {
    "linear": lambda: nn.Linear(6, 4),
    "grouped-linear": grouped_linear,
    "conv1d": lambda: nn.Conv1d(6, 4, 3, stride=2, padding=1, bias=False),
    "conv2d": lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular", groups=2),
    "conv3d": lambda: nn.Conv3d(6, 4, 2, dilation=2),
    "transposed1d": lambda: nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1),
    "transposed2d": lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, groups=2),
    "transposed3d": lambda: nn.ConvTranspose3d(6, 4, 2),
    "summed": summed,
}


def module_and_input(name: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = MODULES[name]()
    spatial = len(getattr(module, "kernel_size", ()))
    return module.eval(), random((5, 6, *[7] * spatial), 1).float()


def calibrated(name: str, weight_bits: int = 8, activation_bits: int | None = 8) -> tuple[QuantizedLeaf, Tensor]:
    module, x = module_and_input(name)
    leaf = QuantizedLeaf(module, weight_bits, activation_bits)
    calibrate(leaf, [(x,)])
    return leaf, x


@pytest.mark.parametrize("name", MODULES)
def test_without_calibration_it_is_its_module(name: str) -> None:
    module, x = module_and_input(name)
    leaf = QuantizedLeaf(copy.deepcopy(module), 4, 8)
    assert torch.equal(leaf(x), module(x))
    assert not leaf.calibrated
    assert can_be_quantized(module)


@pytest.mark.parametrize("bits", [(8, 8), (6, 8), (4, 8), (8, None)], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_it_computes_with_the_weight_and_the_input_that_it_hands_out(name: str, bits: tuple[int, int | None]) -> None:
    leaf, x = calibrated(name, *bits)
    module = copy.deepcopy(leaf.module)
    weight = leaf.weight_grid.values(leaf.integer_weight())
    assert torch.equal(weight, leaf.quantized_weight())
    assert leaf.integer_weight().dtype == torch.int8
    assert int(leaf.integer_weight().abs().max()) <= 2 ** (bits[0] - 1) - 1
    module.weight = nn.Parameter(weight)
    if leaf.input_grid is not None:
        x = leaf.input_grid.values(leaf.input_grid.levels(x))
    assert leaf.calibrated
    assert torch.allclose(leaf(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_eight_bits_are_near_the_module(name: str) -> None:
    module, x = module_and_input(name)
    leaf, _ = calibrated(name)
    assert float((leaf(x) - module(x)).norm() / module(x).norm()) < 0.02


def test_an_output_is_a_sum_of_whole_numbers() -> None:
    """As a runtime computes it: int8 weights times uint8 inputs less their zero point, scaled once."""
    leaf, x = calibrated("linear")
    grid = leaf.input_grid
    assert grid is not None
    shifted = grid.levels(x).long() - grid.zero_point
    whole = shifted @ leaf.integer_weight().long().T
    y = whole.double() * (grid.scale * leaf.weight_scale).double() + leaf.bias  # type: ignore[operator]
    assert torch.allclose(leaf(x).double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state dict", "file"])
@pytest.mark.parametrize("name", ["conv2d", "transposed2d", "grouped-linear"])
def test_copies_compute_the_same(name: str, way: str, tmp_path: Path) -> None:
    leaf, x = calibrated(name)
    if way == "deepcopy":
        other = copy.deepcopy(leaf)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(leaf))
    else:
        other = QuantizedLeaf(module_and_input(name)[0], 8, 8)
        if way == "file":
            write_weights(leaf, tmp_path / "w.safetensors")
            read_weights(other, tmp_path / "w.safetensors")
        else:
            other.load_state_dict(leaf.state_dict())
    assert other.calibrated
    assert torch.equal(other(x), leaf(x))
    leaf.reset()
    assert other.calibrated


def test_an_uncalibrated_state_loads_as_one() -> None:
    leaf, x = calibrated("conv2d")
    plain = QuantizedLeaf(module_and_input("conv2d")[0], 8, 8)
    leaf.load_state_dict(plain.state_dict())
    assert not leaf.calibrated
    assert torch.equal(leaf(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scales_stay_float32_in_other_number_types(dtype: torch.dtype) -> None:
    leaf, x = calibrated("linear")
    scale, expected = leaf.weight_scale.clone(), leaf(x)
    other = copy.deepcopy(leaf).to(dtype)
    assert other.weight_scale.dtype == torch.float32
    assert torch.equal(other.weight_scale, scale)
    assert torch.equal(other.integer_weight(), leaf.integer_weight())
    assert other(x.to(dtype)).dtype == dtype
    assert float((other(x.to(dtype)) - expected).norm() / expected.norm()) < 0.02


def test_channels_last_is_kept() -> None:
    leaf, x = calibrated("conv2d")
    expected = leaf(x)
    leaf.to(memory_format=torch.channels_last)
    y = leaf(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(y, expected, atol=1e-5)


def test_training_moves_the_weight_behind_the_levels() -> None:
    leaf, x = calibrated("conv2d", 4)
    leaf.train()
    before, levels = leaf.weight.detach().clone(), leaf.integer_weight()
    leaf(x).square().mean().backward()
    gradient = leaf.weight.grad
    assert gradient is not None
    assert float(gradient.abs().min()) > 0
    with torch.no_grad():
        leaf.weight.sub_(gradient)
    assert not torch.equal(leaf.weight, before)
    assert not torch.equal(leaf.integer_weight(), levels)


def test_an_empty_model_has_no_leaves() -> None:
    assert leaves(nn.ReLU()) == {}
