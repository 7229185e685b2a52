"""Weights files: what is read, and that nothing in them is run."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autorank.errors import WeightsError
from autorank.tasks.weights import hash_weights, load_into, read_weights


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


SAVED = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "best": 0.5},
    "twice": lambda state: {"model": {"state_dict": state, "step": 1}},
    "parallel": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    "compiled": lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
}


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("layout", SAVED)
def test_pytorch_files(layout, suffix, tmp_path):
    model = net()
    path = tmp_path / f"w{suffix}"
    torch.save(SAVED[layout](model.state_dict()), path)
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    load_into(other, read_weights(path), str(path))
    assert hash_weights(other) == hash_weights(model)


def test_safetensors(tmp_path):
    model = net()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    load_into(other, read_weights(tmp_path / "w.safetensors"), "w")
    assert hash_weights(other) == hash_weights(model)


def test_a_model_called_model_is_not_taken_apart(tmp_path):
    """A state dict whose own keys look like nesting stays whole."""
    torch.save({"model": torch.zeros(2), "net": torch.ones(1)}, tmp_path / "w.pt")
    assert sorted(read_weights(tmp_path / "w.pt")) == ["model", "net"]


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False], ids=["torch.save", "bare pickle"])
def test_a_malicious_pickle_does_not_run(zipped, tmp_path):
    path, proof = tmp_path / "w.pt", tmp_path / "it-ran"
    if zipped:
        torch.save({"weight": torch.zeros(2), "x": Evil(str(proof))}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(str(proof))))
    with pytest.raises(WeightsError) as caught:
        read_weights(path)
    assert not proof.exists()
    assert "\n" not in str(caught.value)
    assert "cannot be read" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.pt", None, "does not exist"),
        ("weights.txt", b"x", "must end in .safetensors, .pt, .pth or .bin"),
        ("text.pt", b"hello", "cannot be read"),
        ("empty.pt", b"", "cannot be read"),
        ("text.safetensors", b"hello, these are no weights", "cannot be read"),
        ("empty.safetensors", b"", "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[:20] else "",
)
def test_not_a_weights_file(name, content, words, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        read_weights(path)
    assert words in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory(tmp_path):
    with pytest.raises(WeightsError, match="is a directory"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    "data", [torch.zeros(2), [torch.zeros(2)], {"a": 1}, {}], ids=["tensor", "list", "number", "empty"]
)
def test_no_state_dict_inside(data, tmp_path):
    torch.save(data, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="not a state dict"):
        read_weights(tmp_path / "w.pt")


def test_a_truncated_file(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(WeightsError, match="cannot be read"):
        read_weights(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("0.weight"), "missing 0.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda s: s.update({"2.bias": torch.zeros(5)}), "of another shape 2.bias is (5,), the model has (2,)"),
        (lambda s: s.update({"0.bias": torch.tensor([1.0, float("nan"), 0, 0])}), "not finite in 0.bias"),
        (
            lambda s: [s.pop(k) for k in ("0.weight", "0.bias", "1.weight", "1.bias", "2.bias")],
            "missing 0.weight, 0.bias, 1.weight and 2 more",
        ),
    ],
    ids=["missing", "unexpected", "shape", "nan", "many"],
)
def test_weights_of_another_model(change, words):
    model = net()
    state = dict(net().state_dict())
    change(state)
    with pytest.raises(WeightsError) as caught:
        load_into(model, state, "w.pt")
    assert words in str(caught.value)


def test_old_files_without_batch_counts_are_fine():
    state = {k: v for k, v in net().state_dict().items() if not k.endswith("num_batches_tracked")}
    load_into(net(), state, "w")
