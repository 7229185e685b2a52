"""What users get wrong: each mistake, the one line it must give, exit status 2, and no traceback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from autorank import cli, demo
from autorank.demo import network
from autorank.journal import FILE_NAME, Journal
from autorank.types import Cost, Evaluation, Objective, SweepHeader

MODEL = ["--model", "python:autorank.demo:network"]
DIGITS = [*MODEL, "--data", "digits"]
QUIET = ["--executor", "inline", "--quiet", "--trials", "1", "--steps", "0"]

# Factories that the table below names as python:tests.test_wrong_inputs:…


def needs_seven_channels() -> nn.Module:
    return nn.Sequential(nn.Conv2d(7, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


def three_classes() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


def no_layers() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LayerNorm(64, elementwise_affine=False), nn.AdaptiveAvgPool1d(10))


def not_a_module() -> str:
    return "a network"


def raises() -> nn.Module:
    raise RuntimeError("no licence file")


def not_finite() -> nn.Module:
    model = network()
    with torch.no_grad():
        next(model.parameters())[0] = float("nan")
    return model


def empty_data() -> dict[str, object]:
    return {"train": (torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long))}


def strange_data() -> int:
    return 3


@dataclass(frozen=True)
class Case:
    """A mistake: what is set up, the arguments, and the line that must come."""

    name: str
    arguments: list[str] | Callable[[Path], list[str]]
    line: str


def search(*more: str) -> list[str]:
    return ["search", *DIGITS, *QUIET, *more]


def file_with(name: str, text: str | bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return make


def space(text: str) -> Callable[[Path], list[str]]:
    return lambda folder: search("--space", str(file_with("space.yaml", text)(folder)))


def sweep(text: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["search", str(file_with("sweep.yaml", text)(folder)), *DIGITS, *QUIET]


def weights(make: Callable[[Path], Path]) -> Callable[[Path], list[str]]:
    return lambda folder: search("--weights", str(make(folder)))


def other_weights(folder: Path) -> Path:
    save_file({"somewhere.weight": torch.zeros(3, 3)}, folder / "other.safetensors")
    return folder / "other.safetensors"


def wrong_shapes(folder: Path) -> Path:
    state = {name: value.clone() for name, value in network().state_dict().items()}
    state["0.weight"] = torch.zeros(32, 3, 3, 3)
    save_file(state, folder / "shapes.safetensors")
    return folder / "shapes.safetensors"


def malicious(folder: Path) -> Path:
    import pickle

    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(folder / "attacked"),)

    (folder / "bad.pt").write_bytes(pickle.dumps(Attack()))
    return folder / "bad.pt"


def read_only(folder: Path) -> list[str]:
    locked = folder / "locked"
    locked.write_text("a file where a directory should be")
    return search("--sweep-dir", str(locked / "sweep"))


def written(folder: Path, text: str) -> Path:
    directory = folder / "sweep"
    directory.mkdir()
    (directory / FILE_NAME).write_text(text)
    return directory


def started(folder: Path) -> Path:
    objectives = (Objective("score", "max"), Objective("macs_kept", "min"))
    header = SweepHeader("s", 0.0, {}, "accuracy", "max", objectives, (), Evaluation(90.0, 0.3), Cost(1, 1, 4))
    with Journal(folder / "sweep") as journal:
        journal.write_header(header)
    return folder / "sweep"


def image_folder(make: Callable[[Path], None]) -> Callable[[Path], list[str]]:
    def arguments(folder: Path) -> list[str]:
        root = folder / "images"
        root.mkdir()
        make(root)
        return ["search", *MODEL, "--data", f"imagefolder:{root}", *QUIET]

    return arguments


def corrupt_image(root: Path) -> None:
    (root / "train" / "dog").mkdir(parents=True)
    (root / "train" / "dog" / "broken too.png").write_bytes(b"not an image")
    (root / "train" / "cat").mkdir(parents=True)
    (root / "train" / "cat" / "broken.png").write_bytes(b"not an image")


CASES = [
    # model
    Case("no model", ["search", "--data", "digits", *QUIET], "no model given.*--model"),
    Case("no data", ["search", *MODEL, *QUIET], "no data given.*--data"),
    Case("unknown model source", ["search", "--model", "zoo:net", "--data", "digits", *QUIET], "zoo.*python:"),
    Case("module missing", ["search", "--model", "python:no_such.mod:f", "--data", "digits", *QUIET], "no_such"),
    Case(
        "factory missing",
        ["search", "--model", "python:autorank.demo:netwrk", "--data", "digits", *QUIET],
        "netwrk.*network",
    ),
    Case(
        "factory gives no module",
        ["search", "--model", "python:tests.test_wrong_inputs:not_a_module", "--data", "digits", *QUIET],
        "not_a_module.*(str|nn.Module|Module)",
    ),
    Case(
        "factory raises",
        ["search", "--model", "python:tests.test_wrong_inputs:raises", "--data", "digits", *QUIET],
        "no licence file",
    ),
    Case("wrong model argument", search("--model-arg", "depth=3"), "depth"),
    Case("model argument without value", search("--model-arg", "depth"), "KEY=VALUE"),
    Case(
        "model does not run on the data",
        ["search", "--model", "python:tests.test_wrong_inputs:needs_seven_channels", "--data", "digits", *QUIET],
        "7 channels|expected input|\\(1, 1, 8, 8\\)|1×1×8×8",
    ),
    Case(
        "labels out of range",
        ["search", "--model", "python:tests.test_wrong_inputs:three_classes", "--data", "digits", *QUIET],
        "label 9.*3 classes|3 classes.*label 9",
    ),
    Case(
        "nothing to decompose",
        ["search", "--model", "python:tests.test_wrong_inputs:no_layers", "--data", "digits", *QUIET],
        "no layer",
    ),
    Case(
        "weights that are not finite",
        ["search", "--model", "python:tests.test_wrong_inputs:not_finite", "--data", "digits", *QUIET],
        "(?i)not finite|nan",
    ),
    # weights
    Case("weights missing", search("--weights", "nowhere.safetensors"), "nowhere.safetensors does not exist"),
    Case("weights of another model", weights(other_weights), "somewhere.weight"),
    Case("weights of other shapes", weights(wrong_shapes), r"0\.weight"),
    Case("weights no safetensors", weights(file_with("w.safetensors", b"garbage")), "w.safetensors"),
    Case("weights of unknown kind", weights(file_with("w.h5", b"garbage")), r"w\.h5.*safetensors"),
    Case("weights that would run code", weights(malicious), "bad.pt"),
    # data
    Case("unknown data source", ["search", *MODEL, "--data", "s3:bucket", *QUIET], "s3.*digits"),
    Case("parquet missing", ["search", *MODEL, "--data", "parquet:nowhere", *QUIET], "nowhere"),
    Case("image folder missing", ["search", *MODEL, "--data", "imagefolder:nowhere", *QUIET], "nowhere"),
    Case("image folder empty", image_folder(lambda root: None), "images"),
    Case("corrupt image", image_folder(corrupt_image), r"broken\.png|broken too\.png"),
    Case(
        "parquet without images",
        lambda folder: ["search", *MODEL, "--data", f"parquet:{_table(folder)}", *QUIET],
        "column",
    ),
    Case("unknown data option", search("--data-arg", "sise=32"), "sise.*(image_size|allowed)"),
    Case(
        "no training examples",
        ["search", *MODEL, "--data", "python:tests.test_wrong_inputs:empty_data", *QUIET],
        "train",
    ),
    Case(
        "data factory gives no data",
        ["search", *MODEL, "--data", "python:tests.test_wrong_inputs:strange_data", *QUIET],
        "strange_data",
    ),
    Case("validation too large", search("--validation", "5000"), "validation.*5000|5000.*validation"),
    Case("validation no number", search("--validation", "much"), "--validation 'much' is not a number"),
    # settings
    Case("unknown objective", search("--objectives", "accuracy,speed"), "speed.*allowed"),
    Case("one objective", search("--objectives", "accuracy"), "two or three"),
    Case("the same objective twice", search("--objectives", "accuracy,score"), "same axis"),
    Case("constraint unreadable", search("--constraint", "small please"), "small please.*macs_kept<=0.5"),
    Case("constraint on nothing known", search("--constraint", "watts<=3"), "watts.*allowed"),
    Case("constraint out of reach", search("--constraint", "macs_kept<=0.0001"), "macs_kept.*0\\.\\d+"),
    Case("unknown strategy", search("--strategy", "gredy"), "gredy.*tpe"),
    Case("unknown device", search("--device", "warp"), "warp.*cpu"),
    Case("device not there", search("--device", "cuda:7"), "cuda:7.*not available"),
    Case("unknown executor", ["search", *DIGITS, "--executor", "slurm"], "slurm.*ray"),
    Case("time unreadable", search("--max-time", "soon"), "soon.*30m"),
    Case("sweep file missing", ["search", "nowhere.yaml"], "nowhere.yaml: no such file"),
    Case("sweep file misspelt key", sweep("trails: 3\n"), "sweep.yaml: trails.*did you mean 'trials'"),
    Case(
        "sweep file wrong value", sweep("recovery: {lr: fast}\n"), "sweep.yaml: recovery: lr must be .*above 0.*'fast'"
    ),
    Case("sweep file not YAML", sweep("trials: [1\n"), "sweep.yaml: line"),
    Case("sweep file no mapping", sweep("- 1\n"), "sweep.yaml.*mapping"),
    Case("sweep file key twice", sweep("seed: 1\nseed: 2\n"), "line 2.*'seed' is given twice"),
    Case("unknown strategy option", sweep("strategy: {name: tpe, options: {temperature: 3}}\n"), "temperature"),
    # search space
    Case("unknown space", search("--space", "defualt"), "defualt.*default"),
    Case("space file missing", search("--space", "my/space.yaml"), "my/space.yaml: no such file"),
    Case("space misspelt key", space("version: 1\ndefalts: {}\n"), "space.yaml: .*defalts.*defaults"),
    Case("space unknown format", space("version: 1\ndefaults: {formats: [tuckr2]}\n"), "tuckr2.*tucker2"),
    Case("space unknown whitening", space("version: 1\ndefaults: {whiten: [out]}\n"), "out.*input.*output.*both"),
    Case("space wrong rank", space("version: 1\ndefaults: {ranks: {fractions: [1.5]}}\n"), "fractions.*1.5.*at most 1"),
    Case("space rank not whole", space("version: 1\ndefaults: {ranks: {counts: [2.5]}}\n"), "counts.*2.5.*whole"),
    Case("space pattern matches nothing", space("version: 1\ndense: [layer9]\n"), "layer9"),
    Case("space rule matches nothing", space("version: 1\nrules: [{match: {name: conv7}}]\n"), "conv7"),
    Case("space leaves nothing", space('version: 1\ndense: ["*"]\n'), "no layer|nothing"),
    # sweeps
    Case("sweep directory not writable", read_only, "cannot write"),
    Case("no such sweep", ["front", "nowhere"], "nowhere is not a sweep"),
    Case("damaged journal", lambda folder: ["front", str(written(folder, "{}\n{}\n"))], "line 1: not a journal entry"),
    Case("resume nothing", lambda folder: ["resume", str(folder)], "is not a sweep"),
    Case("two print formats", ["front", "nowhere", "--json", "--csv"], "choose one"),
    Case(
        "export from an empty front",
        lambda folder: ["export", str(started(folder))],
        "(?i)no (trial|point)|empty",
    ),
    Case("profile without model", ["profile", "--data", "digits"], "no model given"),
    Case("profile without input", ["profile", *MODEL], "--data, or --input"),
    Case("profile with a strange shape", ["profile", *MODEL, "--input", "1xax8"], "1xax8.*3x224x224"),
    Case("profile with a shape that does not fit", ["profile", *MODEL, "--input", "5x8x8"], "5"),
]


def _table(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a", "b"], "stars": [1.5, 2.5]}), folder / "train.parquet")
    return folder / "train.parquet"


def test_there_are_enough_of_them_and_each_has_a_name() -> None:
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_gives_one_clear_line(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).resolve().parents[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(root))
    arguments = case.arguments(tmp_path) if callable(case.arguments) else case.arguments
    monkeypatch.setattr(sys, "argv", ["autorank", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.strip()]
    assert end.value.code == 2, printed
    assert lines, printed
    assert "Traceback" not in printed.err
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("error: ")
    assert re.search(case.line, lines[0]), lines[0]
    assert len(lines[0]) < 600
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("room", [100, 2_000, 100_000], ids=lambda n: f"{n} bytes left")
def test_a_full_disk_gives_one_clear_line(tmp_path: Path, room: int) -> None:
    """The operating system refuses to write a file beyond `room` bytes, wherever in the sweep that comes."""
    code = (
        "import resource, sys\n"
        "from autorank import cli\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
        "cli.main()"
    )
    arguments = [*search("--sweep-dir", str(tmp_path / "s")), "--trials", "400"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert re.match(r"error: .*(File too large|cannot write)", lines[0]), lines[0]


def test_plans_that_do_not_fit_the_model() -> None:
    """The same for plans given from Python: each wrong one is named."""
    from autorank import AutorankError, compress

    model = network()
    good = {"format": "channel_svd", "rank": [4]}
    table: list[tuple[object, str]] = [
        ({"layers": {"99": good}}, "99"),
        ({"layers": {"3": {**good, "rank": [100_000]}}}, "100000|100,000"),
        ({"layers": {"3": {**good, "rank": [0]}}}, "positive whole"),
        ({"layers": {"3": {**good, "rank": [4, 4]}}}, "rank"),
        ({"layers": {"3": {**good, "format": "svd2"}}}, "svd2.*channel_svd"),
        ({"layers": {"16": {"format": "tucker2", "rank": [2, 2]}}}, "16"),
        ({"layers": {"3": {**good, "options": {"speed": "high"}}}}, "speed"),
        ({"layers": {"3": {**good, "options": {"whiten": "input"}}}}, "calibration"),
        ({"layers": {"3": {**good, "options": {"whiten": "both"}}}}, "calibration"),
        ({"layers": {"3": {**good, "options": {"whiten": "outputs"}}}}, "none, input, output, both"),
        ({"layer": {}}, "layer"),
        ([], "mapping"),
        ("nowhere.json", "nowhere.json"),
    ]
    for plan, line in table:
        with pytest.raises(AutorankError, match=line) as error:
            compress(model, plan)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)


def test_demo_says_in_one_line_that_it_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(demo, "train", lambda task: network())  # the training is not what is tested here
    monkeypatch.setattr(sys, "argv", ["autorank", "demo", "--directory", str(blocked / "d")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: cannot write")


def test_help_of_every_command_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("search", "resume", "profile", "front", "export", "spaces", "demo", "version"):
        monkeypatch.setattr(sys, "argv", ["autorank", name, "--help"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
        assert name in capsys.readouterr().out


def test_spaces_are_listed_and_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["autorank", "spaces"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "default" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["autorank", "spaces", "default"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "version: 1" in capsys.readouterr().out
