"""A real sweep: ResNet-20 on CIFAR-10. Prints the front, the wall time, and what is neither training nor evaluation.

python benchmarks/cifar_resnet20.py [--quick] [--json FILE] [--trials 48] [--steps 100] [--sweep-dir DIR]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from harness import arguments, cifar, finish

WORK = ("tune", "evaluate", "batch_norm")
TARGETS = (0.7, 0.5, 0.35)


def shown(score: float | None) -> str:
    return "" if score is None else f"{score:.2f}"


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--steps", type=int, default=100, help="fine-tune steps of 128 images per trial")
    parser.add_argument("--validation", type=int, default=2000)
    parser.add_argument("--space", default="default")
    parser.add_argument("--strategy", default="tpe")
    parser.add_argument("--executor", default="ray")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sweep-dir", type=Path, help="keep the sweep here (default: a temporary directory)")
    parser.add_argument("--export", action="store_true", help="export the point nearest to 0.5 of the MACs")
    args = parser.parse_args()
    settings = cifar(args.shared)
    if args.quick:
        args.trials, args.steps, args.validation = 4, 2, 250
        settings["data_args"]["test"] = None  # 10,000 images for every point of the front take minutes

    import autorank
    from autorank.show import print_result

    scratch = tempfile.TemporaryDirectory()
    result = autorank.search(
        **settings,
        validation=args.validation,
        trials=args.trials,
        space=args.space,
        strategy=args.strategy,
        executor=args.executor,
        device=args.device,
        seed=args.seed,
        recovery={"steps": args.steps},
        sweep_dir=str(args.sweep_dir or Path(scratch.name) / "sweep"),
    )
    print_result(result)

    workers = len({record.worker for record in result.records})
    search = result.seconds["search"]
    phases = {
        name: sum(record.seconds.get(name, 0.0) for record in result.records)
        for name in ("fit", "batch_norm", "tune", "evaluate", "other")
    }
    useful = sum(phases[name] for name in WORK)
    wall = sum(result.seconds.values())
    print(f"\nwall time {wall:.0f} s: " + ", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items()))
    print(f"inside the trials ({workers} workers): " + ", ".join(f"{n} {v:.0f} s" for n, v in phases.items()))
    overhead = 1 - useful / (workers * search)
    print(f"share of the search that is neither training nor evaluation: {100 * overhead:.1f} %")

    figures = {
        "dense_validation": result.header.dense.score,
        "dense_test": result.dense.test_score if result.dense else None,
        "trials": len(result.records),
        "wall_s": wall,
        "parts_s": dict(result.seconds),
        "phases_s": phases,
        "overhead_share": overhead,
        "front": result.front.to_dict(orient="records"),
        "near": {},
    }
    print(f"\n{'MACs kept':>10} {'before tuning':>14} {'validation':>11} {'test':>7} {'dense test':>11}")
    for target in TARGETS:
        near = [p for p in result.points if abs(p.record.kept["macs_kept"] - target) <= 0.08]
        if not near:
            print(f"{'~' + str(target):>10} no point on the front within 0.08")
            continue
        point = min(near, key=lambda p: abs(p.record.kept["macs_kept"] - target))
        record = point.record
        print(
            f"{record.kept['macs_kept']:>10.3f} {record.score_before:>14.2f} {record.score:>11.2f} "
            f"{shown(point.test_score):>7} {shown(result.dense.test_score):>11}"
        )
        figures["near"][str(target)] = {
            "number": record.number,
            "macs_kept": record.kept["macs_kept"],
            "before": record.score_before,
            "after_batch_norm": record.score_bn,
            "validation": record.score,
            "test": point.test_score,
        }
    if args.export and "0.5" in figures["near"]:
        exported = result.export(point=figures["near"]["0.5"]["number"], say=print)
        print(f"exported to {exported.directory}")
    finish(args, figures)
    scratch.cleanup()


if __name__ == "__main__":
    main()
