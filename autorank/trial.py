"""One trial, whole: plan → decomposed model → recovered → measured → record."""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from autorank import measure
from autorank.clock import Clock, threads_fixed
from autorank.copying import model_copy
from autorank.errors import AutorankError, DataError, SweepError, TrialError
from autorank.evaluate import evaluate
from autorank.fitcache import FitCache
from autorank.job import Job
from autorank.layout import canonical_weight
from autorank.plan import apply, kept_result, undecomposed
from autorank.privacy import hidden
from autorank.pulling import decomposed_kernels, squared_distances, train_with_pull
from autorank.quant import QuantSettings, with_bits
from autorank.recover import Recovery
from autorank.restore import Restorer
from autorank.sequential import apply_in_order
from autorank.solvers import whitening
from autorank.solvers.vbmf import spectrum
from autorank.space import predicted_latency
from autorank.tasks import Task
from autorank.trialfiles import carrier_file, load_weights, save_weights, weights_file
from autorank.types import (
    Choice,
    Cost,
    Fidelity,
    LayerResult,
    LayerSpec,
    Plan,
    TrialRecord,
    model_bops,
)

IN_ORDER_EXAMPLES = 512
"""Training examples to whose dense outputs layers are fitted in order."""


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a sweep share; travels to every worker once.

    Attributes
    ----------
    task : Task
    specs : tuple of LayerSpec
        Decomposable layers with their calls, for closed-form costs.
    dense_cost : Cost
    recovery : Recovery
    seed : int
    device : str
    threads : int
        PyTorch threads of a trial.
    directory : Path
        Sweep directory: holds the fit cache, layer statistics, teacher outputs and models.
    quantization : QuantSettings
        For the layers of a plan that have bits.
    stats_file : Path or None
        Layer statistics for whitened fits.
    teacher_file : Path or None
    latencies : mapping
        (layer name, choice or None for dense) → milliseconds; empty unless latency is an objective.
    candidates : mapping of str to tuple of Choice
        Layer → its candidates, in the order of the search space.
    """

    task: Task
    specs: tuple[LayerSpec, ...]
    dense_cost: Cost
    recovery: Recovery
    seed: int
    device: str
    threads: int
    directory: Path
    quantization: QuantSettings = field(default_factory=QuantSettings)
    stats_file: Path | None = None
    teacher_file: Path | None = None
    latencies: Mapping[tuple[str, Choice | None], float] = field(default_factory=dict)
    candidates: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)

    @property
    def full_fidelity(self) -> Fidelity:
        """The fidelity of a trial that ran to its end."""
        return Fidelity(self.recovery.steps, self.recovery.batch_norm != "never")

    def runner(self, fetch: Callable[[Path], object] | None = None) -> TrialRunner:
        """Return what runs the trials in one process; `fetch` as for `TrialRunner`."""
        return TrialRunner(self, fetch)


class TrialRunner:
    """Runs trials in one process; what can be shared between them is loaded once.

    Parameters
    ----------
    context : TrialContext
    fetch : callable, optional
        Brings a file of the sweep directory, if there is one, to its place on this machine; where that is another one.
    """

    def __init__(self, context: TrialContext, fetch: Callable[[Path], object] | None = None) -> None:
        self.context = context
        self._fetch = fetch or (lambda path: None)
        self._dense = context.task.model().to(context.device).eval()
        self._cache = FitCache(context.directory / "cache" / "fits", fetch)
        self._stats: dict[str, whitening.LayerStats] | None = None
        self._restorer = Restorer(
            context.task,
            context.recovery,
            context.quantization,
            context.seed,
            context.device,
            context.teacher_file,
            self._fetch,
        )

    def run(self, job: Job) -> TrialRecord:
        """Run one trial and return its record; whatever goes wrong inside becomes a failed record with the reason.

        Raises
        ------
        SweepError
            Files of the sweep cannot be read or written: a trial must not count as failed for that.
        """
        started = time.time()
        clock = Clock()
        with threads_fixed(self.context.threads):
            try:
                record = self._run(job, clock)
            except SweepError:
                raise  # the sweep directory's trouble is not this trial's: it runs again once that is mended
            except AutorankError as error:
                record = failed(job, str(error))
            except (Exception, SystemExit) as error:
                # The user's own code (loss, metric, forward) may raise anything; the sweep goes on and says where.
                record = failed(job, f"{type(error).__name__} in {_place(error)}: {_one_line(error)}")
        return replace(
            record,
            seconds=clock.seconds(),
            started=started,
            worker=f"{socket.gethostname()}:{os.getpid()}",
            versions=versions(),
        )

    def model(self, job: Job) -> nn.Module:
        """Return the recovered model of a finished trial: from its saved weights, else by running it again."""
        return self._saved(job, job.plan, weights_file(self.context.directory, job))

    def _saved(self, job: Job, plan: Plan, path: Path) -> nn.Module:
        """Return the model of a plan with the weights that a trial left, which is run again if they are gone."""
        self._fetch(path)
        model = load_weights(self._dense, plan, path)
        if model is None:
            again = self.run(replace(job, gate=None, probe=False))
            if again.status != "complete":
                raise TrialError(f"trial {job.number} could not be run again: {again.reason}")
            model = load_weights(self._dense, plan, path)
        if model is None:
            raise TrialError(f"the weights of trial {job.number} could not be written below {self.context.directory}")
        return model

    def _carrier(self, job: Job) -> nn.Module:
        """Return the undecomposed network with the weights with which a pulled training ended."""
        return self._saved(job, Plan(), carrier_file(self.context.directory, job))

    def _start(self, job: Job, clock: Clock) -> tuple[nn.Module, dict[str, nn.Module], tuple[tuple[int, float], ...]]:
        """Return the network that is decomposed, the layers that are so already, and the curve of a pulled training."""
        parent = job.parent
        trained: dict[str, nn.Module] = {}
        with clock("fit"):
            if parent is None:
                origin = self._dense
            elif parent.pull:
                origin = self._carrier(parent)
            else:
                before, model = parent.plan.choices, self.model(parent)
                origin = undecomposed(self._dense, parent.plan, model)
                same = (name for name, choice in job.plan.layers if before.get(name) == choice and not job.pull)
                trained = {name: model.get_submodule(name) for name in same}
        if not job.pull:
            return origin, trained, ()
        context = self.context
        with clock("fit"):
            network = model_copy(origin)
            copies = decomposed_kernels(network, job.plan, specs=context.specs, stats=self._statistics())
        with clock("tune"):
            recovery = replace(context.recovery, steps=self._restorer.first_steps(job.plan, job.fidelity, pulled=True))
            curve = train_with_pull(
                network, copies, context.task, recovery, job.pull, context.seed, context.device, self._restorer.teacher
            )
        with clock("other"):
            save_weights(network, carrier_file(context.directory, job))
        return network, {}, curve

    def _run(self, job: Job, clock: Clock) -> TrialRecord:
        context = self.context
        origin, trained, curve = self._start(job, clock)
        with clock("fit"):
            if context.recovery.in_order and origin is self._dense and not job.probe and job.plan.layers:
                examples = context.task.calibration_batches(IN_ORDER_EXAMPLES, 64, context.device)
                batches = [batch.inputs for batch in examples]
                model, layers = apply_in_order(
                    origin, job.plan.in_float, batches, specs=context.specs, stats=self._statistics()
                )
                model = with_bits(model, job.plan)
                layers = with_their_bits(job.plan, layers, context.specs)
            else:
                # Weights that were trained in the sweep are fitted once; only fits of the dense model's come back.
                cache = self._cache if origin is self._dense else None
                model, layers = apply(
                    origin, job.plan, specs=context.specs, stats=self._statistics(), cache=cache, trained=trained
                )
        cost, layers = self._measure(model, layers, clock)
        kept = cost.kept(self.context.dense_cost)
        with clock("evaluate"):
            before = evaluate(model, context.task, "validation", context.device)
        model, best = self._restorer.batch_norm(model, before, job.fidelity, clock)
        base = TrialRecord(
            number=job.number,
            plan=job.plan,
            fidelity=Fidelity(0, job.fidelity.batch_norm),
            target=job.fidelity,
            status="pruned",
            score=best.score,
            score_before=before.score,
            score_bn=best.score,
            loss=best.loss,
            cost=cost,
            kept=kept,
            layers=layers,
            curve=curve,
            parent=job.parent.number if job.parent else None,
            lineage=job.lineage,
            pull=job.pull,
            probe=job.probe,
            want=job.want,
        )
        if job.gate is not None and (reason := job.gate.hopeless(best.score, kept)):
            return replace(base, reason=reason)
        model, best, more, reason = self._restorer.restore(
            model, best, job.plan, job.fidelity, clock, trained=bool(job.pull)
        )
        with clock("other"):
            if job.fidelity.steps or not job.probe:  # what cost next to nothing is made again where it is needed
                save_weights(model, weights_file(context.directory, job))
        with clock("fit"):
            measured = self._measured(job, model, origin)
        return replace(
            base,
            fidelity=job.fidelity,
            status="complete",
            score=best.score,
            loss=best.loss,
            curve=curve + more,
            reason=reason,
            measured=measured,
        )

    def _measured(self, job: Job, model: nn.Module, origin: nn.Module) -> dict[str, tuple[float, ...]]:
        """Measure what the strategy asked for on the kernels with which the trial ended."""
        if not job.want:
            return {}
        names = list(self.context.candidates)
        specs = {spec.name: spec for spec in self.context.specs}
        # A pulled training ends with the undecomposed weights, all others with decomposed ones.
        network = origin if job.pull else undecomposed(self._dense, job.plan, model)
        untouched = not (job.pull or job.plan.layers or job.parent or job.fidelity.steps)
        if job.want == "distances":
            return squared_distances(
                network,
                self.context.candidates,
                specs=self.context.specs,
                stats=self._statistics(),
                seed=job.plan.seed,
                cache=self._cache if untouched else None,
            )
        found = {}
        for name in names:
            weight = network.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            kernel = canonical_weight(weight.detach(), specs[name])
            found[name] = tuple(map(float, spectrum(kernel, specs[name].groups).vbmf))
        return found

    def _statistics(self) -> dict[str, whitening.LayerStats] | None:
        if self._stats is None and self.context.stats_file is not None:
            self._fetch(self.context.stats_file)
            try:
                self._stats = whitening.load(self.context.stats_file)
            except DataError as error:
                again = f"`autorank resume {self.context.directory}` collects them again and goes on"
                raise SweepError(f"{error}: {again}") from None
        return self._stats

    def _measure(
        self, model: nn.Module, layers: tuple[LayerResult, ...], clock: Clock
    ) -> tuple[Cost, tuple[LayerResult, ...]]:
        """Count the model and hold the count against the closed forms."""
        context = self.context
        dense = context.dense_cost
        with clock("other"):
            cost, _ = measure.count(model, context.task.example_inputs, context.device)
            macs = dense.macs + sum(layer.macs - layer.macs_dense for layer in layers)
            params = dense.params + sum(layer.params - layer.params_dense for layer in layers)
            for what, counted, expected in (("MACs", cost.macs, macs), ("parameters", cost.params, params)):
                if counted != expected:
                    raise TrialError(
                        f"the counted {what} ({counted:,}) are not those of the closed forms ({expected:,}): "
                        "the model's forward pass seems to depend on its weights or on chance"
                    )
        if dense.bops is not None:
            cost = replace(cost, bops=model_bops(dense.macs, layers))
        if not context.latencies:
            return cost, layers
        table = context.latencies
        layers = tuple(
            replace(
                layer, latency_ms=table.get((layer.name, layer.choice)), latency_dense_ms=table.get((layer.name, None))
            )
            for layer in layers
        )
        pairs = [(layer.latency_dense_ms or 0.0, layer.latency_ms or 0.0) for layer in layers]
        return replace(cost, latency_ms=predicted_latency(dense.latency_ms or 0.0, pairs)), layers


def with_their_bits(plan: Plan, fitted: Sequence[LayerResult], specs: Sequence[LayerSpec]) -> tuple[LayerResult, ...]:
    """Return the results of a plan of which `fitted` are those of the same plan without bits."""
    known, sizes = {layer.name: layer for layer in fitted}, {spec.name: spec for spec in specs}
    return tuple(
        replace(known[name], choice=choice) if name in known else kept_result(sizes[name], choice)
        for name, choice in plan.layers
    )


def versions() -> dict[str, str]:
    """Return the versions of what shapes a trial's result."""
    from importlib.metadata import version

    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("autorank", "torch", "numpy", "tensorly", "fvcore")},
    }


def failed(job: Job, reason: str) -> TrialRecord:
    """Return the record of a trial that gave no result."""
    return TrialRecord(
        number=job.number,
        plan=job.plan,
        fidelity=job.fidelity,
        target=job.fidelity,
        status="failed",
        reason=hidden(reason),
        parent=job.parent.number if job.parent else None,
        lineage=job.lineage,
        pull=job.pull,
        probe=job.probe,
        want=job.want,
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _place(error: BaseException) -> str:
    """Return file and line where the error was raised, as the last name of the path only."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "the trial"
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
