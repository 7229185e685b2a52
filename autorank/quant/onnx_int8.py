"""ONNX files with quantize and dequantize nodes, completed so that ONNX Runtime runs them with whole-number kernels.

A traced model has such a pair before every layer with bits. ONNX Runtime fuses a convolution into QLinearConv only when
its output is quantized too and its bias is a whole number, and an addition only when both its inputs and its output
are. What is missing for that is put in here, with ranges of calibration data; the layers' own grids stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autorank.quant.onnx_graph import Graph
from autorank.quant.ranges import Watch, activation_grid
from autorank.quant.settings import QuantSettings

Feed = Mapping[str, np.ndarray]
"""The inputs of a session by name."""


def make_integer(
    path: Path, feeds: Iterable[Feed], unsigned: bool = False, settings: QuantSettings | None = None
) -> None:
    """Complete the nodes of a file in place, with ranges from calibration data.

    Parameters
    ----------
    path : Path
        An ONNX file with QuantizeLinear and DequantizeLinear around the layers with bits.
    feeds : iterable of mappings
        Inputs, batch by batch.
    unsigned : bool
        Hold weights as uint8 around 128. Products of uint8 and int8 are summed in pairs, in 16 bits, by processors with
        AVX2 or AVX-512 alone, and large ones are cut off there; those of two uint8 are exact everywhere, and slower.
    settings : QuantSettings, optional
        How ranges are set.
    """
    import onnx

    graph = Graph(onnx.load(path))
    graph.share()
    graph.between(_watched(path, graph.wanted(), list(feeds), settings or QuantSettings()))
    graph.ungroup()
    graph.pad()
    graph.round_biases()
    if unsigned:
        graph.lift_weights()
    onnx.save(graph.finished(), path)


def kernels(path: Path) -> tuple[int, int]:
    """Return how many of the products of a file ONNX Runtime runs here with whole numbers, and how many there are.

    Parameters
    ----------
    path : Path
    """
    import onnx

    target = path.with_suffix(".optimised")
    try:
        session(path, optimised=target)
        types = Counter(node.op_type for node in onnx.load(target).graph.node)
    finally:
        target.unlink(missing_ok=True)
    whole = sum(types[name] for name in ("QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat"))
    plain = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
    return whole, whole + sum(types[name] for name in plain)


def session(path: Path, threads: int = 1, optimised: Path | None = None) -> Any:
    """Return a session of ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _watched(
    path: Path, names: Sequence[str], feeds: Sequence[Feed], settings: QuantSettings
) -> dict[str, tuple[float, int]]:
    """Run a file over calibration data and return the grid of each of these tensors."""
    import onnx
    import onnxruntime

    if not names:
        return {}
    model = onnx.load(path)
    there = {item.name for item in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    # As it is written, in floating point: fused kernels may cut sums off on this processor.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    run = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    watches: dict[str, Watch] = {}
    for feed in feeds:
        for name, value in zip(names, run.run(list(names), dict(feed)), strict=True):
            found = torch.from_numpy(value)
            watch = watches.setdefault(name, Watch(len(feeds), max(found.ndim - 2, 0), len(watches)))
            watch.add(found)
    grids = {name: activation_grid(watch, settings) for name, watch in watches.items()}
    return {name: (float(grid.scale), int(grid.zero_point)) for name, grid in grids.items()}
