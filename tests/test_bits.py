"""Bits as one more choice of a layer: in the search space, its costs, its error table, in trials and strategies."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import autorank
from autorank import deployment, formats, strategies
from autorank.errors import AutorankError, ConfigError, ExportError, SpaceError
from autorank.errortable import candidate_errors
from autorank.evaluate import evaluate
from autorank.front import Objective
from autorank.journal import FILE_NAME, read
from autorank.measure import count
from autorank.plan import apply
from autorank.profiling import profile
from autorank.quant import QuantSettings, leaves
from autorank.recover import Recovery
from autorank.restore import Restorer
from autorank.space import SearchSpace, build_space, read_space
from autorank.types import DENSE, Choice, Fidelity, Plan
from tests.models import TinyConv
from tests.tiny import task

TWO = (Objective("score", "max"), Objective("bops_kept", "min"))


def space_of(model: torch.nn.Module, inputs: torch.Tensor, names: list[str], **settings: Any) -> SearchSpace:
    given = {"formats": names, "whiten": ["none"], "ranks": {"macs_kept": [0.3, 0.6]}, **settings}
    return build_space(read_space({"version": 1, "defaults": given}), profile(model, (inputs,)))


@pytest.fixture(scope="module")
def tiny() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return TinyConv().eval(), torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("weights", "activations", "expected"),
    [
        (["none"], ["none"], {""}),
        (["none"], [8], {""}),
        ([8], ["none"], {"W8"}),
        (["none", 8], [8], {"", "W8A8"}),
        ([8, 4], ["none", 8], {"W8", "W8A8", "W4", "W4A8"}),
    ],
)
def test_activations_have_bits_where_weights_have(
    tiny: Any, weights: list[Any], activations: list[Any], expected: set[str]
) -> None:
    space = space_of(*tiny, ["tucker2"], weight_bits=weights, activation_bits=activations)
    decomposed = {c.choice.bits for layer in space.layers for c in layer.candidates if c.choice.format != DENSE}
    kept = {c.choice.bits for layer in space.layers for c in layer.candidates if c.choice.format == DENSE}
    assert decomposed == expected
    assert kept == expected - {""}
    assert space.quantizes == (expected != {""})


def test_a_format_may_have_bits_of_its_own(tiny: Any) -> None:
    space = space_of(*tiny, [{"name": "tucker2", "weight_bits": 4}, "channel_svd"], activation_bits=[8])
    bits = {(c.choice.format, c.choice.bits) for layer in space.layers for c in layer.candidates}
    assert bits == {("tucker2", "W4A8"), ("channel_svd", "")}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("weight_bits", [5], "weight_bits[0]: 5 bits are not among none, 8, 6, 4"),
        ("activation_bits", [4], "activation_bits[0]: 4 bits are not among none, 8"),
        ("weight_bits", [8, 8], "8 is given twice"),
        ("weight_bits", "eight", "'eight' bits are not among"),
    ],
)
def test_bits_that_there_are_not(tiny: Any, key: str, value: Any, said: str) -> None:
    with pytest.raises(SpaceError) as error:
        space_of(*tiny, ["tucker2"], **{key: value})
    assert said in str(error.value)


@pytest.mark.parametrize("name", formats.names())
def test_the_cost_in_closed_form_is_that_of_the_model(tiny: Any, name: str) -> None:
    model, inputs = tiny
    space = space_of(model, inputs, [name], weight_bits=["none", 8, 6, 4], activation_bits=["none", 8])
    bits = [c.choice.bits for layer in space.layers for c in layer.candidates]
    assert set(bits) == {"", *(f"W{w}{a}" for w in (8, 6, 4) for a in ("", "A8"))}
    for i in range(0, max(len(layer.candidates) for layer in space.layers), 3):
        plan = Plan.of({x.spec.name: x.candidates[i % len(x.candidates)].choice for x in space.layers})
        counted, _ = count(apply(model, plan)[0], (inputs,))
        assert replace(space.cost(plan), bops=None) == counted
    widths = {"": 32, "A": 32, "A8": 8}
    layer = space.layers[0]
    for candidate in layer.candidates:
        weight, _, activation = candidate.choice.bits.removeprefix("W").partition("A")
        plan = Plan.of({layer.spec.name: candidate.choice})
        rest = 32 * 32 * (space.dense.macs - layer.spec.macs)
        wanted = candidate.cost.macs * int(weight or 32) * widths[activation and f"A{activation}"]
        assert space.cost(plan).bops == rest + wanted


def test_the_error_of_a_kernel_on_its_levels_is_that_of_rounding(tiny: Any) -> None:
    model, inputs = tiny
    space = space_of(model, inputs, ["tucker2"], weight_bits=["none", 8, 4], activation_bits=["none", 8])
    table = candidate_errors(model, space.layers, None, None, 0)
    for layer in space.layers:
        name = layer.spec.name
        weight = model.get_submodule(name).weight.detach().double().numpy()  # type: ignore[union-attr]
        rows = weight.reshape(len(weight), -1)
        # The largest entry of a channel sets its range: no clipping does worse than the best one.
        step = np.abs(rows).max(1, keepdims=True) / 7
        nearest = np.linalg.norm(rows - step * np.clip(np.round(rows / step), -7, 7)) / np.linalg.norm(rows)
        assert table[name, Choice(DENSE, (), (), 4)].weight <= nearest * (1 + 1e-6)
        assert table[name, Choice(DENSE, (), (), 4)].weight > 0.3 * nearest
        for candidate in layer.candidates:
            plain = replace(candidate.choice, weight_bits=None, activation_bits=None)
            if candidate.choice.weight_bits is None or plain.format == DENSE:
                continue
            fitted = table[name, plain].weight
            eight, four = (table[name, replace(plain, weight_bits=bits)].weight for bits in (8, 4))
            assert eight == pytest.approx(fitted, rel=0.02)
            assert abs(four - fitted) >= abs(eight - fitted)


@pytest.fixture(autouse=True, scope="module")
def no_files_to_be_timed() -> Iterator[None]:
    """Writing an ONNX file for every point of every front takes minutes; tests/test_fronttime.py is about them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deployment, "write", Mock(side_effect=ExportError("not in this test")))
        yield


