"""Tasks: their batches, their losses and metrics, their identity, and how they travel."""

from __future__ import annotations

import json
import pickle
import re
from itertools import chain, count

import cloudpickle
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from autorank.errors import ConfigError, DataError, ModelError
from autorank.evaluate import evaluate
from autorank.tasks import ClassificationTask, CustomTask, Task, load_task
from autorank.tasks.augment import ImagePipeline
from autorank.tasks.batch import Batch
from tests.tasks import nets


@pytest.fixture(scope="module")
def digits() -> Task:
    return load_task(model="python:tests.tasks.nets:convnet", data="digits", data_args={"augment": "flip+crop"})


def all_of(task: Task, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(task.batches(split, 100))
    return torch.cat([b.inputs[0] for b in batches]), torch.cat([b.targets for b in batches])


def keys(images: torch.Tensor, labels: torch.Tensor) -> list[bytes]:
    return sorted(
        (i * 16).round().byte().numpy().tobytes() + bytes([int(t)]) for i, t in zip(images, labels, strict=True)
    )


def test_digits_are_scikit_learns(digits):
    data = load_digits()
    everything = [all_of(digits, split) for split in ("train", "validation", "test")]
    found = keys(torch.cat([x for x, _ in everything]), torch.cat([t for _, t in everything]))
    assert found == keys(torch.tensor(data.images[:, None]) / 16, torch.tensor(data.target))
    assert [digits.size(split) for split in ("train", "validation", "test", "exam")] == [1167, 130, 500, 0]
    for split in ("validation", "test"):
        counts = np.bincount(all_of(digits, split)[1])
        assert counts.max() - counts.min() <= 3


def test_test_examples_do_not_depend_on_seed_or_validation(digits):
    other = load_task(model="python:tests.tasks.nets:convnet", data="digits", validation=400, seed=9)
    assert torch.equal(all_of(other, "test")[0], all_of(digits, "test")[0])
    assert other.size("validation") == 400
    assert other.fingerprint["test"]["labels"] == digits.fingerprint["test"]["labels"]


def test_training_batches_never_hold_validation_examples(digits):
    forbidden = set(keys(*all_of(digits, "validation"))) | set(keys(*all_of(digits, "test")))
    plain = load_task(model="python:tests.tasks.nets:convnet", data="digits")
    seen: list[bytes] = []
    for batch in plain.train_batches(9, 128, 0):
        seen += keys(batch.inputs[0], batch.targets)
    for batch in plain.calibration_batches(300, 100):
        seen += keys(batch.inputs[0], batch.targets)
    assert not forbidden & set(seen)


def test_an_epoch_has_no_example_twice_and_the_next_one_another_order():
    x = torch.arange(50).float()[:, None].repeat(1, 4)
    task = ClassificationTask(nn.Linear(4, 3), train=(x, torch.arange(50) % 3), validation=nets.vectors())
    steps = [b.inputs[0][:, 0].tolist() for b in task.train_batches(10, 10, seed=1)]
    first, second = list(chain(*steps[:5])), list(chain(*steps[5:]))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


@pytest.mark.parametrize("device", ["cpu"])
def test_training_batches_depend_on_the_seed_alone(digits, device):
    first = [b.inputs[0] for b in digits.train_batches(30, 64, 5, device)]
    torch.manual_seed(99)
    again = [b.inputs[0] for b in digits.train_batches(12, 64, 5)]
    other = [b.inputs[0] for b in digits.train_batches(12, 64, 6)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=False))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=False))


def test_batches_are_at_most_the_whole_set():
    task = ClassificationTask(nn.Linear(4, 3), train=nets.vectors(20), validation=nets.vectors(6))
    assert [len(b) for b in task.train_batches(3, 64, 0)] == [20, 20, 20]
    assert [len(b) for b in task.batches("validation", 4)] == [4, 2]
    assert [len(b) for b in task.batches("validation", 4, limit=5)] == [4, 1]


