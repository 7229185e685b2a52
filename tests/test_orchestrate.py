"""Ray is started, again where it fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from autorank import orchestrate
from autorank.errors import SweepError


class Failing:
    """What `_start` needs of Ray, failing the first few times."""

    def __init__(self, times: int) -> None:
        self.left, self.calls = times, list[str]()

    def init(self, **settings: Any) -> Any:
        self.calls.append("init")
        assert settings["address"] == "local"
        if self.left:
            self.left -= 1
            raise RuntimeError("Failed to start GCS.\nLast connection error: Traceback")
        return SimpleNamespace()

    def shutdown(self) -> None:
        self.calls.append("shutdown")


@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_start_that_fails_is_tried_again(times: int) -> None:
    ray = Failing(times)
    orchestrate._start(ray, 2, 0)
    assert ray.calls == ["init", "shutdown"] * times + ["init"]


def test_a_ray_that_never_starts_is_one_line() -> None:
    ray = Failing(9)
    with pytest.raises(
        SweepError, match="Ray does not start on this machine: RuntimeError: Failed to start GCS"
    ) as error:
        orchestrate._start(ray, 2, 0)
    assert "\n" not in str(error.value)
    assert "--executor inline" in str(error.value)
    assert ray.calls[-1] == "shutdown"
