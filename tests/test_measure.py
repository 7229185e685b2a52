"""Counting against PyTorch's own counter and by hand, and that measuring leaves no trace on the measured model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from autorank import formats, measure
from autorank.errors import ModelError
from autorank.measure import batch_one, count, time_layers, time_module
from autorank.opcounts import einsum_macs
from autorank.profiling import profile
from autorank.quant.size import stored_bytes
from autorank.types import Choice, LayerSpec
from tests.models import ZOO, make

# Spectral norm multiplies an 8 × 12 weight with a vector, and that with another; PyTorch's counter has neither product.
UNSEEN_BY_TORCH = {"reparametrised": 8 * 12 + 8}


def torch_macs(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(*(x[:1] for x in inputs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", ZOO)
def test_macs_are_half_of_torch_flops(name: str) -> None:
    model, inputs = make(name)
    cost, unsupported = count(model, inputs)
    assert cost.macs == torch_macs(model, inputs) + UNSEEN_BY_TORCH.get(name, 0)
    assert isinstance(cost.macs, int)
    assert unsupported == ()


class Products(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.matrix = nn.Parameter(torch.randn(5, 6))
        self.stack = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        m, s = self.matrix, self.stack
        results = {
            "broadcast_right": lambda: m @ s + x.sum(),
            "broadcast_left": lambda: x[0] @ s[0],
            "vector": lambda: m @ s[0, :, 0] + x.sum(),
            "baddbmm": lambda: torch.baddbmm(x.new_zeros(3, 5, 4), m.expand(3, 5, 6), s),
            "addbmm": lambda: torch.addbmm(x.new_zeros(5, 4), m.expand(3, 5, 6), s),
            "einsum": lambda: torch.einsum("ij,bjk->bik", m, s),
            "einsum_outer": lambda: torch.einsum("ij,kl->ijkl", m, m),
            "einsum_implicit": lambda: torch.einsum("ij,jk", m, s[0]),
            "attention": lambda: nn.functional.scaled_dot_product_attention(x, x, x[..., :2]),
            "unbatched_conv": lambda: nn.functional.conv1d(m, s),
        }
        return results[self.kind]()


@pytest.mark.parametrize(
    ("kind", "macs"),
    [
        ("broadcast_right", 3 * 5 * 6 * 4),
        ("broadcast_left", 7 * 6 * 4),
        ("vector", 5 * 6),
        ("baddbmm", 3 * 5 * 6 * 4),
        ("addbmm", 3 * 5 * 6 * 4),
        ("einsum", 3 * 5 * 6 * 4),
        ("einsum_outer", 30 * 30),
        ("einsum_implicit", 5 * 6 * 4),
        ("attention", 7 * 7 * (6 + 2)),
    ],
)
def test_macs_of_products_by_hand(kind: str, macs: int) -> None:
    cost, unsupported = count(Products(kind), (torch.randn(2, 7, 6),))
    assert cost.macs == macs
    assert unsupported == ()


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
        ("...ij,jk->...ik", [(2, 7, 3, 4), (4, 5)], 2 * 7 * 3 * 4 * 5),
        ("b...,b...->b", [(2, 3, 4), (2, 3, 4)], 24),
        ("ijm,jk->ik", [(3, 4, 9), (4, 5)], 60),
        ("ij->ji", [(3, 4)], 0),
        ("ij,jk,kl->il", [(3, 4), (4, 5), (5, 6)], None),
    ],
)
def test_einsum_macs(equation: str, shapes: list[tuple[int, ...]], macs: int | None) -> None:
    assert einsum_macs(equation, shapes) == macs


class Uncountable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lstm(x)[0]
        return torch.einsum("bij,bjk,bkl->bil", y, y.mT, y)


def test_operations_that_are_not_counted_are_named(caplog: pytest.LogCaptureFixture) -> None:
    _, unsupported = count(Uncountable(), (torch.randn(2, 3, 4),))
    assert unsupported == (("aten::einsum with 3 operands", 1), ("aten::lstm", 1))
    assert not caplog.records


def test_bytes_follow_the_stored_type_and_shared_parameters_count_once() -> None:
    model, inputs = make("tied")
    expected = 20 * 16 + 16 * 16 + 16
    assert count(model, inputs)[0].params == expected
    assert count(model, inputs)[0].bytes == 4 * expected
    half = make("tied")[0].to(torch.bfloat16)
    assert count(half, inputs)[0].bytes == 2 * expected
    half.inner.float()
    assert sum(p.numel() for p in half.parameters()) == expected
    assert stored_bytes(half) == 2 * 320 + 4 * (256 + 16)


def test_count_changes_nothing_on_a_model_in_train_mode() -> None:
    model, inputs = make("tiny_conv")
    model.train()
    model.bn1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    count(model, inputs)
    profile(model, inputs)
    time_module(model, inputs, min_run_time=0.001)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [m.training for m in model.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_macs_are_per_example_and_do_not_depend_on_the_mode() -> None:
    model, inputs = make("tiny_conv")
    many, _ = count(model, inputs)
    one, _ = count(model.train(), (inputs[0][:1],))
    assert many == one


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "at least one tensor"),
        ([torch.randn(1)], "tuple of tensors"),
        ((torch.randn(2, 3), 5), "example input 1 must be a tensor, not int"),
        ((torch.randn(0, 3),), "shape (0, 3): it holds no example"),
    ],
    ids=["none", "list", "number", "empty"],
)
def test_wrong_example_inputs(inputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ModelError) as error:
        batch_one(inputs)
    assert message in str(error.value)


def test_a_model_that_does_not_run_gives_one_line_with_the_input_shapes() -> None:
    model, _ = make("tiny_conv")
    with pytest.raises(ModelError) as error:
        count(model, (torch.randn(2, 5, 8, 8),))
    assert "1×5×8×8 float32" in str(error.value)
    assert "RuntimeError" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_be_copied() -> None:
    model, inputs = make("tiny_conv")
    model.lock = __import__("threading").Lock()
    with pytest.raises(ModelError, match="cannot be deep-copied: TypeError"):
        count(model, inputs)


def test_time_of_a_module() -> None:
    model, inputs = make("tiny_conv")
    timing = time_module(model, inputs, threads=1, min_run_time=0.01)
    assert timing.median_ms > 0
    assert timing.spread_ms >= 0
    assert timing.runs >= measure.MIN_BLOCKS


def test_threads_are_restored_after_a_measurement() -> None:
    before = torch.get_num_threads()
    time_module(nn.Linear(4, 4), (torch.randn(2, 4),), threads=before + 1, min_run_time=0.001)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("name", ["padding_modes", "sequence", "conv1d", "conv3d", "shared_residual", "generator"])
def test_dense_layers_are_rebuilt_from_their_spec(name: str) -> None:
    model, inputs = make(name)
    for spec in profile(model, inputs).layers:
        original, layer = model.get_submodule(spec.name), measure.dense_layer(spec)
        layer.load_state_dict(original.state_dict())
        call = spec.calls[0]
        shape = (*call.input, spec.in_channels) if spec.kind == "linear" else (spec.in_channels, *call.input)
        x = torch.randn(2, *shape)
        assert torch.equal(layer(x), original(x))


def test_layers_of_equal_shape_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    real = measure.time_module

    def spy(module: nn.Module, inputs: tuple[Tensor, ...], *args: object, **kwargs: object) -> measure.Timing:
        seen.append(tuple(inputs[0].shape))
        return real(module, inputs, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "time_module", spy)
    model, inputs = make("shared_residual")
    specs = {spec.name: spec for spec in profile(model, inputs).layers}
    block = specs["block.0"]
    twin = LayerSpec("twin", *[getattr(block, f) for f in block.__slots__[1:]])
    choice = Choice("channel_svd", (4,))
    table = time_layers([(block, None), (twin, None), (twin, choice), (block, choice)], batch=3, min_run_time=0.001)
    assert sorted(seen) == [(3, 16, 4, 4)] * 2 + [(3, 16, 8, 8)] * 2
    assert set(table) == {("block.0", None), ("twin", None), ("twin", choice), ("block.0", choice)}
    assert table["block.0", None] == table["twin", None] > 0
    assert table["block.0", choice] == table["twin", choice]


def test_a_linear_layer_is_timed_on_its_leading_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def spy(module: nn.Module, inputs: tuple[Tensor, ...], *args: object) -> measure.Timing:
        seen.append(tuple(inputs[0].shape))
        assert math.prod(module(inputs[0]).shape[:-1]) == math.prod(inputs[0].shape[:-1])
        return measure.Timing(1.0, 0.0, 1)

    monkeypatch.setattr(measure, "time_module", spy)
    model, inputs = make("sequence")
    time_layers([(spec, None) for spec in profile(model, inputs).layers], batch=2)
    assert seen == [(2, 7, 12), (14, 32)]


def test_a_layer_without_calls_cannot_be_timed() -> None:
    with pytest.raises(ModelError, match="'a' cannot be timed"):
        time_layers([(LayerSpec("a", "linear", (4, 4)), None)])


def test_every_format_can_be_timed() -> None:
    model, inputs = make("tiny_conv")
    spec = profile(model, inputs).layers[1]
    supported = [name for name in formats.names() if formats.get(name).supports(spec) is None]
    pairs = [(spec, Choice(name, (1,) * len(formats.get(name).max_rank(spec)))) for name in supported]
    assert len(time_layers(pairs, min_run_time=0.001)) == len(supported) >= 3


def test_a_batch_repeats_the_first_example_and_leaves_what_has_no_dimension() -> None:
    x, scalar = torch.arange(6.0).reshape(2, 3), torch.tensor(4.0)
    for batch in (1, 5):
        rows, same = batch_one((x, scalar), batch)
        assert torch.equal(rows, x[:1].expand(batch, 3))
        assert rows.is_contiguous()
        assert torch.equal(same, scalar)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_layers_are_timed_in_the_models_number_type(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[set[torch.dtype], torch.dtype]] = []
    real = measure.time_module

    def time_one(module: nn.Module, inputs: tuple[torch.Tensor, ...], *rest: Any) -> Any:
        timed.append(({p.dtype for p in module.parameters()}, inputs[0].dtype))
        return real(module, inputs, *rest)

    monkeypatch.setattr(measure, "time_module", time_one)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 8)).to(dtype)
    specs = profile(model, (torch.randn(1, 8, 4, 4).to(dtype),)).layers
    assert {spec.dtype for spec in specs} == {str(dtype).removeprefix("torch.")}
    time_layers(
        [(spec, choice) for spec in specs for choice in (None, Choice("channel_svd", (2,)))], min_run_time=0.001
    )
    assert timed == [({dtype}, dtype)] * 4
    assert {p.dtype for spec in specs for p in measure.dense_layer(spec).parameters()} == {dtype}


class OnlyOn(nn.Module):
    """A model that runs only where it has been moved to, as one with a device's own operators does."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.now, self.conv = torch.device(device), torch.device("cpu"), nn.Conv2d(8, 8, 3)

    def to(self, device: Any) -> OnlyOn:  # type: ignore[override]
        self.now = torch.device(device)
        return super().to(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.now != self.device:
            raise RuntimeError(f"no such operator on {self.now}")
        return self.conv(x)


# Every PyTorch knows the CPU by two names.
@pytest.mark.parametrize("device", ["cpu:0", *(["cuda:0"] if torch.cuda.is_available() else [])])
def test_models_that_run_on_one_device_only_are_counted_and_profiled_there(device: str) -> None:
    model, plain, inputs = OnlyOn(device), OnlyOn("cpu"), (torch.randn(2, 8, 5, 5),)
    for use in (count, profile):
        with pytest.raises(ModelError, match="no such operator on cpu"):
            use(model, inputs)
    assert count(model, inputs, device) == count(plain, inputs)
    assert profile(model, inputs, device) == profile(plain, inputs)
    assert model.now == torch.device("cpu")
