"""What orchestration costs: workers, trials per second, and the driver, the journal and MLflow in long sweeps.

Trials of a fixed, simulated length (they sleep, and return a made-up record of the plan that they were given) run in a
real sweep: strategy, schedule, Ray Tune, journal, front. So many workers can be had on two cores. Then real trials of
the digits network with one and two workers; then sweeps of trials that take no time, in which all that is left is the
driver; then journals and MLflow stores of made-up records.

python benchmarks/scaling.py [--quick] [--json FILE] [--only workers,real,driver,journal,mlflow]
                             [--workers 1,4,16,64] [--lengths 0.1,1,10] [--trials 100,1000,10000]
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import ROOT, arguments, finish
from scaling_trials import Simulated

sys.path.insert(0, str(ROOT))
PARTS = ("workers", "real", "driver", "journal", "mlflow")
MEGABYTE = 1e6


def resident() -> float:
    """Return the megabytes that this process holds."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024 / MEGABYTE


@contextmanager
def simulated(seconds: float) -> Iterator[None]:
    """Let every trial of the sweeps in the block take so long and compute nothing."""
    from autorank import driver
    from autorank.types import DenseFigures, FrontPoint

    before = driver.prepare, driver.measure_front

    def prepare(*given: Any) -> Any:
        prepared = before[0](*given)
        shared = {name: getattr(prepared.context, name) for name in prepared.context.__dataclass_fields__}
        return replace(prepared, context=Simulated(**shared, sleep=seconds))

    def measure(front: Sequence[Any], *_: Any, **__: Any) -> Any:
        return tuple(map(FrontPoint, front)), DenseFigures(90.0, 1.0, 0.1)

    driver.prepare, driver.measure_front = prepare, measure
    try:
        yield
    finally:
        driver.prepare, driver.measure_front = before


def sweep(place: Path, trials: int, **settings: Any) -> Any:
    """Run a sweep of random plans of a ResNet-20 on a few made-up images."""
    import torch

    import autorank
    from benchmarks.models import resnet20

    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(64, 3, 32, 32, generator=generator), torch.arange(64) % 10
    torch.manual_seed(0)
    task = autorank.ClassificationTask(resnet20(), train=(images, targets), validation=0.5)
    given = {"strategy": "random", "space": "small", "recovery": {"steps": 0}, "calibration": 16, **settings}
    return autorank.search(
        task, trials=trials, sweep_dir=str(place), tracking=False, progress=False, latency={"batch": 1}, **given
    )


def workers(scratch: Path, counts: Sequence[int], lengths: Sequence[float], seconds: float) -> dict[str, Any]:
    """Run simulated trials on so many workers until all of them have been busy for long enough, then press Ctrl-C.

    At full swing is the time between the last worker's first trial and the last trial's start: the share of it that the
    workers spend in trials. The start of the workers, which is 2 cores' work for a hundred processes, is told apart.
    """
    print("\nsimulated trials on Ray Tune")
    print("workers  length s  trials  all workers there after s  full swing s  trials/s then  of the time in trials")
    found: dict[str, Any] = {}
    for length in lengths:
        for count in counts:
            place = scratch / f"w{count}-{length}"
            with simulated(length), stopped_after(place, count, max(seconds, 4 * length)):
                result = sweep(place, 1_000_000, workers=count, cpus_per_trial=1)
            row = full_swing(result.records, count, result.seconds["search"])
            found[f"{count} workers, {length:g} s"] = {name: round(value, 4) for name, value in row.items()}
            print(
                f"{count:7} {length:9g} {row['trials']:7} {row['all_there_s']:25.1f} {row['full_swing_s']:13.1f} "
                f"{row['trials_per_s']:14.2f} {row['efficiency_full_swing']:21.3f}",
                flush=True,
            )
    return found


