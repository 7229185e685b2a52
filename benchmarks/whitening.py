"""What whitening is worth: accuracy of ResNet-20 on CIFAR-10 right after decomposition, no training at all.

Every convolution is decomposed to about the same share of its MACs; the same ranks are fitted to the weights (plain),
to the layers' outputs (whitened by input covariances), to the gradients of the loss (output), to the loss in second
order (both), and, for Tucker-2, by TensorLy's partial_tucker. One run, one set of images. Then, without --quick, how
well the statistics predict what decomposing one layer alone costs.

python benchmarks/whitening.py [--quick] [--json FILE]
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from functools import partial

import torch
from harness import arguments, cifar, finish
from torch import nn

from autorank import formats
from autorank.evaluate import evaluate
from autorank.plan import apply
from autorank.profiling import profile
from autorank.solvers import whitening
from autorank.solvers.curvature import predicted_loss_increase
from autorank.solvers.gradients import collect_gradients
from autorank.space import build_space, read_space
from autorank.tasks import Task, load_task
from autorank.types import Choice, ModelProfile, Plan

FORMATS = ("channel_svd", "spatial_svd", "tucker2")
TARGETS = (0.7, 0.5, 0.35)
COLUMNS = {"none": "plain", "input": "whitened", "output": "output", "both": "both"}


def plan_for(form: str, target: float, whiten: str, model_profile: ModelProfile) -> Plan:
    """Return the plan in which every convolution keeps about `target` of its MACs in one format."""
    file = read_space(
        {
            "version": 1,
            "defaults": {"formats": [form], "whiten": [whiten], "ranks": {"macs_kept": [target]}},
            "dense": ["type:linear"],
        }
    )
    space = build_space(file, model_profile)
    choices: dict[str, Choice] = {}
    for layer in space.layers:
        nearest = min(layer.candidates, key=lambda c: (abs(c.cost.macs / layer.spec.macs - target), str(c.choice)))
        choices[layer.spec.name] = nearest.choice
    return Plan.of(choices)


def with_tensorly(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy whose weights are replaced by TensorLy's partial Tucker approximation of the same ranks."""
    import tensorly as tl
    from tensorly.decomposition import partial_tucker

    other = copy.deepcopy(model)
    with tl.backend_context("pytorch"), torch.no_grad():
        for name, choice in plan.layers:
            weight = other.get_submodule(name).weight
            (core, factors), _ = partial_tucker(weight.detach(), rank=list(choice.rank), modes=[0, 1], init="svd")
            weight.copy_(tl.tenalg.multi_mode_dot(core, factors, modes=[0, 1]))
    return other


def statistics(
    task: Task, model: nn.Module, model_profile: ModelProfile, examples: int
) -> tuple[dict[str, whitening.LayerStats], tuple[float, float]]:
    """Return input and gradient covariances of all layers, and the seconds that each took."""
    begun = time.perf_counter()
    inputs = (batch.inputs for batch in task.calibration_batches(examples, 64))
    stats = whitening.collect(model, model_profile.layers, inputs, examples=examples)
    between = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    batches = (
        (batch.inputs, partial(task.sampled_loss, batch=batch, generator=generator))
        for batch in task.calibration_batches(examples, 32)
    )
    gradients = collect_gradients(model, model_profile.layers, batches, examples=examples)
    seconds = between - begun, time.perf_counter() - between
    return {name: replace(each, gradient=gradients[name]) for name, each in stats.items()}, seconds


def predictions(
    task: Task, model: nn.Module, model_profile: ModelProfile, stats: dict[str, whitening.LayerStats]
) -> dict[str, float]:
    """Return the rank correlations of the rise of the loss, one layer decomposed, with what is known beforehand."""
    dense = evaluate(model, task, "validation", limit=1000).loss
    rows = []
    for target in (0.3, 0.5, 0.7):
        for name, choice in plan_for("tucker2", target, "both", model_profile).layers[::2]:
            one = Plan.of({name: choice})
            other, (layer,) = apply(model, one, specs=model_profile.layers, stats=stats)
            fmt, spec = formats.get(choice.format), model_profile.layer(name)
            weight = model.get_submodule(name).weight.detach()
            factors = fmt.fit(weight, spec, choice.rank, choice.options, stats[name], one.seed)
            approx = fmt.reconstruct(factors, spec, choice.rank, choice.options)
            predicted = predicted_loss_increase(weight, approx, stats[name])
            rise = evaluate(other, task, "validation", limit=1000).loss - dense
            rows.append((rise, predicted, layer.output_error, layer.weight_error))
    ranks = torch.tensor(rows, dtype=torch.float64).T.argsort(1).argsort(1).double()
    found = torch.corrcoef(ranks)[0, 1:].tolist()
    factor = sorted(rise / predicted for rise, predicted, *_ in rows)[len(rows) // 2]
    names = ("predicted rise", "output error", "weight error", "median of rise / predicted")
    return dict(zip(names, (*found, factor), strict=True))


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    args = parser.parse_args()
    if args.quick:
        args.images = 250
    task = load_task(**cifar(args.shared), validation=max(args.images, 250))
    model = task.model()
    model_profile = profile(model, task.example_inputs)
    stats, seconds = statistics(task, model, model_profile, 128 if args.quick else 512)
    dense = evaluate(model, task, "validation").score
    print(f"dense: {dense:.2f} % on {task.size('validation')} images")
    print(f"statistics: inputs {seconds[0]:.1f} s, gradients {seconds[1]:.1f} s\n")
    heads = "".join(f"{name + ' %':>12}" for name in COLUMNS.values())
    print(f"{'format':<14}{'MACs kept':>10}{heads}{'gain':>8}{'TensorLy %':>12}")
    rows = []
    for form in FORMATS:
        for target in (0.5,) if args.quick else TARGETS:
            scores = {}
            for whiten in COLUMNS:
                plan = plan_for(form, target, whiten, model_profile)
                other, layers = apply(model, plan, specs=model_profile.layers, stats=stats)
                scores[whiten] = evaluate(other, task, "validation").score
            kept = 1 + sum(layer.macs - layer.macs_dense for layer in layers) / model_profile.dense.macs
            peer = None
            if form == "tucker2":
                plain = plan_for(form, target, "none", model_profile)
                peer = evaluate(with_tensorly(model, plain), task, "validation").score
            gain = scores["both"] / scores["none"]
            shown = f"{peer:>12.2f}" if peer is not None else f"{'':>12}"
            figures = "".join(f"{scores[whiten]:>12.2f}" for whiten in COLUMNS)
            print(f"{form:<14}{kept:>10.3f}{figures}{gain:>7.2f}×{shown}", flush=True)
            rows.append(
                {
                    "format": form,
                    "macs_kept": kept,
                    **{column: scores[whiten] for whiten, column in COLUMNS.items()},
                    "ratio": scores["input"] / scores["none"],
                    "ratio_both": gain,
                    "tensorly": peer,
                }
            )
    correlations = {} if args.quick else predictions(task, model, model_profile, stats)
    if correlations:
        print("\none layer alone, rank correlation with the rise of the loss:")
        print("\n".join(f"  {name}: {value:.2f}" for name, value in correlations.items()))
    finish(
        args,
        {
            "dense": dense,
            "rows": rows,
            "seconds": dict(zip(("inputs", "gradients"), seconds, strict=True)),
            "predictions": correlations,
        },
    )


if __name__ == "__main__":
    main()
