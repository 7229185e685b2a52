"""How a network is quantized after its training: the `quantization:` mapping of a sweep file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from autorank.errors import ConfigError
from autorank.settings import made

Ranges = Literal["minmax", "percentile", "mse"]
WeightRanges = Literal["max", "mse"]
Rounding = Literal["nearest", "coordinate"]


@dataclass(frozen=True)
class QuantSettings:
    """How ranges are set and weights are rounded.

    Attributes
    ----------
    ranges : {"minmax", "percentile", "mse"}
        Of activations: the smallest and the largest value, the quantiles at `percentile`, or the clipping with the
        least squared error.
    weight_ranges : {"max", "mse"}
        Of weights, per channel: the largest entry, or the clipping with the least squared error.
    equalise : bool
        Whether the channels between two factors of one layer are mixed and scaled so that both sides quantize well.
    rounding : {"nearest", "coordinate"}
        Weights go to the nearest level, or one after the other to the level that keeps the factor's outputs on the
        calibration inputs best.
    calibration : int
        Examples that are looked at.
    percentile : float
        For ``ranges="percentile"``: from above 50 to 100.
    qat : float
        Share of a trial's fine-tune steps that are taken with quantization, after the others.
    qat_rate : float
        Their peak learning rate, as a share of the fine-tune's.
    """

    ranges: Ranges = "mse"
    weight_ranges: WeightRanges = "mse"
    equalise: bool = True
    rounding: Rounding = "coordinate"
    calibration: int = 512
    percentile: float = 99.99
    qat: float = 0.3
    qat_rate: float = 0.2

    def __post_init__(self) -> None:
        for name, kind in (("ranges", Ranges), ("weight_ranges", WeightRanges), ("rounding", Rounding)):
            value, allowed = getattr(self, name), get_args(kind)
            if value not in allowed:
                raise _wrong(name, value, " or ".join(map(repr, allowed)))
        if type(self.equalise) is not bool:
            raise _wrong("equalise", self.equalise, "true or false")
        if type(self.calibration) is not int or self.calibration < 1:
            raise _wrong("calibration", self.calibration, "a whole number from 1")
        if type(self.qat) not in (int, float) or not 0 <= self.qat <= 1:
            raise _wrong("qat", self.qat, "a number from 0 to 1")
        if type(self.qat_rate) not in (int, float) or not 0 < self.qat_rate <= 1:
            raise _wrong("qat_rate", self.qat_rate, "a number above 0, at most 1; qat: 0 leaves these steps out")
        real = type(self.percentile) in (int, float) and math.isfinite(self.percentile)
        if not (real and 50 < self.percentile <= 100):
            raise _wrong("percentile", self.percentile, "a number from above 50 to 100")

    @classmethod
    def from_mapping(cls, data: object) -> QuantSettings:
        """Return the settings that a mapping with some of the keys asks for; ConfigError says what is wrong."""
        return made(cls, "quantization", data)


def _wrong(name: str, value: Any, allowed: str) -> ConfigError:
    return ConfigError(f"quantization: {name} must be {allowed}, not {value!r}")
