"""Time to fit one kernel to the same relative error, ours and TensorLy's, one thread each, in one run.

Kernels have the shapes of ResNet-20, ResNet-18, ResNet-50 and VGG-16; their entries are normal ("gauss"), normal with
falling spectra in both channel modes ("decay"), or those of the trained ResNet-20 ("real", with --shared).
Both sides get the same float32 kernel and the same rank: CP against parafac (svd and random start, the better answer
counts, and only its own time), Tucker-2 against partial_tucker, tensor train against tensor_train, tensor ring against
tensor_ring. TensorLy runs on its PyTorch backend to its own convergence (parafac and partial_tucker: tolerance 1e-6, at
most --iterations sweeps; the other two are a single pass). Ours is the whole of `Format.fit`, checks included. Times
are seconds of the processor, so that a busy machine disturbs them little.

"reached" says whether our error is at most TensorLy's times 1.001: only then is the ratio of times one at equal error
(or a better one: our fits do not stop where TensorLy's did). Where CP misses it, the time that parafac took to our
error is given beside. Where our error is lower still, the same solver is run once more with as few sweeps as TensorLy's
error takes ("same error": these seconds; the ratio is then with them); for the tensor ring that is the start and plain
sweeps.

python benchmarks/fit_speed.py [--quick] [--json FILE] [--formats cp ...] [--kernels 64x64x3x3 ...] [--iterations N]
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import arguments, finish
from torch import Tensor

from autorank import formats
from autorank.errors import FormatError
from autorank.formats import Factors, Format, Options
from autorank.solvers import cp, hooi, ring, train
from autorank.solvers.kept import KEPT
from autorank.types import CallSize, LayerSpec

PEERS = {"cp": "parafac", "tucker2": "partial_tucker", "tensor_train": "tensor_train", "tensor_ring": "tensor_ring"}
SHAPES = (
    (16, 16, 3, 3),
    (64, 3, 3, 3),
    (64, 64, 3, 3),
    (128, 128, 3, 3),
    (256, 256, 3, 3),
    (512, 256, 3, 3),
    (512, 512, 3, 3),
    (256, 64, 1, 1),
    (512, 2048, 1, 1),
)
QUICK = ((16, 16, 3, 3), (64, 64, 3, 3), (256, 64, 1, 1))
REAL = ("layer1.1.conv1", "layer2.1.conv2", "layer3.1.conv2")
SLACK = 1e-3


def kernels(quick: bool, shared: Path) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (shape in words, kind, weight (T, S, K1, K2) in float32)."""
    for shape in QUICK if quick else SHAPES:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(shape, generator=generator, dtype=torch.float64)
        name = "x".join(map(str, shape))
        if not quick:
            yield name, "gauss", weight.float()
        mixes = []
        for size in shape[:2]:
            basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
            mixes.append(basis * torch.arange(1, size + 1) ** -0.7)
        yield name, "decay", torch.einsum("abhw,ta,sb->tshw", weight, *mixes).float()
    path = shared / "models" / "resnet20-cifar10jpeg.safetensors"
    if not path.exists():
        print(f"{path} is not there: no real kernels")
        return
    from safetensors.torch import load_file

    tensors = load_file(str(path))
    for layer in REAL[1:2] if quick else REAL:
        weight = tensors[f"{layer}.weight"].float()
        yield "x".join(map(str, weight.shape)), f"real {layer}", weight