LINEAR = "python:tests.tasks.nets:linear"
IN_BATCHES = {
    "default": (lambda: ClassificationTask(nets.linear(), nets.vectors(600), nets.vectors(300)), 256),
    "classification": (
        lambda: ClassificationTask(nets.linear(), nets.vectors(), nets.vectors(), evaluation_batch=7),
        7,
    ),
    "custom": (
        lambda: CustomTask(
            nets.linear(), nets.vectors(), nets.vectors(), loss=lambda o, t: o.mean(), evaluation_batch=7
        ),
        7,
    ),
    "by name": (lambda: load_task(model=LINEAR, data="python:tests.tasks.nets:task", evaluation_batch=4), 4),
    "data_args": (
        lambda: load_task(
            model="python:tests.tasks.nets:convnet", data="digits", data_args={"evaluation_batch": 50, "mean": 0.5}
        ),
        50,
    ),
    "factory": (
        lambda: load_task(model=LINEAR, data="python:tests.tasks.nets:in_batches", data_args={"size": 5}),
        5,
    ),
}


@pytest.mark.parametrize("case", IN_BATCHES)
def test_evaluation_batches_have_the_size_that_the_task_says(case):
    make, size = IN_BATCHES[case]
    task = make()
    seen: list[int] = []

    class Watching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return torch.zeros(len(x), 10)

    evaluate(Watching(), task, "validation")
    assert seen[0] == size
    assert sum(seen) == task.size("validation")
    assert [len(b) for b in task.batches("validation")] == seen
    assert len(next(iter(task.batches("validation", 2)))) == 2


@pytest.mark.parametrize("size", [0, -3, 2.5, True, "many"])
def test_wrong_evaluation_batches(size):
    words = re.escape(f"evaluation_batch must be a whole number from 1, not {size!r}")
    with pytest.raises(ConfigError, match=words):
        ClassificationTask(nets.linear(), nets.vectors(), evaluation_batch=size)
    with pytest.raises(ConfigError, match=words):
        load_task(model=LINEAR, data="python:tests.tasks.nets:data", evaluation_batch=size)
    with pytest.raises(ConfigError, match=words):
        load_task(model="python:tests.tasks.nets:convnet", data="digits", data_args={"evaluation_batch": size})


def test_augmentation_shifts_and_flips_only(digits):
    """Every augmented image is found among all shifts and mirror images of the stored ones."""
    pipeline = ImagePipeline((0.0,), (1.0,), "flip+crop", 16)
    image = torch.randint(1, 17, (1, 1, 8, 8), dtype=torch.uint8)
    padded = nn.functional.pad(image, (1, 1, 1, 1))
    allowed = set()
    for base in (padded, padded.flip(3)):
        for down in range(3):
            for right in range(3):
                allowed.add(base[..., down : down + 8, right : right + 8].numpy().tobytes())
    generator = torch.Generator().manual_seed(0)
    out = pipeline(image.expand(400, 1, 8, 8), generator)
    found = {(x * 16).round().byte().numpy().tobytes() for x in out}
    assert found == allowed
    assert torch.equal(pipeline(image), image / 16)


