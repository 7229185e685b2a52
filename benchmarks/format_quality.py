"""What each format is good for: errors of every layer of ResNet-20, and accuracy without training, side by side.

For every convolution and every format, the rank whose MACs (or parameters) come nearest to a share of the dense layer's
is fitted, to the weight (plain) and under the input covariance (whitened); of a format's variants (order, blocks,
factor shapes) the one with the smallest output error counts. Then all layers use the format at once and the network is
scored as it is. One run, one set of images.

python benchmarks/format_quality.py [--quick] [--json FILE] [--images N] [--formats a,b] [--shares 0.5]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

from harness import arguments, cifar, finish
from torch import Tensor

from autorank import formats
from autorank.evaluate import evaluate
from autorank.fitcache import FitCache
from autorank.formats import Format, Options
from autorank.plan import apply
from autorank.profiling import profile
from autorank.solvers import whitening
from autorank.solvers.whitening import LayerStats
from autorank.tasks import load_task
from autorank.types import Choice, LayerSpec, Plan

SHARES = (0.7, 0.5, 0.35)


@dataclass(frozen=True)
class Fit:
    """The best variant of a format for one layer."""

    choice: Choice
    weight_error: float
    output_error: float
    share: float
    seconds: float


def rank_for(fmt: Format, spec: LayerSpec, options: Options, share: float, cost: str) -> tuple[int, ...]:
    """Return the rank on the way from (1, ..., 1) to the largest whose MACs or parameters come nearest to the share."""
    largest = fmt.max_rank(spec, options)
    longest = max(largest)

    def at(step: int) -> tuple[int, ...]:
        return tuple(max(1, round(step * limit / longest)) for limit in largest)

    def kept(step: int) -> float:
        return getattr(fmt.cost(spec, at(step), options), cost) / getattr(spec, cost)

    return at(min(range(1, longest + 1), key=lambda step: (abs(kept(step) - share), step)))


def best(
    fmt: Format,
    weight: Tensor,
    spec: LayerSpec,
    stats: LayerStats,
    whiten: str,
    share: float,
    cost: str,
    cache: FitCache,
) -> Fit | None:
    """Return the variant with the smallest output error; None when the format refuses the layer."""
    found = []
    for variant in fmt.variants(spec):
        options = tuple(sorted((*variant, ("whiten", whiten))))
        if fmt.supports(spec, options) is not None or whiten not in fmt.whitenings(spec, variant):
            continue
        choice = Choice(fmt.name, rank_for(fmt, spec, options, share, cost), options)
        start = time.perf_counter()
        _, info = cache.get_or_fit(fmt, weight, spec, choice, stats, 0)
        took = time.perf_counter() - start
        kept = getattr(fmt.cost(spec, choice.rank, options), cost) / getattr(spec, cost)
        found.append(Fit(choice, info["weight_error"], info["output_error"], kept, took))
    # A variant that cannot come near the share at all is no answer to it.
    near = [fit for fit in found if abs(fit.share - share) <= 0.15 * share] or found
    return min(near, key=lambda fit: fit.output_error, default=None)


def every(args_formats: str) -> Iterator[Format]:
    """Yield the formats asked for."""
    for name in args_formats.split(",") if args_formats else formats.names():
        yield formats.get(name)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--formats", default="", help="names with commas between them; all without it")
    parser.add_argument("--shares", default="", help="of the MACs, with commas between them; 0.7,0.5,0.35 without it")
    args = parser.parse_args()
    shares = tuple(float(share) for share in args.shares.split(",")) if args.shares else SHARES
    if args.quick:
        args.images, shares = 250, (0.5,)
        args.formats = args.formats or "channel_svd,spatial_svd,tucker2,kronecker"
    task = load_task(**cifar(args.shared), validation=max(args.images, 250))
    model = task.model()
    profiled = profile(model, task.example_inputs)
    inputs = (batch.inputs for batch in task.calibration_batches(128 if args.quick else 512, 64))
    stats = whitening.collect(model, profiled.layers, inputs)
    specs = [spec for spec in profiled.layers if spec.kind == "conv2d"]
    weights = {spec.name: model.get_submodule(spec.name).weight.detach() for spec in specs}
    dense = evaluate(model, task, "validation").score
    print(f"dense: {dense:.2f} % on {task.size('validation')} images; errors are means over {len(specs)} layers\n")
    head = f"{'format':<15}{'share':>6}{'fit':>10}"
    columns = ("weight err", "output err", "at = params", "MACs kept", "accuracy %", "s a fit")
    print(head + "".join(f"{name:>12}" for name in columns))
    rows, layers, cache = [], [], FitCache(None)
    for fmt in every(args.formats):
        for share in shares:
            for whiten in ("none", "input"):
                fits = {}
                by_params = []
                for spec in specs:
                    fit = best(fmt, weights[spec.name], spec, stats[spec.name], whiten, share, "macs", cache)
                    same = best(fmt, weights[spec.name], spec, stats[spec.name], whiten, share, "params", cache)
                    if fit is None or same is None:
                        continue
                    fits[spec.name] = fit
                    by_params.append(same.output_error)
                    layers.append(
                        {
                            "format": fmt.name,
                            "share": share,
                            "whiten": whiten,
                            "layer": spec.name,
                            "choice": str(fit.choice),
                            "macs_kept": fit.share,
                            "weight_error": fit.weight_error,
                            "output_error": fit.output_error,
                            "output_error_at_params": same.output_error,
                        }
                    )
                plan = Plan.of({name: fit.choice for name, fit in fits.items()})
                other, results = apply(model, plan, specs=profiled.layers, stats=stats, cache=cache)
                kept = 1 + sum(layer.macs - layer.macs_dense for layer in results) / profiled.dense.macs
                row = {
                    "format": fmt.name,
                    "share": share,
                    "whiten": whiten,
                    "weight_error": statistics.mean(fit.weight_error for fit in fits.values()),
                    "output_error": statistics.mean(fit.output_error for fit in fits.values()),
                    "output_error_at_params": statistics.mean(by_params),
                    "macs_kept": kept,
                    "accuracy": evaluate(other, task, "validation").score,
                    "seconds_a_fit": statistics.mean(fit.seconds for fit in fits.values()),
                    "layers": len(fits),
                }
                rows.append(row)
                name = "plain" if whiten == "none" else "whitened"
                shown = "".join(f"{row[key]:>12.3f}" for key in list(row)[3:9])
                print(f"{fmt.name:<15}{share:>6.2f}{name:>10}{shown}", flush=True)
    finish(args, {"dense": dense, "rows": rows, "layers": layers})


if __name__ == "__main__":
    main()
