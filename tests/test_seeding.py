"""Random numbers of one purpose: repeatable inside, untouched outside, on this device and on no other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autorank import demo, plan
from autorank.measure import time_layers
from autorank.profiling import profile
from autorank.recover import Recovery, fine_tune
from autorank.seeding import seeded
from autorank.tasks import ClassificationTask, load_task
from autorank.types import Plan
from tests.tasks import nets


def test_the_same_inside_and_untouched_outside() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    state = torch.get_rng_state()
    with seeded(5):
        assert torch.equal(torch.rand(3), expected)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ZeroDivisionError), seeded(5):
        _ = int(torch.rand(1)) // 0
    assert torch.equal(torch.get_rng_state(), state)


def tune() -> None:
    task = ClassificationTask(nets.linear(), train=nets.vectors())
    fine_tune(task.model(), task, Recovery(steps=1), 0)


SEEDED = {
    "fine-tune": tune,
    "build": lambda: plan.build(nn.Linear(4, 3), Plan()),
    "time": lambda: time_layers([(profile(nn.Linear(4, 3), (torch.zeros(1, 4),)).layers[0], None)], min_run_time=0.01),
    "demo": lambda: demo.train(load_task(model=demo.MODEL, data="digits"), steps=1),
}


@pytest.mark.parametrize("name", SEEDED)
def test_accelerators_are_not_seeded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("every accelerator was seeded"))
    SEEDED[name]()
