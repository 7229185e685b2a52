"""What the bits of a choice do to its layer, before any calibration: estimated from the weights and the statistics."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from autorank import formats
from autorank.fitcache import kernel_errors
from autorank.formats import Factors
from autorank.layout import canonical_weight, stored_weight
from autorank.measure import dense_layer
from autorank.quant import leaves, quantized_layer, without_bits
from autorank.quant.ranges import weight_grid
from autorank.solvers.whitening import LayerStats
from autorank.types import DENSE, Choice, Errors, LayerSpec

ACTIVATION_NOISE = 0.007
"""Root-mean-square error of 8-bit activations relative to themselves: 255 levels over about six standard deviations."""


def quantized_errors(
    weight: Tensor, spec: LayerSpec, choice: Choice, factors: Factors | None, stats: LayerStats | None
) -> Errors:
    """Return what a choice with bits does to its layer, weights rounded to the nearest level.

    The error of the activations, which depends on no weight, is added to that of the output in quadrature, once for
    each factor. Calibration does better than this (it balances the factors and rounds by what keeps their outputs), by
    about as much for all ranks.

    Parameters
    ----------
    weight : Tensor, shape (T, S/groups, K1, ..., Kd)
    spec : LayerSpec
    choice : Choice
        With weight bits.
    factors : dict of Tensor or None
        The fit of the choice without its bits; None where the layer keeps its kernel.
    stats : LayerStats or None
    """
    errors = kernel_errors(weight, rounded_kernel(weight, spec, choice, factors), stats)
    if choice.activation_bits is None:
        return errors
    noise = (1 if factors is None else len(factors)) * ACTIVATION_NOISE**2
    total = kernel_errors(weight, torch.zeros_like(weight), stats).loss
    return replace(
        errors,
        output=None if errors.output is None else (errors.output**2 + noise) ** 0.5,
        loss=None if errors.loss is None or total is None else errors.loss + noise * total,
    )


def rounded_kernel(weight: Tensor, spec: LayerSpec, choice: Choice, factors: Factors | None) -> Tensor:
    """Return the kernel, of the shape of `weight`, that a choice stands for with its factors at its weight bits.

    Parameters
    ----------
    weight, spec, choice, factors
        As for `quantized_errors`; a choice without bits is not rounded.
    """
    if choice.format == DENSE:
        layer = dense_layer(spec).to(weight.device, weight.dtype)
        with torch.no_grad():
            layer.weight.copy_(stored_weight(weight, spec))  # type: ignore[operator]
        rounded = rounded_layer(layer, choice, spec.name).weight
        assert isinstance(rounded, Tensor)
        return canonical_weight(rounded.detach(), spec)
    assert factors is not None
    fmt = formats.get(choice.format)
    if choice.weight_bits is not None:
        layer = fmt.layer(spec, choice.rank, choice.options, factors)
        factors = fmt.factors_of(rounded_layer(layer, choice, spec.name), spec, choice.rank, choice.options)
    return fmt.reconstruct(factors, spec, choice.rank, choice.options)


def rounded_layer(layer: nn.Module, choice: Choice, name: str) -> nn.Module:
    """Return a layer in floating point whose weights are on the levels of a choice; `layer` is taken over."""
    if choice.weight_bits is None:
        return layer
    layer = quantized_layer(layer, choice, name)
    with torch.no_grad():
        for leaf in leaves(layer).values():
            leaf.weight.copy_(weight_grid(leaf.weight, leaf.weight_bits, leaf.axis, "mse").fake(leaf.weight))
    return without_bits(layer)