def full_swing(records: Sequence[Any], count: int, search: float) -> dict[str, float]:
    """Return what the records of a sweep say of the time in which all its workers were there."""
    first: dict[str, float] = {}
    for record in sorted(records, key=lambda record: record.started):
        first.setdefault(record.worker, record.started)
    if len(first) < count:
        raise RuntimeError(f"only {len(first)} of {count} workers ran a trial")
    spans = [(record.started, record.started + record.seconds["other"]) for record in records]
    begun, ended = sorted(first.values())[count - 1], max(start for start, _ in spans)
    busy = sum(max(0.0, min(end, ended) - max(start, begun)) for start, end in spans)
    within = [start for start, _ in spans if begun <= start < ended]
    return {
        "trials": len(records),
        "all_there_s": begun - (max(end for _, end in spans) - search),
        "full_swing_s": ended - begun,
        "trials_per_s": len(within) / (ended - begun),
        "efficiency_full_swing": busy / count / (ended - begun),
    }


@contextmanager
def stopped_after(place: Path, count: int, seconds: float) -> Iterator[None]:
    """Press Ctrl-C so long after the sweep's journal has trials of so many workers."""
    over = threading.Event()

    def look() -> None:
        from autorank.following import Follower

        follower, workers = Follower(place), 0
        while workers < count and not over.wait(2):
            follower.poll()
            workers = len({record.worker for record in follower.contents.records})
        if not over.wait(seconds):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def real(scratch: Path, trials: int) -> dict[str, Any]:
    """Run the same trials of the digits network with one and two workers."""
    import autorank
    from autorank.demo import prepare_weights, settings

    weights = scratch / "net.safetensors"
    prepare_weights(weights)
    seconds = {}
    for count in (1, 2):
        result = autorank.search(
            **settings(weights),
            trials=trials,
            strategy="random",
            workers=count,
            lookahead=4,
            sweep_dir=str(scratch / f"real-{count}"),
            tracking=False,
            progress=False,
        )
        seconds[count] = result.seconds["search"]
    ratio = seconds[1] / seconds[2]
    said = f"one worker {seconds[1]:.1f} s, two {seconds[2]:.1f} s: {ratio:.2f} times as fast"
    print(f"\n{trials} real trials, search: {said}")
    return {"one_s": round(seconds[1], 3), "two_s": round(seconds[2], 3), "ratio": round(ratio, 4)}


