"""`autorank.compress`: a plan applied to a model of the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import autorank
from autorank import Choice, Plan
from autorank.demo import network
from autorank.errors import AutorankError, PlanError
from autorank.solvers.gradients import fisher_loss

INPUTS = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
FULL = Plan.of({"3": Choice("channel_svd", (64,)), "7": Choice("tucker2", (64, 64))})


def as_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(FULL.canonical)
    return path


@pytest.mark.parametrize("form", ["plan", "mapping", "file"])
def test_a_plan_of_full_ranks_changes_nothing_in_any_form(tmp_path: Path, form: str) -> None:
    model = network().eval()
    plan = {"plan": FULL, "mapping": json.loads(FULL.canonical), "file": as_file(tmp_path)}[form]
    smaller = autorank.compress(model, plan)
    assert type(smaller[3]).__name__ != "Conv2d"
    torch.testing.assert_close(smaller(INPUTS), model(INPUTS), rtol=1e-3, atol=1e-4)


def test_whitening_with_calibration_data_gives_smaller_output_errors() -> None:
    model = network().eval()
    calibration = [INPUTS[:8] * 3, (INPUTS[8:] * 3,)]
    errors = {}
    for whiten in ("none", "input"):
        plan = Plan.of({"3": Choice("channel_svd", (8,), (("whiten", whiten),))})
        smaller = autorank.compress(model, plan, calibration=calibration)
        inside = model[:3](torch.cat([INPUTS * 3]))
        dense = model[3](inside)
        errors[whiten] = (smaller[3](inside) - dense).norm() / dense.norm()
    assert errors["input"] < errors["none"]


def test_whitening_the_output_gives_smaller_losses() -> None:
    torch.manual_seed(0)
    model = network().eval()
    dense = model(INPUTS * 3).log_softmax(1).detach()
    signs = torch.Generator().manual_seed(0)
    rises = {}
    for whiten in ("none", "input", "output", "both"):
        plan = Plan.of({"3": Choice("channel_svd", (6,), (("whiten", whiten),))})
        smaller = autorank.compress(
            model, plan, calibration=[INPUTS * 3] * 20, loss=lambda logits: fisher_loss(logits, signs)
        )
        with torch.no_grad():
            rises[whiten] = float((dense.exp() * (dense - smaller(INPUTS * 3).log_softmax(1))).sum())
    assert rises["both"] < rises["input"] < rises["none"]
    assert rises["output"] != rises["none"]


def test_the_model_keeps_its_mode_and_its_weights() -> None:
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    smaller = autorank.compress(model, FULL)
    assert smaller.training
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_whitened_plan_without_calibration_says_what_is_missing() -> None:
    plan = Plan.of({"3": Choice("channel_svd", (8,), (("whiten", "input"),))})
    with pytest.raises(PlanError, match="calibration"):
        autorank.compress(network(), plan)
    with pytest.raises(PlanError, match="at least one batch"):
        autorank.compress(network(), plan, calibration=[])
    with pytest.raises(PlanError, match="iterable of batches"):
        autorank.compress(network(), plan, calibration=5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (None, "the output of layer '3' is whitened, so the plan needs gradients of the loss: give loss="),
        (0.5, "loss must be a function of the model's outputs, not a float"),
        (lambda y: y.sum(1), r"one number, a sum over examples, not a tensor of shape \(16,\)"),
        (lambda y: y.argmax(1).sum(), "the loss has no gradient"),
    ],
    ids=["missing", "number", "not summed", "no gradient"],
)
@pytest.mark.parametrize("whiten", ["output", "both"])
def test_a_plan_that_whitens_outputs_needs_a_loss(loss: Any, words: str, whiten: str) -> None:
    plan = Plan.of({"3": Choice("channel_svd", (8,), (("whiten", whiten),))})
    with pytest.raises(AutorankError, match=words) as error:
        autorank.compress(network(), plan, calibration=[INPUTS], loss=loss)
    assert "\n" not in str(error.value)


def test_a_layer_that_keeps_its_kernel_needs_no_rank() -> None:
    written = {"layers": {"conv": {"format": "dense", "weight_bits": 8, "activation_bits": 8}}}
    assert Plan.from_json(written) == Plan.of({"conv": Choice("dense", (), (), 8, 8)})
    with pytest.raises(KeyError, match="rank"):
        Plan.from_json({"layers": {"conv": {"format": "tucker2"}}})
