"""report.md: the figures are those of the records, whatever the names and settings contain."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from autorank.comparing import Check
from autorank.report import render_report
from autorank.types import (
    Choice,
    Cost,
    DenseFigures,
    Evaluation,
    Fidelity,
    FrontPoint,
    LayerResult,
    LeftAlone,
    Objective,
    Plan,
    SweepHeader,
    TrialRecord,
)

WHITENED = Choice("spatial_svd", (5,), (("first", "h"), ("whiten", "input")))
TUCKER = Choice("tucker2", (12, 8))
LAYERS = (
    LayerResult("stem|conv", WHITENED, 0.25, 300, 90, 1000, 300, output_error=0.125, sensitivity=4321.0),
    LayerResult("block.conv", TUCKER, 0.5, 450, 150, 500, 200, latency_ms=0.5, latency_dense_ms=0.25),
)
RECORD = TrialRecord(
    number=12,
    plan=Plan.of({"stem|conv": WHITENED, "block.conv": TUCKER}, seed=5),
    fidelity=Fidelity(100),
    status="complete",
    score=91.25,
    score_before=40.5,
    score_bn=77.75,
    cost=Cost(750_000, 2_500, 10_000),
    layers=LAYERS,
    seconds={"fit": 1.25, "tune": 30.0},
    versions={"torch": "2.13.0"},
)
HEADER = SweepHeader(
    sweep_id="night",
    created=0.0,
    config={
        "model": "python:shop.nets:resnet",
        "model_args": {"depth": 20},
        "tracking_uri": "https://me:secret@mlflow.example/",
        "space": {"rules": [{"match": "a|b"}]},
        "max_time": None,
        "recovery": {"lr": 0.002},
    },
    metric="accuracy",
    direction="max",
    objectives=(Objective("score", "max"), Objective("macs_kept", "min")),
    constraints=(),
    dense=Evaluation(92.5, 0.3, 5000),
    dense_cost=Cost(1_500_000, 10_000, 40_000),
    layers=(
        {"name": "stem|conv", "weight_shape": [16, 3, 3, 3]},
        {"name": "block.conv", "weight_shape": [32, 16, 3, 3]},
        {"name": "head", "weight_shape": [10, 32]},
    ),
    left_alone=(LeftAlone("up", "ConvTranspose2d", "it is never called", 1234),),
    fingerprint={"train": {"sha256": "abc123"}},
    versions={"autorank": "0.1.0"},
)
POINT = FrontPoint(RECORD, 90.0, 1.5, 0.05, ("block.conv",))
DENSE = DenseFigures(92.0, 2.0, 0.04, batch=8, threads=2, device="cpu")
SIZES = {"plan.json": 321, "model.safetensors": 10_240, "model.pt2": 20_480, "model.onnx": 30_720}
CHECKS = (
    Check("model.onnx", "largest output difference ÷ largest output", 2.5e-7, True, 1e-3),
    Check("model.pt2", "not written: RuntimeError: a | b", math.nan, False),
)


@pytest.fixture
def report() -> str:
    return render(HEADER, POINT, DENSE)


def render(header: SweepHeader, point: FrontPoint, dense: DenseFigures | None) -> str:
    return render_report(
        header,
        point,
        sizes=SIZES,
        checks=CHECKS,
        dense=dense,
        examples=2000,
        input_names=("x",),
        notes={"model.onnx": "opset 20"},
        versions={"onnx": "1.23.2"},
    )


def rows(report: str) -> list[list[str]]:
    """Return the cells of all tables, unescaped."""
    found = []
    for line in report.splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            found.append([cell.strip().replace("\\|", "|") for cell in cells])
    return found


def row(report: str, first: str) -> list[str]:
    return next(cells for cells in rows(report) if cells[0] == first)


@pytest.mark.parametrize(
    ("first", "cells"),
    [
        ("accuracy (higher is better), validation", ["92.50", "91.25", "1.25 worse"]),
        ("· right after decomposition", ["", "40.50", "52.00 worse"]),
        ("· with batch-norm statistics settled", ["", "77.75", "14.75 worse"]),
        ("the same, test", ["92.00", "90.00", "2.00 worse"]),
        ("MACs", ["1,500,000", "750,000", "50.0% kept"]),
        ("Parameters", ["10,000", "2,500", "25.0% kept"]),
        ("Bytes of the parameters", ["40,000", "10,000", "25.0% kept"]),
        ("Latency", ["2 ms ± 0.04", "1.5 ms ± 0.05", "75.0% kept"]),
        ("`model.safetensors`", ["10,240", ""]),
        ("seed of the plan", ["5"]),
        ("recovery.lr", ["0.002"]),
        ("train.sha256", ["abc123"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_figures(report: str, first: str, cells: list[str]) -> None:
    assert row(report, first)[1:] == cells


def test_plan_in_forward_order_with_costs_and_errors(report: str) -> None:
    stem, block = row(report, "`stem|conv`"), row(report, "`block.conv`")
    assert stem[1:10] == [
        "16×3×3×3",
        "spatial_svd",
        "5",
        "first h, whiten input",
        "30.0%",
        "30.0%",
        "0.250",
        "0.125",
        "4.32e+03",
    ]
    assert block[1:9] == ["32×16×3×3", "tucker2", "12×8", "–", "90.0%", "75.0%", "0.500", "–"]
    assert report.index("`stem\\|conv`") < report.index("| `block.conv`")
    assert "Left dense by the plan (1): `head`." in report
    assert row(report, "`up`") == ["`up`", "ConvTranspose2d", "it is never called", "1,234"]


def test_slower_layers_are_flagged(report: str) -> None:
    assert "**Slower than their dense originals on this machine:** `block.conv`." in report
    assert row(report, "`block.conv`")[-3:] == ["0.25 ms", "0.5 ms", "slower"]
    assert row(report, "`stem|conv`")[-1] == ""


def test_how_latency_was_taken(report: str) -> None:
    assert "median ± interquartile range in PyTorch on cpu, batch 8, 2 threads" in report


def test_checks_passed_and_failed(report: str) -> None:
    assert ["`model.onnx`", CHECKS[0].what, "2.5e-07", "0.001", "passed"] in rows(report)
    assert ["`model.pt2`", "not written: RuntimeError: a | b", "–", "–", "**failed**"] in rows(report)
    assert "run on 2,000 validation examples" in report


def test_every_table_is_whole(report: str) -> None:
    for block in re.findall(r"(?:^\|.*\n)+", report, re.MULTILINE):
        assert len({len(cells) for cells in rows(block)}) == 1, block


def test_no_password_goes_along(report: str) -> None:
    assert "secret" not in report
    assert row(report, "tracking_uri")[1] == "https://mlflow.example/"


@pytest.mark.parametrize(
    "config",
    [
        {"data_args": {"token": "hf_HIDDEN", "split": "train"}},
        {"data": "https://host/data.parquet?token=HIDDEN&part=1"},
        {"model": "https://me:HIDDEN@host/net"},
        {"model": "python:shop.nets:net", "model_args": {"api_key": "HIDDEN", "url": "s3://u:HIDDEN@host/w"}},
        {"weights": ["https://host/a?sig=HIDDEN"], "recovery": {"deep": [{"password": "HIDDEN"}]}},
    ],
    ids=["key", "query", "model", "arguments", "nested"],
)
def test_no_secret_of_the_settings_goes_along(config: dict[str, object]) -> None:
    header = replace(HEADER, config=config, fingerprint={"data": {"source": "https://h/x?token=HIDDEN"}})
    failed = replace(RECORD, reason="no answer from https://me:HIDDEN@host/?token=HIDDEN")
    report = render(header, replace(POINT, record=failed), DENSE)
    assert "HIDDEN" not in report
    assert "host" in report


def test_versions_and_settings(report: str) -> None:
    assert "Versions: autorank 0.1.0, onnx 1.23.2, torch 2.13.0." in report
    assert "max_time" not in report


def test_code_compiles_and_names_the_factory(report: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", report, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        compile(block, "report.md", "exec")
    assert "from shop.nets import resnet\nfactory = lambda: resnet(depth=20)" in blocks[0]


def test_a_program_with_bits_is_opened_with_its_operations_known() -> None:
    needed = "import torch.ao.quantization.fx._decomposed"
    record = replace(POINT.record, plan=Plan.of({"block.conv": replace(TUCKER, weight_bits=8, activation_bits=8)}))
    assert needed in render(HEADER, replace(POINT, record=record), None)
    assert needed not in render(HEADER, POINT, None)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"model": "python:a.b:net"}, "from a.b import net as factory"),
        ({"model": "timm:resnet18"}, "factory = ...  # a function that returns the dense model (timm:resnet18)"),
        ({"model": "python:a.b:net\nimport os"}, "factory = ...  # a function that returns the dense model"),
        ({}, "factory = ...  # a function that returns the dense model"),
    ],
    ids=["python", "timm", "strange", "none"],
)
def test_factory(config: dict[str, str], line: str) -> None:
    report = render(replace(HEADER, config=config), POINT, DENSE)
    assert line in report
    assert "\nimport os" not in report


@pytest.mark.parametrize(
    ("direction", "change"), [("max", "1.25 worse"), ("min", "1.25 better")], ids=["more is better", "less is better"]
)
def test_direction(direction: str, change: str) -> None:
    report = render(replace(HEADER, direction=direction), POINT, DENSE)  # type: ignore[arg-type]
    assert next(cells for cells in rows(report) if cells[0].endswith("validation"))[3] == change


def test_what_was_not_measured_is_said_to_be_so() -> None:
    report = render(HEADER, FrontPoint(replace(RECORD, score_bn=None)), None)
    assert row(report, "the same, test")[1:] == ["not measured", "not measured", ""]
    assert row(report, "Latency")[1:] == ["not measured", "not measured", ""]
    assert "batch-norm statistics" not in report
    assert "Slower" not in report


def test_an_empty_plan() -> None:
    report = render(HEADER, replace(POINT, record=replace(RECORD, plan=Plan(), layers=())), DENSE)
    assert "No layer is decomposed: this is the dense model." in report
