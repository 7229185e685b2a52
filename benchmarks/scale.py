"""How long strategies think: milliseconds per ask after many outcomes in a space of 60 layers × 9 formats × 16 ranks.

The space and its scores are made up (`autorank.testing.strategies`). Every strategy is told plans drawn along the cost
axis, as trials known beforehand, and is then asked and told as in a sweep. Strategies that end by a rule of their own
are timed until they end. Processor time, so that other work on the machine does not count.

python benchmarks/scale.py [--quick] [--json FILE] [--tells 2000] [--asks 40] [--strategies a,b]
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from random import Random

from harness import arguments, finish

from autorank import strategies
from autorank.space import SearchSpace
from autorank.strategies import Strategy
from autorank.strategies.catalog import Catalog
from autorank.testing.strategies import MADE_UP_DENSE, MADE_UP_FULL, TWO, made_up_record, made_up_space
from autorank.types import Choice, LayerCost, Plan, Proposal, TrialRecord

LIMIT_MS = 50.0
LAYERS, FORMATS, RANKS = 60, 9, 16
KEEP_ON = {"auto": {"patience": 0}}
"""Options without which a strategy would end before it is timed."""


def wide_space() -> tuple[SearchSpace, SearchSpace]:
    """Return the space, and the one of three formats whose scores it borrows: three variants of each of its formats."""
    plain = made_up_space(LAYERS, RANKS, 3)
    layers = []
    for layer in plain.layers:
        found = []
        for candidate in layer.candidates:
            for variant in range(FORMATS // 3):
                dearer = 1.0 + 0.01 * variant
                cost = LayerCost(round(candidate.cost.macs * dearer), round(candidate.cost.params * dearer))
                choice = Choice(f"{candidate.choice.format}{variant}", candidate.choice.rank)
                found.append(replace(candidate, choice=choice, cost=cost))
        layers.append(replace(layer, candidates=tuple(sorted(found, key=lambda c: (c.cost.macs, c.choice.format)))))
    return replace(plain, layers=tuple(layers)), plain


def outcome(spaces: tuple[SearchSpace, SearchSpace], proposal: Proposal, number: int) -> TrialRecord:
    """Return the made-up outcome of a proposal: the score of the borrowed format, the cost of its own."""
    wide, plain = spaces
    borrowed = {name: Choice(choice.format[:-1], choice.rank) for name, choice in proposal.plan.layers}
    record = made_up_record(plain, replace(proposal, plan=Plan.of(borrowed), parent=None, want=""), number)
    cost = wide.cost(proposal.plan)
    return replace(record, plan=proposal.plan, cost=cost, kept=cost.kept(wide.dense))


def timed(strategy: Strategy, spaces: tuple[SearchSpace, SearchSpace], tells: int, asks: int) -> dict[str, float]:
    """Tell what is known, then ask and tell; return the milliseconds."""
    catalog, rng = Catalog(spaces[0], (), "macs_kept", 0), Random(1)
    begun = time.process_time()
    for number in range(tells):
        vector = catalog.spread(rng.uniform(catalog.low, catalog.high), rng, 0.35)
        proposal = Proposal(catalog.plan(vector))
        strategy.tell(proposal, outcome(spaces, proposal, number))
    told = time.process_time() - begun
    spent = []
    for number in range(tells, tells + asks):
        begun = time.process_time()
        asked = strategy.ask()
        spent.append(1e3 * (time.process_time() - begun))
        if not isinstance(asked, Proposal):
            break
        strategy.tell(asked, outcome(spaces, asked, number))
    return {
        "asks": len(spent),
        "median_ms": round(statistics.median(spent), 2),
        "mean_ms": round(statistics.mean(spent), 2),
        "largest_ms": round(max(spent), 1),
        "ms_per_tell": round(1e3 * told / max(tells, 1), 2),
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--tells", type=int, default=2000, help="outcomes that are known before the first ask")
    parser.add_argument("--asks", type=int, default=40)
    parser.add_argument("--strategies", default="", help="names with commas between them; all without it")
    args = parser.parse_args()
    if args.quick:
        args.tells, args.asks = min(args.tells, 200), min(args.asks, 20)
    spaces = wide_space()
    figures: dict[str, object] = {"space": f"{LAYERS} layers x {FORMATS} formats x {RANKS} ranks", "tells": args.tells}
    print(f"{figures['space']}, after {args.tells} tells, ms per ask (limit of the median: {LIMIT_MS:g})")
    for name in args.strategies.split(",") if args.strategies else strategies.names():
        strategy = strategies.make(
            name, spaces[0], TWO, (), 0, KEEP_ON.get(name, {}), dense=MADE_UP_DENSE, fidelity=MADE_UP_FULL
        )
        row = timed(strategy, spaces, args.tells, args.asks)
        figures[name] = row
        mark = "" if row["median_ms"] <= LIMIT_MS else "  over the limit"
        print(
            f"{name:18} median {row['median_ms']:8.2f}  mean {row['mean_ms']:8.2f}  largest {row['largest_ms']:8.1f}"
            f"  ({row['asks']} asks; {row['ms_per_tell']:.2f} per tell){mark}",
            flush=True,
        )
    finish(args, figures)


if __name__ == "__main__":
    main()