def test_normalisation():
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    expected = (images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(ImagePipeline(mean, std)(images), expected)


def test_loss_metric_and_distillation_of_classification():
    task = ClassificationTask(nn.Linear(4, 3), train=nets.vectors(), label_smoothing=0.1)
    outputs, teacher, targets = torch.randn(8, 3), torch.randn(8, 3), torch.arange(8) % 3
    log = outputs.log_softmax(1)
    smooth = torch.full((8, 3), 0.1 / 3).scatter_add_(1, targets[:, None], torch.full((8, 1), 0.9))
    torch.testing.assert_close(task.loss(outputs, targets), -(smooth * log).sum(1).mean())
    assert float(task.metric(outputs, targets)) == pytest.approx(
        100 * sum(int(o.argmax()) == int(t) for o, t in zip(outputs, targets, strict=True)) / 8
    )
    p, q = (teacher / 4).softmax(1), (outputs / 4).softmax(1)
    torch.testing.assert_close(task.distill(outputs, teacher, 4.0), 16 * (p * (p / q).log()).sum(1).mean())
    assert float(task.distill(teacher, teacher, 4.0)) == pytest.approx(0, abs=1e-6)


def test_the_sampled_loss_of_a_classification_has_the_curvature_of_its_loss():
    task = ClassificationTask(nn.Linear(4, 3), train=nets.vectors(), label_smoothing=0.1)
    logits = torch.tensor([[1.0, 0.0, -2.0], [0.0, 3.0, 0.5]])
    hessian = torch.autograd.functional.hessian(lambda x: 2 * task.loss(x, torch.tensor([2, 0])), logits)
    found, draws, generator = torch.zeros(6, 6), 4000, torch.Generator().manual_seed(0)
    state = torch.random.get_rng_state()
    for _ in range(draws):
        leaf = logits.clone().requires_grad_()
        # Targets are not looked at, and outputs may come in a mapping.
        value = task.sampled_loss({"logits": leaf}, Batch((torch.zeros(2, 4),), None), generator)
        g = torch.autograd.grad(value, leaf)[0].flatten()
        found += torch.outer(g, g) / draws
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(found, hessian.reshape(6, 6), rtol=0, atol=0.01)


def test_the_sampled_loss_of_other_tasks_is_their_loss_summed_over_the_examples():
    x, _ = nets.vectors(40)
    task = CustomTask(nn.Linear(4, 1), train=(x, x.sum(1, keepdim=True)), loss=nn.functional.mse_loss)
    outputs = torch.randn(5, 1, requires_grad=True)
    batch = Batch((x[:5],), x[:5].sum(1, keepdim=True))
    value = task.sampled_loss(outputs, batch, torch.Generator())
    each = [task.loss(outputs[i : i + 1], batch.targets[i : i + 1]) for i in range(5)]
    assert float(value.detach()) == pytest.approx(float(sum(each)))
    torch.testing.assert_close(torch.autograd.grad(value, outputs), torch.autograd.grad(sum(each), outputs))


def test_outputs_with_logits_and_soft_targets():
    task = ClassificationTask(nn.Linear(4, 3), train=nets.vectors())
    outputs = torch.eye(3) * 9
    assert float(task.metric({"logits": outputs}, torch.eye(3))) == 100
    assert float(task.loss({"logits": outputs}, torch.eye(3))) == pytest.approx(
        float(task.loss(outputs, torch.arange(3)))
    )
    with pytest.raises(ModelError, match="CustomTask"):
        task.metric([outputs], torch.arange(3))


def test_dense_prediction():
    net = nn.Conv2d(1, 4, 1)
    task = ClassificationTask(net, train=(torch.rand(20, 1, 5, 5), torch.randint(0, 4, (20, 5, 5))))
    batch = next(iter(task.batches("validation")))
    assert 0 <= float(task.metric(net(*batch.inputs), batch.targets)) <= 100
    assert task.loss(net(*batch.inputs), batch.targets).dim() == 0


class Pairs(Dataset):
    """A data set that draws from all three global generators, and shows no labels."""

    def __init__(self, count: int = 40, bad: int | None = None) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i):
        import random

        noise = torch.rand(4) + float(np.random.rand()) + random.random()
        return noise + i, 9 if i == self.bad else i % 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("wrapped", ["dataset", "loader", "loader with generator", "loader split"])
def test_random_transforms_repeat_and_leave_the_callers_numbers_alone(wrapped, workers):
    generator = torch.Generator().manual_seed(1) if wrapped == "loader with generator" else None
    train = Pairs()
    if wrapped != "dataset":
        train = DataLoader(train, batch_size=8, shuffle=True, num_workers=workers, generator=generator)
    validation = None if wrapped in ("loader split", "dataset") else nets.vectors()
    task = ClassificationTask(nn.Linear(4, 3), train=train, validation=validation, workers=workers)
    state, own = torch.get_rng_state(), generator.get_state() if generator else None
    first = [b.inputs[0] for b in task.train_batches(7, 8, 3)]
    torch.rand(5)
    second = [b.inputs[0] for b in pickle.loads(cloudpickle.dumps(task)).train_batches(6, 8, 3)]
    torch.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=False))
    assert not torch.equal(first[0], next(iter(task.train_batches(1, 8, 4))).inputs[0])
    assert torch.equal(state, torch.get_rng_state())
    if generator is not None:
        assert torch.equal(own, generator.get_state())