def settings(tmp_path: Path, **more: Any) -> dict[str, Any]:
    space = {
        "formats": ["channel_svd", "tucker2"],
        "whiten": ["both"],
        "ranks": {"macs_kept": [0.3, 0.6]},
        "weight_bits": ["none", 8, 4],
        "activation_bits": [8],
    }
    return {
        "executor": "inline",
        "strategy": "random",
        "space": {"version": 1, "defaults": space},
        "objectives": "accuracy,bops",
        "recovery": {"steps": 4, "batch_size": 16, "calibration": 32},
        "quantization": {"calibration": 32, "qat": 0.5},
        "calibration": 32,
        "progress": False,
        "trials": 5,
        "sweep_dir": tmp_path,
        **more,
    }


def essence(records: Any) -> list[tuple[Any, ...]]:
    return [(r.number, r.key, r.status, r.score, r.loss, r.cost, r.curve) for r in records]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> autorank.SearchResult:
    return autorank.search(task(), **settings(tmp_path_factory.mktemp("bits")))


def test_the_scored_model_is_the_quantized_one(swept: autorank.SearchResult) -> None:
    point = next(p for p in swept.points if any(choice.bits for _, choice in p.record.plan.layers))
    model = swept.model(point)
    found = leaves(model)
    named = {name for name, choice in point.record.plan.layers if choice.bits}
    assert {name for name in named if any(leaf.startswith(name) for leaf in found)} == named
    assert all(leaf.calibrated for leaf in found.values())
    for leaf in found.values():
        levels = leaf.integer_weight()
        assert int(levels.abs().max()) <= 2 ** (leaf.weight_bits - 1)
    assert evaluate(model, task(), "validation").score == point.record.score


