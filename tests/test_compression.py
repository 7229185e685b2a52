"""`autorank.compress`: a plan applied to a model of the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import autorank
from autorank import Choice, Plan
from autorank.demo import network
from autorank.errors import PlanError

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