def test_a_consumer_that_stops_early_gives_generators_back():
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(Pairs(), batch_size=8, shuffle=True, generator=generator)
    task = ClassificationTask(nn.Linear(4, 3), train=loader, validation=nets.vectors())
    before = generator.get_state()
    batches = task.train_batches(5, 8, 0)
    next(batches)
    batches.close()
    del batches
    assert torch.equal(before, generator.get_state())


def test_loader_split_has_no_common_example():
    x = torch.arange(40).float()[:, None].repeat(1, 4)
    loader = DataLoader(TensorDataset(x, torch.arange(40) % 4), batch_size=8, shuffle=True)
    task = ClassificationTask(nn.Linear(4, 4), train=loader, validation=0.25)
    training = {float(v) for b in task.train_batches(8, 8, 0) for v in b.inputs[0][:, 0]}
    held_out = {float(v) for b in task.batches("validation") for v in b.inputs[0][:, 0]}
    assert len(held_out) == 10
    assert not training & held_out
    assert training | held_out == set(map(float, range(40)))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.full((4,), float(i)), i % 3) for i in range(25)])


def test_iterable_loader():
    loader = DataLoader(Stream(), batch_size=8)
    task = ClassificationTask(nn.Linear(4, 3), train=loader, validation=DataLoader(Stream(), batch_size=5))
    assert task.size("validation") == 25
    with pytest.raises(DataError, match="the size of an iterable training loader is not known"):
        task.size("train")
    # The lone example at the end of an epoch is left out: batch norm could not train on it.
    assert [len(b) for b in task.train_batches(5, 64, 0)] == [8, 8, 8, 8, 8]
    assert sum(len(b) for b in task.batches("validation")) == 25
    assert sum(len(b) for b in task.calibration_batches(10)) == 16


class Endless(IterableDataset):
    """Counts for ever, and notes how far it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __iter__(self):
        for i in count():
            self.asked = max(self.asked, i + 1)
            yield torch.full((4,), float(i)), i % 3


def test_endless_training_data():
    data = Endless()
    task = ClassificationTask(nn.Linear(4, 3), train=DataLoader(data, batch_size=8), validation=nets.vectors())
    assert "train: unknown" in repr(task)
    assert task.fingerprint["train"]["size"] == "unknown"
    assert data.asked <= 16
    assert len(list(task.train_batches(5, 8, 0))) == 5
    assert sum(len(b) for b in task.calibration_batches(20)) == 24


def test_evaluation_data_of_unknown_size_are_gone_through_only_when_their_size_is_asked_for():
    data = Counted()
    task = ClassificationTask(nn.Linear(4, 3), train=nets.vectors(), validation=DataLoader(data, batch_size=5))
    assert task.fingerprint["validation"]["size"] == "unknown"
    assert data.passes == 0
    assert task.size("validation") == task.size("validation") == 25
    assert data.passes == 1


class Counted(IterableDataset):
    """Notes how often it was gone through to the end."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self):
        yield from ((torch.full((4,), float(i)), i % 3) for i in range(25))
        self.passes += 1


class Nothing(IterableDataset):
    def __iter__(self):
        return iter(())


def test_inputs_without_dimensions_are_taken_as_they_are():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * scale

    loader = DataLoader(TensorDataset(*nets.vectors(20)), batch_size=8)
    task = ClassificationTask(
        Scaled(),
        train=loader,
        validation=loader,
        unpack=lambda item: ((torch.tensor(2.0), item[0]), item[1]),
    )
    assert [tuple(x.shape) for x in task.example_inputs] == [(), (2, 4)]
    assert [len(b) for b in task.batches("validation")] == [8, 8, 4]


LABELLED = {
    "tensors": lambda x, t: (x, t),
    "tensor dataset": TensorDataset,
    "subset": lambda x, t: Subset(TensorDataset(torch.cat([x, x]), torch.cat([t + 7, t])), range(len(x), 2 * len(x))),
    "concatenation": lambda x, t: ConcatDataset([TensorDataset(x[:9], t[:9]), TensorDataset(x[9:], t[9:])]),
    "targets": lambda x, t: type("D", (TensorDataset,), {"targets": t.tolist()})(x, t),
    "loader": lambda x, t: DataLoader(TensorDataset(x, t), batch_size=4),
    "int32": lambda x, t: (x, t.int()),
}