def test_the_last_steps_are_taken_with_quantization(swept: autorank.SearchResult) -> None:
    quantized = [r for r in swept.records if any(c.bits for _, c in r.plan.layers)]
    assert quantized
    for record in quantized:
        assert [step for step, _ in record.curve] == sorted({step for step, _ in record.curve})
        assert record.curve[-1][0] >= 3
        assert "quantize" in record.seconds


def test_bit_operations_of_a_trial_are_those_of_its_layers(swept: autorank.SearchResult) -> None:
    dense = swept.header.dense_cost
    assert dense.bops == 1024 * dense.macs
    for record in swept.records:
        assert record.cost is not None
        saved = sum(
            1024 * x.macs_dense - x.macs * (x.choice.weight_bits or 32) * (x.choice.activation_bits or 32)
            for x in record.layers
        )
        assert record.cost.bops == dense.bops - saved
        assert record.kept["bops_kept"] == record.cost.bops / dense.bops


def test_the_same_seed_gives_the_same_sweep_and_a_journal_is_gone_on_with(
    swept: autorank.SearchResult, tmp_path: Path
) -> None:
    lines = (swept.directory / FILE_NAME).read_text().splitlines(keepends=True)
    (tmp_path / FILE_NAME).write_text("".join(lines[:3]))  # the header and two trials
    resumed = autorank.resume(tmp_path, task=task(), progress=False)
    assert essence(resumed.records) == essence(swept.records)


def test_a_journal_from_before_there_were_bits_is_read(swept: autorank.SearchResult, tmp_path: Path) -> None:
    lines = []
    for line in (swept.directory / FILE_NAME).read_text().splitlines():
        entry = json.loads(line)
        for holder in (entry, *(v for v in entry.values() if isinstance(v, dict))):
            for key in ("dense_cost", "cost", "kept"):
                if isinstance(holder.get(key), dict):
                    holder[key].pop("bops", None)
                    holder[key].pop("bops_kept", None)
            if isinstance(holder.get("objectives"), list):
                holder["objectives"] = [{**o, "name": o["name"].replace("bops", "macs")} for o in holder["objectives"]]
            if isinstance(holder.get("config"), dict):
                holder["config"].pop("quantization", None)
        lines.append(json.dumps(entry))
    (tmp_path / FILE_NAME).write_text("\n".join(lines) + "\n")
    assert len(read(tmp_path).records) == len(swept.records)


@pytest.mark.parametrize("in_order", [True, False])
def test_layers_in_order_and_trained_ones_have_bits_too(in_order: bool, tmp_path: Path) -> None:
    """The stages of a multi-stage search start from each other's weights."""
    recovery = {"steps": 2, "batch_size": 16, "calibration": 32, "in_order": in_order}
    result = autorank.search(task(), **settings(tmp_path, recovery=recovery, strategy="multi-stage", trials=4))
    assert not [record.reason for record in result.records if record.status == "failed"]
    assert any(choice.bits for record in result.records for _, choice in record.plan.layers)


