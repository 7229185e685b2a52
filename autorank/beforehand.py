"""What a strategy wants to know before the search: errors of all candidates, spectra of all kernels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autorank import errortable
from autorank.fitcache import FitCache
from autorank.layout import canonical_weight
from autorank.lossrise import measured_increases
from autorank.progress import Reporter
from autorank.solvers import whitening
from autorank.solvers.vbmf import spectrum
from autorank.space import SearchSpace
from autorank.tasks import Task
from autorank.tasks.batch import Batch
from autorank.types import Spectrum, canonical_json


def informed(
    space: SearchSpace,
    needs: frozenset[str],
    model: nn.Module,
    stats_file: Path | None,
    directory: Path,
    reporter: Reporter,
    *,
    seed: int,
    processes: int,
    threads: int,
    measured_on: Sequence[Batch] = (),
    task: Task | None = None,
) -> SearchSpace:
    """Return the space with what a strategy needs to know of it.

    Parameters
    ----------
    space : SearchSpace
    needs : frozenset of str
        ``errors`` and ``spectra``, as in `Strategy.needs`.
    model : nn.Module
        The dense model, on the device of the trials.
    stats_file : Path or None
        Layer statistics.
    directory : Path
        Sweep directory. The errors are kept there, beside the journal: a resumed sweep is replayed with the same ones.
    reporter : Reporter
    seed : int
        Of the plans.
    processes, threads : int
        How many processes fit at a time, and PyTorch threads of each.
    measured_on : sequence of Batch
        Examples on which the rise of the loss with each candidate alone in its layer is measured, instead of predicted;
        as the divergence of the task's outputs from the dense model's.
    task : Task, optional
        Needed with `measured_on`.
    """
    if "errors" in needs:
        path = directory / f"errors-{_name(space, stats_file, seed, sum(map(len, measured_on)))}.json"
        table = _read(path)
        wanted = {(layer.spec.name, c.choice) for layer in space.layers for c in layer.candidates}
        if table is None or not wanted <= table.keys():
            stats: Mapping[str, whitening.LayerStats] = whitening.load(stats_file) if stats_file else {}
            fits = directory / "cache" / "fits"
            table = errortable.candidate_errors(
                model, space.layers, stats, fits, seed, reporter, processes, threads=threads
            )
            if measured_on and task is not None:
                pairs = [(layer.spec, c.choice) for layer in space.layers for c in layer.candidates]
                distill = partial(_divergence, task)
                rises = measured_increases(
                    model, pairs, measured_on, distill, stats=stats, cache=FitCache(fits), seed=seed, reporter=reporter
                )
                table = {key: replace(known, loss=max(0.0, rises.values[key])) for key, known in table.items()}
            part = path.with_suffix(".part")
            part.write_text(json.dumps(errortable.to_json(table)))
            part.replace(path)
        space = space.with_errors(table)
    if "spectra" in needs:
        space = space.with_spectra(_spectra(space, model))
    return space


def _divergence(task: Task, outputs: Any, dense: Any, _targets: Any) -> Tensor:
    return task.distill(outputs, dense, 1.0)


def _read(path: Path) -> errortable.Table | None:
    try:
        return errortable.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # not there, or damaged: the fits are in the cache


def _name(space: SearchSpace, stats_file: Path | None, seed: int, examples: int) -> str:
    """Return a name for what the errors depend on: candidates, statistics (their name is a hash), seed, examples."""
    choices = {layer.spec.name: [c.choice.to_json() for c in layer.candidates] for layer in space.layers}
    what = [choices, stats_file.name if stats_file else "", seed, examples]
    return hashlib.sha256(canonical_json(what).encode()).hexdigest()[:12]


def _spectra(space: SearchSpace, model: nn.Module) -> dict[str, Spectrum]:
    found = {}
    for layer in space.layers:
        weight = model.get_submodule(layer.spec.name).weight
        assert isinstance(weight, Tensor)
        found[layer.spec.name] = spectrum(canonical_weight(weight.detach(), layer.spec), layer.spec.groups)
    return found
