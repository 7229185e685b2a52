"""Models with bits as files: whole-number weights, the same outputs in ONNX Runtime in another process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from autorank import artifacts, formats
from autorank.comparing import tensors
from autorank.plan import apply
from autorank.quant import QuantSettings, calibrate, leaves, quantized_layer, with_bits
from autorank.quant.deploy import deployable
from autorank.quant.onnx_int8 import kernels, make_integer, session
from autorank.types import Choice, Plan
from tests.quant.samples import decomposed_layers, images, network

NAIVE = QuantSettings("minmax", "max", False, "nearest")
PLAN = Plan.of({"0": Choice("dense", (), (), 8, 8), "3": Choice("tucker2", (7, 5), (), 8, 8)})
RUN = """
import sys
import numpy, onnxruntime
for path in sys.argv[1:]:
    run = onnxruntime.InferenceSession(path + ".onnx", providers=["CPUExecutionProvider"])
    given = numpy.load(path + ".npz")
    numpy.savez(path + ".got.npz", *run.run(None, {item.name: given[item.name] for item in run.get_inputs()}))
assert "torch" not in sys.modules
"""
FIRST = {row[3].format: row for row in reversed(list(decomposed_layers())) if row[1].spec.kind == "conv2d"}
"""One layer of each format."""


class Written:
    """A model with bits as an ONNX file for whole numbers, and what it does in this process."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...], path: Path, unsigned: bool = True) -> None:
        self.model, self.inputs, self.path, self.file = model, inputs, path, path.with_suffix(".onnx")
        program = deployable(model)
        traced = artifacts.trace(program, inputs)
        with torch.no_grad():
            artifacts.write_onnx(traced, program, program(*inputs), self.file)
            self.wanted = tuple(tensors(model(*inputs)))
        names = artifacts.onnx_inputs(self.file)
        feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        make_integer(self.file, [feed], unsigned, NAIVE)
        np.savez(path.with_suffix(".npz"), **feed)
        self.graph = onnx.load(self.file).graph
        self.values = {item.name: onnx.numpy_helper.to_array(item) for item in self.graph.initializer}
        self.makers = {node.output[0]: node for node in self.graph.node}

    @property
    def got(self) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, np.load(self.path.with_suffix(".got.npz")).values()))

    def step(self, output: int = 0) -> float:
        """The step of the grid of an output; of 8 bits over its values where it ends in floating point."""
        last = self.makers[self.graph.output[output].name]
        if last.op_type != "DequantizeLinear":
            return float(self.wanted[output].abs().max()) / 127
        return float(self.values[last.input[1]])


