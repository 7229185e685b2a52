"""Recovery: batch-norm statistics, the fine-tune and its guard, and the teacher's outputs."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from autorank.errors import ConfigError, TrialError
from autorank.evaluate import evaluate
from autorank.features import FeatureMatch
from autorank.plan import apply
from autorank.recover import Recovery, Teacher, fine_tune, reestimate_batch_norm
from autorank.tasks import ClassificationTask, CustomTask, Task, load_task
from autorank.types import Choice, Plan
from tests import tiny
from tests.tasks import nets


@pytest.fixture(scope="module")
def digits() -> Task:
    """The digits with a network that has been trained on them."""
    raw = load_task(
        model="python:tests.tasks.nets:convnet",
        model_args={"width": 8},
        data="digits",
        data_args={"augment": "flip+crop"},
    )
    model = raw.model()
    fine_tune(model, raw, Recovery(steps=250, batch_size=64, optimizer="sgd", lr=0.1, distill=0.0), seed=0)
    assert evaluate(model, raw, "validation").score > 70
    return raw.with_model(model)


def damaged(task: Task, noise: float = 0.3) -> nn.Module:
    model = task.model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += noise * p.std() * torch.randn(p.shape, generator=generator) if p.dim() > 1 else 0
    return model


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


FEW = Recovery(steps=12, batch_size=64, optimizer="sgd", lr=0.05, features=0.0)


# Batch norm


class Normed(nn.Module):
    """Batch norms of one and two dimensions, dropout before the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(2, momentum=0.3), nn.BatchNorm1d(2, momentum=None)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.drop(self.first(x).mean((2, 3))))


def test_statistics_are_the_averages_over_the_batches():
    torch.manual_seed(0)
    model = Normed().train()
    model.first.running_mean += 5
    batches = [(torch.randn(16, 2, 3, 3) * 2 + 1,) for _ in range(4)]
    state = copy.deepcopy(model.state_dict())
    found = reestimate_batch_norm(model, batches)
    assert found is not None
    mean = torch.stack([x.mean((0, 2, 3)) for (x,) in batches]).mean(0)
    var = torch.stack([x.transpose(0, 1).reshape(2, -1).var(1) for (x,) in batches]).mean(0)
    torch.testing.assert_close(found.first.running_mean, mean)
    torch.testing.assert_close(found.first.running_var, var)
    # The second norm sees the first one's batch statistics, and no dropout.
    inner = [F.batch_norm(x, None, None, training=True).mean((2, 3)) for (x,) in batches]
    torch.testing.assert_close(
        found.second.running_mean, torch.stack([x.mean(0) for x in inner]).mean(0), atol=1e-6, rtol=0
    )
    assert (found.first.momentum, found.second.momentum) == (0.3, None)
    assert not any(m.training for m in found.modules())
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in found.parameters())


@pytest.mark.parametrize(
    "model",
    [nn.Linear(4, 3), nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), nn.Sequential(nn.LayerNorm(4))],
    ids=["none", "no running statistics", "layer norm"],
)
def test_models_without_batch_norm(model):
    assert reestimate_batch_norm(model, [(torch.zeros(2, 4),)]) is None


def test_it_repairs_wrong_statistics(digits):
    model = digits.model()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 1
            module.running_var *= 9
    repaired = reestimate_batch_norm(model, digits.calibration_batches(512))
    assert repaired is not None
    assert evaluate(repaired, digits, "validation").loss < 0.5 * evaluate(model, digits, "validation").loss


# Fine-tune


def test_fine_tune_brings_a_damaged_model_back(digits):
    model = damaged(digits, 0.8)
    before = evaluate(model, digits, "validation")
    curve = fine_tune(model, digits, replace(FEW, steps=60), seed=1)
    after = evaluate(model, digits, "validation")
    assert after.loss < 0.7 * before.loss
    assert after.score > before.score
    assert curve[0][0] == 0
    assert curve[-1][0] == 59
    assert len(curve) <= 50
    assert not any(m.training for m in model.modules())


