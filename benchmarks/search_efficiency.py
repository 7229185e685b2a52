"""Which strategy finds a better front with less work: hypervolume against evaluations and against worker-seconds.

Every strategy searches the same space of the same network with the same seeds, fine-tune and machine. The volume is
that of (validation score, MACs kept) against the corner (score 0, all MACs), in per cent of the dense model's whole
rectangle. Levels: ``none`` (no training), ``short`` (a short fine-tune in every trial), ``long`` (points of the fronts
that were found before, at --from, are trained for 800 steps more and tested).

python benchmarks/search_efficiency.py [--quick] [--json FILE] [--task digits|cifar] [--level none|short|long]
    [--strategies a,b] [--seeds 0,1,2] [--trials 200] [--runs FILE] [--summarise] [--plans FILE ...]

Searches are kept one to a line in --runs, with their sweeps beside it, so that a long comparison can be done in pieces,
by several processes, and be summarised at the end; a search that the file already has is not run again. --plans takes
what benchmarks/peers wrote; a peer's plans then run like a strategy's. Names may carry options: auto:sampler=nsga2.
All searches share one cache of fits; --warm fills it first, and its seconds are then told apart.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import arguments, finish

QUICK = {"strategies": "uniform,nsga2", "seeds": "0", "trials": 10, "space": "small"}


def options_of(text: str) -> dict[str, Any]:
    """Read ``a=1;b=word`` as options of a strategy."""
    found: dict[str, Any] = {}
    for part in filter(None, text.split(";")):
        key, _, value = part.partition("=")
        try:
            found[key] = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            found[key] = value
    return found


def parse() -> argparse.Namespace:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("digits", "cifar"), default="digits")
    parser.add_argument("--level", choices=("none", "short", "long"), default="none")
    parser.add_argument("--from", dest="origin", choices=("none", "short"), default="none", help="level of the fronts")
    parser.add_argument("--strategies", default="", help="names with commas between them; all without it")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--steps", type=int, help="fine-tune steps instead of the level's")
    parser.add_argument("--targets", default="0.7,0.5,0.35,0.2", help="MACs kept, for level long")
    parser.add_argument("--space", default=str(Path(__file__).with_name("efficiency_space.yaml")))
    parser.add_argument("--validation", type=int, help="validation images (digits: 260; cifar: 1000)")
    parser.add_argument("--lookahead", type=int, default=1, help="proposals in flight")
    parser.add_argument("--max-time", type=float, help="seconds for each search")
    parser.add_argument("--plans", type=Path, nargs="*", default=[], help="figures of benchmarks/peers")
    parser.add_argument("--runs", type=Path, help="file of JSON lines, read and appended")
    parser.add_argument("--warm", action="store_true", help="fit all candidates first, and note how long that takes")
    parser.add_argument("--summarise", action="store_true", help="run nothing")
    args = parser.parse_args()
    if args.quick:
        args.task, args.level = "digits", "none"
        for key, value in QUICK.items():
            setattr(args, key, value)
    return args


def main() -> None:
    args = parse()
    from efficiency_summary import summarise

    with tempfile.TemporaryDirectory() as scratch:
        base = args.runs.resolve().parent if args.runs else Path(scratch)
        rows = work(args, base)
        figures = summarise([row for row in rows if row["task"] == args.task])
    finish(args, figures)


def work(args: argparse.Namespace, base: Path) -> list[dict[str, Any]]:
    """Run what is missing and return all lines, those of the file first."""
    import efficiency_runs as runs
    from efficiency_tasks import load

    rows = runs.read(args.runs) if args.runs else []
    if args.summarise:
        return rows
    task = load(args.task, args.shared.resolve(), base, args.validation)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    if args.level == "long":
        targets = [float(target) for target in args.targets.split(",")]
        asked = [label_of(name) for name in args.strategies.split(",") if name]
        if not any(row["kind"] == "dense" and row["task"] == args.task for row in rows):
            rows.append({"kind": "dense", "task": args.task, "test": runs.dense_test(task)})
            runs.append(args.runs, rows[-1])
        for run in [row for row in rows if row["kind"] == "search" and row["task"] == args.task]:
            if run["level"] != args.origin or run["seed"] not in seeds or (asked and run["strategy"] not in asked):
                continue
            done = [row for row in rows if row["kind"] == "final"]
            for row in runs.finals(task, run, done, base, steps=args.steps or 800, targets=targets):
                runs.append(args.runs, row)
                rows.append(row)
                print(
                    f"{row['strategy']} seed {row['seed']} target {row['target']}: MACs kept {row['macs_kept']:.3f}, "
                    f"validation {row['searched']:.2f} → {row['validation']:.2f}, test {row['test']:.2f}, "
                    f"{row['seconds']:.0f} s",
                    flush=True,
                )
        return rows
    for seed in seeds:
        if args.warm and not any(r["kind"] == "fits" and (r["task"], r["seed"]) == (args.task, seed) for r in rows):
            row = runs.search(
                task, args.task, args.level, "knapsack", seed, 1, base, space=args.space, steps=args.steps
            )
            fits = {"kind": "fits", **{key: row[key] for key in ("task", "space", "seed", "prepare_s", "processor_s")}}
            runs.append(args.runs, fits)
            rows.append(fits)
            print(f"all candidates fitted for seed {seed}: {row['processor_s']:.0f} s of the processor", flush=True)
        for name, peer in contestants(args):
            strategy, _, more = name.partition(":")
            # Finds the same search again, in a file that other processes write too.
            key = {"kind": "search", "task": args.task, "level": args.level, "strategy": label_of(name), "seed": seed}
            rows = runs.read(args.runs) if args.runs else rows
            if any(all(row[k] == v for k, v in key.items() if k in row) for row in rows if row["kind"] == "search"):
                continue
            begun = time.perf_counter()
            row = runs.search(
                task,
                args.task,
                args.level,
                strategy,
                seed,
                args.trials,
                base,
                space=args.space,
                steps=args.steps,
                lookahead=args.lookahead,
                max_time=args.max_time,
                peer=peer,
                label=label_of(name),
                options=options_of(more),
            )
            if row["ended"] == "interrupted":
                sys.exit(f"{label_of(name)} seed {seed} was interrupted and is not kept")
            runs.append(args.runs, row)
            rows.append(row)
            points = sum(record["point"] for record in row["records"])
            print(
                f"{label_of(name)} seed {seed}: {len(row['records'])} evaluations, {points} of them points, "
                f"{time.perf_counter() - begun:.0f} s ({row['ended']})",
                flush=True,
            )
    return rows


def label_of(name: str) -> str:
    """Return the name under which a strategy with options is listed."""
    return name.replace(":", "[") + "]" if ":" in name else name


def contestants(args: argparse.Namespace) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the strategies asked for, and the peers by name with their figures."""
    import json

    import efficiency_strategies  # noqa: F401  # registers the strategies of the comparison

    from autorank import strategies

    names = [name for name in args.strategies.split(",") if name]
    if not names and not args.plans:
        names = [name for name in strategies.names() if name != "given"]
    peers: dict[str, list[dict[str, Any]]] = {}
    for path in args.plans:
        row = json.loads(path.read_text())
        if row["task"] == args.task:
            peers.setdefault(row["peer"], []).append(row)
    return [(name, []) for name in names] + list(peers.items())


if __name__ == "__main__":
    main()
