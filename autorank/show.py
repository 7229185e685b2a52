"""What the command line prints: the profile, the front, the end of a sweep."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autorank.captions import counted
from autorank.errors import AutorankError, ConfigError
from autorank.front import score_text
from autorank.mlflow_ui import program
from autorank.remotedir import shown
from autorank.terminal import plot_for, standard_output
from autorank.types import tally

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from autorank.sweep import SearchResult
    from autorank.types import FrontPoint, ModelProfile


def _print(*renderables: object) -> None:
    """Print to standard output."""
    _write(standard_output(), renderables)


def _write(console: Console, renderables: Sequence[object]) -> None:
    for item in renderables:
        if isinstance(item, str):
            console.print(item, highlight=False, markup=False, soft_wrap=True)
        else:
            console.print(item)


def table(title: str, columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> Table:
    """Return a rich table; a column is its heading and whether it holds numbers (right-aligned)."""
    from rich.markup import escape
    from rich.table import Table

    result = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name, numeric in columns:
        result.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        result.add_row(*(escape(cell) for cell in row))
    return result


def print_profile(
    *,
    model: str | None,
    weights: str | None,
    data: str | None,
    model_args: Mapping[str, Any],
    data_args: Mapping[str, Any],
    shapes: Sequence[tuple[int, ...]],
    space: str | None,
    as_json: bool,
) -> None:
    """Profile a model and print its layers, their costs, and what is left alone and why."""
    import torch

    from autorank.config import make_config
    from autorank.profiling import profile
    from autorank.space import build_space, read_space
    from autorank.sweep import task_of
    from autorank.tasks.models import NamedModel

    if model is None:
        raise ConfigError("no model given: name it with --model python:pkg.mod:factory")
    if (data is None) == (not shapes):
        raise ConfigError("give either --data, or --input with the shape of one example, such as --input 3x224x224")
    if data is not None:
        config = make_config(
            {"model": model, "weights": weights, "data": data, "model_args": model_args, "data_args": data_args}
        )
        task = task_of(config)
        net, inputs = task.model(), task.example_inputs
    else:
        net = NamedModel(model, model_args, weights).template()
        inputs = tuple(torch.randn(1, *shape) for shape in shapes)
    result = profile(net, inputs)
    candidates = None
    if space is not None:
        built = build_space(read_space(space), result)
        candidates = {layer.spec.name: len(layer.candidates) for layer in built.layers}
    if as_json:
        from dataclasses import asdict

        print(json.dumps({**asdict(result), "candidates": candidates}, indent=1))
    else:
        _print_profile(result, candidates)


def _print_profile(result: ModelProfile, candidates: Mapping[str, int] | None) -> None:
    dense = result.dense
    columns = [("layer", False), ("kind", False), ("weight", False), ("stride", False), ("output", False)]
    columns += [("MACs", True), ("of all", True), ("params", True), ("of all", True)]
    columns += [("candidates", True)] if candidates is not None else []
    rows = []
    for spec in result.layers:
        row = [
            spec.name,
            spec.kind + (f" /{spec.groups}" if spec.groups > 1 else ""),
            "×".join(map(str, spec.weight_shape)),
            "×".join(map(str, spec.stride)),
            ", ".join("×".join(map(str, call.output)) or "1" for call in spec.calls),
            counted(spec.macs),
            f"{100 * spec.macs / max(dense.macs, 1):.1f} %",
            counted(spec.params),
            f"{100 * spec.params / max(dense.params, 1):.1f} %",
        ]
        rows.append(row + ([str(candidates.get(spec.name, 0))] if candidates is not None else []))
    _print(table(f"{len(rows)} layers that can be decomposed", columns, rows))
    if result.left_alone:
        rows = [[item.name, item.type, counted(item.params), item.reason] for item in result.left_alone]
        _print("", table("left alone", [("layer", False), ("type", False), ("params", True), ("why", False)], rows))
    _print(
        "",
        f"the whole model: {counted(dense.macs)} MACs, {counted(dense.params)} parameters, {counted(dense.bytes)}B "
        "(for one example; normalisation layers not counted)",
    )
    if result.unsupported_ops:
        names = ", ".join(f"{name} ×{times}" for name, times in result.unsupported_ops)
        _print(f"not counted by fvcore: {names}")


def print_front(result: SearchResult, how: str) -> None:
    """Print the front of a sweep as a table, JSON or CSV."""
    frame = result.front
    if how == "json":
        rows = json.loads(frame.to_json(orient="records"))
        for row, point in zip(rows, result.points, strict=True):
            row["slower_layers"] = list(point.slower_layers)
        print(json.dumps(rows, indent=1))
    elif how == "csv":
        print(frame.to_csv(index=False), end="")
    else:
        console = standard_output()
        plot = [plot_for(console, result.header, result.records), ""] if result.points else []
        _write(console, [*plot, *_front_tables(result)])


def _front_tables(result: SearchResult) -> list[object]:
    header, dense = result.header, result.dense
    if not result.points:
        return [f"no point on the front yet ({tally(result.records)} finished)"]
    try:
        recommended = result.recommended.record.number
    except AutorankError:
        recommended = -1
    unit = " %" if header.metric == "accuracy" else ""
    columns = [("", False), ("point", True), (f"validation {header.metric}{unit}", True), ("before tuning", True)]
    shown = ["macs_kept", "params_kept"]
    if header.dense_cost.bops is not None:
        shown += ["bytes_kept", "bops_kept"]
    shown += [o.name for o in header.objectives if o.name not in ("score", *shown)]
    columns += [("test", True), *((_heading(name), True) for name in shown)]
    by_layer = dense is None or dense.runtime == "pytorch"
    columns += [("latency ms" if by_layer else "ONNX Runtime ms", True), ("slower layers", True), ("formats", False)]
    rows = [
        [
            "",
            "dense",
            score_text(header.dense.score),
            "",
            _number(dense.test_score if dense else None),
            *("1.000" for _ in shown),
            _latency(dense.latency_ms, dense.latency_spread_ms) if dense else "",
            "",
            "",
        ]
    ]
    for point, formats in zip(result.points, result.front["formats"], strict=True):
        record = point.record
        rows.append(
            [
                "→" if record.number == recommended else "",
                str(record.number),
                _number(record.score),
                _number(record.score_before),
                _number(point.test_score),
                *(f"{record.kept[name]:.3f}" for name in shown),
                _latency(point.latency_ms, point.latency_spread_ms),
                str(len(point.slower_layers)) if by_layer and point.latency_ms is not None else "",
                formats,
            ]
        )
    return [table(f"front of {header.sweep_id}: {tally(result.records)}", columns, rows)]


def _heading(name: str) -> str:
    """Return the heading of a cost; a latency among the objectives is the table's prediction, not a measurement."""
    text = name.replace("_", " ").replace("macs", "MACs")
    return f"{text}, predicted" if name == "latency_kept" else text


