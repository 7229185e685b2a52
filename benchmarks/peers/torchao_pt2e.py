"""torchao's PT2E flow beside autorank's quantization, on the same models: accuracy, and the time that it takes.

Both start from the same network in floating point (dense, and decomposed and fine-tuned), see the same calibration
batches, quantize weights per channel and activations per tensor in 8 bits, and, where they train, take the same number
of steps on the same batches at the same rate. torchao's is `X86InductorQuantizer` in its default configuration. Blocks
of an exported program have no names, so it learns from the dense model's outputs alone; autorank's row *outputs alone*
does the same.

python benchmarks/peers/torchao_pt2e.py [--quick] [--json FILE] [--work DIR] [--shares 0.35] [--steps 160]
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import Any

from surroundings import prepare

LIBRARY = prepare()

import torch  # noqa: E402
from harness import finish  # noqa: E402
from quantized import flags, prepared  # noqa: E402
from quantized_models import NAIVE, Models  # noqa: E402
from torch import nn  # noqa: E402
from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train  # noqa: E402
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e  # noqa: E402
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86  # noqa: E402

from autorank.evaluate import evaluate  # noqa: E402
from autorank.quant import QuantSettings, calibrate, with_bits  # noqa: E402
from autorank.recover import fine_tune  # noqa: E402
from autorank.types import Plan  # noqa: E402


class Exported(nn.Module):
    """An exported program that can be set to train and to evaluate as any module can."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, *inputs: Any) -> Any:
        """Run the program."""
        return self.program(*inputs)

    def train(self, mode: bool = True) -> Exported:
        """Set the program's batch norms and dropout."""
        (move_exported_model_to_train if mode else move_exported_model_to_eval)(self.program)
        self.training = mode
        return self


def exported(model: nn.Module, inputs: tuple[torch.Tensor, ...], training: bool) -> nn.Module:
    """Return the program of a model, for any batch size."""
    model = copy.deepcopy(model).train(training)
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    example = tuple(torch.cat([x, x])[:2].clone() for x in inputs)
    return torch.export.export(model, example, dynamic_shapes=shapes).module()


def quantizer(training: bool) -> Any:
    """Return torchao's quantizer for x86, in its default configuration."""
    return x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=training))


def by_torchao(models: Models, start: nn.Module, steps: int, rate: float) -> tuple[nn.Module, dict[str, float]]:
    """Return torchao's quantized model, and the seconds of its parts."""
    taken, begun = {}, time.perf_counter()
    program = exported(start, models.task.example_inputs, bool(steps))
    prepared = (prepare_qat_pt2e if steps else prepare_pt2e)(program, quantizer(bool(steps)))
    model = Exported(prepared).eval()
    with torch.no_grad():
        for batch in models.task.calibration_batches(QuantSettings().calibration, 128):
            model(*batch.inputs)
    taken["prepare"] = time.perf_counter() - begun
    if steps:
        begun = time.perf_counter()
        recovery = replace(models.recovery, steps=steps, lr=models.recovery.peak * rate, features=0.0)
        fine_tune(model, models.task, recovery, models.seed)
        taken["step"] = (time.perf_counter() - begun) / steps
    model.eval()
    return Exported(convert_pt2e(model.program)), taken


def by_autorank(
    models: Models, start: nn.Module, bits: Plan, steps: int, rate: float, settings: QuantSettings, features: float
) -> tuple[nn.Module, dict[str, float]]:
    """Return autorank's quantized model, and the seconds of its parts."""
    taken, begun = {}, time.perf_counter()
    model = with_bits(start, bits)
    batches = models.task.calibration_batches(settings.calibration, 128)
    calibrate(model, (batch.inputs for batch in batches), settings)
    taken["prepare"] = time.perf_counter() - begun
    if steps:
        begun = time.perf_counter()
        recovery = replace(models.recovery, steps=steps, lr=models.recovery.peak * rate, features=features)
        fine_tune(model, models.task, recovery, models.seed)
        taken["step"] = (time.perf_counter() - begun) / steps
    return model.eval(), taken


def rows(
    models: Models, share: str, plan: Plan, settings: QuantSettings, left_out: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Print and return what both do with one network."""
    whole = models.recovery.steps
    last = round(settings.qat * whole)
    floats = models.tuned(plan, whole)
    bits = models.bits(plan, 8)
    made: list[tuple[str, Any]] = [
        ("floating point", lambda: (floats, {})),
        ("torchao", lambda: by_torchao(models, floats, 0, 1.0)),
        ("autorank, naive", lambda: by_autorank(models, floats, bits, 0, 1.0, NAIVE, 0.0)),
        ("autorank", lambda: by_autorank(models, floats, bits, 0, 1.0, settings, 0.0)),
    ]
    if plan.layers:
        first, rate, features = models.tuned(plan, whole - last), settings.qat_rate, models.recovery.features
        made += [
            ("torchao, trained", lambda: by_torchao(models, first, last, rate)),
            ("autorank, outputs alone", lambda: by_autorank(models, first, bits, last, rate, settings, 0.0)),
            ("autorank, trained", lambda: by_autorank(models, first, bits, last, rate, settings, features)),
        ]
    found = []
    split = "test" if models.task.size("test") else "validation"
    for name, make in made:
        if name in left_out:
            continue
        model, taken = make()
        begun = time.perf_counter()
        result = evaluate(model, models.task, split)
        taken["1,000 images"] = (time.perf_counter() - begun) / result.examples * 1000
        found.append({"share": share, "row": name, "score": result.score, "seconds": taken})
        shown = "   ".join(f"{key} {value:.2f} s" for key, value in taken.items())
        print(f"{share:>6}  {name:<26}{result.score:>8.2f}   {shown}", flush=True)
    return found


def main() -> None:
    args = flags(__doc__.splitlines()[0], "0.35").parse_args()
    if args.quick:
        args.steps, args.shares = 6, "0.35"
    left_out = ("autorank", "autorank, outputs alone") if args.quick else ()
    with prepared(args) as (models, plans):
        found = [] if args.quick else rows(models, "dense", Plan(), QuantSettings())
        for share, plan in plans.items():
            found += rows(models, f"{share:g}", plan, QuantSettings(), left_out)
    finish(args, {"steps": args.steps, "rows": found})


if __name__ == "__main__":
    main()
