"""What the profile finds in networks of every kind, and in words why it leaves things alone."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from autorank import formats
from autorank.errors import ModelError
from autorank.layout import canonical_weight
from autorank.measure import count
from autorank.profiling import profile, spec_of
from autorank.types import CallSize, LayerSpec, LeftAlone, ModelProfile
from tests.models import ZOO, make


def reasons(result: ModelProfile) -> dict[str, str]:
    return {item.name: item.reason for item in result.left_alone}


@pytest.mark.parametrize("name", ZOO)
def test_every_layer_is_listed_once_and_its_macs_are_exact(name: str) -> None:
    model, inputs = make(name)
    result = profile(model, inputs)
    listed = [spec.name for spec in result.layers] + [item.name for item in result.left_alone]
    assert len(listed) == len(set(listed))
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    assert {n for n, m in model.named_modules() if isinstance(m, kinds)} <= set(listed)
    assert result.dense == count(model, inputs)[0]
    modules = dict(model.named_modules())
    for spec in result.layers:
        module = modules[spec.name]
        assert spec.params == sum(p.numel() for p in module.parameters())
        assert spec.weight_shape == tuple(canonical_weight(module.weight, spec).shape)
    counted = sum(spec.macs for spec in result.layers) + sum(item.macs for item in result.left_alone)
    assert counted == result.dense.macs


def test_layers_are_in_the_order_of_their_first_call() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(8, 8)
            self.first = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    assert [s.name for s in profile(Backwards(), (torch.randn(1, 8),)).layers] == ["first", "last"]


def test_a_shared_module_has_all_its_calls_under_its_first_name() -> None:
    result = profile(*make("shared_residual"))
    assert [spec.name for spec in result.layers] == ["stem", "block.0", "head"]
    assert result.layer("block.0").calls == (CallSize(1, (8, 8), (8, 8)), CallSize(1, (4, 4), (4, 4)))


def test_dimensions_folded_into_the_batch_are_seen_there() -> None:
    result = profile(*make("sequence"))
    assert result.layer("up").calls == (CallSize(1, (7,), (7,)),)
    assert result.layer("folded").calls == (CallSize(7, (), ()),)


def test_everything_about_a_convolution_is_read() -> None:
    result = profile(*make("padding_modes"))
    spec = result.layer("reflect")
    assert (spec.stride, spec.padding, spec.padding_mode) == ((1, 2), (1, 2), "reflect")
    assert result.layer("grouped").groups == 2
    assert result.layer("grouped").in_channels == 8
    assert result.layer("dilated").dilation == (2, 2)
    assert not result.layer("dilated").bias
    assert result.layer("same").padding == "same"
    assert result.layer("replicate").calls == (CallSize(1, (11, 6), (11, 4)),)


@pytest.mark.parametrize(
    ("network", "layer", "words"),
    [
        ("generator", "crop", "does more with it than call it, and fails when it is replaced (TypeError"),
        ("tied", "decoder", "tied to embed.weight"),
        ("tied", "embed", "no format supports Embedding layers"),
        ("reparametrised", "new", "WeightNorm"),
        ("reparametrised", "old", "WeightNorm"),
        ("reparametrised", "spectral", "SpectralNorm"),
        ("subclasses", "own", "StandardisedConv2d has its own forward"),
        ("never_called", "unused", "never called"),
        ("attention", "attention", "no format supports MultiheadAttention layers"),
        ("attention", "attention.out_proj", "MultiheadAttention"),
        ("attention", "position", "a parameter that Attention uses in its own way"),
    ],
)
def test_what_is_left_alone_has_its_reason(network: str, layer: str, words: str) -> None:
    assert words in reasons(profile(*make(network)))[layer]


@pytest.mark.parametrize("name", ["tiny_conv", "sequence", "conv1d", "shared_residual", "padding_modes"])
def test_norms_biases_and_plain_layers_are_not_left_alone(name: str) -> None:
    assert profile(*make(name)).left_alone == ()


def test_a_subclass_that_keeps_forward_is_a_layer() -> None:
    assert [spec.name for spec in profile(*make("subclasses")).layers] == ["same"]


def test_macs_of_what_is_left_alone() -> None:
    by_name = {item.name: item for item in profile(*make("generator")).left_alone}
    assert by_name["crop"].macs == 15 * 9 * 8 * 8 * 3 * 3
    assert by_name["crop"].params == 8 * 8 * 3 * 3 + 8
    by_name = {item.name: item for item in profile(*make("attention")).left_alone}
    assert by_name["attention"].macs == 4 * 6 * 16 * 16 + 2 * 6 * 6 * 16


def test_the_reason_when_no_format_gains_anything_comes_from_the_formats() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4))
    result = profile(model, (torch.randn(1, 4, 3, 3),))
    assert result.layers == ()
    for name in formats.names():
        assert name in reasons(result)["0"]


class Holder(nn.Module):
    """One linear layer that is used, or held, in some unusual way."""

    def __init__(self, run: Callable[[Holder, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def held(how: str) -> Holder:
    model = Holder(lambda self, x: self.layer(x))
    if how == "list":
        model.all = [model.layer]
    elif how == "nested":
        model.all = {"a": (model.layer,)}
    elif how == "method":
        model.call = model.layer.forward
    elif how == "partial":
        model.call = functools.partial(model.layer)
    return model


@pytest.mark.parametrize("how", ["list", "nested", "method", "partial"])
def test_a_layer_that_is_also_held_outside_the_registered_places_is_left_alone(how: str) -> None:
    assert "also kept in the plain attribute" in reasons(profile(held(how), (torch.randn(1, 16),)))["layer"]


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda self, x: self.layer(x.to(self.layer.weight.dtype)), id="dtype"),
        pytest.param(lambda self, x: self.layer(x) * self.layer.in_features, id="size"),
    ],
)
def test_a_layer_whose_attributes_the_model_reads_is_left_alone(run: Callable[[Holder, Tensor], Tensor]) -> None:
    model = nn.Sequential(nn.Linear(16, 16), Holder(run))
    result = profile(model, (torch.randn(2, 16),))
    assert [spec.name for spec in result.layers] == ["0"]
    assert "the model does more with it than call it" in reasons(result)["1.layer"]


def test_the_fused_encoder_layer_reads_the_weights_of_its_linear_layers() -> None:
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    assert {"linear1", "linear2", "self_attn"} <= set(reasons(profile(encoder, (torch.randn(2, 5, 32),))))


def hooked() -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.register_forward_hook(lambda module, args, result: result * 2)
    return layer


def patched() -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.5)


def widened() -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.register_buffer("scale", torch.ones(1))
    return layer


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (hooked(), "hooks"),
        (patched(), "own forward"),
        (pruned(), "L1Unstructured"),
        (widened(), "'scale'"),
        (nn.Linear(4, 4, dtype=torch.complex64), "complex64"),
        (nn.Linear(4, 4, device="meta"), "meta device"),
        (nn.LazyLinear(4), "lazy"),
        (nn.LazyConv2d(4, 3), "lazy"),
        (nn.ReLU(), "only convolution and linear layers"),
    ],
    ids=["hooked", "patched", "pruned", "buffer", "complex", "meta", "lazy", "lazy_conv", "relu"],
)
def test_reasons_that_the_module_alone_shows(module: nn.Module, words: str) -> None:
    found = spec_of("x", module)
    assert isinstance(found, LeftAlone)
    assert words in found.reason
    assert "\n" not in found.reason


def test_a_plain_module_is_described() -> None:
    assert spec_of("x", nn.Linear(3, 5, bias=False)) == LayerSpec("x", "linear", (5, 3))
    assert spec_of("c", nn.Conv1d(4, 6, 3, stride=2, padding="valid", groups=2)) == LayerSpec(
        "c", "conv1d", (6, 2, 3), (2,), "valid", "zeros", (1,), 2, True
    )


def test_a_transposed_convolution_is_described_like_the_others() -> None:
    module = nn.ConvTranspose2d(6, 8, (3, 2), stride=(2, 3), padding=1, output_padding=(1, 0), groups=2, bias=False)
    spec = spec_of("up", module)
    assert spec == LayerSpec(
        "up", "conv_transpose2d", (8, 3, 3, 2), (2, 3), (1, 1), "zeros", (1, 1), 2, output_padding=(1, 0)
    )
    assert (spec.in_channels, spec.out_channels, spec.kernel) == (6, 8, (3, 2))


def test_a_transposed_convolution_uses_its_weights_once_per_input_position() -> None:
    result = profile(*make("decoder"))
    assert result.layer("up").calls == (CallSize(1, (6, 6), (12, 12)),)
    assert result.layer("up").macs == 6 * 6 * 16 * 8 * 4 * 4
    assert result.layer("up").params == 16 * 8 * 4 * 4 + 8


def test_weights_that_share_memory_are_tied_and_neighbours_in_a_buffer_are_not() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight.data = model[0].weight.data.t()
    flat = torch.randn(2, 16, 16)
    model[2].weight.data, model[3].weight.data = flat[0], flat[1]
    result = profile(model, (torch.randn(1, 16),))
    assert [spec.name for spec in result.layers] == ["2", "3"]
    assert "tied to 1.weight" in reasons(result)["0"]
    assert "tied to 0.weight" in reasons(result)["1"]


def test_lazy_modules_that_never_ran_are_left_alone_and_the_model_is_not_initialised() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.LazyLinear(16))
    result = profile(model, (torch.randn(2, 8),))
    assert [spec.name for spec in result.layers] == ["0"]
    assert "lazy" in reasons(result)["1"]
    assert isinstance(model[1], nn.LazyLinear)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "part"])
def test_torchscript_is_an_error_that_says_what_to_do(whole: bool) -> None:
    model = torch.jit.trace(nn.Sequential(nn.Linear(8, 8)), torch.randn(1, 8))
    with pytest.raises(ModelError, match="is TorchScript; build it from its Python classes"):
        profile(model if whole else nn.Sequential(nn.ReLU(), model), (torch.randn(2, 8),))


def test_a_layer_called_with_a_keyword_or_without_a_batch_is_seen() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.b = nn.Conv1d(16, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(input=x)[0].T)

    result = profile(Odd(), (torch.randn(2, 5, 16),))
    assert result.layer("a").calls == (CallSize(1, (5,), (5,)),)
    assert result.layer("b").calls == (CallSize(1, (5,), (3,)),)
    assert result.dense.macs == sum(spec.macs for spec in result.layers)


def test_the_model_itself_may_be_a_layer() -> None:
    assert [spec.name for spec in profile(nn.Linear(16, 16), (torch.randn(2, 16),)).layers] == [""]


def test_a_model_that_needs_a_larger_batch_is_an_error_of_one_line() -> None:
    class Pairs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(-1, 2, 3)

    with pytest.raises(ModelError) as error:
        profile(Pairs(), (torch.randn(4, 3),))
    assert "a batch of one example (inputs: 1×3 float32): RuntimeError" in str(error.value)


def test_hooks_of_the_profile_do_not_stay() -> None:
    model, inputs = make("tiny_conv")
    profile(model, inputs)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert type(model.conv1) is nn.Conv2d
