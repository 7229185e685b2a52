"""Many strange files: sweep file, space file, plan.json and journal are read, and rules that must hold are checked.

What is tried and the rules are those of tests/test_fuzz.py (tests/fuzzing). Each input has ten seconds of processor
time. Ends with status 1 when a rule is broken, with the smallest input that breaks it.

python benchmarks/fuzz.py [--examples 10000] [--quick] [--json FILE] [--only NAME] [--seed 0]
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

from harness import ROOT, arguments, finish

sys.path.insert(0, str(ROOT))

import hypothesis
from hypothesis import HealthCheck, given, settings

from tests.fuzzing import TARGETS, BrokenError, Target

SECONDS = 10.0


def _hangs(_signal: int, _frame: FrameType | None) -> None:
    raise BrokenError(f"it takes more than {SECONDS:g} seconds of processor time")


def fuzz(target: Target, examples: int, seed: int) -> dict[str, Any]:
    """Try inputs of a target and return how many there were, were accepted, and how long the slowest took."""
    home = Path(tempfile.mkdtemp(prefix="autorank-fuzz-"))
    count = accepted = 0
    slowest, broken, begun = 0.0, "", time.perf_counter()

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def run(case: tuple[bytes, bool]) -> None:
        nonlocal count, accepted, slowest
        count += 1
        folder = home / str(count)
        folder.mkdir()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        start = time.process_time()
        try:
            accepted += target.check(*case, folder)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            slowest = max(slowest, time.process_time() - start)
            shutil.rmtree(folder)

    try:
        run()
    except BrokenError as error:
        broken = "\n".join([str(error), *getattr(error, "__notes__", [])])
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return {
        "inputs": count,
        "accepted": accepted,
        "slowest_ms": round(1000 * slowest, 1),
        "seconds": round(time.perf_counter() - begun, 1),
        "broken": broken,
    }


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--examples", type=int, default=10_000, help="inputs for each kind of file")
    parser.add_argument("--only", help="one kind of file: sweep file, space file, plan.json or journal")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    signal.signal(signal.SIGPROF, _hangs)
    warnings.simplefilter("ignore")
    figures = {}
    for target in TARGETS:
        if args.only in (None, target.name):
            found = fuzz(target, 300 if args.quick else args.examples, args.seed)
            figures[target.name] = found
            print(
                f"{target.name:11} {found['inputs']:6} inputs, {found['accepted']:5} accepted, slowest "
                f"{found['slowest_ms']:7.1f} ms, {found['seconds']:6.1f} s: {found['broken'] or 'no rule is broken'}"
            )
    finish(args, figures)
    sys.exit(any(found["broken"] for found in figures.values()))


if __name__ == "__main__":
    main()
