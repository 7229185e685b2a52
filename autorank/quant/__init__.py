"""Quantization of factors and of dense layers: weights and activations in a few bits.

`with_bits` makes the structure (uncalibrated, it computes as before), `calibrate` sets ranges and rounds, `fold` is for
deployment. `QuantizedLeaf` holds what a runtime needs: integer weights, scales and zero points.
"""

from __future__ import annotations

from autorank.quant.build import calibrate, leaves, quantized_layer, with_bits, without_bits
from autorank.quant.fake import QParams
from autorank.quant.folding import fold
from autorank.quant.leaf import QuantizedLeaf
from autorank.quant.settings import QuantSettings

__all__ = [
    "QParams",
    "QuantSettings",
    "QuantizedLeaf",
    "calibrate",
    "fold",
    "leaves",
    "quantized_layer",
    "with_bits",
    "without_bits",
]
