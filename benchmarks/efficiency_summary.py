"""From the lines of searches to tables: hypervolume at equal evaluations and at equal seconds, and who leads where."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autorank.pareto import hypervolume

EVALUATIONS = (5, 10, 20, 50, 100, 200)
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Of the seconds that the yardstick took."""
YARDSTICK = "nsga2"
OURS = "auto"
NARROW = 10.0
"""Points of score below the dense model's at which the narrow corner lies."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """Hypervolume after every trial of one search, in per cent of the rectangle from the corner to the dense score.

    Attributes
    ----------
    steps : tuple of (evaluations, worker-seconds, volume)
        Probes cost seconds and count as no evaluation. What all trials share is prepared before the first one, and is
        in the seconds, as is the time for proposals. Seconds are those of the processor, of which a search uses one
        core, so that other programs beside it do not count: what the whole search used, in proportion to the trials'.
    settled : bool
        Whether the search ended by itself: then its last volume holds for every larger budget.
    """

    steps: tuple[tuple[int, float, float], ...]
    settled: bool

    @classmethod
    def of(cls, run: Row, narrow: bool = False, fits_s: float = 0.0) -> Curve:
        """Read the line of a search; `fits_s` is what a strategy pays that needs the errors of all candidates."""
        sign = 1.0 if run["directions"][0] == "max" else -1.0
        corner = [run["dense"] - sign * NARROW, *run["reference"][1:]] if narrow else run["reference"]
        whole = abs(run["dense"] - corner[0]) * corner[1]
        wall = run["prepare_s"] + sum(record["seconds"] for record in run["records"])
        rate = run["processor_s"] / wall if wall else 1.0
        evaluations, seconds = run["before"]["evaluations"], rate * run["prepare_s"] + run["before"]["seconds"]
        if "errors" in run["needs"]:
            seconds += fits_s
        points: list[tuple[float, float]] = []
        volume = 0.0
        steps = [(0, 0.0, 0.0)]
        for record in run["records"]:
            seconds += rate * record["seconds"]
            evaluations += not record["probe"]
            if record["point"]:
                points.append((record["score"], record["macs_kept"]))
                volume = 100 * hypervolume(points, corner, run["directions"]) / whole
            steps.append((evaluations, seconds, volume))
        cut = run["ended"].startswith("all ") or "time limit" in run["ended"]
        return cls(tuple(steps), not cut)

    @property
    def end(self) -> tuple[int, float, float]:
        """Evaluations, seconds and volume at the end."""
        return self.steps[-1]

    def at(self, axis: int, budget: float) -> float | None:
        """Return the volume at a budget of evaluations (axis 0) or seconds (1); None beyond a search that was cut."""
        if budget > self.end[axis] and not self.settled:
            return None
        return next(step[2] for step in reversed(self.steps) if step[axis] <= budget)

    def reaches(self, volume: float) -> tuple[int, float] | None:
        """Return evaluations and seconds after which the volume is reached."""
        return next(((n, s) for n, s, v in self.steps if v >= volume), None)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Print the tables of one task and return their figures, a level at a time."""
    figures: dict[str, Any] = {}
    for level in ("none", "short"):
        runs = [row for row in rows if row["kind"] == "search" and row["level"] == level]
        if runs:
            fits = [row["processor_s"] for row in rows if row["kind"] == "fits"]
            figures[level] = _level(runs, level, statistics.mean(fits) if fits else None)
        finals = [row for row in rows if row["kind"] == "final" and row["level"] == level]
        if finals:
            dense = next((row["test"] for row in rows if row["kind"] == "dense"), None)
            figures[f"long, from {level}"] = _finals(finals, level, dense)
    return figures


def _grouped(runs: Sequence[Row]) -> dict[str, list[Row]]:
    names = dict.fromkeys(run["strategy"] for run in runs)
    return {name: [run for run in runs if run["strategy"] == name] for name in names}


