"""Fits made ahead by other processes: they put into the cache what this process will ask for.

Each process is ``python -m autorank.fitting JOBFILE``, started anew rather than forked or spawned by `multiprocessing`:
that would run the user's script again. It is told over its standard input which units to fit, one number a line, and
answers each with its number. At the end of its input it ends at once, whatever it is doing, so that none outlives the
process that started it. What it writes is exactly what `FitCache` finds afterwards; one that dies costs time only.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autorank import formats
from autorank.fitcache import FitCache
from autorank.solvers import whitening
from autorank.solvers.whitening import LayerStats
from autorank.types import CallSize, Choice, LayerSpec

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Unit:
    """Fits of one layer that one process makes one after the other, because they share work.

    Attributes
    ----------
    spec : LayerSpec
    choices : tuple of Choice
    seconds : float
        How long they are thought to take; long ones are begun first.
    """

    spec: LayerSpec
    choices: tuple[Choice, ...]
    seconds: float


def fit_ahead(
    units: Sequence[Unit],
    weights: Mapping[str, Tensor],
    stats: Mapping[str, LayerStats],
    cache_dir: Path,
    seed: int,
    *,
    processes: int,
    threads: int = 1,
    progress: Callable[[int], None] = lambda fits: None,
) -> int:
    """Fill a cache with fits by several processes.

    Parameters
    ----------
    units : sequence of Unit
        Of formats that come with the package.
    weights : mapping of str to Tensor, shape `LayerSpec.weight_shape`
        By layer; the processes compute on the device of each.
    stats : mapping of str to LayerStats
        Of the layers that have any.
    cache_dir : Path
        Of the `FitCache`.
    seed : int
        Of the fits.
    processes : int
        How many run at a time.
    threads : int
        PyTorch threads of each.
    progress : callable
        Called in this thread, every second and at the end, with the number of fits made.

    Returns
    -------
    int
        How many fits were made. Fewer than asked for when a process died: its units are left to whoever needs them.
    """
    order = sorted(range(len(units)), key=lambda i: (-units[i].seconds, i))
    with tempfile.TemporaryDirectory(prefix="autorank-fits-") as folder:
        job = _write_job(Path(folder), units, weights, stats, cache_dir, seed, threads)
        pool = _Pool(job, order, min(processes, len(units)), threads)
        try:
            while not pool.wait(1.0):
                progress(sum(len(units[i].choices) for i in list(pool.done)))
        finally:
            pool.kill()
    made = sum(len(units[i].choices) for i in pool.done)
    progress(made)
    return made


class _Pool:
    """Processes, and one thread each that feeds it."""

    def __init__(self, job: Path, order: Sequence[int], count: int, threads: int) -> None:
        self.done: list[int] = []
        self._left = deque(order)  # popleft and append are atomic
        self._processes: list[subprocess.Popen[str]] = []
        self._feeders: list[threading.Thread] = []
        try:
            with suppress(OSError):  # no more processes to be had: the others do the work, or the caller does
                for _ in range(count):
                    process = _started(job, threads)
                    self._processes.append(process)
                    feeder = threading.Thread(target=self._feed, args=(process,), daemon=True)
                    feeder.start()
                    self._feeders.append(feeder)
        except BaseException:
            self.kill()
            raise

    def _feed(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            while True:
                try:
                    number = self._left.popleft()
                except IndexError:
                    return
                process.stdin.write(f"{number}\n")
                process.stdin.flush()
                if process.stdout.readline().strip() != str(number):
                    return
                self.done.append(number)
        except (OSError, ValueError):
            return  # it died, or was killed and its pipes closed

    def wait(self, seconds: float) -> bool:
        """Wait for a while; return whether all is over."""
        for feeder in self._feeders:
            feeder.join(seconds)
            if feeder.is_alive():
                return False
        return True

    def kill(self) -> None:
        """End the processes, and wait until they have."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for feeder in self._feeders:
            feeder.join()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):  # what could not be sent to a process that died
                        pipe.close()


def _started(job: Path, threads: int) -> subprocess.Popen[str]:
    package = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(part for part in (package, os.environ.get("PYTHONPATH", "")) if part)
    return subprocess.Popen(
        [sys.executable, "-m", "autorank.fitting", str(job)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **dict.fromkeys(_THREADS, str(threads)), "PYTHONPATH": path},
        start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others
    )


def _write_job(
    folder: Path,
    units: Sequence[Unit],
    weights: Mapping[str, Tensor],
    stats: Mapping[str, LayerStats],
    cache_dir: Path,
    seed: int,
    threads: int,
) -> Path:
    from safetensors.torch import save_file

    names = list(dict.fromkeys(unit.spec.name for unit in units))
    save_file({name: weights[name].detach().cpu().contiguous().clone() for name in names}, folder / "weights")
    whitening.save({name: stats[name] for name in names if name in stats}, folder / "stats")
    what = {
        "cache": str(cache_dir.resolve()),
        "seed": seed,
        "threads": threads,
        "devices": {name: str(weights[name].device) for name in names},
        "units": [[asdict(unit.spec), [choice.to_json() for choice in unit.choices]] for unit in units],
    }
    path = folder / "job.json"
    path.write_text(json.dumps(what))
    return path


def _spec(data: Mapping[str, Any]) -> LayerSpec:
    """Return the spec that `asdict` and JSON made `data` of."""
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    plain["calls"] = tuple(
        CallSize(call["batch"], tuple(call["input"]), tuple(call["output"])) for call in data["calls"]
    )
    return LayerSpec(**plain)


def _listen(to: queue.SimpleQueue[int]) -> None:
    for line in sys.stdin:
        to.put(int(line))
    os._exit(0)  # whoever started this process has what it wants, or is gone


def main(path: str) -> None:
    """Fit the units whose numbers come in over standard input, until it ends."""
    from safetensors.torch import load_file

    job = json.loads(Path(path).read_text())
    torch.set_num_threads(job["threads"])
    weights = load_file(Path(path).parent / "weights")
    stats = whitening.load(Path(path).parent / "stats")
    cache = FitCache(Path(job["cache"]))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # nothing that a library prints may pass for an answer
    numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(numbers,), daemon=True).start()
    while True:
        number = numbers.get()
        spec, choices = _spec(job["units"][number][0]), job["units"][number][1]
        weight = weights[spec.name].to(job["devices"][spec.name])
        for choice in map(Choice.from_json, choices):
            cache.get_or_fit(formats.get(choice.format), weight, spec, choice, stats.get(spec.name), job["seed"])
        answers.write(f"{number}\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
