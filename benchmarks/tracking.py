"""What MLflow costs a running sweep, and how long its figures take for many records.

Every figure is drawn once from 1,000 made-up records of 20 layers; then the digits network of the demonstration is
searched with the same seed and trials, with and without tracking in turns.

python benchmarks/tracking.py [--quick] [--json FILE] [--trials 24] [--repeat 3] [--records 1000]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harness import ROOT, arguments, finish

sys.path.insert(0, str(ROOT))


def sweep(place: Path, weights: Path, trials: int, tracking: bool) -> dict[str, float]:
    """Run a sweep; return its wall seconds, from the call to the result, and of the search alone."""
    import autorank
    from autorank.demo import settings

    begun = time.monotonic()
    result = autorank.search(
        **settings(weights),
        trials=trials,
        strategy="tpe",
        seed=0,
        sweep_dir=str(place),
        tracking=tracking,
    )
    return {"whole": time.monotonic() - begun, "search": result.seconds["search"]}


def sweeps(scratch: Path, trials: int, repeat: int) -> dict[str, object]:
    """Run sweeps with and without tracking in turns, and compare the medians."""
    from autorank.demo import prepare_weights

    weights = scratch / "net.safetensors"
    prepare_weights(weights)
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for number in range(repeat):
        for tracking in (False, True) if number % 2 == 0 else (True, False):
            found[tracking].append(sweep(scratch / f"{number}-{tracking}", weights, trials, tracking))
    figures: dict[str, object] = {"trials": trials}
    print(f"\n{trials} trials on digits, {repeat} times each, seconds (median, least to most)")
    for part in ("search", "whole"):
        middle = {}
        for tracking in (False, True):
            seconds = [one[part] for one in found[tracking]]
            middle[tracking] = statistics.median(seconds)
            name = f"{part}, {'with' if tracking else 'without'} tracking"
            figures[name] = {"median_s": middle[tracking], "least_s": min(seconds), "most_s": max(seconds)}
            print(f"{name:28} {middle[tracking]:7.1f}  ({min(seconds):.1f} to {max(seconds):.1f})")
        figures[f"{part}, ratio"] = round(middle[True] / middle[False], 4)
        print(f"{part + ', ratio':28} {middle[True] / middle[False]:7.3f}")
    return figures


def drawings(records: int) -> dict[str, object]:
    """Draw every figure of a sweep with so many records; return processor seconds and sizes."""
    from autorank import figures
    from tests.dashboards.samples import front_points, sweep_header, widened
    from tests.sweep_samples import records as made_up

    header = sweep_header("sweep", records)
    done = tuple(widened(record, 20) for record in made_up(header, records))
    front = front_points(header, done)
    figures.pareto_png(header, done[:10], ())  # the first picture loads the libraries
    calls: dict[str, tuple[Callable[..., str | bytes], tuple[object, ...]]] = {
        "pareto": (figures.pareto_html, (header, done, front)),
        "pareto.png": (figures.pareto_png, (header, done, front)),
        "hypervolume": (figures.hypervolume_html, (header, done)),
        "hypervolume.png": (figures.hypervolume_png, (header, done)),
        "rank map": (figures.rank_map_html, (header, front)),
        "rank map.png": (figures.rank_map_png, (header, front)),
        "importance": (figures.importance_html, (header, done)),
        "importance.png": (figures.importance_png, (header, done)),
        "layers": (figures.layers_html, (header, front[0])),
        "layers.png": (figures.layers_png, (header, front[0])),
    }
    print(f"\nfigures of {records} records of 20 layers, {len(front)} on the front: processor seconds, size")
    rows: dict[str, object] = {}
    for name, (draw, given) in calls.items():
        begun = time.process_time()
        drawn = draw(*given)
        spent = time.process_time() - begun
        rows[name] = {"cpu_s": round(spent, 3), "kB": round(len(drawn) / 1e3)}
        print(f"{name:18} {spent:7.3f} s {len(drawn) / 1e3:9.0f} kB", flush=True)
    return rows


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--no-sweeps", action="store_true", help="the figures alone")
    args = parser.parse_args()
    if args.quick:
        args.trials, args.repeat, args.records = 3, 1, 200
    figures: dict[str, object] = {"figures": drawings(args.records)}
    if not args.no_sweeps:
        with tempfile.TemporaryDirectory() as scratch:
            figures["sweeps"] = sweeps(Path(scratch), args.trials, args.repeat)
    finish(args, figures)


if __name__ == "__main__":
    main()