def print_result(result: SearchResult) -> None:
    """Print the end of a sweep: why it ended, the front, the recommendation, and what to do next."""
    _print(*_result(result))


def summary(result: SearchResult) -> str:
    """Return what `print_result` prints, as text."""
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=140)
    _write(console, _result(result))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def _result(result: SearchResult) -> list[object]:
    header = result.header
    failed = sum(record.status == "failed" for record in result.records)
    pruned = sum(record.status == "pruned" for record in result.records)
    extra = "".join(f", {n} {what}" for n, what in ((pruned, "stopped early"), (failed, "failed")) if n)
    points = sum(not record.probe for record in result.records)
    probes = f" and {len(result.records) - points} probes" if points < len(result.records) else ""
    place = shown(result.directory)
    command, sweep = shlex.quote(program("autorank")), shlex.quote(place)
    done = f"{points} of {header.config.get('trials', points)} trials{probes}{extra}"
    lines: list[object] = [f"{result.ended or 'still running'}: {done}", "", *_front_tables(result), ""]
    if result.points:
        advice = result.recommended
        point = next(p for p in result.points if p.record.number == advice.record.number)
        lines.append(f"recommended: point {advice.record.number}: {advice.reason}")
        lines += _doubts(result, point)
    if result.ended in ("interrupted", "time limit reached"):
        lines.append(f"go on:       {command} resume {sweep}")
    if result.points:
        lines.append(f"export it:   {command} export {sweep}")
    above = os.path.dirname(place) or "."
    beside = "" if above == "sweeps" else f" {shlex.quote(above)}"
    lines.append(f"look at it:  {command} dashboard{beside}")
    if result.ui_command and header.config.get("tracking_uri"):  # the dashboard brings the default store's MLflow along
        lines.append(f"in MLflow:   {result.ui_command}")
    return lines


