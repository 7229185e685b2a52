"""The settings of quantization are checked, in one line."""

from __future__ import annotations

from typing import Any

import pytest

from autorank.errors import ConfigError
from autorank.quant import QuantSettings


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"ranges": "max"}, "ranges must be 'minmax' or 'percentile' or 'mse', not 'max'"),
        ({"ranges": ["mse"]}, "ranges must be"),
        ({"weight_ranges": "minmax"}, "weight_ranges must be 'max' or 'mse'"),
        ({"rounding": "up"}, "rounding must be 'nearest' or 'coordinate', not 'up'"),
        ({"equalise": 1}, "equalise must be true or false, not 1"),
        ({"calibration": 0}, "calibration must be a whole number from 1, not 0"),
        ({"calibration": True}, "calibration must be a whole number"),
        ({"percentile": 50}, "percentile must be a number from above 50 to 100, not 50"),
        ({"percentile": float("nan")}, "percentile must be a number"),
        ({"range": "mse"}, "unknown key 'range' (did you mean 'ranges'?)"),
        ([], "quantization must be a mapping, not []"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_in_one_line(data: Any, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        QuantSettings.from_mapping(data)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_not_said_is_the_default() -> None:
    assert QuantSettings.from_mapping({}) == QuantSettings()
    assert QuantSettings.from_mapping({"ranges": "percentile", "percentile": 99}).percentile == 99