@pytest.mark.parametrize("kind", LABELLED)
def test_labels_are_known_and_checked_before_anything_runs(kind):
    x, t = nets.vectors(30)
    task = ClassificationTask(nn.Linear(4, 3), train=LABELLED[kind](x, t), validation=0.2)
    counts = torch.bincount(torch.cat([b.targets for b in task.batches("validation")]).long())
    assert counts.tolist() == [2, 2, 2]
    assert task.loss(torch.randn(2, 3), t[:2]).dim() == 0
    with pytest.raises(DataError, match=r"label 2 in the (train|validation) split, but the model has 2 classes"):
        ClassificationTask(nn.Linear(4, 2), train=LABELLED[kind](x, t))


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range_in_the_test_split(label):
    x, t = nets.vectors(30)
    bad = t.clone()
    bad[4] = label
    message = rf"label {label} in the test split, but the model has 3 classes \(labels 0 to 2\)"
    with pytest.raises(DataError, match=message):
        ClassificationTask(nn.Linear(4, 3), train=(x, t), test=(x, bad))


def test_unknown_labels_are_checked_as_they_come():
    task = ClassificationTask(nn.Linear(4, 3), train=Pairs(), validation=Pairs(20, bad=15))
    with pytest.raises(DataError, match="label 9 in the validation split"):
        list(task.batches("validation", 4))


def test_several_inputs():
    x, t = nets.vectors(30)
    y = torch.randn(30, 2)
    forms = [
        ClassificationTask(nets.TwoInputs(), train=(x, y, t)),
        ClassificationTask(nets.TwoInputs(), train=TensorDataset(x, y, t)),
        ClassificationTask(
            nets.TwoInputs(),
            train=[((a, b), c) for a, b, c in zip(x, y, t.tolist(), strict=True)],
            validation=(x, y, t),
        ),
        ClassificationTask(
            nets.TwoInputs(),
            train=[{"x": a, "y": b, "t": c} for a, b, c in zip(x, y, t.tolist(), strict=True)],
            validation=3,
            unpack=lambda batch: ((batch["x"], batch["y"]), batch["t"]),
        ),
    ]
    for task in forms:
        assert [tuple(i.shape) for i in task.example_inputs] == [(2, 4), (2, 2)]
        batch = next(iter(task.train_batches(1, 8, 0)))
        assert task.loss(task.model()(*batch.inputs), batch.targets).isfinite()


def test_custom_task():
    x, _ = nets.vectors(40)
    target = x.sum(1, keepdim=True)
    task = CustomTask(
        nn.Linear(4, 1),
        train=(x, target),
        loss=nn.functional.mse_loss,
        metric=lambda outputs, targets: float((outputs - targets).abs().mean()),
        metric_name="mae",
        direction="min",
    )
    assert (task.metric_name, task.direction) == ("mae", "min")
    assert float(task.metric(target + 2, target)) == pytest.approx(2)
    assert float(task.distill(torch.zeros(3, 1), torch.full((3, 1), 2.0), 4.0)) == pytest.approx(4)
    pair = {"a": torch.zeros(2, 3), "b": (torch.ones(4),)}
    other = {"a": torch.ones(2, 3), "b": (torch.ones(4) * 3,)}
    assert float(task.distill(pair, other, 1.0)) == pytest.approx((6 * 1 + 4 * 4) / 10)


def test_custom_task_without_a_metric_takes_its_loss():
    x, _ = nets.vectors(40)
    task = CustomTask(nn.Linear(4, 1), train=(x, x.sum(1, keepdim=True)), loss=nn.functional.mse_loss)
    assert (task.metric_name, task.direction) == ("loss", "min")


