"""Strange files are refused in one line, and what is accepted is kept and means the same afterwards.

``AUTORANK_FUZZ_EXAMPLES`` says how many inputs each kind of file gets; ``benchmarks/fuzz.py`` tries thousands.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzzing import TARGETS, Target

EXAMPLES = int(os.environ.get("AUTORANK_FUZZ_EXAMPLES", "60"))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.filterwarnings("ignore")
def test_no_file_breaks_a_rule(target: Target) -> None:
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def run(case: tuple[bytes, bool]) -> None:
        with tempfile.TemporaryDirectory(prefix="autorank-fuzz-") as folder:
            target.check(*case, Path(folder))

    run()