def test_the_same_seed_gives_the_same_bits_and_leaves_the_callers_numbers(digits):
    first, second, third = (damaged(digits) for _ in range(3))
    state = torch.get_rng_state()
    curve = fine_tune(first, digits, FEW, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(77)
    assert fine_tune(second, digits, FEW, seed=3) == curve
    assert equal(first, second)
    assert fine_tune(third, digits, FEW, seed=4) != curve


def test_one_step_is_the_one_of_the_textbook():
    """Nesterov SGD with weight decay on matrices only, warm-up and clipping, against the formulas."""
    x, t = nets.vectors(8)
    task = ClassificationTask(nets.linear(), train=(x, t), validation=(x, t))
    recovery = Recovery(
        steps=2,
        batch_size=8,
        optimizer="sgd",
        features=0.0,
        lr=0.5,
        momentum=0.9,
        weight_decay=0.1,
        distill=0.0,
        grad_clip=0.2,
        schedule="linear",
    )
    model = task.model()
    fine_tune(model, task, recovery, seed=0)
    w, b = (p.detach().clone().requires_grad_() for p in task.model().parameters())
    velocity = [torch.zeros_like(w), torch.zeros_like(b)]
    for step, batch in enumerate(task.train_batches(2, 8, 0)):
        loss = F.cross_entropy(batch.inputs[0] @ w.T + b, batch.targets)
        grads = torch.autograd.grad(loss, (w, b))
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
        grads = [g * min(1.0, 0.2 / norm) for g in grads]
        grads[0] = grads[0] + 0.1 * w.detach()
        rate = 0.5 * (1 - step / 2)
        with torch.no_grad():
            for i, p in enumerate((w, b)):
                velocity[i] = 0.9 * velocity[i] + grads[i]
                p -= rate * (grads[i] + 0.9 * velocity[i])
    torch.testing.assert_close(model.weight.detach(), w.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.bias.detach(), b.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.25, 0.5, 0.75, *((1 + math.cos(math.pi * i / 5)) / 2 for i in range(5))]),
    ],
)
def test_schedules(schedule, expected):
    recovery = Recovery(steps=8, optimizer="sgd", lr=1.0, warmup=3, schedule=schedule)
    assert [recovery.rate(step) for step in range(8)] == pytest.approx(expected)


def test_the_loss_mixes_targets_and_teacher():
    x, t = nets.vectors(16)
    dense = nets.linear()
    task = ClassificationTask(dense, train=(x, t), validation=(x, t))
    model = nn.Linear(4, 3)
    start = copy.deepcopy(model)
    recovery = Recovery(steps=1, batch_size=16, features=0.0, distill=0.3, temperature=2.0)
    ((_, loss),) = fine_tune(model, task, recovery, 0)
    p, q = (dense(x) / 2).softmax(1), (start(x) / 2).softmax(1)
    expected = 0.7 * F.cross_entropy(start(x), t) + 0.3 * 4 * (p * (p / q).log()).sum(1).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_nothing_to_do(digits):
    model = damaged(digits)
    reference = copy.deepcopy(model)
    assert fine_tune(model.train(), digits, replace(FEW, steps=0), 0) == ()
    assert not model.training
    assert equal(model, reference)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert fine_tune(model, digits, FEW, 0) == ()