X, T = nets.vectors(12)
WRONG = {
    "direction": (
        lambda: CustomTask(nn.Linear(4, 1), (X, T), loss=max, metric=max, direction="up"),
        ConfigError,
        "'up'",
    ),
    "loss": (lambda: CustomTask(nn.Linear(4, 1), (X, T), loss=3), ConfigError, "loss must be a function"),
    "smoothing": (lambda: ClassificationTask(nn.Linear(4, 3), (X, T), label_smoothing=1.0), ConfigError, "1.0"),
    "seed": (lambda: ClassificationTask(nn.Linear(4, 3), (X, T), seed=-1), ConfigError, "seed"),
    "lengths": (lambda: ClassificationTask(nn.Linear(4, 3), (X, T[:5])), DataError, "of lengths [12, 5]"),
    "one tensor": (lambda: ClassificationTask(nn.Linear(4, 3), X), DataError, ""),
    "text": (lambda: ClassificationTask(nn.Linear(4, 3), "cifar"), DataError, "not a str"),
    "empty": (lambda: ClassificationTask(nn.Linear(4, 3), (X[:0], T[:0])), DataError, "the train split is empty"),
    "iterable": (lambda: ClassificationTask(nn.Linear(4, 3), Stream()), DataError, "needs a DataLoader"),
    "empty iterable": (
        lambda: ClassificationTask(nn.Linear(4, 3), DataLoader(Nothing(), 4), validation=(X, T)),
        DataError,
        "the train split is empty",
    ),
    "iterable loader": (
        lambda: ClassificationTask(nn.Linear(4, 3), DataLoader(Stream(), 4)),
        DataError,
        "pass validation=",
    ),
    "mapping items": (
        lambda: ClassificationTask(nn.Linear(4, 3), [{"x": X[0], "y": 1}] * 9),
        DataError,
        "with keys 'x', 'y': pass unpack=",
    ),
    "text inputs": (lambda: ClassificationTask(nn.Linear(4, 3), [("a", 1)] * 9), DataError, "not a tensor"),
    "unpack": (
        lambda: ClassificationTask(nn.Linear(4, 3), [(X[0], 1)] * 9, unpack=lambda b: b[0]),
        DataError,
        "unpack must return",
    ),
    "no classes": (lambda: ClassificationTask(nn.Linear(4, 1), (X, T * 0)), ModelError, "(N, classes), not (2, 1)"),
    "example": (
        lambda: ClassificationTask(nn.Linear(4, 3), (X, T), example_inputs=torch.zeros(2, 5)),
        ModelError,
        "[(2, 5) float32]",
    ),
    "example kind": (
        lambda: ClassificationTask(nn.Linear(4, 3), (X, T), example_inputs=3),
        ModelError,
        "example_inputs",
    ),
    "validation size": (lambda: ClassificationTask(nn.Linear(4, 3), (X, T), validation=12), DataError, "1 to 11"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tasks(case):
    make, kind, words = WRONG[case]
    with pytest.raises(kind) as caught:
        make()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_test_split():
    task = ClassificationTask(nn.Linear(4, 3), train=nets.vectors())
    with pytest.raises(DataError, match="has no test split; it has train, validation"):
        list(task.batches("test"))


def test_the_pickle_of_a_task_is_small_and_equal(digits):
    data = cloudpickle.dumps(digits)
    weights = sum(v.numel() * v.element_size() for v in digits.model().state_dict().values())
    assert len(data) - weights < 200_000
    again = pickle.loads(data)
    assert again.fingerprint == digits.fingerprint
    assert torch.equal(all_of(again, "validation")[0], all_of(digits, "validation")[0])
    x = digits.example_inputs[0]
    assert torch.equal(again.model()(x), digits.model()(x))


def test_fingerprints_tell_data_and_weights_apart(digits):
    assert json.loads(json.dumps(dict(digits.fingerprint))) == digits.fingerprint
    x, t = nets.vectors(30)
    model = nets.linear()
    base = ClassificationTask(model, train=(x, t), validation=(x, t)).fingerprint
    assert ClassificationTask(model, train=(x, t), validation=(x, t)).fingerprint == base
    assert ClassificationTask(model, train=(x + 1, t), validation=(x, t)).fingerprint["train"] != base["train"]
    assert ClassificationTask(model, train=(x, t.flip(0)), validation=(x, t)).fingerprint["train"] != base["train"]
    assert ClassificationTask(nets.linear(), train=(x, t), validation=(x, t)).fingerprint["model"] != base["model"]


WRAPPED = {
    "tensors": lambda x, y: (x, y),
    "dataset": lambda x, y: list(zip(x, y, strict=True)),
    "loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=8),
    "shuffled loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True),
    "iterable": lambda x, y: DataLoader(Listed(list(zip(x, y, strict=True))), batch_size=8),
}


class Listed(IterableDataset):
    def __init__(self, items) -> None:
        self.items = items

    def __iter__(self):
        return iter(self.items)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.bool])