def elsewhere(*written: Written) -> None:
    paths = [str(each.path) for each in written]
    done = subprocess.run([sys.executable, "-c", RUN, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def calibrated(model: nn.Module, *inputs: Tensor) -> nn.Module:
    calibrate(model, [inputs], NAIVE)
    return model.eval()


class Beside(nn.Module):
    """Layers side by side, each with an input of its own."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, inputs, strict=True))


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Written:
    made = [
        quantized_layer(formats.get(name).from_layer(dense, choice.rank, choice.options), choice)
        for name, (_, _, dense, choice) in FIRST.items()
    ]
    inputs = tuple(case.input(6, dtype=torch.float32) for _, case, _, _ in FIRST.values())
    written = Written(calibrated(Beside(made), *inputs), inputs, tmp_path_factory.mktemp("layers") / "all")
    elsewhere(written)
    return written


@pytest.mark.parametrize("name", FIRST)
def test_every_format_gives_the_same_in_another_process(layers: Written, name: str) -> None:
    index = list(FIRST).index(name)
    off = (layers.got[index] - layers.wanted[index]).abs() / layers.step(index)
    assert float(off.quantile(0.99)) <= 1
    assert float(off.max()) <= 2  # two roundings in a row may both fall on the other side


@pytest.mark.parametrize("row", list(decomposed_layers()), ids=lambda row: row[0])
def test_whole_number_weights_give_the_same_in_pytorch(row: Any) -> None:
    _, case, dense, choice = row
    inputs = case.input(6, dtype=torch.float32)
    model = quantized_layer(
        nn.Sequential(formats.get(choice.format).from_layer(dense, choice.rank, choice.options)), choice
    )
    program = deployable(calibrated(model, inputs))
    assert not leaves(program)
    stored = [value for name, value in program.state_dict().items() if name.endswith(".weight")]
    assert stored
    assert all(value.dtype == torch.int8 for value in stored)
    with torch.no_grad():
        torch.testing.assert_close(program(inputs), model(inputs), rtol=1e-4, atol=1e-4)


def close(written: Written, share: float) -> None:
    """Outputs differ by no more than a share of the largest."""
    (got,), (wanted,) = written.got, written.wanted
    torch.testing.assert_close(got, wanted, rtol=0, atol=share * float(wanted.abs().max()))


@pytest.fixture(scope="module")
def net() -> tuple[nn.Module, tuple[Tensor]]:
    plain, _ = apply(network(), PLAN)
    return calibrated(plain, images()), (images(),)


@pytest.fixture(scope="module")
def whole(net: tuple[nn.Module, tuple[Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Written:
    written = Written(*net, tmp_path_factory.mktemp("net") / "net")
    elsewhere(written)
    return written


class TestNetwork:
    def test_outputs_are_those_of_the_model(self, whole: Written) -> None:
        close(whole, 0.03)

    def test_convolutions_with_bits_run_with_whole_numbers(self, whole: Written) -> None:
        assert kernels(whole.file) == (4, 5)  # the linear layer has no bits

    @pytest.mark.parametrize("size", [1, 2, 7])
    def test_at_any_batch_size(self, whole: Written, size: int) -> None:
        run = session(whole.file)
        (got,) = run.run(None, {run.get_inputs()[0].name: whole.inputs[0][:size].numpy()})
        np.testing.assert_allclose(got, whole.got[0][:size].numpy(), atol=1e-5)

    def test_odd_ranks_are_filled_up_and_weights_are_whole(self, whole: Written) -> None:
        weights = [
            whole.values[whole.makers[node.input[1]].input[0]] for node in whole.graph.node if node.op_type == "Conv"
        ]
        assert [weight.shape[:2] for weight in weights] == [(16, 3), (8, 16), (8, 8), (16, 8)]
        assert all(weight.dtype == np.uint8 for weight in weights)

    def test_small_weights_are_exact_as_int8(self, tmp_path: Path) -> None:
        """Four bits cannot overflow the sums of pairs in 16 bits that processors without dot products take."""
        plan = Plan.of({name: Choice(c.format, c.rank, (), 4, 8) for name, c in PLAN.layers})
        model = calibrated(apply(network(), plan)[0], images())
        runs = [Written(model, (images(),), tmp_path / str(unsigned), unsigned) for unsigned in (False, True)]
        elsewhere(*runs)
        torch.testing.assert_close(runs[0].got[0], runs[1].got[0], rtol=0, atol=1e-5)

    def test_weights_alone(self, tmp_path: Path) -> None:
        plan = Plan.of({"3": Choice("tucker2", (7, 5), (), 8)})
        written = Written(calibrated(apply(network(), plan)[0], images()), (images(),), tmp_path / "net")
        elsewhere(written)
        close(written, 1e-4)
        assert kernels(written.file) == (0, 5)


class Residual(nn.Module):
    """Sums, a shortcut by slices and zeros, two readers of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.right, self.last = nn.Conv2d(8, 16, 1, 2), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        short = nn.functional.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.last(torch.relu(self.left(y) + self.right(y) + short)).mean((2, 3))


@pytest.fixture(scope="module")
def residual() -> tuple[nn.Module, tuple[Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Residual().eval()
    plan = Plan.of({name: Choice("dense", (), (), 8, 8) for name in ("first", "left", "right", "last")})
    return calibrated(with_bits(model, plan), images()), (images(),)


def test_sums_run_with_whole_numbers(residual: tuple[nn.Module, tuple[Tensor]], tmp_path: Path) -> None:
    written = Written(*residual, tmp_path / "net")
    elsewhere(written)
    close(written, 0.03)
    target = tmp_path / "optimised.onnx"
    session(written.file, optimised=target)
    types = [node.op_type for node in onnx.load(target).graph.node]
    assert (types.count("QLinearConv"), types.count("QLinearAdd")) == (4, 2)


def test_odd_channels(tmp_path: Path) -> None:
    """A bias that 32 bits do not hold on its channel's grid, and a channel of zeros."""
    layer = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        layer.weight[1] *= 1e-9
        layer.bias[1] = 50.0  # type: ignore[index]
        layer.weight[2] = 0
    model = nn.Sequential(quantized_layer(layer, Choice("dense", (), (), 8, 8)))
    written = Written(calibrated(model, images()), (images(),), tmp_path / "net")
    elsewhere(written)
    assert float((written.got[0] - written.wanted[0]).abs().max()) <= 1.01 * written.step()