@pytest.mark.parametrize("name", strategies.names())
def test_every_strategy_trades_bits_against_ranks(name: str, tmp_path: Path) -> None:
    """A bound that ranks alone cannot meet: the lowest of them keep more than a tenth of the operations."""
    options = {"learned-rank": {"points": 1, "iterations": 1, "steps": 0.5}}.get(name, {})
    result = autorank.search(
        task(), **settings(tmp_path, strategy={"name": name, "options": options}, constraints="bops<=0.1", trials=3)
    )
    assert result.points
    for point in result.points:
        assert point.record.kept["bops_kept"] <= 0.1
        assert any(choice.bits for _, choice in point.record.plan.layers)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objectives": "accuracy,latency"}, "measured at export only"),
        ({"constraints": "latency<=0.5"}, "measured at export only"),
        ({"quantization": {"rounding": "up"}}, "quantization: rounding must be 'nearest'"),
        ({"quantization": {"qat": 1.5}}, "qat must be a number from 0 to 1, not 1.5"),
        ({"quantization": {"bits": 8}}, "unknown key 'bits'"),
    ],
)
def test_what_does_not_go_together(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        autorank.search(task(), **settings(tmp_path, **change))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_bits_that_no_objective_rewards_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    autorank.search(task(), **settings(tmp_path, objectives="accuracy,macs", trials=1, progress=True))
    assert "bits only cost accuracy" in "".join(capsys.readouterr())


def test_bit_operations_may_be_asked_for_without_bits(tmp_path: Path) -> None:
    space = {"version": 1, "defaults": {"formats": ["tucker2"], "ranks": {"macs_kept": [0.5]}}}
    result = autorank.search(task(), **settings(tmp_path, space=space, trials=2))
    for record in result.records:
        assert record.kept["bops_kept"] == pytest.approx(record.kept["macs_kept"])


def test_a_layer_that_keeps_its_kernel_is_no_layer_of_the_plan_in_floating_point() -> None:
    plan = Plan.of({"a": Choice(DENSE, (), (), 8, 8), "b": Choice("tucker2", (2, 3), (), 4, 8)}, seed=7)
    assert plan.in_float == Plan.of({"b": Choice("tucker2", (2, 3))}, seed=7)


def test_compress_calibrates_what_has_bits(tiny: Any) -> None:
    model, inputs = tiny
    plan = {
        "layers": {
            "conv1": {"format": DENSE, "rank": [], "weight_bits": 8, "activation_bits": 8},
            "conv2": {"format": "tucker2", "rank": [12, 9], "weight_bits": 8, "activation_bits": 8},
        }
    }
    with pytest.raises(AutorankError, match="'conv1' has bits, so the plan needs the ranges of its inputs: give cal"):
        autorank.compress(model, plan)
    quantized = autorank.compress(model, plan, calibration=[inputs])
    assert all(leaf.calibrated for leaf in leaves(quantized).values())
    in_float = autorank.compress(model, {"layers": {"conv2": {"format": "tucker2", "rank": [12, 9]}}})
    change = (quantized(inputs) - in_float(inputs)).norm() / in_float(inputs).norm()
    assert 0 < change < 0.05


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        ([[torch.zeros(2, 3, 8, 8), torch.zeros(2)]], "must give tensors, or tuples of them"),
        ([(torch.zeros(2, 3, 8, 8), torch.zeros(2))], "must give batches of model inputs"),
        ([torch.zeros(2, 5, 8, 8)], "must give batches of model inputs"),
        ([], "has no batch"),
        (7, "must be an iterable of batches"),
    ],
    ids=["lists", "labels", "another shape", "nothing", "a number"],
)
def test_calibration_that_does_not_fit_is_told_in_a_line(tiny: Any, calibration: Any, said: str) -> None:
    plan = {"layers": {"conv1": {"format": DENSE, "rank": [], "weight_bits": 8, "activation_bits": 8}}}
    with pytest.raises(AutorankError) as error:
        autorank.compress(tiny[0], plan, calibration=calibration)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_calibration_data_that_is_not_finite_is_refused_wherever_it_stands(tiny: Any) -> None:
    model, inputs = tiny
    plan = {"layers": {"conv1": {"format": DENSE, "rank": [], "weight_bits": 8, "activation_bits": 8}}}
    for batches in ([inputs * math.nan, inputs], [inputs, inputs * math.nan]):
        with pytest.raises(AutorankError, match="not finite"):
            autorank.compress(model, plan, calibration=batches, quantization={"calibration": 32})


