"""What decomposing one layer alone costs, measured: the network is run on real examples with only that layer replaced.

The prediction from statistics (`autorank.errortable`) costs next to nothing; this one counts what the network really
does, and costs a part of a forward pass for every candidate: the part behind the changed layer (`autorank.replay`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autorank import formats
from autorank.errors import DataError
from autorank.fitcache import FitCache
from autorank.formats.replacing import in_place_of
from autorank.layout import canonical_weight
from autorank.measure import undisturbed
from autorank.progress import Reporter, Silent
from autorank.quanterrors import rounded_layer
from autorank.replay import Replay
from autorank.solvers.whitening import LayerStats
from autorank.tasks.batch import Batch
from autorank.types import DENSE, Choice, LayerSpec

Loss = Callable[[Any, Any, Any], Tensor]
"""From a network's outputs, the dense network's and the targets to the mean loss of the examples."""

TELL_FROM_S = 20.0
"""Estimated seconds from which a line says beforehand how long it will take."""

_WHAT = "layers, one at a time"


@dataclass(frozen=True)
class Increases:
    """What was measured.

    Attributes
    ----------
    values : dict from (layer name, Choice) to float
        The mean loss of an example with that layer replaced, less that of the dense network; in the loss's unit.
    dense : float
        The dense network's.
    whole : tuple of str
        Layers for which the whole network had to be run, as it does not replay.
    """

    values: dict[tuple[str, Choice], float]
    dense: float
    whole: tuple[str, ...] = ()


def measured_increases(
    model: nn.Module,
    pairs: Sequence[tuple[LayerSpec, Choice]],
    batches: Sequence[Batch],
    loss: Loss,
    *,
    stats: Mapping[str, LayerStats] | None = None,
    cache: FitCache | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Increases:
    """Return by how much the loss rises with each candidate alone in the place of its layer.

    Parameters
    ----------
    model : nn.Module
        The dense model; not changed. Run in eval mode on its device.
    pairs : sequence of (LayerSpec, Choice)
        The candidates.
    batches : sequence of Batch
        The examples. What the network's modules return is kept for one batch at a time, so its size bounds the memory.
    loss : callable
        See `Loss`; for example ``lambda out, dense, targets: task.distill(out, dense, 1.0)``, the divergence from the
        dense network's predictions, or ``lambda out, dense, targets: task.loss(out, targets)``.
    stats : mapping of str to LayerStats, optional
        Needed for candidates that whiten.
    cache : FitCache, optional
        Where the fits are looked up.
    seed : int
        Of the fits, and of PyTorch's random numbers in every run of a network that draws some.
    reporter : Reporter, optional
        Is told, after the first pass through the dense network, how long the rest will take, and how far it is.

    Raises
    ------
    DataError
        There is no example.
    FormatError
        A weight cannot be decomposed.
    """
    if not sum(map(len, batches)):
        raise DataError("there is no example to measure layers with")
    reporter, cache = reporter or Silent(), cache or FitCache(None)
    replay = Replay(model, seed)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modules = dict(model.named_modules())
    sums = dict.fromkeys(((spec.name, choice) for spec, choice in pairs), 0.0)
    dense, examples, steps = 0.0, 0, len(batches) * len(pairs)
    for number, batch in enumerate(part.to(device) for part in batches):
        outputs = replay.record(batch.inputs)
        if not number:
            _announce(reporter, replay, pairs, len(batches))
        dense += len(batch) * float(loss(outputs, outputs, batch.targets))
        examples += len(batch)
        for done, (spec, choice) in enumerate(pairs):
            reporter.step(_WHAT, number * len(pairs) + done, steps)
            layer = _layer(modules[spec.name], spec, choice, (stats or {}).get(spec.name), cache, seed)
            changed = replay.run(spec.name, layer)
            sums[spec.name, choice] += len(batch) * float(loss(changed, outputs, batch.targets))
    reporter.step(_WHAT, steps, steps)
    rises = {key: (value - dense) / examples for key, value in sums.items()}
    return Increases(rises, dense / examples, tuple(sorted(replay.whole)))


def _layer(
    old: nn.Module, spec: LayerSpec, choice: Choice, stats: LayerStats | None, cache: FitCache, seed: int
) -> nn.Module:
    if choice.format == DENSE:
        return rounded_layer(copy.deepcopy(old), choice, spec.name)
    fmt, weight = formats.get(choice.format), old.weight
    assert isinstance(weight, Tensor)
    with undisturbed():
        factors, _ = cache.get_or_fit(fmt, canonical_weight(weight.detach(), spec), spec, choice, stats, seed)
        return rounded_layer(in_place_of(old, fmt.layer(spec, choice.rank, choice.options, factors)), choice, spec.name)


def _announce(reporter: Reporter, replay: Replay, pairs: Sequence[tuple[LayerSpec, Choice]], batches: int) -> None:
    """Say how long it will take: the time of a dense pass, times what is left of it behind each candidate's layer."""
    checks = sum(replay.share(name) for name in {spec.name for spec, _ in pairs})  # one for each layer
    passes = batches * sum(replay.share(spec.name) for spec, _ in pairs) + checks
    seconds = replay.seconds * passes
    if seconds < TELL_FROM_S:
        return
    about = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{10 * round(seconds / 10)} s"
    reporter.say(
        f"{_WHAT}: {len(pairs)} candidates on {batches} batches may take about {about}, "
        f"as much as {passes:.0f} passes through the whole network"
    )
