"""Faults injected for real into real sweeps: what is lost, what runs twice, what is left, and what the user is told.

Each run is a sweep of a tiny network that one fault disturbs at a random moment (kill -9 of a worker, the driver, a
part of Ray, MLflow's server; full disks, damaged files, hanging trials, …; see tests/faults/catalogue.py), which is
resumed where it was ended and compared with an undisturbed one of the same seed. Every fault comes once before any
comes again.

python benchmarks/faults.py [--quick] [--json FILE] [--runs 50] [--seed 0] [--only NAME] [--minutes]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from random import Random

from harness import ROOT, arguments, finish

sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

QUICK = ("driver killed", "half a line", "damaged fits", "raises")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the schedule")
    parser.add_argument("--only", action="append", help="name of a fault; may be repeated")
    parser.add_argument("--minutes", action="store_true", help="also the fault that takes minutes")
    args = parser.parse_args()
    from tests.faults.catalogue import FAULTS, INLINE
    from tests.faults.judging import Findings, Undisturbed, examine
    from tests.faults.mlflow_server import Server

    names = args.only or (QUICK if args.quick else None)
    faults = [one for one in FAULTS if (one.name in names if names else not one.slow or args.minutes)]
    if not faults:
        sys.exit(f"there is no such fault; there are {', '.join(one.name for one in FAULTS)}")
    runs = min(args.runs, len(faults)) if args.quick else args.runs
    rng = Random(args.seed)
    findings: list[Findings] = []
    begun = time.monotonic()
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="autorank-faults-")))
        server: Server | None = None
        undisturbed = Undisturbed(place)
        waiting = []
        for number in range(runs):
            waiting = waiting or rng.sample(
                [one for one in faults if number < len(faults) or not one.slow], k=len(faults)
            )
            fault = waiting.pop()
            if fault.tracked and server is None:
                server = stack.enter_context(Server(place / "mlflow"))
            executor = INLINE if args.quick and INLINE in fault.executors else rng.choice(fault.executors)
            own = Random(rng.random())
            found = examine(fault, place / f"run-{number}", own, undisturbed, executor, server)
            findings.append(found)
            print(
                f"{number + 1:3}/{runs} {found.fault:26} {found.executor:7} {found.seconds:6.1f} s  "
                f"{'; '.join(found.wrong) or 'ok'}",
                flush=True,
            )
            for line in found.told[:1]:
                print(f"        {line[:200]}", flush=True)
    seconds = time.monotonic() - begun
    bad = [one for one in findings if one.wrong]
    print(f"\n{len(findings)} runs in {seconds:.0f} s, seed {args.seed}: {len(bad)} with something wrong")
    trials = sum(one.kept for one in findings)
    print(f"{trials} finished trials were in a journal when a driver ended")
    finish(args, {"seed": args.seed, "seconds": round(seconds), "runs": [asdict(one) for one in findings]})
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
