"""report.md of an export: what was gained and lost, the plan, how to load the files, how they came about."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from autorank.comparing import Check
from autorank.deployment import Latency
from autorank.privacy import public, without_secrets
from autorank.types import DENSE, DenseFigures, FrontPoint, SweepHeader

_RUNTIMES = {"pytorch": "PyTorch", "onnxruntime": "ONNX Runtime"}
_RATIOS = {"macs": "MACs", "params": "Parameters", "bytes": "Bytes of the parameters", "bops": "Bit operations"}


def render_report(
    header: SweepHeader,
    point: FrontPoint,
    *,
    sizes: Mapping[str, int],
    checks: Sequence[Check],
    dense: DenseFigures | None = None,
    examples: int = 0,
    input_names: Sequence[str] = ("input",),
    notes: Mapping[str, str] | None = None,
    versions: Mapping[str, str] | None = None,
    latencies: Sequence[Latency] = (),
) -> str:
    """Return the report of one exported point as Markdown.

    Parameters
    ----------
    header : SweepHeader
    point : FrontPoint
    sizes : mapping of str to int
        File name → bytes on disk.
    checks : sequence of Check
    dense : DenseFigures, optional
        Test score and latency of the dense model, measured beside the front.
    examples : int
        Validation examples on which the files were compared.
    input_names : sequence of str
        Names of the model's inputs, for the ONNX example.
    notes : mapping of str to str, optional
        File name → what is particular about it (opset, batch size).
    versions : mapping of str to str, optional
        Libraries that wrote the files.
    latencies : sequence of Latency
        Of the ONNX file of a model with bits, and of the dense model's beside it.

    Returns
    -------
    str
        Without the secrets that settings or addresses carry.
    """
    header = replace(header, config=without_secrets(header.config), fingerprint=without_secrets(header.fingerprint))
    record = point.record
    parts = [
        f"# Compressed model: trial {record.number} of sweep {_text(header.sweep_id)}",
        _summary(header, point),
        "## Figures",
        *_figures(header, point, dense),
        *_timed(latencies),
        "## Plan",
        *_plan(header, point),
        "## Loading it",
        *_loading(header, sizes, input_names, point.record.plan.has_bits),
        "## Files and checks",
        *_files(sizes, checks, examples, notes or {}),
        "## How it came about",
        *_origin(header, point, versions or {}),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(header: SweepHeader, point: FrontPoint) -> str:
    record, cost = point.record, point.record.cost
    score = "not measured" if record.score is None else _score(record.score)
    text = f"**{_text(header.metric)} {score}** on validation data (dense {_score(header.dense.score)})"
    if cost is not None:
        kept = cost.kept(header.dense_cost)
        text += f", with **{kept['macs_kept']:.1%} of the MACs** and **{kept['params_kept']:.1%} of the parameters**"
    decomposed = sum(choice.format != DENSE for _, choice in record.plan.layers)
    bits = [choice.bits for _, choice in record.plan.layers if choice.bits]
    quantized = f", {len(bits)} with bits ({', '.join(sorted(set(bits)))})" if bits else ""
    return text + f". Plan `{record.plan_id}`, {decomposed} layers decomposed{quantized}."


def _figures(header: SweepHeader, point: FrontPoint, dense: DenseFigures | None) -> list[str]:
    record, better = point.record, "higher" if header.direction == "max" else "lower"
    metric = f"{_text(header.metric)} ({better} is better)"
    rows = [_scores(f"{metric}, validation", header.dense.score, record.score, header.direction)]
    for label, value in (
        ("right after decomposition", record.score_before),
        ("with batch-norm statistics settled", record.score_bn),
    ):
        if value is not None:
            rows.append([f"· {label}", "", _score(value), _lost(header.dense.score, value, header.direction)])
    dense_test = None if dense is None else dense.test_score
    if point.test_score is not None or dense_test is not None:
        rows.append(_scores("the same, test", dense_test, point.test_score, header.direction))
    else:
        rows.append(["the same, test", "not measured", "not measured", ""])
    if record.cost is not None:
        kept = record.cost.kept(header.dense_cost)
        for name, label in _RATIOS.items():
            before, after = getattr(header.dense_cost, name), getattr(record.cost, name)
            if before is None or after is None or (name == "bops" and not record.plan.has_bits):
                continue
            rows.append([label, f"{before:,}", f"{after:,}", f"{kept[f'{name}_kept']:.1%} kept"])
    rows.append(_latency(header, point, dense))
    lines = [_table(["", "dense", "compressed", "change"], rows)]
    if dense is not None and point.latency_ms is not None:
        lines.append(
            f"Latency: median ± interquartile range in {_RUNTIMES[dense.runtime]} on {_text(dense.device)}, "
            f"batch {dense.batch}, "
            f"{dense.threads} thread{'s' if dense.threads != 1 else ''}, nothing else running"
            + ("; both models in one go." if dense.latency_ms is not None else ".")
        )
    if point.slower_layers:
        names = ", ".join(f"`{_text(name)}`" for name in point.slower_layers)
        lines.append(f"**Slower than their dense originals on this machine:** {names}.")
    lines.append(
        "MACs are multiply-accumulates for one example. The test split was read once, at the end of the sweep."
    )
    return lines


def _timed(latencies: Sequence[Latency]) -> list[str]:
    if not latencies:
        return []
    rows = [[each.file, str(each.batch), _milliseconds(each.median_ms, each.spread_ms)] for each in latencies]
    return [
        "In ONNX Runtime, measured at export: median ± interquartile range on the CPU, one thread, in turns.",
        _table(["file", "batch", "latency"], rows),
    ]


def _scores(label: str, before: float | None, after: float | None, direction: str) -> list[str]:
    cells = ["not measured" if value is None else _score(value) for value in (before, after)]
    return [label, *cells, "" if before is None or after is None else _lost(before, after, direction)]


def _lost(before: float, after: float, direction: str) -> str:
    lost = before - after if direction == "max" else after - before
    if abs(lost) < 0.005 and abs(lost) < 1e-3 * abs(before):
        return "no change"
    return f"{_score(abs(lost))} {'worse' if lost > 0 else 'better'}"


def _latency(header: SweepHeader, point: FrontPoint, dense: DenseFigures | None) -> list[str]:
    before = dense.latency_ms if dense is not None else header.dense_cost.latency_ms
    cells = [
        _milliseconds(before, dense.latency_spread_ms if dense is not None else None),
        _milliseconds(point.latency_ms, point.latency_spread_ms),
    ]
    share = f"{point.latency_ms / before:.1%} kept" if point.latency_ms is not None and before else ""
    return ["Latency", *cells, share]


def _milliseconds(value: float | None, spread: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.3g} ms" + (f" ± {spread:.2g}" if spread is not None else "")


def _plan(header: SweepHeader, point: FrontPoint) -> list[str]:
    shapes = {str(layer["name"]): layer for layer in header.layers}
    results = {result.name: result for result in point.record.layers}
    choices = point.record.plan.choices
    order = [name for name in shapes if name in choices] + [name for name in choices if name not in shapes]
    timed = any(result.latency_ms is not None for result in results.values())
    rows = []
    for name in order:
        choice, result = choices[name], results.get(name)
        options = ", ".join(f"{key} {value}" for key, value in choice.options)
        shape = shapes.get(name, {}).get("weight_shape")
        row = [f"`{_text(name)}`", "×".join(map(str, shape)) if shape else "?", choice.called]
        row += ["×".join(map(str, choice.rank)) or "–", options or "–"]
        if result is None:
            row += [""] * (7 if timed else 5)
        else:
            row += [_share(result.macs, result.macs_dense), _share(result.params, result.params_dense)]
            row += [f"{result.weight_error:.3f}", _optional(result.output_error)]
            row.append("–" if result.sensitivity is None else f"{result.sensitivity:.3g}")
            if timed:
                row += [_milliseconds(result.latency_dense_ms, None), _milliseconds(result.latency_ms, None)]
        rows.append([*row, "slower" if name in point.slower_layers else ""])
    columns = ["layer", "dense shape", "format", "rank", "options", "MACs kept", "params kept", "weight error"]
    columns += ["output error", "sensitivity", *(["dense time", "time"] if timed else []), ""]
    lines = [_table(columns, rows)] if rows else ["No layer is decomposed: this is the dense model."]
    if rows:
        lines.append(
            "Errors are relative: of the weight (Frobenius), and of the layer's output where it was known. A whitened "
            "fit gives up the one for the other, so its weight error may be large. Sensitivity is the expected squared "
            "error of the weight under noise of variance one on every entry of the factors."
        )
    dense = [f"`{_text(name)}`" for name in shapes if name not in choices]
    if dense:
        lines.append(f"Left dense by the plan ({len(dense)}): {', '.join(dense)}.")
    if header.left_alone:
        rows = [[f"`{_text(item.name)}`", item.type, item.reason, f"{item.params:,}"] for item in header.left_alone]
        lines += ["Not decomposable here:", _table(["layer", "type", "reason", "parameters"], rows)]
    return lines


def _loading(header: SweepHeader, sizes: Mapping[str, int], input_names: Sequence[str], bits: bool) -> list[str]:
    lines = []
    names = ", ".join(_identifier(name) for name in input_names)
    if "model.safetensors" in sizes:
        lines += [
            "As the PyTorch model that it is, given the dense model's factory (`plan.json` and `model.safetensors`):",
            _code(f'import autorank\n{_factory(header)}\nmodel = autorank.load("this/directory", factory)'),
        ]
    if "model.pt2" in sizes:
        lines += [
            "As a PyTorch program, without the model's code (open .pt2 files of others only when you trust them: "
            "`torch.export.load` may unpickle):",
            _code(
                "import torch\n"
                + (
                    "import torch.ao.quantization.fx._decomposed  # makes the program's operations known\n"
                    if bits
                    else ""
                )
                + f'model = torch.export.load("model.pt2").module()\noutput = model({names})'
            ),
        ]
    if "model.onnx" in sizes:
        feed = ", ".join(f'"{name}": {_identifier(name)}' for name in input_names)
        lines += [
            "In ONNX Runtime, without PyTorch (inputs are NumPy arrays):",
            _code(
                "import onnxruntime\n"
                'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])\n'
                f"outputs = session.run(None, {{{feed}}})"
            ),
        ]
    return lines


def _factory(header: SweepHeader) -> str:
    """Return the line of code that gets the dense model's factory, as far as the sweep's settings tell."""
    source = str(header.config.get("model") or "")
    if match := re.fullmatch(r"python:([\w.]+):([A-Za-z_]\w*)", source):
        arguments = header.config.get("model_args") or {}
        line = f"from {match[1]} import {match[2]} as factory"
        if isinstance(arguments, Mapping) and arguments:
            plain = all(str(key).isidentifier() for key in arguments)
            given = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) if plain else f"**{arguments!r}"
            line = f"from {match[1]} import {match[2]}\nfactory = lambda: {match[2]}({given})"
        return line
    origin = f" ({' '.join(source.split())})" if source else ""
    return f"factory = ...  # a function that returns the dense model{origin}"


def _files(sizes: Mapping[str, int], checks: Sequence[Check], examples: int, notes: Mapping[str, str]) -> list[str]:
    rows = [[f"`{name}`", f"{size:,}", notes.get(name, "")] for name, size in sizes.items()]
    lines = [_table(["file", "bytes", ""], rows)]
    if checks:
        where = f"{examples:,} validation examples" if examples else "the example inputs (there is no validation data)"
        rows = [
            [f"`{c.file}`", c.what, _figure(c.value), _figure(c.limit), "passed" if c.passed else "**failed**"]
            for c in checks
        ]
        lines.append(f"Each file was loaded back, run on {where} and held against the model:")
        lines.append(_table(["file", "what", "value", "allowed", ""], rows))
    return lines


def _origin(header: SweepHeader, point: FrontPoint, versions: Mapping[str, str]) -> list[str]:
    objectives = ", ".join(f"{o.name} ({o.direction})" for o in header.objectives)
    constraints = ", ".join(map(str, header.constraints)) or "none"
    day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(header.created))
    seconds = ", ".join(f"{phase} {value:.1f} s" for phase, value in point.record.seconds.items())
    rows = [
        ["sweep", f"{header.sweep_id}, started {day}"],
        ["objectives", objectives],
        ["constraints", constraints],
        ["trial", f"{point.record.number}, {point.record.fidelity.label}" + (f": {seconds}" if seconds else "")],
        ["seed of the plan", str(point.record.plan.seed)],
    ]
    if point.record.reason:
        rows.append(["remark", point.record.reason])
    lines = [_table(["", ""], rows), "Settings of the sweep:", _table(["key", "value"], _flat(header.config))]
    if header.fingerprint:
        lines += ["Weights and data:", _table(["what", "fingerprint"], _flat(header.fingerprint))]
    libraries = {**header.versions, **point.record.versions, **versions}
    if libraries:
        lines.append("Versions: " + ", ".join(f"{_text(k)} {_text(v)}" for k, v in sorted(libraries.items())) + ".")
    return lines


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """Return a nested mapping as rows of dotted key and value, None left out."""
    rows: list[list[str]] = []
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            rows.append([f"{prefix}{key}", ", ".join(map(str, value)) or "none"])
        elif value is not None:
            rows.append([f"{prefix}{key}", str(value)])
    return rows


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_text(str(cell)) for cell in line) + " |" for line in lines)


def _text(value: str) -> str:
    """Make a string safe in a table's cell: one line, no column ends, no secrets in addresses."""
    return public(" ".join(value.split())).replace("\\|", "|").replace("|", "\\|").replace("<", "&lt;")


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _identifier(name: str) -> str:
    name = re.sub(r"\W", "_", name)
    return name if name and not name[0].isdigit() else f"input_{name}"


def _score(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.4g}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _optional(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"
