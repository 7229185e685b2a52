"""The part of the format contract about layers: what is taken, what it costs, what it computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from autorank import formats
from autorank.errors import FormatError
from autorank.formats import Options
from autorank.testing import cases
from autorank.testing.cases import Case, dense, random
from autorank.testing.format_base import ContractBase, one_at_top
from autorank.types import LayerSpec


class LayerContract(ContractBase):
    """The layer that a format builds, and what the format says about it."""

    # What it takes and what it refuses

    def test_is_registered_under_its_name(self) -> None:
        """`formats.get` finds it."""
        assert self.format.name == self.format_name
        assert self.format_name in formats.names()

    def test_takes_the_kinds_it_claims_and_no_other(self) -> None:
        """Every kind in `kinds` is really taken: a format cannot pass by refusing."""
        taken = {case.spec.kind for case in self.grid() for _ in self.choices(case.spec)}
        assert taken == set(self.kinds)

    @pytest.mark.parametrize(
        "spec", cases.odd(), ids=lambda s: f"{s.kind}-{'x'.join(map(str, s.weight_shape))}-g{s.groups}"
    )
    def test_takes_a_layer_or_says_why_not(self, spec: LayerSpec) -> None:
        """A layer is made smaller or refused with a reason that every method repeats."""
        for options in self.format.variants(spec) or ((),):
            reason = self.format.supports(spec, options)
            if reason is None:
                top = self.format.max_rank(spec, options)
                corners = {tuple(1 for _ in top), top, *one_at_top(top)}
                assert min(self.format.cost(spec, rank, options).params for rank in corners) < spec.params
                continue
            assert spec.kind in reason
            for call in (self.format.factor_shapes, self.format.cost, self.format.layer):
                with pytest.raises(FormatError, match=spec.name):
                    call(spec, (1,) * len(self.format.rank_names), options)
            with pytest.raises(FormatError, match=spec.name):
                self.format.fit(torch.ones(spec.weight_shape), spec, (1,) * len(self.format.rank_names), options)

    def test_rank_out_of_range_names_the_allowed(self, sample: Case) -> None:
        """A wrong rank is a one-line error with the layer and the range of each mode."""
        for options in self.choices(sample.spec):
            top = self.format.max_rank(sample.spec, options)
            wrong = [tuple(0 for _ in top), (*top, 1), (), tuple(float(r) for r in top), tuple(-1 for _ in top)]
            wrong += [tuple(r + (i == j) for i, r in enumerate(top)) for j in range(len(top))]
            for rank in wrong:
                with pytest.raises(FormatError) as caught:
                    self.format.fit(random(sample.spec.weight_shape, 0), sample.spec, rank, options)  # type: ignore[arg-type]
                message = str(caught.value)
                assert "\n" not in message
                assert sample.spec.name in message
                for name, limit in zip(self.format.rank_names, top, strict=True):
                    assert f"{name} from 1 to {limit}" in message

    @pytest.mark.parametrize(
        "wrong",
        [(("colour", "red"),), (("whiten", "yes"),), (("shrink", 2.0),), (("shrink", "much"),), (("shrink", True),)],
        ids=str,
    )
    def test_wrong_options_are_errors(self, wrong: Options, sample: Case) -> None:
        """An unknown option or value is refused by name."""
        for options in self.choices(sample.spec):
            reason = self.format.supports(sample.spec, tuple(sorted(options + wrong)))
            assert reason is not None
            assert wrong[0][0] in reason

    # The layer and its cost

    def test_layer_equals_dense_layer_with_the_reconstruction(self, case: Case) -> None:
        """The factors compute what the dense convolution with the reconstructed weight computes."""
        spec = case.spec
        for options in self.choices(spec):
            bias = random((spec.out_channels,), 2) if spec.bias else None
            rank = self.middle_rank(spec, options)
            shapes = self.format.factor_shapes(spec, rank, options)
            factors = {name: random(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
            layer = self.format.layer(spec, rank, options, factors, bias)
            reference = dense(spec, self.format.reconstruct(factors, spec, rank, options), bias)
            for batch in (1, 3):
                x = case.input(batch)
                torch.testing.assert_close(layer(x), reference(x), rtol=1e-9, atol=1e-9)
            if spec.kind != "linear":  # PyTorch's convolutions take one example without a batch dimension, too
                torch.testing.assert_close(layer(x[0]), reference(x[0]), rtol=1e-9, atol=1e-9)

    def test_cost_equals_what_runs(self, case: Case) -> None:
        """The closed forms equal PyTorch's counter and the parameters that are there."""
        spec = case.spec
        for options in self.choices(spec):
            rank = self.middle_rank(spec, options)
            layer = self.format.layer(spec, rank, options).eval()
            cost = self.format.cost(spec, rank, options)
            assert cost.params == sum(p.numel() for p in layer.parameters())
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                layer(case.input(1, dtype=torch.float32))
            assert cost.macs == len(spec.calls) * counter.get_total_flops() // 2

    def test_cost_equals_fvcore_at_every_corner_of_the_ranks(self, sample: Case) -> None:
        """The closed forms equal fvcore's count, at rank 1, in the middle and with modes at full rank."""
        from fvcore.nn import FlopCountAnalysis, parameter_count
        from fvcore.nn.jit_handles import conv_flop_count, get_shape

        spec = sample.spec
        for options in self.choices(spec):
            top = self.format.max_rank(spec, options)
            for rank in {tuple(1 for _ in top), self.middle_rank(spec, options), top, *one_at_top(top)}:
                layer = self.format.layer(spec, rank, options).eval()
                analysis = FlopCountAnalysis(layer, (sample.input(1, dtype=torch.float32),))
                analysis.unsupported_ops_warnings(False)
                # fvcore passes over convolutions whose padding is a word.
                analysis.set_op_handle(
                    "aten::_convolution_mode", lambda i, o: conv_flop_count(*map(get_shape, (i[0], i[1], o[0])))
                )
                cost = self.format.cost(spec, rank, options)
                assert cost.macs == len(spec.calls) * analysis.total()
                assert cost.params == parameter_count(layer)[""]

    def test_factor_shapes_are_those_of_the_fit(self, sample: Case) -> None:
        """The fit returns contiguous float32 factors of the announced shapes and order."""
        for options in self.choices(sample.spec):
            top = self.format.max_rank(sample.spec, options)
            for rank in {self.middle_rank(sample.spec, options), top, *one_at_top(top)}:
                factors = self.format.fit(random(sample.spec.weight_shape, 0), sample.spec, rank, options)
                shapes = {name: tuple(factor.shape) for name, factor in factors.items()}
                assert list(shapes.items()) == list(self.format.factor_shapes(sample.spec, rank, options).items())
                assert all(factor.dtype == torch.float32 and factor.is_contiguous() for factor in factors.values())

    def test_fresh_layer_has_the_output_variance_of_a_fresh_dense_layer(self, sample: Case) -> None:
        """Training can start from the initialisation as it could from the dense layer's."""
        spec = sample.spec
        x = sample.input(16, dtype=torch.float32)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            for options in self.choices(spec):
                rank = self.middle_rank(spec, options)
                ours, theirs = 0.0, 0.0
                for _ in range(150):
                    ours += float(self.format.layer(spec, rank, options)(x).square().mean())
                    plain = dense(spec, torch.zeros(spec.weight_shape))
                    plain.reset_parameters()  # type: ignore[operator]
                    theirs += float(plain(x).square().mean())
                assert ours == pytest.approx(theirs, rel=0.15)

    def test_wrong_factors_or_bias_are_errors(self, sample: Case) -> None:
        """Factors or a bias that do not fit are errors that name the layer."""
        spec = sample.spec
        for options in self.choices(spec):
            rank = self.middle_rank(spec, options)
            factors = self.format.fit(random(spec.weight_shape, 0), spec, rank, options)
            with pytest.raises(FormatError, match=spec.name):
                self.format.layer(spec, rank, options, {"nonsense": torch.zeros(1)})
            with pytest.raises(FormatError, match=spec.name):
                self.format.layer(spec, rank, options, factors, torch.zeros(spec.out_channels + 1))

    # The module as PyTorch handles it

    def test_gradients(self, sample: Case) -> None:
        """Gradients with respect to input and factors are right."""
        for options in self.choices(sample.spec):
            layer = self.format.layer(sample.spec, self.middle_rank(sample.spec, options), options).double()
            names, values = zip(*layer.named_parameters(), strict=True)

            def run(x: Tensor, *parameters: Tensor, layer: nn.Module = layer, names: tuple[str, ...] = names) -> Tensor:
                return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

            assert torch.autograd.gradcheck(run, (sample.input(1).requires_grad_(), *values), fast_mode=True)

    def test_factors_are_read_back_from_the_layer(self, sample: Case) -> None:
        """What a module holds comes back in the shapes of the fit, trained or not, so that it can be fitted again."""
        for options in self.choices(sample.spec):
            rank = self.format.max_rank(sample.spec, options)
            shapes = self.format.factor_shapes(sample.spec, rank, options)
            factors = {name: random(shape, i).float() for i, (name, shape) in enumerate(shapes.items())}
            layer = self.format.layer(sample.spec, rank, options, factors)
            found = self.format.factors_of(layer, sample.spec, rank, options)
            assert list(found) == list(factors)
            for name, factor in factors.items():
                torch.testing.assert_close(found[name], factor, rtol=0, atol=0)

    def test_copies_and_state_dicts(self, sample: Case) -> None:
        """Deep copies and reloaded modules compute the same; no memory is shared with the factors."""
        spec = sample.spec
        x = sample.input(2, dtype=torch.float32)
        for options in self.choices(spec):
            rank = self.middle_rank(spec, options)
            factors = self.format.fit(random(spec.weight_shape, 0), spec, rank, options)
            layer = self.format.layer(spec, rank, options, factors)
            expected = layer(x)
            assert torch.equal(copy.deepcopy(layer)(x), expected)
            fresh = self.format.layer(spec, rank, options)
            fresh.load_state_dict(layer.state_dict(), strict=True)
            assert torch.equal(fresh(x), expected)
            for factor in factors.values():
                factor.zero_()
            assert torch.equal(layer(x), expected), "the module shares memory with the factors"

    def test_export(self, sample: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
        """`torch.export` saves it and loads it back."""
        options = next(self.choices(sample.spec))
        layer = self.format.layer(sample.spec, self.middle_rank(sample.spec, options), options).eval()
        x = sample.input(2, dtype=torch.float32)
        path = tmp_path_factory.mktemp("export") / "layer.pt2"
        torch.export.save(torch.export.export(layer, (x,)), path)
        torch.testing.assert_close(torch.export.load(path).module()(x), layer(x))

    def test_channels_last(self, sample: Case) -> None:
        """The memory layout changes nothing."""
        layouts = {"conv2d": torch.channels_last, "conv3d": torch.channels_last_3d}
        for options in self.choices(sample.spec):
            layer = self.format.layer(sample.spec, self.middle_rank(sample.spec, options), options)
            x = sample.input(2, dtype=torch.float32)
            expected = layer(x)
            layout = layouts.get(sample.spec.kind, torch.preserve_format)
            if sample.spec.kind in layouts:
                layer = layer.to(memory_format=layout)  # type: ignore[call-overload]
            torch.testing.assert_close(layer(x.clone(memory_format=layout)), expected)

    def test_onnx(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        """ONNX Runtime computes what PyTorch does, for any batch size."""
        import onnxruntime

        kinds: dict[str, Case] = {}
        for sample in self.few():
            kinds.setdefault(sample.spec.kind, sample)
        kind = next(kind for kind in ("conv2d", "conv_transpose2d", "linear", *kinds) if self._takes(kinds.get(kind)))
        sample, path = kinds[kind], tmp_path_factory.mktemp("onnx") / "layer.onnx"
        options = next(self.choices(sample.spec))
        layer = self.format.layer(sample.spec, self.middle_rank(sample.spec, options), options).eval()
        x = sample.input(2, dtype=torch.float32)
        batch = {0: torch.export.Dim("batch")}
        torch.onnx.export(layer, (x,), path, dynamo=True, dynamic_shapes=(batch,), verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for rows in (x, sample.input(5, dtype=torch.float32)):
            (found,) = session.run(None, {session.get_inputs()[0].name: rows.numpy()})
            torch.testing.assert_close(torch.from_numpy(found), layer(rows), rtol=1e-4, atol=1e-5)

    def _takes(self, sample: Case | None) -> bool:
        return sample is not None and any(True for _ in self.choices(sample.spec))

    def test_from_layer(self, sample: Case) -> None:
        """A layer is decomposed on its own, or built with fresh values for training from scratch."""
        spec = sample.spec
        options = next(self.choices(spec))
        rank = self.middle_rank(spec, options)
        layer = dense(spec, random(spec.weight_shape, 0)).float()
        x = sample.input(2, dtype=torch.float32)
        factors = self.format.fit(random(spec.weight_shape, 0).float(), spec, rank, options)
        bias = layer.bias.detach() if spec.bias else None  # type: ignore[operator]
        expected = self.format.layer(spec, rank, options, factors, bias)(x)
        torch.testing.assert_close(self.format.from_layer(layer, rank, options)(x), expected)
        fresh = self.format.from_layer(layer.double(), rank, options, fresh=True)
        assert {parameter.dtype for parameter in fresh.parameters()} == {torch.float64}
        assert fresh(x.double()).shape == expected.shape
        with pytest.raises(FormatError, match="BatchNorm"):
            self.format.from_layer(nn.BatchNorm2d(3), rank, options)
