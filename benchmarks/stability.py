"""What a stable fit is worth: sensitivity at equal error, and accuracy before and after a short fine-tune.

On real kernels of ResNet-20, plain alternating least squares (TensorLy's parafac, or the loop of a tensor chain,
many iterations) stands beside the stable fit of the same rank. Then the 3 × 3 layers of some blocks are replaced by
factors of either fit, and both models are fine-tuned by the same few steps.

python benchmarks/stability.py [--quick] [--json FILE]
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness import arguments, cifar, finish
from torch import Tensor, nn

from autorank import formats
from autorank.evaluate import evaluate
from autorank.plan import apply
from autorank.profiling import profile
from autorank.recover import Recovery, fine_tune
from autorank.solvers import cp_modes, ring, ring_algebra
from autorank.tasks import Task, load_task
from autorank.types import Choice, LayerSpec, ModelProfile, Plan

Fit = Callable[[Tensor, LayerSpec, tuple[int, ...]], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """A format with a plain fit to compare its own with.

    Attributes
    ----------
    format : str
    plain : callable
        (dense weight, spec, rank) -> the format's factors, fitted without care for stability.
    """

    format: str
    plain: Fit


def parafac(iterations: int) -> Fit:
    """Return the plain fit of ``cp``: TensorLy's parafac, its components rescaled to the least sensitivity."""

    def fit(weight: Tensor, spec: LayerSpec, rank: tuple[int, ...]) -> dict[str, Tensor]:
        import tensorly
        from tensorly.decomposition import parafac as theirs

        tensor = weight.detach().double().flatten(2)
        with tensorly.backend_context("pytorch"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its start pads with random columns
            _, factors = theirs(tensor, rank[0], n_iter_max=iterations, init="svd", tol=0, random_state=0)
        output, into, spatial = (f.float() for f in cp_modes.balanced([f[None] for f in factors]))
        named = {"input": into.mT, "spatial": spatial.mT, "output": output}
        shapes = formats.get("cp").factor_shapes(spec, rank)
        return {name: named[name].reshape(shape).contiguous() for name, shape in shapes.items()}

    return fit


def loop(iterations: int) -> Fit:
    """Return the plain fit of ``tensor_chain``: alternating least squares from the same start, without a price."""

    def fit(weight: Tensor, spec: LayerSpec, rank: tuple[int, ...]) -> dict[str, Tensor]:
        tensor = weight.detach().double().flatten(2).permute(1, 2, 0)[None]
        problem, scale = ring.Problem.of(tensor)
        cores = ring.start(problem.tensor, (2, *rank))
        for _ in range(iterations):
            ring.sweep(problem, cores)
        first, middle, last = ring_algebra.balanced(cores, scale)
        named = {
            "input": first.permute(0, 1, 3, 2),
            "spatial_0": middle.permute(0, 3, 1, 2),
            "output": last.permute(0, 2, 3, 1),
        }
        shapes = formats.get("tensor_chain").factor_shapes(spec, rank)
        return {name: named[name].reshape(shape).float().contiguous() for name, shape in shapes.items()}

    return fit


def kept(form: str, spec: LayerSpec, share: float) -> tuple[int, ...]:
    """Return the rank along the diagonal whose parameters come nearest to a share of the dense layer's."""
    fmt = formats.get(form)
    top = fmt.max_rank(spec)
    ranks = [tuple(max(1, round(r * step / 200)) for r in top) for step in range(1, 201)]
    return min(ranks, key=lambda rank: abs(fmt.cost(spec, rank).params / spec.params - share))


def layers_of(model_profile: ModelProfile, blocks: Sequence[str]) -> list[LayerSpec]:
    """Return the convolutions of the stages, by the start of their names."""
    return [spec for spec in model_profile.layers if spec.name.startswith(tuple(blocks)) and spec.kind == "conv2d"]


def compare_kernel(case: Case, weight: Tensor, spec: LayerSpec, rank: tuple[int, ...]) -> dict[str, float | str]:
    """Return errors and sensitivities of both fits, and their ratio."""
    fmt = formats.get(case.format)
    found: dict[str, float] = {}
    for name, factors in (("plain", case.plain(weight, spec, rank)), ("stable", fmt.fit(weight, spec, rank))):
        found[f"{name}_error"] = float((fmt.reconstruct(factors, spec, rank) - weight).norm() / weight.norm())
        found[f"{name}_sensitivity"] = fmt.sensitivity(factors, spec, rank)
    found["ratio"] = found["plain_sensitivity"] / found["stable_sensitivity"]
    return {"format": case.format, "layer": spec.name, "rank": "-".join(map(str, rank)), **found}


def compare_tuning(
    case: Case,
    model: nn.Module,
    model_profile: ModelProfile,
    task: Task,
    specs: Sequence[LayerSpec],
    share: float,
    recovery: Recovery,
) -> dict[str, float | str]:
    """Return the accuracy of the model with either fit, before and after the same fine-tune."""
    plan = Plan.of({spec.name: Choice(case.format, kept(case.format, spec, share), ()) for spec in specs})
    fmt = formats.get(case.format)
    scores: dict[str, float] = {}
    for name in ("plain", "stable"):
        other, _ = apply(model, plan, specs=model_profile.layers)
        if name == "plain":
            for spec in specs:
                rank = kept(case.format, spec, share)
                factors = case.plain(model.get_submodule(spec.name).weight, spec, rank)
                other.set_submodule(spec.name, fmt.layer(spec, rank, (), factors))
        scores[f"{name}_before"] = evaluate(other, task, "validation").score
        fine_tune(other, task, recovery, seed=0)
        scores[f"{name}_after"] = evaluate(other, task, "validation").score
    return {"format": case.format, "share": share, "lr": recovery.lr, **scores}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=2000, help="of plain alternating least squares")
    parser.add_argument("--steps", type=int, default=200, help="of the fine-tune")
    args = parser.parse_args()
    if args.quick:
        args.iterations, args.steps = 100, 6
    images = 250 if args.quick else 2000
    task = load_task(**cifar(args.shared), validation=images)
    model = task.model()
    model_profile = profile(model, task.example_inputs)
    cases = [Case("cp", parafac(args.iterations)), Case("tensor_chain", loop(args.iterations))]
    kernels, tuned = [], []
    heads = ("plain error", 13), ("ours", 9), ("plain sens.", 13), ("ours", 10), ("ratio", 9)
    print(f"{'format':<14}{'layer':<18}{'rank':>8}" + "".join(f"{head:>{width}}" for head, width in heads))
    for case in cases:
        for spec in layers_of(model_profile, ("layer1.1.", "layer2.1.", "layer3.1.")[: 2 if args.quick else 3]):
            for share in (0.5,) if args.quick else (0.3, 0.5, 0.7):
                weight = model.get_submodule(spec.name).weight.detach()
                row = compare_kernel(case, weight, spec, kept(case.format, spec, share))
                print(
                    f"{row['format']:<14}{row['layer']:<18}{row['rank']:>8}{row['plain_error']:>13.4f}"
                    f"{row['stable_error']:>9.4f}{row['plain_sensitivity']:>13.0f}{row['stable_sensitivity']:>10.0f}"
                    f"{row['ratio']:>8.1f}×",
                    flush=True,
                )
                kernels.append(row)
    print(
        f"\n{'format':<14}{'kept':>6}{'rate':>8}{'plain %':>10}{'ours %':>10}{'plain tuned %':>16}{'ours tuned %':>14}"
    )
    batch = 64 if args.quick else 128
    specs = layers_of(model_profile, ("layer3.1", "layer3.2") if args.quick else ("layer1", "layer2", "layer3"))
    for case in cases:
        # What a step may be depends on the sensitivity: one rate could be right for one fit and wrong for the other.
        for lr in (0.01,) if args.quick else (0.02, 0.005):
            recovery = Recovery(steps=args.steps, batch_size=batch, optimizer="sgd", lr=lr, distill=0.0, features=0.0)
            row = compare_tuning(case, model, model_profile, task, specs, 0.5, recovery)
            print(
                f"{row['format']:<14}{row['share']:>6.2f}{row['lr']:>8.3f}{row['plain_before']:>10.2f}{row['stable_before']:>10.2f}"
                f"{row['plain_after']:>16.2f}{row['stable_after']:>14.2f}",
                flush=True,
            )
            tuned.append(row)
    finish(args, {"kernels": kernels, "tuning": tuned, "iterations": args.iterations, "steps": args.steps})


if __name__ == "__main__":
    main()