def driver(scratch: Path, sizes: Sequence[int]) -> dict[str, Any]:
    """Run sweeps of trials that take no time in this process: what is left is the driver."""
    print("\nthe driver alone\ntrials  ms per trial, all  the last tenth  processor ms  more memory MB  journal MB")
    found: dict[str, Any] = {}
    for size in sizes:
        place = scratch / f"driver-{size}"
        before, used = resident(), time.process_time()
        with simulated(0.0):
            result = sweep(place, size, executor="inline")
        used = time.process_time() - used
        starts = [record.started for record in result.records]
        last = (starts[-1] - starts[-max(size // 10, 2)]) / (max(size // 10, 2) - 1)
        row = {
            "ms_per_trial": 1e3 * result.seconds["search"] / size,
            "ms_last_tenth": 1e3 * last,
            "processor_ms": 1e3 * used / size,
            "memory_mb": resident() - before,
            "journal_mb": (place / "journal.jsonl").stat().st_size / MEGABYTE,
        }
        found[f"{size} trials"] = {name: round(value, 4) for name, value in row.items()}
        print(
            f"{size:6} {row['ms_per_trial']:18.2f} {row['ms_last_tenth']:15.2f} {row['processor_ms']:13.2f} "
            f"{row['memory_mb']:15.1f} {row['journal_mb']:11.2f}",
            flush=True,
        )
    return found


def made_up(size: int) -> tuple[Any, tuple[Any, ...]]:
    """Return the header and records of a sweep that never ran, of 20 layers."""
    from tests.dashboards.samples import sweep_header, widened
    from tests.sweep_samples import records

    header = sweep_header(f"scaling-{size}", size)
    return header, tuple(widened(record, 20) for record in records(header, size))


def journals(scratch: Path, sizes: Sequence[int]) -> dict[str, Any]:
    """Write, read and replay journals of made-up trials."""
    from autorank.front import front_of
    from autorank.journal import Journal, read

    print("\njournals\ntrials  written, ms per trial  read ms  front ms  MB")
    found: dict[str, Any] = {}
    for size in sizes:
        header, records = made_up(size)
        place = scratch / f"journal-{size}"
        times = []
        with Journal(place) as journal:
            journal.write_header(header)
            for record in records:
                begun = time.perf_counter()
                journal.write_trial(record)
                times.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        contents = read(place)
        seconds = time.perf_counter() - begun
        begun = time.perf_counter()
        front_of(contents.records, header.objectives)
        fronts = time.perf_counter() - begun
        row = {
            "written_ms": 1e3 * statistics.median(times),
            "read_ms": 1e3 * seconds,
            "front_ms": 1e3 * fronts,
            "mb": (place / "journal.jsonl").stat().st_size / MEGABYTE,
        }
        found[f"{size} trials"] = {name: round(value, 4) for name, value in row.items()}
        said = f"{row['read_ms']:8.0f} {row['front_ms']:9.1f} {row['mb']:4.1f}"
        print(f"{size:6} {row['written_ms']:22.3f} {said}", flush=True)
    return found


def mlflow(scratch: Path, sizes: Sequence[int]) -> dict[str, Any]:
    """Bring MLflow (SQLite) in line with sweeps of so many trials, then with one trial more."""
    from autorank.tracking import Tracker

    print("\nMLflow\ntrials  runs/s  one more s  with figures s  MB")
    found: dict[str, Any] = {}
    for size in sizes:
        header, records = made_up(size + 1)
        place = scratch / f"mlflow-{size}"
        tracker = Tracker(f"sqlite:///{place}/mlflow.db", place)
        place.mkdir()
        tracker.start(header)
        begun = time.perf_counter()
        tracker.catch_up(header, records[:size], (), wait=3600)
        whole = time.perf_counter() - begun
        begun = time.perf_counter()
        tracker.log(records[size])
        with tracker._changed:  # the trial alone: figures come when their time has come
            tracker._changed.wait_for(lambda t=tracker: t._done == t._asked, 600)
        one = time.perf_counter() - begun
        begun = time.perf_counter()
        tracker.close(wait=3600)
        figures = time.perf_counter() - begun
        row = {
            "runs_per_s": size / whole,
            "one_more_s": one,
            "figures_s": figures,
            "mb": (place / "mlflow.db").stat().st_size / MEGABYTE,
        }
        found[f"{size} trials"] = {name: round(value, 4) for name, value in row.items()} | {"problem": tracker.problem}
        print(
            f"{size:6} {row['runs_per_s']:7.1f} {one:11.2f} {figures:15.2f} {row['mb']:5.1f} {tracker.problem}",
            flush=True,
        )
    return found


def numbers(text: str, kind: type) -> list[Any]:
    """Return the numbers of a list with commas."""
    return [kind(part) for part in text.split(",") if part]


def main() -> None:
    """Measure what is asked for."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure, with commas between")
    parser.add_argument("--workers", default="1,4,16,64")
    parser.add_argument("--lengths", default="0.1,1,10")
    parser.add_argument("--trials", default="100,1000,10000")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long the workers are kept busy")
    args = parser.parse_args()
    if args.quick:
        args.only, args.workers, args.lengths = "workers,driver,journal", "1,4", "0.1,1"
        args.trials, args.seconds = "100,1000", 4.0
    wanted, sizes = args.only.split(","), numbers(args.trials, int)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        if "workers" in wanted:
            figures["workers"] = workers(
                scratch, numbers(args.workers, int), numbers(args.lengths, float), args.seconds
            )
        if "real" in wanted:
            figures["real"] = real(scratch, 16)
        if "driver" in wanted:
            figures["driver"] = driver(scratch, sizes)
        if "journal" in wanted:
            figures["journal"] = journals(scratch, sizes)
        if "mlflow" in wanted:
            figures["mlflow"] = mlflow(scratch, sizes)
    finish(args, figures)


if __name__ == "__main__":
    main()