def _level(runs: Sequence[Row], level: str, fits_s: float | None) -> dict[str, Any]:
    wide = {name: [Curve.of(run) for run in of] for name, of in _grouped(runs).items()}
    narrow = {name: [Curve.of(run, narrow=True) for run in of] for name, of in _grouped(runs).items()}
    first = runs[0]
    seeds = sorted({run["seed"] for run in runs})
    print(
        f"\nlevel {level}: {first['task']}, space {first['space']}, {first['steps']} fine-tune steps, dense "
        f"{first['dense']:.2f} on {first['validation']} validation images, seeds {', '.join(map(str, seeds))}"
    )
    figures: dict[str, Any] = {"seeds": seeds}
    figures["evaluations"] = _table("hypervolume, %, after evaluations (mean ± half the range)", wide, 0, EVALUATIONS)
    title = f"the same, of the corner {NARROW:g} points below the dense score"
    figures["evaluations_narrow"] = _table(title, narrow, 0, EVALUATIONS)
    yardstick = wide.get(YARDSTICK)
    if yardstick:
        whole = statistics.mean(curve.end[1] for curve in yardstick)
        budgets = tuple(round(whole * share, 1) for share in SHARES)
        figures["seconds"] = _table("hypervolume, %, after worker-seconds (of the processor)", wide, 1, budgets)
        figures["reach"] = _reach(wide, yardstick)
    if OURS in wide:
        figures["lead"] = _lead(wide, "")
        if fits_s is not None:
            figures["fits_s"] = fits_s
            paid = {name: [Curve.of(run, fits_s=fits_s) for run in of] for name, of in _grouped(runs).items()}
            what = f", where those that need the errors of all candidates first pay {fits_s:.0f} s for the fits"
            figures["lead_paid"] = _lead(paid, what)
    failed = {
        name: sum(r["status"] == "failed" for run in of for r in run["records"]) for name, of in _grouped(runs).items()
    }
    if any(failed.values()):
        print("failed trials: " + ", ".join(f"{name} {count}" for name, count in failed.items() if count))
    return figures


def _mean(curves: Sequence[Curve], axis: int, budget: float) -> tuple[float, float] | None:
    """Return mean and half the range over the searches; None unless all of them have a value."""
    values = [curve.at(axis, budget) for curve in curves]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return statistics.mean(known), (max(known) - min(known)) / 2


def _table(
    title: str, groups: Mapping[str, Sequence[Curve]], axis: int, budgets: Sequence[float]
) -> dict[str, dict[str, list[float]]]:
    figures: dict[str, dict[str, list[float]]] = {}
    print(f"\n{title}")
    print(f"{'':<22}" + "".join(f"{budget:>13g}" for budget in budgets) + f"{'evaluations':>13}{'seconds':>9}")
    for name, curves in groups.items():
        cells, found = "", {}
        for budget in budgets:
            value = _mean(curves, axis, budget)
            cells += f"{f'{value[0]:.2f} ± {value[1]:.2f}' if value else '':>13}"
            if value:
                found[f"{budget:g}"] = [round(part, 3) for part in value]
        ends = [statistics.mean(curve.end[k] for curve in curves) for k in (0, 1)]
        print(f"{name:<22}{cells}{ends[0]:>13.0f}{ends[1]:>9.1f}")
        figures[name] = found
    return figures


def _reach(groups: Mapping[str, Sequence[Curve]], yardstick: Sequence[Curve]) -> dict[str, Any]:
    """Say how much each strategy needs for the volume with which the yardstick ended, in the mean over its seeds."""
    volume = statistics.mean(curve.end[2] for curve in yardstick)
    evaluations = round(statistics.mean(curve.end[0] for curve in yardstick))
    print(f"\nneeded for {volume:.2f} %, where {YARDSTICK} is after {evaluations} evaluations (median)")
    print(f"{'':<22}{'evaluations':>13}{'seconds':>10}{'reached by':>12}")
    figures: dict[str, Any] = {"volume": volume, "evaluations": evaluations}
    for name, curves in groups.items():
        reached = [found for curve in curves if (found := curve.reaches(volume)) is not None]
        if not reached:
            print(f"{name:<22}{'':>23}{f'0 of {len(curves)}':>12}")
            figures[name] = None
            continue
        n, s = (statistics.median(found[k] for found in reached) for k in (0, 1))
        print(f"{name:<22}{n:>13g}{s:>10.1f}{f'{len(reached)} of {len(curves)}':>12}")
        figures[name] = {"evaluations": n, "seconds": s, "reached": len(reached), "of": len(curves)}
    return figures