def _doubts(result: SearchResult, point: FrontPoint) -> list[str]:
    """Say what speaks against the recommended point, and which points break a bound now that they are measured."""
    header, dense = result.header, result.dense
    notes = []
    if point.slower_layers:
        notes.append(f"note: slower than their dense originals on this machine: {', '.join(point.slower_layers)}")
    if dense and dense.latency_ms and point.latency_ms and point.latency_ms > dense.latency_ms:
        times = point.latency_ms / dense.latency_ms
        notes.append(f"note: as a whole it takes {times:.2f} times as long as the dense model on this machine")
    if dense and dense.test_score is not None and point.test_score is not None:
        sign = 1 if header.direction == "max" else -1
        lost = sign * (dense.test_score - point.test_score)
        allowed = float(header.config.get("max_drop") or 0.0)
        if lost > 2 * allowed:
            notes.append(
                f"note: on test data it loses {score_text(lost)} ({score_text(dense.test_score)} → "
                f"{score_text(point.test_score)}), more than the validation data let expect"
            )
    return notes + _broken_promises(result)


def print_choice(result: SearchResult, point: FrontPoint) -> None:
    """Say which point is exported."""
    record = point.record
    scores = f"{score_text(result.header.dense.score)} → {_number(record.score)}"
    _print(
        f"point {record.number}: {result.header.metric} {scores} on validation data, "
        f"{record.kept['macs_kept']:.3f} of the MACs, {record.kept['params_kept']:.3f} of the parameters"
    )


def _broken_promises(result: SearchResult) -> list[str]:
    """Say which points are, when measured, beyond a bound on latency that their prediction met."""
    dense = result.dense.latency_ms if result.dense else None
    bounds = [c for c in result.header.constraints if c.name == "latency_kept"]
    return [
        f"note: point {point.record.number} was measured at {point.latency_ms / dense:.2f} of the dense latency, "
        f"beyond {bound}"
        for bound in bounds
        for point in result.points
        if dense and point.latency_ms and bound.violation(point.latency_ms / dense) > 0
    ]


def print_formats(markdown: bool) -> None:
    """Print the formats with the kinds of layers that each takes, or all of it as Markdown with the reasons."""
    from autorank import formats
    from autorank.formats import support

    if markdown:
        sys.stdout.write(support.markdown())
        return
    pairs, rows = support.support(), []
    for name in formats.names():
        taken = [pair.layer for pair in pairs if pair.format == name and pair.options]
        rows.append((name, ", ".join(formats.get(name).rank_names), "; ".join(taken)))
    _print(table("formats", [("format", False), ("ranks", False), ("takes", False)], rows))
    _print("autorank formats --markdown says why the others are refused.")


def print_strategies(markdown: bool) -> None:
    """Print the strategies with their options, as text or as Markdown."""
    from autorank.strategies import overview

    if markdown:
        sys.stdout.write(overview.markdown())
        return
    for row in overview.rows():
        _print(f"{row.name}: {row.summary}")
        for key, option in row.options:
            _print(f"    {key} = {option.default}  ({overview.allowed(option)}): {option.help}")
    _print("autorank search --strategy NAME --option KEY=VALUE … takes one of them.")


def print_spaces(name: str | None) -> None:
    """Print the names of the shipped search spaces, or one of them."""
    from autorank.spacefile import shipped, shipped_text

    if name is None:
        for item in shipped():
            comment = shipped_text(item).split("\n", 1)[0]
            print(f"{item:<20} {comment.lstrip('# ') if comment.startswith('#') else ''}".rstrip())
    else:
        print(shipped_text(name), end="")


def _number(value: float | None) -> str:
    return "" if value is None else score_text(value)


def _latency(median: float | None, spread: float | None) -> str:
    if median is None:
        return ""
    return f"{median:.3f} ± {spread or 0.0:.3f}"
