"""The nodes of an ONNX model with quantize and dequantize pairs, and what has to be put in between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_MULTIPLY = ("Conv", "Gemm", "MatMul")
_TOGETHER = ("Add", "Mul", "Concat")
_KEEP = ("Slice", "Pad", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "MaxPool", "Split")
NARROW, WIDEST = 16, 128 * 128
"""Groups with fewer channels than the former are made one convolution, up to the latter of inputs times outputs."""

COARSER = 1.25
"""Grids of one tensor are made one while that is at most so much coarser than the finest of them."""

EVEN = 8
"""Channels between two convolutions are filled up to a multiple of this: 7 took twice the time of 8 in a session."""


class Graph:
    """The nodes of a model, the quantized tensors among them, and changes to both."""

    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper

        self.model, self.graph = model, model.graph
        self.nodes: list[Any] = list(self.graph.node)
        self.values = {item.name: numpy_helper.to_array(item) for item in self.graph.initializer}
        self.outputs = {item.name for item in self.graph.output}
        self.grids: dict[str, tuple[str, str]] = {}  # quantized form of a tensor → names of its scale and zero point
        self._read()

    def _read(self) -> None:
        self.users: dict[str, list[Any]] = defaultdict(list)
        self.maker: dict[str, Any] = {}
        for node in self.nodes:
            for name in node.input:
                self.users[name].append(node)
            for name in node.output:
                self.maker[name] = node
        # Of activations only: weights are dequantized from initializers.
        self.grids = {
            node.output[0]: (node.input[1], node.input[2])
            for node in self.nodes
            if node.op_type == "DequantizeLinear" and node.input[0] not in self.values
        }

    def share(self) -> None:
        """Quantize a tensor once for all that read it, on a grid that holds their ranges, where those are alike."""
        gone: set[int] = set()
        for name in list(self.users):
            pairs = [node for node in self.users[name] if node.op_type == "QuantizeLinear" and node.input[0] == name]
            if not pairs:
                continue
            grid = self._union(pairs)
            if grid is None:
                continue
            kept = pairs[0]
            kept.input[1], kept.input[2] = grid
            for back in self.users[kept.output[0]]:
                back.input[1], back.input[2] = grid
            form = self.users[kept.output[0]][0].output[0]
            for node in pairs:
                if node is not kept:
                    for back in self.users[node.output[0]]:
                        self._redirect(back.output[0], form)
                        gone.add(id(back))
                    gone.add(id(node))
            self._redirect(name, form, keep=kept)
        self.nodes = [node for node in self.nodes if id(node) not in gone]
        self._own_weights()
        self._read()

    def _union(self, pairs: Sequence[Any]) -> tuple[str, str] | None:
        """Return scale and zero point of a grid that holds all these; None where it would be much coarser than one."""
        first = pairs[0]
        steps = [float(self.values[node.input[1]]) for node in pairs]
        zeros = [int(self.values[node.input[2]]) for node in pairs]
        low = min(-zero * step for zero, step in zip(zeros, steps, strict=True))
        high = max((255 - zero) * step for zero, step in zip(zeros, steps, strict=True))
        step = (high - low) / 255
        if len(set(zip(steps, zeros, strict=True))) == 1:
            return first.input[1], first.input[2]
        if step > COARSER * min(steps):
            return None
        names = f"{first.output[0]}_shared_scale", f"{first.output[0]}_shared_zero_point"
        self.values[names[0]] = np.array(step, np.float32)
        self.values[names[1]] = np.array(round(-low / step), np.uint8)
        return names

    def _own_weights(self) -> None:
        """Give every product a dequantized weight of its own: equal ones were made one by the exporter."""
        taken: set[str] = set()
        for index in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[index]
            weight = self.maker.get(node.input[1]) if node.op_type in _MULTIPLY else None
            if weight is None or weight.op_type != "DequantizeLinear":
                continue
            if weight.output[0] in taken:
                copied = type(weight)()
                copied.CopyFrom(weight)
                copied.output[0] = node.input[1] = f"{weight.output[0]}_{index}"
                copied.name = ""
                self.nodes.insert(index, copied)
            taken.add(weight.output[0])

    def _redirect(self, old: str, new: str, keep: Any = None) -> None:
        for node in self.users[old]:
            if node is not keep and node.op_type != "QuantizeLinear":
                for index, name in enumerate(node.input):
                    if name == old:
                        node.input[index] = new
                self.users[new].append(node)

    def wanted(self) -> list[str]:
        """Name the tensors whose ranges `between` needs."""
        return [name for name, like in self._missing().items() if like is None and self._ahead(name) is None]

    def _ahead(self, name: str) -> tuple[str, str] | None:
        """Return the grid on which a tensor is quantized after steps that keep its values; None where there is none."""
        while len(users := self.users[name]) == 1 and name not in self.outputs:
            user = users[0]
            if user.op_type == "QuantizeLinear":
                return user.input[1], user.input[2]
            if user.op_type not in _KEEP or user.op_type in ("Slice", "Split"):
                return None
            name = user.output[0]
        return None

    def _missing(self) -> dict[str, str | None]:
        """Return the tensors that are to be quantized, in order, with the tensor whose grid they have (None: own)."""
        form = dict.fromkeys(self.grids)  # the tensors that are, or will be, quantized where they are read
        found: dict[str, str | None] = {}
        for node in self.nodes:
            if not node.output or not self._whole(node, form):
                continue
            name = node.output[0]
            users = self.users[name]
            if len(users) == 1 and users[0].op_type == "Relu" and name not in self.outputs:
                node = users[0]
                name, users = node.output[0], self.users[node.output[0]]
            if name in found or any(user.op_type == "QuantizeLinear" for user in users):
                continue
            if node.op_type in ("Gemm", "MatMul") and (name in self.outputs or not users):
                continue  # ends in floating point from whole numbers
            found[name] = node.input[0] if node.op_type in _KEEP else None
            form[name] = None
        return found

    def _whole(self, node: Any, form: Mapping[str, Any]) -> bool:
        """Whether a node works on whole numbers as soon as its output is quantized."""
        if node.op_type in _MULTIPLY:
            weight = self.maker.get(node.input[1])
            dequantized = weight is not None and weight.op_type == "DequantizeLinear"
            return dequantized and node.input[0] in form
        if node.op_type in _TOGETHER:
            return all(name in form for name in node.input)
        if node.op_type == "Pad" and len(node.input) > 2 and node.input[2]:
            filled = self.values.get(node.input[2])
            if filled is None or filled.any():
                return False
        return node.op_type in _KEEP and len(node.output) == 1 and node.input[0] in form

    def between(self, grids: Mapping[str, tuple[float, int]]) -> None:
        """Quantize what is missing."""
        from onnx import helper

        for index, (name, like) in enumerate(self._missing().items()):
            # The grid of the tensor that this one is cut or moved from; it may be one that was put in just now.
            if (grid := self._ahead(name)) is not None:
                scale, zero_point = grid
            elif like is not None:
                scale, zero_point = self.grids[like]
            else:
                scale, zero_point = f"between_{index}_scale", f"between_{index}_zero_point"
                self.values[scale] = np.array(grids[name][0], np.float32)
                self.values[zero_point] = np.array(grids[name][1], np.uint8)
            levels, form, raw = f"between_{index}_levels", f"between_{index}", name
            made = self.maker[name]
            if name in self.outputs:  # the output keeps its name
                form, raw = name, f"between_{index}_raw"
                made.output[list(made.output).index(name)] = raw
            for node in self.users[name]:
                for position, given in enumerate(node.input):
                    if given == name:
                        node.input[position] = form
            pair = [
                helper.make_node("QuantizeLinear", [raw, scale, zero_point], [levels]),
                helper.make_node("DequantizeLinear", [levels, scale, zero_point], [form]),
            ]
            place = next(i for i, node in enumerate(self.nodes) if node is made) + 1
            self.nodes[place:place] = pair
            self.grids[name] = self.grids[form] = (scale, zero_point)
        self._read()

    def ungroup(self) -> None:
        """Make narrow groups one convolution with zeros between them: their kernels took up to ten times the time."""
        for node in self.nodes:
            groups = _groups(node)
            weight = self.maker.get(node.input[1]) if node.op_type == "Conv" and groups > 1 else None
            if weight is None or weight.op_type != "DequantizeLinear" or node.input[0] not in self.grids:
                continue
            levels = self.values[weight.input[0]]
            out, into = levels.shape[0] // groups, levels.shape[1]
            if max(out, into) == 1 or min(out, into) >= NARROW or groups * groups * out * into > WIDEST:
                continue
            whole = np.zeros((groups * out, groups * into, *levels.shape[2:]), levels.dtype)
            for group in range(groups):
                rows = slice(group * out, (group + 1) * out)
                whole[rows, group * into : (group + 1) * into] = levels[rows]
            weight.input[0] = f"{weight.output[0]}_whole"
            self.values[weight.input[0]] = whole
            next(item for item in node.attribute if item.name == "group").i = 1

    def pad(self) -> None:
        """Fill up the channels between two convolutions with zeros, as odd numbers of them have slow kernels."""
        for first in self.nodes:
            second = self._next(first)
            if second is None:
                continue
            before, after = (self.maker.get(node.input[1]) for node in (first, second))
            if before is None or after is None or not before.op_type == after.op_type == "DequantizeLinear":
                continue
            missing = -self.values[before.input[0]].shape[0] % EVEN
            if not missing or self.values[after.input[0]].shape[1] != self.values[before.input[0]].shape[0]:
                continue
            for node, position, axis, filling in (
                (before, 0, 0, 0),
                (before, 1, 0, 1),
                (before, 2, 0, 0),
                (first, 2, 0, 0),
                (after, 0, 1, 0),
            ):
                if position < len(node.input) and node.input[position]:
                    old = self.values[node.input[position]]
                    width = [(0, missing if index == axis else 0) for index in range(old.ndim)]
                    name = f"{node.input[position]}_filled_{axis}"
                    self.values[name] = np.pad(old, width, constant_values=filling)
                    node.input[position] = name

    def _next(self, node: Any) -> Any:
        """Return the only convolution that reads, quantized, what another one makes; None where it is not so."""
        one = node
        for types in (("Relu", "QuantizeLinear"), ("QuantizeLinear", "DequantizeLinear"), ("DequantizeLinear", "Conv")):
            users = self.users[one.output[0]] if one is not None and one.output[0] not in self.outputs else []
            one = users[0] if len(users) == 1 and users[0].op_type in types else None
            if one is not None and one.op_type == "Relu":
                users = self.users[one.output[0]]
                one = users[0] if len(users) == 1 and users[0].op_type == "QuantizeLinear" else None
        chained = node.op_type == "Conv" and one is not None and one.op_type == "Conv"
        return one if chained and _groups(node) == _groups(one) == 1 else None

    def round_biases(self) -> None:
        """Hold the biases of whole-number products as int32, on the grid of input times weight."""
        from onnx import helper

        done: list[Any] = []
        for node in self.nodes:
            weight = self.maker.get(node.input[1]) if len(node.input) > 2 else None
            bias = self.values.get(node.input[2]) if len(node.input) > 2 else None
            inner = node.op_type in ("Conv", "Gemm") and weight is not None and weight.op_type == "DequantizeLinear"
            if inner and bias is not None and node.input[0] in self.grids:
                grid = float(self.values[self.grids[node.input[0]][0]])
                name = f"{node.input[2]}_{len(done)}"
                scale = self._room(weight, bias.astype(np.float64), grid) * grid
                self.values[f"{name}_levels"] = np.rint(bias / scale).astype(np.int32)
                self.values[f"{name}_scale"] = scale.astype(np.float32)
                self.values[f"{name}_zero_point"] = np.zeros(scale.shape, np.int32)
                parts = [f"{name}_levels", f"{name}_scale", f"{name}_zero_point"]
                done.append(helper.make_node("DequantizeLinear", parts, [name], axis=0))
                node.input[2] = name
        self.nodes[:0] = done
        self._read()

    def _room(self, weight: Any, bias: np.ndarray, grid: float) -> np.ndarray:
        """Return the scales of a weight, made larger where a bias would not fit into 32 bits on them."""
        levels, scale = self.values[weight.input[0]], self.values[weight.input[1]].astype(np.float64)
        least = np.abs(bias) / (grid * 2.0**30)
        if not (least > scale).any():
            return scale
        axis = next((item.i for item in weight.attribute if item.name == "axis"), 1)
        wider = np.maximum(scale, least)
        shape = [-1 if index == axis else 1 for index in range(levels.ndim)]
        name = f"{weight.output[0]}_wider"
        self.values[f"{name}_levels"] = np.rint(levels * (scale / wider).reshape(shape)).astype(levels.dtype)
        self.values[f"{name}_scale"] = wider.astype(np.float32)
        weight.input[0], weight.input[1] = f"{name}_levels", f"{name}_scale"
        return wider

    def lift_weights(self) -> None:
        """Hold the weights of whole-number products as uint8."""
        for node in self.nodes:
            weight = self.maker.get(node.input[1]) if node.op_type in _MULTIPLY else None
            if weight is None or weight.op_type != "DequantizeLinear" or node.input[0] not in self.grids:
                continue
            levels = self.values[weight.input[0]]
            if levels.dtype == np.int8:
                name = weight.output[0]
                self.values[f"{name}_lifted"] = (levels.astype(np.int16) + 128).astype(np.uint8)
                self.values[f"{name}_middle"] = np.full_like(self.values[weight.input[2]], 128, dtype=np.uint8)
                weight.input[0], weight.input[2] = f"{name}_lifted", f"{name}_middle"

    def finished(self) -> Any:
        """Return the model with what was changed."""
        from onnx import numpy_helper

        used = {name for node in self.nodes for name in node.input} | self.outputs
        del self.graph.node[:], self.graph.initializer[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(
            numpy_helper.from_array(np.asarray(value, order="C"), name)
            for name, value in self.values.items()
            if name in used
        )
        return self.model


def _groups(node: Any) -> int:
    return next((int(item.i) for item in node.attribute if item.name == "group"), 1)