def _lead(groups: Mapping[str, Sequence[Curve]], what: str) -> dict[str, Any]:
    """Print the ratio of our volume to every other's at equal budgets: the worst one, where it is, and at the end."""
    print(
        f"\n{OURS} ÷ other, hypervolume at equal budgets from 5 evaluations on{what}: smallest ratio (where) and last"
    )
    print(f"{'':<22}{'at equal evaluations':>26}{'at equal seconds':>28}")
    figures = {}
    ours = groups[OURS]
    begin = max(next((s for n, s, _ in curve.steps if n >= 5), curve.end[1]) for curve in ours)
    for name, curves in groups.items():
        if name == OURS:
            continue
        both = [*ours, *curves]
        ends = [min((c.end[k] for c in both if not c.settled), default=max(c.end[k] for c in both)) for k in (0, 1)]
        counts = [float(n) for n in range(5, int(ends[0]) + 1)]
        times = sorted({s for curve in both for _, s, _ in curve.steps if begin <= s <= ends[1]})
        cells, found = "", {}
        for axis, (unit, budgets) in enumerate((("evaluations", counts), ("seconds", times))):
            ratios = [
                (ratio, budget) for budget in budgets if (ratio := _ratio(ours, curves, axis, budget)) is not None
            ]
            if not ratios:
                cells += f"{'':>27}"
                continue
            worst, last = min(ratios), ratios[-1]
            cells += f"{f'{worst[0]:.3f} ({worst[1]:.4g}), {last[0]:.3f} ({last[1]:.4g})':>27}"
            found[unit] = {"worst": worst, "last": last}
        print(f"{name:<22}{cells}")
        figures[name] = found
    return figures


def _ratio(ours: Sequence[Curve], others: Sequence[Curve], axis: int, budget: float) -> float | None:
    mine, theirs = _mean(ours, axis, budget), _mean(others, axis, budget)
    return mine[0] / theirs[0] if mine and theirs and theirs[0] > 0 else None


def _finals(rows: Sequence[Row], level: str, dense: float | None) -> dict[str, Any]:
    """Print test accuracy and MACs kept of the points that were trained for long, by strategy and budget."""
    targets = sorted({row["target"] for row in rows}, reverse=True)
    steps = sorted({row["long"] for row in rows})
    print(f"\nafter {'/'.join(map(str, steps))} more steps, fronts of level {level}: test accuracy (MACs kept), mean")
    print(f"{'':<22}" + "".join(f"{f'≤ {target:g}':>18}" for target in targets) + f"{'searches':>10}")
    figures: dict[str, Any] = {"dense": dense}
    if dense is not None:
        print(f"{'dense':<22}{f'{dense:.2f} (1)':>18}")
    names = list(dict.fromkeys(row["strategy"] for row in rows))
    for name in names:
        mine = [row for row in rows if row["strategy"] == name]
        cells, found = "", {}
        for target in targets:
            there = [row for row in mine if row["target"] == target]
            if there:
                mean = {k: statistics.mean(row[k] for row in there) for k in ("test", "validation", "macs_kept")}
                found[f"{target:g}"] = mean
                cells += "{:>18}".format("{test:.2f} ({macs_kept:.3f})".format(**mean))
            else:
                cells += f"{'':>18}"
        print(f"{name:<22}{cells}{len({row['sweep'] for row in mine}):>10}")
        figures[name] = found
    return figures