@pytest.mark.parametrize("kind", WRAPPED)
def test_fingerprints_see_inputs_and_targets_of_any_number_type(kind, dtype):
    x, y = torch.arange(1, 33)[:, None].expand(32, 4), torch.arange(32.0)[:, None]

    def print_(x, y):
        task = CustomTask(
            nn.Flatten(),
            train=WRAPPED[kind](x.to(dtype), y),
            validation=WRAPPED[kind](x.to(dtype), y),
            loss=nn.functional.mse_loss,
        )
        return task.fingerprint["train"]

    first = print_(x, y)
    assert print_(x, y) == first
    assert json.loads(json.dumps(first)) == first
    assert print_(x * (0 if dtype is torch.bool else 100), y) != first
    assert print_(x, y * 100) != first


def test_a_part_of_the_fingerprint_looks_at_that_part_only():
    task = ClassificationTask(nn.Linear(4, 3), train=nets.vectors(), validation=nets.vectors(), test=Never())
    assert task.fingerprint_of("train")["size"] == 60
    assert len(task.fingerprint_of("model")) > 8
    with pytest.raises(RuntimeError, match="looked at"):
        assert task.fingerprint


class Never(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i):
        raise RuntimeError("looked at")


@pytest.mark.parametrize("factory", ["data", "regression", "task"])
def test_python_data(factory):
    classes = 1 if factory == "regression" else 3
    task = load_task(
        model="python:tests.tasks.nets:linear",
        model_args={"classes": classes},
        data=f"python:tests.tasks.nets:{factory}",
    )
    assert type(task) is (CustomTask if factory == "regression" else ClassificationTask)
    assert task.size("test") == (30 if factory == "data" else 0)
    assert task.size("validation") > 0
    batch = next(iter(task.batches("validation")))
    assert task.loss(task.model()(*batch.inputs), batch.targets).isfinite()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("not_data", "not a mapping with 'training'"),
        ("number", "not a int"),
        ("nothing", "has no 'nothing'"),
        ("broken", "failed: RuntimeError"),
    ],
)
def test_wrong_python_data(name, words):
    with pytest.raises(DataError) as caught:
        load_task(model="python:tests.tasks.nets:linear", data=f"python:tests.tasks.nets:{name}")
    assert words in str(caught.value)


@pytest.mark.parametrize("key", ["metric", "metric_name", "direction", "distill"])
def test_what_means_something_only_beside_a_loss(key):
    with pytest.raises(DataError, match=f"returned '{key}' without a loss: {key} needs loss beside it"):
        load_task(
            model="python:tests.tasks.nets:linear",
            data="python:tests.tasks.nets:without_loss",
            data_args={"key": key},
        )


def test_calibration_examples_are_plain_and_fixed(digits):
    first = torch.cat([b.inputs[0] for b in digits.calibration_batches(100, 32)])
    assert len(first) == 100
    assert torch.equal(first, torch.cat([b.inputs[0] for b in digits.calibration_batches(100, 32)]))
    stored = {k[:-1] for k in keys(*all_of(digits, "train"))}
    assert all((x * 16).round().byte().numpy().tobytes() in stored for x in first)


@pytest.mark.shared
def test_cifar10_and_its_resnet(shared_dir):
    task = load_task(
        model="python:benchmarks.models:resnet20",
        weights=shared_dir / "models" / "resnet20-cifar10jpeg.safetensors",
        data=f"parquet:{shared_dir / 'data' / 'cifar10-jpeg'}",
        validation=5000,
    )
    assert [task.size(split) for split in ("train", "validation", "test")] == [45000, 5000, 10000]
    assert sum(p.numel() for p in task.model().parameters()) == 269_722
    counts = np.bincount(np.concatenate([b.targets for b in task.batches("validation", 5000)]))
    assert counts.tolist() == [500] * 10
    assert evaluate(task.model(), task, "test", limit=1000).score > 87
