"""What a task with data in memory sends to its workers: small pickles, files that all of them map."""

from __future__ import annotations

import pickle
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from autorank.errors import DataError
from autorank.tasks import ClassificationTask, Task, travel

COUNT = 4000  # × 784 float32 = 12.5 MB


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTORANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tensors"


class Arrays(Dataset):
    def __init__(self, x: torch.Tensor, t: torch.Tensor) -> None:
        self.x, self.labels = x.numpy(), t.numpy()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self.x[i], int(self.labels[i])


KINDS = {
    "tensors": lambda x, t: (x, t),
    "tensor dataset": TensorDataset,
    "numpy arrays": Arrays,
    "loader": lambda x, t: DataLoader(TensorDataset(x, t), batch_size=256),
}


def task_of(kind: str, dtype: torch.dtype = torch.float32) -> Task:
    whole = torch.randn(2 * COUNT, 784, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.arange(2 * COUNT) % 3
    train, validation = (KINDS[kind](whole[part], labels[part]) for part in (slice(COUNT), slice(COUNT, None)))
    return ClassificationTask(nn.Linear(784, 3).to(dtype), train=train, validation=validation)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pickle_is_small_and_the_files_are_shared(kind, cache):
    task = task_of(kind)
    data = cloudpickle.dumps(task)
    assert len(data) < 200_000
    files = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert sorted(path.stat().st_size // 1000 for path in files) == [12544, 12544]
    cloudpickle.dumps(task)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == files
    again = pickle.loads(data)
    mapped = Path("/proc/self/maps").read_text()
    assert all(path.name in mapped for path in files)
    assert {part: again._feeds[part].fingerprint() for part in again._feeds} == {
        part: task._feeds[part].fingerprint() for part in task._feeds
    }
    for first, second in zip(task.train_batches(3, 100, 1), again.train_batches(3, 100, 1), strict=True):
        assert torch.equal(first.inputs[0], second.inputs[0])
        assert torch.equal(first.targets, second.targets)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_number_type(dtype, cache):
    task = task_of("tensors", dtype)
    again = pickle.loads(cloudpickle.dumps(task))
    first, second = (next(iter(t.batches("validation"))).inputs[0] for t in (task, again))
    assert second.dtype == dtype
    assert torch.equal(first, second)


VALUES = {
    "small view of a large tensor": torch.randn(3_000_000)[5:9],
    "transposed": torch.randn(700, 800).t(),
    "every second": torch.randn(900_000)[::2],
    "expanded": torch.randn(1, 700).expand(700, 700),
    "complex": torch.randn(500_000, dtype=torch.complex64).conj(),
    "widest": torch.randn(100_000, dtype=torch.complex128),
    "bool": torch.rand(2_000_000) < 0.5,
    "no elements": torch.zeros(0, 5),
    "no dimensions": torch.tensor(2.5),
    "sparse": torch.eye(50).to_sparse(),
    "gradient": torch.randn(5, requires_grad=True),
}


@pytest.mark.parametrize("name", VALUES)
def test_every_tensor_comes_back_equal(name, cache):
    value = VALUES[name]
    data = travel.dumps({"x": [value, value]})
    assert len(data) < 2_000_000
    if name == "small view of a large tensor":
        assert len(data) < 2000
    first, second = pickle.loads(data)["x"]
    assert first is second
    assert (first.dtype, first.requires_grad) == (value.dtype, value.requires_grad)
    assert torch.equal(first.to_dense(), value.to_dense())


def test_writing_into_what_came_back_changes_no_file(cache):
    data = travel.dumps(torch.zeros(500_000))
    pickle.loads(data).add_(1)
    assert float(pickle.loads(data).sum()) == 0


def test_a_damaged_file_is_written_again(cache):
    data = travel.dumps(torch.ones(500_000))
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"cannot be read .* set \$AUTORANK_CACHE to a directory that all machines"):
        pickle.loads(data)
    assert float(pickle.loads(travel.dumps(torch.ones(500_000))).sum()) == 500_000


def test_a_cache_that_cannot_be_written_sends_the_values(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTORANK_CACHE", str(tmp_path / "file"))
    for value in (torch.ones(500_000), np.ones(500_000)):
        assert float(pickle.loads(travel.dumps(value)).sum()) == 500_000
