"""Models with bits as programs hold them: whole-number weights, and quantize and dequantize operations around layers.

The operations are those that torchao's ``convert_pt2e`` writes (``quantized_decomposed``), so that a traced program is
one of PT2E, and its ONNX form has a QuantizeLinear and a DequantizeLinear in their places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autorank.copying import model_copy
from autorank.formats.running import GroupedLinear, SummedConv
from autorank.modules import substitute
from autorank.quant.build import leaves
from autorank.quant.folding import fold
from autorank.quant.leaf import QuantizedLeaf, with_weight

REGISTERING = "torch.ao.quantization.fx._decomposed"
"""The module of PyTorch whose import makes the operations known; a program is opened after it."""


class IntegerLeaf(nn.Module):
    """What a calibrated `QuantizedLeaf` computes, with its weight held as int8.

    Parameters
    ----------
    leaf : QuantizedLeaf
        In eval mode; not changed.
    """

    def __init__(self, leaf: QuantizedLeaf) -> None:
        super().__init__()
        grid, inputs = leaf.weight_grid, leaf.input_grid if leaf.input_on else None
        self.low, self.high, self.axis = grid.low, grid.high, leaf.axis
        self.input = None if inputs is None else (float(inputs.scale), int(inputs.zero_point))
        self.register_buffer("weight", leaf.integer_weight().detach().contiguous())
        self.register_buffer("weight_scale", grid.scale.detach().clone())
        self.register_buffer("weight_zero_point", torch.zeros_like(grid.scale, dtype=torch.int64))
        self.module = model_copy(leaf.module)
        self.module.register_parameter("weight", None)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize the input, dequantize the weight, run the layer."""
        operations = quantization_operations()
        if self.input is not None:
            grid = (*self.input, 0, 255, torch.uint8)
            levels = operations.quantize_per_tensor(x.float(), *grid)
            x = operations.dequantize_per_tensor(levels, *grid).to(x.dtype)
        weight = operations.dequantize_per_channel(
            self.weight, self.weight_scale, self.weight_zero_point, self.axis, self.low, self.high, torch.int8
        )
        return _run(self.module, x, weight.to(x.dtype))


def deployable(model: nn.Module) -> nn.Module:
    """Return a copy of a calibrated model for deployment: batch norms folded, leaves with whole-number weights.

    Leaves that are not calibrated, and layers without bits, stay in floating point.
    """
    folded = fold(model)
    found = leaves(folded).values()
    return substitute(folded, {leaf: IntegerLeaf(leaf) if leaf.weight_on else leaf.module for leaf in found}).eval()


def quantization_operations() -> Any:
    """Return the namespace of PT2E's operations, which PyTorch registers only on demand."""
    import torch.ao.quantization.fx._decomposed

    return torch.ops.quantized_decomposed


def _run(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Run a module with a weight, by operations that runtimes have whole-number kernels for."""
    if isinstance(module, GroupedLinear):
        rows = x.reshape(-1, x.shape[-1], 1)
        y = functional.conv1d(rows, weight.unsqueeze(-1), module.bias, groups=module.blocks)
        return y.reshape(*x.shape[:-1], weight.shape[0])
    if isinstance(module, SummedConv):
        axes = len(module.kernel_size)
        padding: Any = module.padding
        if module.padding_mode != "zeros":
            x = functional.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = (0,) * axes
        run = (functional.conv1d, functional.conv2d, functional.conv3d)[axes - 1]
        return run(x, weight, module.bias, module.stride, padding, module.dilation, module.groups)
    return with_weight(module, x, weight)
