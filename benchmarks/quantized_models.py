"""The models that benchmarks/quantized.py measures: decomposed, recovered and quantized in the trial's own way.

Every model is kept below a folder, so that a run goes on where one was interrupted.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from quality import started
from torch import nn
from whitening import statistics

from autorank.evaluate import evaluate
from autorank.fitcache import FitCache
from autorank.plan import build
from autorank.profiling import profile
from autorank.quant import QuantSettings, calibrate, with_bits
from autorank.recover import Recovery, fine_tune, reestimate_batch_norm
from autorank.tasks import Task
from autorank.teacher import Teacher
from autorank.types import Choice, Plan
from autorank.weightfile import read_weights, write_weights

NAIVE = QuantSettings(ranges="minmax", weight_ranges="max", equalise=False, rounding="nearest")
STAGES = {
    "naive": NAIVE,
    "+ equalise": replace(NAIVE, equalise=True),
    "+ clipping": replace(NAIVE, equalise=True, ranges="mse", weight_ranges="mse"),
    "+ rounding": QuantSettings(),
    "all but equalise": QuantSettings(equalise=False),
}
"""Quantization after training, piece by piece."""


class Models:
    """Makes models and keeps them.

    Parameters
    ----------
    task : Task
    folder : Path
    recovery : Recovery
        Its steps are those of all recoveries together, with or without quantization.
    seed : int
    """

    def __init__(self, task: Task, folder: Path, recovery: Recovery, seed: int = 0) -> None:
        self.task, self.folder, self.recovery, self.seed = task, folder, recovery, seed
        self.dense = task.model().eval()
        self.profiled = profile(self.dense, task.example_inputs)
        self._teacher: Teacher | None = None
        self._fitting: Any = None
        folder.mkdir(parents=True, exist_ok=True)

    def bits(self, plan: Plan, weights: int, others: int = 8) -> Plan:
        """Return a plan with 8 bits for activations and these for weights; layers it leaves dense get `others`."""
        choices = plan.choices
        return Plan.of(
            {
                spec.name: replace(choices[spec.name], weight_bits=weights, activation_bits=8)
                if spec.name in choices
                else Choice("dense", (), (), others, 8)
                for spec in self.profiled.layers
            }
        )

    def fitted(self, plan: Plan) -> nn.Module:
        """Return the decomposed model before any training, fitted layer after layer."""
        return self._kept("fitted", plan, lambda: self._fit(plan))

    def tuned(self, plan: Plan, steps: int) -> nn.Module:
        """Return the decomposed model after a fine-tune."""
        if not plan.layers:
            return self.dense
        return self._kept(f"float-{steps}", plan, lambda: self._tune(self.fitted(plan), steps, 1.0))

    def quantized(self, plan: Plan, weights: int, share: float, rate: float, settings: QuantSettings) -> nn.Module:
        """Return the model with bits, of which `share` of the steps were taken with quantization."""
        last = round(share * self.recovery.steps)
        first = self.recovery.steps - last
        bits = self.bits(plan, weights)
        start = f"{first}-{weights}-{settings.rounding}-{settings.equalise}-{settings.ranges}"

        def calibrated() -> nn.Module:
            model = with_bits(self.tuned(plan, first) if first else self.fitted(plan), bits)
            taken = self.task.calibration_batches(settings.calibration, 128)
            calibrate(model, (batch.inputs for batch in taken), settings)
            return self.settled(model)

        if not last or not plan.layers:
            return self._kept(f"ptq-{start}", bits, calibrated)
        make = lambda: self._tune(self._kept(f"ptq-{start}", bits, calibrated), last, rate)  # noqa: E731
        return self._kept(f"qat-{start}-{last}-{rate:g}", bits, make)

    def score(self, model: nn.Module, name: str) -> float:
        """Return the accuracy on the test data, else on the validation data; kept under a name."""
        file = self.folder / "scores.json"
        known = json.loads(file.read_text()) if file.is_file() else {}
        if name not in known:
            split = "test" if self.task.size("test") else "validation"
            known[name] = evaluate(model, self.task, split).score
            file.write_text(json.dumps(known, indent=1) + "\n")
        return float(known[name])

    def _kept(self, name: str, plan: Plan, make: Any) -> nn.Module:
        file = self.folder / f"{plan.plan_id}-{name}-{self.recovery.steps}-{self.seed}.safetensors"
        if file.is_file():
            return read_weights(build(self.task.model(), plan), file).eval()
        begun = time.perf_counter()
        model: nn.Module = make()
        write_weights(model, file)
        print(f"  made {name} of {plan.plan_id} in {time.perf_counter() - begun:.0f} s", flush=True)
        return model.eval()

    def _fit(self, plan: Plan) -> nn.Module:
        if self._fitting is None:
            whitened = any(choice.whitens("input") or choice.whitens("output") for _, choice in plan.layers)
            stats = statistics(self.task, self.dense, self.profiled, 512)[0] if whitened else None
            batches = [batch.inputs for batch in self.task.calibration_batches(512)]
            self._fitting = SimpleNamespace(profiled=self.profiled, stats=stats, batches=batches)
        return started(self.task, self.dense, plan, self._fitting, self.recovery, FitCache(None))

    def _tune(self, model: nn.Module, steps: int, rate: float) -> nn.Module:
        """Fine-tune as a trial does, and keep what was there where that is better on validation data."""
        if self._teacher is None:
            self._teacher = Teacher.build(self.task, self.recovery, self.seed)
        recovery = replace(self.recovery, steps=steps, lr=self.recovery.peak * rate)
        before = evaluate(model, self.task, "validation").score
        state = {name: value.clone() for name, value in model.state_dict().items()}
        fine_tune(model, self.task, recovery, self.seed, teacher=self._teacher)
        if evaluate(model, self.task, "validation").score < before:
            print("  the training did not help: the weights before it are kept")
            model.load_state_dict(state)
        return model

    def settled(self, model: nn.Module) -> nn.Module:
        """Re-estimate the batch norms' statistics where that lowers the validation loss."""
        batches = self.task.train_batches(-(-self.recovery.calibration // 128), 128, self.seed)
        again = reestimate_batch_norm(model, batches, laid=self.task.channels_last())
        if again is None:
            return model
        losses = [evaluate(each, self.task, "validation").loss for each in (model, again)]
        return again if losses[1] < losses[0] else model