class Narrow(nn.Module):
    """A layer and a batch norm in `dtype`, a bias that is float32 in any case, and whole-number buffers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)
        self.to(dtype)
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(x)) + self.bias


@pytest.mark.parametrize("distill", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_16_bits_are_tuned_in_32(dtype, distill):
    """The same bits as tuning the widened model and rounding it, where 16-bit steps would change nothing."""
    torch.manual_seed(0)
    x, t = nets.vectors(60)
    narrow = Narrow(dtype)
    wide = copy.deepcopy(narrow).float()
    task = ClassificationTask(narrow, train=(x.to(dtype), t), validation=(x.to(dtype), t))
    wide_task = ClassificationTask(wide, train=(x.to(dtype).float(), t), validation=(x, t))
    recovery = Recovery(
        steps=30, optimizer="sgd", lr=1e-4, features=0.0, batch_size=20, distill=distill, weight_decay=0.0
    )
    model, reference = task.model(), wide_task.model()
    objects = [(id(p), p.dtype) for p in model.parameters()]
    fine_tune(model, task, recovery, 0)
    fine_tune(reference, wide_task, recovery, 0)
    assert [(id(p), p.dtype) for p in model.parameters()] == objects
    assert {name: b.dtype for name, b in model.named_buffers()} == {name: b.dtype for name, b in narrow.named_buffers()}
    assert not torch.equal(model.layer.weight, narrow.layer.weight)
    if distill == 0:
        assert all(torch.equal(v, reference.state_dict()[k].to(v.dtype)) for k, v in model.state_dict().items())


def test_a_narrow_model_comes_back_narrow_when_its_tuning_fails():
    x, t = nets.vectors(20)
    task = ClassificationTask(Narrow(torch.bfloat16), train=(x.bfloat16(), t))
    model = task.model()
    with pytest.raises(TrialError, match="diverged"):
        fine_tune(model, task, replace(FEW, steps=100, lr=1e30, grad_clip=None), 0)
    assert model.layer.weight.dtype == torch.bfloat16


def test_frozen_weights_stay():
    task = ClassificationTask(nets.convnet(), train=(torch.rand(40, 1, 8, 8), torch.arange(40) % 10))
    model = task.model()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    fine_tune(model, task, replace(FEW, steps=3), 0)
    assert torch.equal(before, model[0].weight)
    assert not torch.equal(task.model()[6].weight, model[6].weight)


def test_divergence_fails_with_the_reason(digits):
    model = damaged(digits)
    with pytest.raises(TrialError, match="the fine-tune diverged"):
        fine_tune(model, digits, replace(FEW, steps=100, lr=1e6, grad_clip=None, momentum=0.99), 0)
    assert not model.training


def test_a_loss_that_stays_high_is_divergence():
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    task = CustomTask(nn.Linear(4, 1), train=(x, x[:, :1]), loss=F.mse_loss, validation=(x, x[:, :1]))
    recovery = Recovery(
        steps=80,
        batch_size=64,
        optimizer="sgd",
        features=0.0,
        lr=1.5,
        distill=0.0,
        grad_clip=1000.0,
        schedule="constant",
        momentum=0.0,
    )
    model = task.model()
    with pytest.raises(TrialError, match="the fine-tune diverged"):
        fine_tune(model, task, recovery, 0)


def test_a_loss_that_is_nan_at_once(digits):
    model = digits.model()
    with torch.no_grad():
        model[0].weight[0] = float("nan")
    with pytest.raises(TrialError, match="the loss is nan at step 0"):
        fine_tune(model, digits, FEW, 0)


def test_several_inputs_and_mappings_as_outputs():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nets.TwoInputs()

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"scores": self.net(x, y)}

    x, t = nets.vectors(30)
    task = CustomTask(
        Net(), train=(x, torch.randn(30, 2), t), loss=lambda o, t: F.cross_entropy(o["scores"], t), validation=6
    )
    teacher = Teacher.build(task, FEW, 0)
    assert teacher.rows is None
    model = task.model()
    assert len(fine_tune(model, task, FEW, 0, "cpu", teacher)) == 12


# Teacher


def test_teacher_holds_the_dense_outputs_for_the_very_batches(digits, tmp_path):
    seen: list[tuple[int, int]] = []
    path = tmp_path / "cache" / "teacher.npy"
    teacher = Teacher.build(digits, FEW, 5, "cpu", path, lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 12) for i in range(12)]
    assert isinstance(teacher.rows, np.memmap)
    dense = digits.model()
    lesson = teacher.lesson(digits, 64, 5, "cpu")
    with torch.no_grad():
        for step, batch in enumerate(digits.train_batches(12, 64, 5)):
            torch.testing.assert_close(lesson(step, batch), dense(*batch.inputs), atol=1e-5, rtol=1e-5)


def test_stored_and_computed_outputs_tune_alike(digits, tmp_path):
    models = [damaged(digits) for _ in range(3)]
    stored = Teacher.build(digits, FEW, 5, "cpu", tmp_path / "teacher.npy")
    curves = [
        fine_tune(model, digits, FEW, 5, "cpu", teacher)
        for model, teacher in zip(models, (stored, None, Teacher.build(digits, FEW, 5, limit_bytes=100)), strict=True)
    ]
    assert np.allclose(curves[0], curves[1], rtol=1e-4)
    assert curves[1] == curves[2]


@pytest.mark.parametrize(
    ("recovery", "seed"),
    [(replace(FEW, steps=20), 5), (replace(FEW, steps=6), 5), (replace(FEW, batch_size=32), 5), (FEW, 6)],
    ids=["more steps", "fewer steps", "another batch size", "another seed"],
)
def test_a_teacher_of_other_batches_never_misleads(recovery, seed, digits, tmp_path):
    teacher = Teacher.build(digits, FEW, 5, "cpu", tmp_path / "teacher.npy")
    with_it, without = damaged(digits), damaged(digits)
    curve = fine_tune(with_it, digits, recovery, seed, "cpu", teacher)
    assert np.allclose(curve, fine_tune(without, digits, recovery, seed), rtol=1e-4)


def _never(*args: object) -> None:
    pytest.fail("computed again")


def test_teacher_is_read_and_not_computed_again(digits, tmp_path, monkeypatch):
    path = tmp_path / "teacher.npy"
    first = Teacher.build(digits, FEW, 5, "cpu", path)
    monkeypatch.setattr("autorank.teacher._compute", _never)
    second = Teacher.build(digits, FEW, 5, "cpu", path)
    assert np.array_equal(first.rows, second.rows)
    travelled = pickle.loads(pickle.dumps(second))
    assert len(pickle.dumps(second)) < 2000
    assert np.array_equal(first.rows, travelled.rows)
    path.unlink()
    assert pickle.loads(pickle.dumps(second)).rows is None  # another machine: computed as needed


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "one byte": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\xff"),
    "not numpy": lambda path: path.write_bytes(b"hello"),
    "no note": lambda path: path.with_suffix(".json").unlink(),
    "note no json": lambda path: path.with_suffix(".json").write_text("{"),
    "note without key": lambda path: path.with_suffix(".json").write_text("{}"),
    "note a list": lambda path: path.with_suffix(".json").write_text("[]"),
    "another key": lambda path: path.with_suffix(".json").write_text(
        json.dumps(json.loads(path.with_suffix(".json").read_text()) | {"key": "x"})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_teacher_files_are_computed_again(damage, digits, tmp_path):
    path = tmp_path / "teacher.npy"
    first = np.array(Teacher.build(digits, FEW, 5, "cpu", path).rows)
    DAMAGE[damage](path)
    assert np.array_equal(Teacher.build(digits, FEW, 5, "cpu", path).rows, first)
    assert np.array_equal(np.load(path), first)


def test_a_teacher_looks_at_no_test_example(tmp_path):
    class Never(Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            pytest.fail("a test example was read")

    task = ClassificationTask(nets.linear(), train=nets.vectors(), test=Never())
    assert Teacher.build(task, FEW, 0, "cpu", tmp_path / "teacher.npy").steps == 12


def test_teacher_of_another_model_is_computed_again(digits, tmp_path):
    path = tmp_path / "teacher.npy"
    first = np.array(Teacher.build(digits, FEW, 5, "cpu", path).rows)
    other = digits.with_model(damaged(digits))
    assert not np.allclose(Teacher.build(other, FEW, 5, "cpu", path).rows, first)


@pytest.mark.parametrize(
    "recovery", [replace(FEW, steps=0), replace(FEW, distill=0.0)], ids=["no steps", "no distilling"]
)
def test_no_teacher_is_needed(recovery, digits, monkeypatch):
    monkeypatch.setattr("autorank.teacher._compute", _never)
    assert Teacher.build(digits, recovery, 0).steps == 0


def test_without_a_path_the_outputs_stay_in_memory(digits):
    teacher = Teacher.build(digits, FEW, 5)
    assert teacher.rows is not None
    assert np.array_equal(pickle.loads(pickle.dumps(teacher)).rows, teacher.rows)


def test_a_path_that_cannot_be_written(digits, tmp_path):
    (tmp_path / "file").write_text("")
    assert Teacher.build(digits, FEW, 5, "cpu", tmp_path / "file" / "teacher.npy").rows is not None


# Settings


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("steps", -1, "a whole number from 0"),
        ("steps", 1.5, "a whole number from 0"),
        ("steps", True, "a whole number from 0"),
        ("batch_size", 0, "a whole number from 1"),
        ("warmup", -1, "a whole number from 0"),
        ("calibration", 0, "a whole number from 1"),
        ("optimizer", "adam", "'sgd' or 'adamw'"),
        ("features", -1, "a number from 0"),
        ("lr", 0, "a number above 0"),
        ("lr", float("nan"), "a number above 0"),
        ("momentum", 1.0, "from 0 to below 1"),
        ("weight_decay", -1e-4, "a number from 0"),
        ("distill", 1.1, "from 0 to 1"),
        ("temperature", 0.0, "a number above 0"),
        ("grad_clip", 0, "a number above 0, or null"),
        ("schedule", "step", "'cosine' or 'linear' or 'constant'"),
        ("batch_norm", "yes", "'auto' or 'always' or 'never'"),
        ("amp", 1, "true or false"),
    ],
)
def test_wrong_settings(field, value, allowed):
    with pytest.raises(ConfigError) as caught:
        Recovery(**{field: value})
    assert str(caught.value).startswith(f"recovery: {field} must be ")
    assert allowed in str(caught.value)
    assert repr(value) in str(caught.value)


def test_rates_of_sgd_are_refused_for_adamw():
    with pytest.raises(ConfigError, match=r"lr 0.02 is a rate for sgd and ruins a model under adamw, whose default is"):
        Recovery(lr=0.02, optimizer="adamw")
    assert Recovery(lr=0.02).peak == 0.02
    assert (Recovery().peak, Recovery(optimizer="adamw").peak) == (0.02, 0.0015)


def test_matched_features_bring_the_blocks_nearer_to_the_dense_ones():
    task = tiny.task()
    dense = task.model().eval()
    plan = Plan.of({"3": Choice("channel_svd", (3,)), "5": Choice("channel_svd", (2,))})
    batch = next(iter(task.batches("validation", 64)))
    distance = {}
    for features in (0.0, 10.0):
        model, _ = apply(dense, plan)
        fine_tune(model, task, Recovery(steps=40, batch_size=32, features=features), seed=0)
        match = FeatureMatch(model, dense)
        with torch.no_grad():
            match.teach(batch.inputs)
            model(*batch.inputs)
            distance[features] = float(match.loss())
        match.close()
    assert 0 < distance[10.0] < 0.9 * distance[0.0]
