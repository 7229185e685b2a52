"""Where models come from, and what is said when they do not."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from autorank.errors import AutorankError, ConfigError, MissingExtraError, ModelError
from autorank.tasks import ClassificationTask, load_task
from autorank.tasks.models import GivenModel, NamedModel, build
from tests.tasks import nets


def test_python_factory_takes_arguments():
    assert build("python:tests.tasks.nets:convnet", {"width": 7})[0].out_channels == 7


def test_factory_is_found_in_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "only_here_models.py").write_text("from torch import nn\ndef net():\n    return nn.Linear(2, 3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert build("python:only_here_models:net", {}).out_features == 3


def test_random_weights_do_not_depend_on_the_caller():
    torch.manual_seed(1)
    first = build("python:tests.tasks.nets:convnet", {})
    state = torch.get_rng_state()
    second = build("python:tests.tasks.nets:convnet", {})
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "args", "kind", "words"),
    [
        ("resnet", {}, ConfigError, ["'resnet'", "python:package.module:function", "torchhub"]),
        ("keras:resnet", {}, ConfigError, ["'keras:resnet'"]),
        ("python:nets", {}, ModelError, ["must be python:package.module:function"]),
        ("python:no_such_module:net", {}, ModelError, ["no module 'no_such_module'", "looked in", str(Path.cwd())]),
        ("python:tests.tasks.nothing:net", {}, ModelError, ["no module 'tests.tasks.nothing'"]),
        ("python:tests.tasks.nets:convent", {}, ModelError, ["no 'convent'", "near: convnet"]),
        ("python:tests.tasks.nets:not_callable", {}, ModelError, ["not_callable is a int, not a function"]),
        (
            "python:tests.tasks.nets:broken",
            {"width": 2},
            ModelError,
            ["broken(width=2) failed: RuntimeError: no net of width 2"],
        ),
        ("python:tests.tasks.nets:convnet", {"depth": 2}, ModelError, ["TypeError", "depth"]),
        ("python:tests.tasks.nets:number", {}, ModelError, ["returned a int, not a torch.nn.Module"]),
        ("torchhub:nothing", {}, ModelError, ["torchhub:repository:name"]),
    ],
    ids=[
        "no scheme",
        "unknown scheme",
        "no function",
        "no module",
        "no submodule",
        "no attribute",
        "not callable",
        "raises",
        "wrong argument",
        "not a module",
        "hub without name",
    ],
)
def test_errors_tell_the_cases_apart(name, args, kind, words):
    with pytest.raises(kind) as caught:
        build(name, args)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "import no_such_dependency\n",
            "importing {} failed: ModuleNotFoundError: No module named 'no_such_dependency'",
        ),
        ("1 / 0\n", "importing {} failed: ZeroDivisionError: division by zero"),
        ("def net(:\n", "importing {} failed: SyntaxError"),
    ],
    ids=["missing dependency", "raises", "syntax"],
)
def test_a_module_that_does_not_import_says_why(source, words, tmp_path, monkeypatch, request):
    name = "broken_" + request.node.callspec.id.replace(" ", "_")
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ModelError) as caught:
        build(f"python:{name}:net", {})
    assert words.format(name) in str(caught.value)


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_missing_extra_says_how_to_install_it(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match="extra 'vision': pip install torchvision timm"):
        build(f"{package}:resnet18", {})


@pytest.mark.vision
@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:resnet18"])
def test_vision_models(name):
    model = build(name, {"num_classes": 5})
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises(ModelError, match="near:"):
        build(name[:-1] + "x", {})


def test_torchhub_reads_a_local_repository(tmp_path):
    (tmp_path / "hubconf.py").write_text("from torch import nn\ndef tiny(width=3):\n    return nn.Linear(2, width)\n")
    assert build(f"torchhub:{tmp_path}:tiny", {"width": 5}).out_features == 5
    with pytest.raises(ModelError, match="Cannot find callable tony"):
        build(f"torchhub:{tmp_path}:tony", {})


def test_torchhub_without_hubconf(tmp_path):
    with pytest.raises(ModelError, match=r"failed: FileNotFoundError.*hubconf"):
        build(f"torchhub:{tmp_path}:tiny", {})


def test_torchhub_names_the_extra_that_a_repository_needs(tmp_path, monkeypatch):
    (tmp_path / "hubconf.py").write_text("dependencies = ['timm']\ndef tiny():\n    return None\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(MissingExtraError, match="pip install torchvision timm"):
        build(f"torchhub:{tmp_path}:tiny", {})


def test_the_users_module_is_copied_and_unchanged():
    mine = nets.convnet().train()
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    x = torch.rand(20, 1, 8, 8)
    task = ClassificationTask(mine, train=(x, torch.arange(20) % 10))
    theirs = task.model()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    assert mine.training
    assert not theirs.training
    assert all(torch.equal(before[name], value) for name, value in mine.state_dict().items())
    assert any(bool(p.any()) for p in task.model().parameters())


def test_wrappers_are_taken_off():
    inner = nn.Linear(2, 2)
    assert type(GivenModel(nn.DataParallel(inner)).template()) is nn.Linear
    assert type(GivenModel(torch.compile(inner)).template()) is nn.Linear


@pytest.mark.parametrize("given", [3, "net", None], ids=repr)
def test_not_a_model(given):
    with pytest.raises(ModelError, match="model must be a module or a function"):
        GivenModel(given)


def test_a_named_model_travels_as_name_and_weights(tmp_path):
    weights = nets.convnet(width=5)
    path = tmp_path / "w.pt"
    torch.save(weights.state_dict(), path)
    source = NamedModel("python:tests.tasks.nets:convnet", {"width": 5}, path)
    path.unlink()
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(source))))
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(again.template()(x), weights.eval()(x))


def test_a_worker_elsewhere_finds_the_factory(tmp_path):
    (tmp_path / "factory_of_mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__(); self.line = nn.Linear(4, 3)\n"
        "    def forward(self, x):\n        return self.line(x)\n"
        "class Data(torch.utils.data.Dataset):\n"
        "    def __len__(self):\n        return 30\n"
        "    def __getitem__(self, i):\n        return torch.full((4,), float(i)), i % 3\n"
        "def data():\n    return {'train': Data()}\n"
    )
    dump = (
        "import cloudpickle, sys; from autorank.tasks import load_task;"
        "t = load_task(model='python:factory_of_mine:Net', data='python:factory_of_mine:data');"
        "open('task.pkl', 'wb').write(cloudpickle.dumps(t)); print(t.fingerprint['model'])"
    )
    load = (
        "import pickle, sys; t = pickle.load(open(sys.argv[1], 'rb'));"
        "next(iter(t.batches('validation'))); print(t.fingerprint['model'], t.model()(t.example_inputs[0]).shape[1])"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    first = subprocess.run([sys.executable, "-c", dump], cwd=tmp_path, capture_output=True, text=True, check=True)
    second = subprocess.run(
        [sys.executable, "-c", load, str(tmp_path / "task.pkl")],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=True,
    )
    assert second.stdout.split() == [first.stdout.strip(), "3"]


def test_a_model_that_does_not_run_on_the_data():
    with pytest.raises(
        ModelError, match=r"does not run on its example inputs \[\(2, 1, 8, 8\) float32\]: RuntimeError"
    ):
        load_task(model="python:tests.tasks.nets:convnet", model_args={"channels": 3}, data="digits")


def test_errors_are_autoranks():
    assert issubclass(ModelError, AutorankError)
