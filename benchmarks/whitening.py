"""What input whitening is worth: accuracy of ResNet-20 on CIFAR-10 right after decomposition, no training at all.

Every convolution is decomposed to about the same share of its MACs; the same ranks are fitted to the weights (plain),
to the outputs (whitened by input covariances), and, for Tucker-2, by TensorLy's partial_tucker. One run, one set of
images.

python benchmarks/whitening.py [--quick] [--json FILE]
"""

from __future__ import annotations

import copy

import torch
from harness import arguments, cifar, finish
from torch import nn

from autorank.evaluate import evaluate
from autorank.plan import apply
from autorank.profiling import profile
from autorank.solvers import whitening
from autorank.space import build_space, read_space
from autorank.tasks import load_task
from autorank.types import Choice, ModelProfile, Plan

FORMATS = ("channel_svd", "spatial_svd", "tucker2")
TARGETS = (0.7, 0.5, 0.35)


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


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    args = parser.parse_args()
    if args.quick:
        args.images = 250
    task = load_task(**cifar(args.shared), validation=max(args.images, 250))
    model = task.model()
    model_profile = profile(model, task.example_inputs)
    inputs = (batch.inputs for batch in task.calibration_batches(128 if args.quick else 512, 64))
    stats = whitening.collect(model, model_profile.layers, inputs)
    dense = evaluate(model, task, "validation").score
    print(f"dense: {dense:.2f} % on {task.size('validation')} images\n")
    print(f"{'format':<14}{'MACs kept':>10}{'plain %':>10}{'whitened %':>12}{'gain':>8}{'TensorLy %':>12}")
    rows = []
    for form in FORMATS:
        for target in (0.5,) if args.quick else TARGETS:
            scores = {}
            for whiten in ("none", "input"):
                plan = plan_for(form, target, whiten, model_profile)
                other, layers = apply(model, plan, specs=model_profile.layers, stats=stats)
                scores[whiten] = evaluate(other, task, "validation").score
            kept = 1 + sum(layer.macs - layer.macs_dense for layer in layers) / model_profile.dense.macs
            peer = None
            if form == "tucker2":
                plain = plan_for(form, target, "none", model_profile)
                peer = evaluate(with_tensorly(model, plain), task, "validation").score
            gain = scores["input"] / scores["none"]
            shown = f"{peer:>12.2f}" if peer is not None else f"{'':>12}"
            pair = f"{scores['none']:>10.2f}{scores['input']:>12.2f}"
            print(f"{form:<14}{kept:>10.3f}{pair}{gain:>7.2f}×{shown}", flush=True)
            rows.append(
                {
                    "format": form,
                    "macs_kept": kept,
                    "plain": scores["none"],
                    "whitened": scores["input"],
                    "ratio": gain,
                    "tensorly": peer,
                }
            )
    finish(args, {"dense": dense, "rows": rows})


if __name__ == "__main__":
    main()