def spec_of(weight: Tensor) -> LayerSpec:
    """Return the convolution that has this weight, with padding that keeps the size."""
    kernel = tuple(weight.shape[2:])
    pads = tuple(k // 2 for k in kernel)
    ones = (1,) * len(kernel)
    calls = (CallSize(1, (16, 16), (16, 16)),)
    return LayerSpec("layer", "conv2d", tuple(weight.shape), ones, pads, "zeros", ones, 1, False, calls)


def rank_for(fmt: Format, spec: LayerSpec, options: Options, kept: float) -> tuple[int, ...]:
    """Return the rank, an equal share of the largest in every mode, with about `kept` of the parameters."""
    top = fmt.max_rank(spec, options)
    shares = [n / 400 for n in range(1, 401)]
    ranks = list(dict.fromkeys(tuple(max(1, round(r * share)) for r in top) for share in shares))
    return min(ranks, key=lambda rank: abs(fmt.cost(spec, rank, options).params - kept * spec.params))


def timed(run: Callable[[], Any], quick: bool) -> tuple[Any, float]:
    """Return the answer and the least processor time of up to three runs, of one when it takes long."""
    best, spent = math.inf, 0.0
    for _ in range(3):
        KEPT.clear()
        begin = time.process_time()
        answer = run()
        took = time.process_time() - begin
        best, spent = min(best, took), spent + took
        if spent > (1 if quick else 5):
            break
    return answer, best


def relative(approx: Tensor, weight: Tensor) -> float:
    return float((approx.double() - weight.double()).norm() / weight.double().norm())


def train_modes(
    fmt: Format, spec: LayerSpec, rank: tuple[int, ...], options: Options
) -> tuple[list[int], list[int], int]:
    """Return the mode sizes (S, spatial cores, T), the bonds between them, and the closing bond."""
    steps = fmt.steps(spec, rank, options)  # type: ignore[attr-defined]
    sizes = fmt.sizes(spec, rank, options)  # type: ignore[attr-defined]
    spatial = [math.prod(spec.kernel[a] for a in step.axes) for step in steps if step.axes]
    bonds = [sizes[f"b{n}"] for n in range(len(spatial) + 1)]
    return [spec.weight_shape[1], *spatial, spec.weight_shape[0]], bonds, sizes.get("p", 1)


def theirs(
    name: str, fmt: Format, weight: Tensor, spec: LayerSpec, rank: tuple[int, ...], options: Options, iterations: int
) -> list[tuple[str, Callable[[], Any], Callable[[Any], Tensor]]]:
    """Return TensorLy's ways: a name, what is timed, and what turns its answer into a weight."""
    import tensorly as tl
    from tensorly.decomposition import parafac, partial_tucker, tensor_ring, tensor_train

    if name == "cp":
        flat = weight.flatten(2)

        def run_cp(init: str) -> Any:
            return parafac(flat, rank=rank[0], init=init, n_iter_max=iterations, tol=1e-6, random_state=0)

        def full_cp(found: Any) -> Tensor:
            return tl.cp_to_tensor(found).reshape(weight.shape)

        return [(init, lambda i=init: run_cp(i), full_cp) for init in ("svd", "random")]
    if name == "tucker2":
        run = lambda: partial_tucker(weight, rank=list(rank), modes=[0, 1], n_iter_max=iterations, tol=1e-6)  # noqa: E731
        return [("svd", run, lambda found: tl.tenalg.multi_mode_dot(found[0][0], found[0][1], modes=[0, 1]))]
    modes, bonds, closing = train_modes(fmt, spec, rank, options)
    tensor = weight.movedim(0, -1).reshape(modes).contiguous()

    def back(full: Tensor) -> Tensor:
        return full.reshape(weight.shape[1], *weight.shape[2:], weight.shape[0]).movedim(-1, 0)

    if name == "tensor_train":
        return [("svd", lambda: tensor_train(tensor, [1, *bonds, 1]), lambda found: back(tl.tt_to_tensor(found)))]
    ranks = [closing, *bonds, closing]
    return [("svd", lambda: tensor_ring(tensor, ranks), lambda found: back(tl.tr_to_tensor(found)))]


def seconds_to(weight: Tensor, rank: int, init: str, iterations: int, error: float) -> float | None:
    """Return the processor time that parafac takes to an error, or None when it does not get there."""
    from tensorly.decomposition import parafac

    begin, reached = time.process_time(), []

    def note(_: Any, now: Any) -> None:
        if float(now) <= error * (1 + SLACK):
            reached.append(time.process_time() - begin)

    parafac(weight.flatten(2), rank=rank, init=init, n_iter_max=iterations, tol=1e-6, random_state=0, callback=note)
    return reached[0] if reached else None


def with_sweeps(
    name: str, fmt: Format, weight: Tensor, spec: LayerSpec, rank: tuple[int, ...], options: Options, sweeps: int
) -> Callable[[], float]:
    """Return what runs our solver with so many sweeps and returns its relative error."""

    def run() -> float:
        work = weight.double()
        norm = float(work.norm())
        if name == "cp":
            return float(cp.cp(work.flatten(2)[None], rank[0], max_sweeps=max(1, sweeps)).error)
        if name == "tucker2":
            core, *_ = hooi.tucker2(work.flatten(2)[None], (rank[0], rank[1]), max_iterations=max(1, sweeps))
            return math.sqrt(max(0.0, 1 - (float(core.norm()) / norm) ** 2))
        modes, bonds, closing = train_modes(fmt, spec, rank, options)
        tensor = work.movedim(0, -1).reshape(1, *modes)
        if name == "tensor_train":
            cores = train.train(tensor, bonds, sweeps=sweeps)
            # All cores but one at an end are orthonormal.
            return math.sqrt(max(0.0, 1 - (max(float(core.norm()) / norm for core in (cores[0], cores[-1]))) ** 2))
        problem, _ = ring.Problem.of(tensor)
        loop = ring.start(problem.tensor, (closing, *bonds))
        for _ in range(sweeps):
            ring.sweep(problem, loop)
        return math.sqrt(float(ring.squared_error(problem, loop)))

    return run


def sensitivity(found: Any) -> float:
    """Return the sensitivity of TensorLy's CP when the norms of every component are shared out evenly."""
    weights, factors = found
    norms = [factor.double().norm(dim=0) for factor in factors]
    even = (weights.double() * norms[0] * norms[1] * norms[2]).abs() ** (4 / 3)
    return float(sum(factor.shape[0] for factor in factors) * even.sum())


def compare(name: str, weight: Tensor, kept: float, iterations: int, quick: bool) -> dict[str, Any] | str:
    """Return a row of figures, or why there is none."""
    import tensorly as tl

    fmt, spec = formats.get(name), spec_of(weight)
    variants = fmt.variants(spec)
    options: Options = variants[0] if variants else ()
    reason = fmt.supports(spec, options)
    if reason is not None:
        return reason
    rank = rank_for(fmt, spec, options, kept)
    factors, ours = timed(lambda: fmt.fit(weight, spec, rank, options), quick)
    factors_of: Factors = factors
    row: dict[str, Any] = {
        "format": name,
        "rank": list(rank),
        "options": dict(options),
        "error": relative(fmt.reconstruct(factors_of, spec, rank, options), weight),
        "seconds": ours,
        "sensitivity": fmt.sensitivity(factors_of, spec, rank, options),
    }
    answers = []
    with tl.backend_context("pytorch", local_threadsafe=True):
        for start, run, full in theirs(name, fmt, weight, spec, rank, options, iterations):
            try:
                found, seconds = timed(run, quick)
                error = relative(full(found), weight)
            except (ValueError, RuntimeError) as problem:
                row["tensorly_refuses"] = str(problem).splitlines()[0]
                continue
            if math.isfinite(error):
                answers.append((error, seconds, start, sensitivity(found) if name == "cp" else None))
    if answers:
        lowest = min(answer[0] for answer in answers)
        error, seconds, start, ss = min((a for a in answers if a[0] <= lowest * (1 + SLACK)), key=lambda a: a[1])
        row |= {
            "tensorly": PEERS[name],
            "tensorly_start": start,
            "tensorly_error": error,
            "tensorly_seconds": seconds,
            "tensorly_sensitivity": ss,
            "ratio": seconds / ours,
            "ratio_whole_fit": seconds / ours,
            "reached": row["error"] <= error * (1 + SLACK) + 1e-6,
        }
        if row["error"] < error * (1 - SLACK):
            for sweeps in (0, 1, 2, 4, 8, 16, 32):
                found_error, sooner = timed(with_sweeps(name, fmt, weight, spec, rank, options, sweeps), quick)
                if found_error <= error * (1 + SLACK):
                    row |= {"same_error_seconds": sooner, "same_error_sweeps": sweeps, "ratio": seconds / sooner}
                    break
                if sooner > ours:
                    break
        if name == "cp" and not row["reached"]:
            with tl.backend_context("pytorch", local_threadsafe=True):
                row["tensorly_seconds_to_ours"] = seconds_to(weight, rank[0], start, iterations, row["error"])
    return row


def shown(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    head = f"{row['format']:<13}{row['kernel']:<14}{row['kind']:<21}{tuple(row['rank'])!s:<12}"
    own = f"{row['error']:>9.5f}{row['seconds']:>9.3f}"
    if "tensorly" not in row:
        return f"{head}{own}   TensorLy refuses: {row.get('tensorly_refuses', 'no finite answer')}"
    peer = f"{row['tensorly_error']:>10.5f}{row['tensorly_seconds']:>9.3f}{row['ratio']:>8.2f}×"
    note = "yes" if row["reached"] else f"no, {100 * (row['error'] / row['tensorly_error'] - 1):.1f} % above"
    if "same_error_seconds" in row:
        below = 100 * (1 - row["error"] / row["tensorly_error"])
        note += f", {below:.1f} % below; same error {row['same_error_seconds']:.3f} s"
    if row.get("tensorly_seconds_to_ours") is not None:
        note += f", where TensorLy is after {row['tensorly_seconds_to_ours']:.3f} s"
    if row["tensorly_sensitivity"] is not None:
        note += f"; sensitivity {row['tensorly_sensitivity'] / row['sensitivity']:.3g}× ours"
    return f"{head}{own}{peer}  {note}"


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--kernels", nargs="+", help="shapes to keep, such as 64x64x3x3")
    parser.add_argument("--kept", type=float, default=0.2, help="share of the parameters that a fit keeps")
    parser.add_argument("--iterations", type=int, default=200, help="most sweeps of parafac and partial_tucker")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = [name for name in args.formats if name in formats.names()]
    for name in args.formats:
        if name not in known:
            print(f"{name}: no such format here yet, skipped")
    print(
        f"one thread, {args.kept:.0%} of the parameters, at most {args.iterations} sweeps of TensorLy, tolerance 1e-6"
    )
    columns = f"{'error':>9}{'s':>9}{'TensorLy':>10}{'s':>9}{'ratio':>9}  reached"
    print(f"{'format':<13}{'kernel':<14}{'kind':<21}{'rank':<12}{columns}")
    rows: list[dict[str, Any]] = []
    refused: list[dict[str, str]] = []
    for shape, kind, weight in kernels(args.quick, args.shared):
        if args.kernels and shape not in args.kernels:
            continue
        for name in known:
            try:
                row = compare(name, weight, args.kept, args.iterations, args.quick)
            except FormatError as problem:
                row = str(problem)
            if isinstance(row, str):
                refused.append({"format": name, "kernel": shape, "kind": kind, "why": row})
                continue
            rows.append({"kernel": shape, "kind": kind, **row})
            print(shown(rows[-1]), flush=True)
    for what in dict.fromkeys(f"{each['format']} does not take {each['kernel']}: {each['why']}" for each in refused):
        print(what)
    summary = {}
    for name in known:
        equal = [row for row in rows if row["format"] == name and row.get("reached")]
        missed = sum(1 for row in rows if row["format"] == name and row.get("reached") is False)
        if equal:
            middle = sorted(row["ratio"] for row in equal)[len(equal) // 2]
            least = min(row["ratio"] for row in equal)
            summary[name] = {"reached": len(equal), "missed": missed, "median_ratio": middle, "least_ratio": least}
            print(
                f"{name}: error reached on {len(equal)}, missed on {missed}; ratio {middle:.2f}× (least {least:.2f}×)"
            )
        elif missed:
            summary[name] = {"reached": 0, "missed": missed}
            print(f"{name}: error missed on all {missed}")
    finish(args, {"summary": summary, "rows": rows, "refused": refused})


if __name__ == "__main__":
    main()