def test_a_layer_that_is_never_called_cannot_have_bits() -> None:
    class Reads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.f.weight)

    plan = {"layers": {"f": {"format": DENSE, "rank": [], "weight_bits": 8, "activation_bits": 8}}}
    with pytest.raises(AutorankError, match="'f'"):
        autorank.compress(Reads(), plan, calibration=[torch.randn(4, 8)])


def test_calibration_leaves_the_data_alone() -> None:
    class InPlace(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x -= 3.0
            return self.f(x)

    x = torch.randn(16, 8)
    before = x.clone()
    plan = {"layers": {"f": {"format": DENSE, "rank": [], "weight_bits": 8, "activation_bits": 8}}}
    model = autorank.compress(InPlace(), plan, calibration=[x])
    assert torch.equal(x, before)
    grid = leaves(model)["f"].input_grid
    assert grid is not None
    lowest = float(grid.scale) * (0 - int(grid.zero_point))
    assert lowest == pytest.approx(float((x - 3.0).min()), rel=0.3)


def test_a_sweep_without_bits_is_reused_with_bit_operations(tmp_path: Path) -> None:
    given = settings(tmp_path / "first", objectives="accuracy,macs")
    given["space"]["defaults"].pop("weight_bits")
    first = autorank.search(task(), **given)
    assert all("bops_kept" not in record.kept for record in first.records)
    more = settings(tmp_path / "second", reuse=str(tmp_path / "first"), trials=8)
    more["space"]["defaults"]["weight_bits"] = ["none", 8]
    second = autorank.search(task(), **more)
    assert all("bops_kept" in record.kept for record in second.records if record.status == "complete")


def test_pulled_trials_take_the_steps_of_their_fidelity(tmp_path: Path) -> None:
    strategy = {"name": "learned-rank", "options": {"points": 1, "iterations": 1, "steps": 1.0}}
    result = autorank.search(task(), **settings(tmp_path, strategy=strategy, trials=3))
    pulled = [record for record in result.records if record.pull and record.curve]
    assert pulled
    for record in pulled:
        steps = [step for step, _ in record.curve]
        assert steps == sorted(set(steps))
        assert steps[-1] < record.fidelity.steps


@pytest.mark.parametrize(
    ("qat", "steps", "plain", "pulled"),
    [(1.0, 4, 0, 1), (0.6, 1, 0, 1), (0.5, 4, 2, 2), (0.0, 4, 4, 4), (1.0, 0, 0, 0)],
)
def test_a_pulled_training_is_never_left_out(qat: float, steps: int, plain: int, pulled: int) -> None:
    restorer = Restorer(task(), Recovery(), QuantSettings(qat=qat), 0, "cpu", None, lambda path: None)
    plan = Plan.of({"conv2": Choice("tucker2", (8, 6), (), 8, 8)})
    assert restorer.first_steps(plan, Fidelity(steps)) == plain
    assert restorer.first_steps(plan, Fidelity(steps), pulled=True) == pulled


def test_settings_of_another_kind_are_refused_before_anything_is_fitted(tiny: Any) -> None:
    model, inputs = tiny
    plan = Plan.of({"conv2": Choice("tucker2", (8, 6), (), 8, 8)})
    with pytest.raises(ConfigError, match="quantization must be a mapping, not 'minmax'"):
        autorank.compress(model, plan, calibration=[inputs], quantization="minmax")


def test_bytes_of_a_model_of_two_number_types() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(24, 16), Halved(torch.nn.Linear(16, 24).to(torch.bfloat16))).eval()
    inputs = torch.randn(2, 24)
    space = space_of(model, inputs, ["channel_svd"], weight_bits=["none", 8], activation_bits=[8])
    for layer in space.layers:
        for candidate in layer.candidates:
            plan = Plan.of({layer.spec.name: candidate.choice})
            assert space.cost(plan).bytes == count(apply(model, plan)[0], (inputs,))[0].bytes


class Halved(torch.nn.Module):
    """Runs a module of 16 bits in a network of 32."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.to(torch.bfloat16)).float()
