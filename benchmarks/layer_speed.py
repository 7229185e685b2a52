"""How much of the ideal speed-up the layer of each format gives: forward time against the dense layer, on one thread.

Every registered format writes layers of ResNet-20 and ResNet-18 at the same share of their MACs, with the ranks that a
search space would choose. Dense and decomposed layer are timed in turn, in eager mode, compiled by torch.compile and in
ONNX Runtime. The ideal speed-up is MACs of the dense layer / MACs of the decomposed one; the share of it that is
measured is (t_dense / t_layer) / ideal.

python benchmarks/layer_speed.py [--quick] [--json FILE] [--formats cp,tucker2] [--engines eager] [--layers 256]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import arguments, finish
from torch import Tensor, nn

from autorank import artifacts, formats
from autorank.candidates import Found, LayerSettings, candidates_of
from autorank.measure import dense_layer
from autorank.spacefile import read_space
from autorank.types import CallSize, Choice, LayerSpec

LAYERS = {
    "16x16x3x3@32": (16, 32),  # ResNet-20
    "64x64x3x3@8": (64, 8),
    "64x64x3x3@56": (64, 56),  # ResNet-18
    "256x256x3x3@14": (256, 14),
    "512x512x3x3@7": (512, 7),
}
QUICK = ("256x256x3x3@14",)
TARGETS = (0.5, 0.35)
ENGINES = ("eager", "compile", "onnx")
Run = Callable[[], object]


def spec_of(channels: int, size: int) -> LayerSpec:
    """Return a 3 × 3 convolution with as many input as output channels."""
    call = CallSize(1, (size, size), (size, size))
    shape = (channels, channels, 3, 3)
    return LayerSpec("layer", "conv2d", shape, (1, 1), (1, 1), "zeros", (1, 1), 1, False, (call,))


def choice_for(name: str, target: float, spec: LayerSpec, multiple: int) -> tuple[Choice, float] | str:
    """Return the choice of a format that keeps about a share of the MACs and that share; else why there is none.

    Of the option sets that come equally near, to 5 %, the first.
    """
    rule = {"formats": [name], "whiten": ["none"], "ranks": {"macs_kept": [target]}, "max_candidates": 1000}
    file = read_space({"version": 1, "defaults": rule | {"multiple_of": multiple}})
    found: Found = candidates_of(file, spec, LayerSettings.of(file, spec, ()))
    shares = {choice: cost.macs / spec.macs for choice, cost in found.candidates.items()}
    if not shares:
        return "; ".join(found.reasons)
    choice = min(shares, key=lambda c: round(abs(shares[c] - target) / 0.05))
    return choice, shares[choice]


def runner(engine: str, layer: nn.Module, x: Tensor) -> Run:
    """Return what runs the layer once."""
    if engine == "eager":
        return lambda: layer(x)
    if engine == "compile":
        compiled = torch.compile(layer, dynamic=False)
        return lambda: compiled(x)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder, artifacts.quiet():
        path = str(Path(folder) / "layer.onnx")
        torch.onnx.export(layer, (x,), path, dynamo=True, verbose=False, external_data=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    # Bound once, so that copies in and out of the runtime are not part of the time.
    binding = session.io_binding()
    binding.bind_cpu_input(session.get_inputs()[0].name, x.contiguous().numpy())
    binding.bind_output(session.get_outputs()[0].name)
    return lambda: session.run_with_iobinding(binding)


def seconds(run: Run, number: int) -> float:
    """Return the processor time of one of `number` runs, all in this thread; others on the machine do not count."""
    start = time.thread_time()
    for _ in range(number):
        run()
    return (time.thread_time() - start) / number


def compare(dense: Run, layer: Run, rounds: int, block: float) -> tuple[float, float, float]:
    """Return the median times of both, and the median of the ratios of each round, in which both run in turn."""
    numbers = []
    for run in (dense, layer):
        run()
        numbers.append(max(1, round(block / max(seconds(run, 1), 1e-7))))
    pairs = [(seconds(dense, numbers[0]), seconds(layer, numbers[1])) for _ in range(rounds)]
    first, second = zip(*pairs, strict=True)
    return statistics.median(first), statistics.median(second), statistics.median(a / b for a, b in pairs)


def engines(wanted: list[str]) -> list[str]:
    """Return the engines that this machine has; say in a line what is missing."""
    if "compile" not in wanted:
        return wanted
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        compiler = shutil.which(get_cpp_compiler())
    except Exception as error:  # inductor raises its own kinds, which differ between versions
        compiler = None
        print(f"({type(error).__name__})", end=" ")
    if compiler:
        return wanted
    print("compile: left out, there is no C++ compiler for torch.compile on this machine")
    return [engine for engine in wanted if engine != "compile"]


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure every format on every layer in every engine."""
    for label in args.layers:
        spec = spec_of(*LAYERS[label])
        dense = dense_layer(spec).eval()
        for engine in args.engines:
            for batch in args.batches:
                x = torch.randn(batch, spec.in_channels, *spec.calls[0].input)
                if args.channels_last:
                    x = x.to(memory_format=torch.channels_last)
                    dense = dense.to(memory_format=torch.channels_last)
                torch._dynamo.reset()
                run_dense = runner(engine, dense, x)
                for target in args.targets:
                    for name in args.formats:
                        row = {"layer": label, "engine": engine, "batch": batch, "target": target, "format": name}
                        found = choice_for(name, target, spec, args.multiple_of)
                        if isinstance(found, str):
                            yield row | {"refused": found}
                            continue
                        choice, kept = found
                        layer = formats.get(name).layer(spec, choice.rank, choice.options).eval()
                        if args.channels_last:
                            layer = layer.to(memory_format=torch.channels_last)
                        times = compare(run_dense, runner(engine, layer, x), args.rounds, args.block)
                        yield row | {
                            "rank": list(choice.rank),
                            "options": dict(choice.options),
                            "macs_kept": kept,
                            "dense_ms": 1e3 * times[0],
                            "layer_ms": 1e3 * times[1],
                            "speedup": times[2],
                            "share": times[2] * kept,
                        }


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the median share of the ideal by format and engine."""
    shares: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if "share" in row:
            shares.setdefault(row["format"], {}).setdefault(row["engine"], []).append(row["share"])
    return {name: {e: statistics.median(v) for e, v in found.items()} for name, found in shares.items()}


def keep_memory() -> None:
    """Start again with glibc told to keep freed memory, once.

    It gives blocks of 32 MiB and more back at once, and every use of a fresh page is then a fault: a cost of the
    machine (a virtual one above all), which falls on whoever has more intermediate results.
    """
    settings = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
    if sys.platform == "linux" and not settings.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})


def main() -> None:
    keep_memory()
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--formats", help="names, by commas; all that are registered by default")
    parser.add_argument("--engines", help=f"of {', '.join(ENGINES)}; all by default, --quick without compile")
    parser.add_argument("--layers", help=f"parts of the names of layers, by commas: {', '.join(LAYERS)}")
    parser.add_argument("--batches", help="sizes, by commas; 1,32 by default")
    parser.add_argument("--targets", help="shares of the MACs, by commas; 0.5,0.35 by default")
    parser.add_argument("--multiple-of", type=int, default=1, help="round ranks to multiples of this")
    parser.add_argument("--channels-last", action="store_true", help="inputs and weights in channels_last")
    args = parser.parse_args()

    def listed(text: str | None, default: tuple[Any, ...], kind: Callable[[str], Any] = str) -> list[Any]:
        return [kind(part) for part in text.split(",")] if text else list(default)

    args.formats = listed(args.formats, tuple(formats.names()))
    args.engines = engines(listed(args.engines, ("eager", "onnx") if args.quick else ENGINES))
    named = listed(args.layers, QUICK if args.quick else tuple(LAYERS))
    args.layers = [label for label in LAYERS if any(part in label for part in named)]
    args.batches = listed(args.batches, (1,) if args.quick else (1, 32), int)
    args.targets = listed(args.targets, (0.5,) if args.quick else TARGETS, float)
    args.rounds, args.block = (3, 0.01) if args.quick else (11, 0.02)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    head = ("layer", "engine", "batch", "format", "kept", "dense ms", "layer ms", "speed-up", "ideal", "share")
    form = "{:<16}{:<8}{:>6}  {:<22}{:>6}{:>10}{:>10}{:>9}{:>7}{:>8}"
    print(form.format(*head))
    rows = []
    with torch.inference_mode():
        for row in measure(args):
            rows.append(row)
            start = (row["layer"], row["engine"], row["batch"], row["format"])
            if "refused" in row:
                print(f"{row['layer']:<16}{row['engine']:<8}{row['batch']:>6}  {row['format']}: {row['refused']}")
                continue
            figures = (f"{row['macs_kept']:.2f}", f"{row['dense_ms']:.3f}", f"{row['layer_ms']:.3f}")
            ratios = (f"{row['speedup']:.2f}×", f"{1 / row['macs_kept']:.2f}×", f"{100 * row['share']:.0f} %")
            print(form.format(*start, *figures, *ratios), flush=True)
    print("\nmedian share of the ideal speed-up")
    for name, found in summary(rows).items():
        print(f"{name:<22}", *(f"{engine} {100 * share:.0f} %" for engine, share in found.items()))
    finish(args, {"rows": rows, "median_share": summary(rows)})


if __name__ == "__main__":
    main()
