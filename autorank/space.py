"""The search space: for every layer the candidates (format, options, rank) worth trying, with their exact costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from autorank.candidates import LayerSettings, candidates_of, with_bits
from autorank.errors import SpaceError
from autorank.patterns import check_patterns, matching_rules, nearest
from autorank.spacefile import SpaceFile, read_space, shipped, shipped_text
from autorank.types import (
    DENSE,
    Choice,
    Cost,
    Errors,
    LayerCost,
    LayerSpec,
    LeftAlone,
    ModelProfile,
    Plan,
    Spectrum,
    bit_operations,
)

__all__ = [
    "Candidate",
    "LayerCandidates",
    "SearchSpace",
    "SpaceFile",
    "build_space",
    "read_space",
    "shipped",
    "shipped_text",
]


_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to write one layer, its cost in closed form, and its measured time and errors where there are any."""

    choice: Choice
    cost: LayerCost
    latency_ms: float | None = None
    errors: Errors | None = None


@dataclass(frozen=True)
class LayerCandidates:
    """The candidates of one layer, cheapest MACs first; keeping the layer dense is always allowed besides.

    Attributes
    ----------
    spec : LayerSpec
    candidates : tuple of Candidate
        None of them without a saving in MACs, in parameters or in bits.
    dense_latency_ms : float or None
        Measured time of the dense layer.
    spectrum : Spectrum or None
        Of the layer's kernel, where it was computed.
    """

    spec: LayerSpec
    candidates: tuple[Candidate, ...]
    dense_latency_ms: float | None = None
    spectrum: Spectrum | None = None

    @cached_property
    def by_choice(self) -> dict[Choice, Candidate]:
        """Choice → candidate."""
        return {candidate.choice: candidate for candidate in self.candidates}


@dataclass(frozen=True)
class SearchSpace:
    """Everything a strategy may propose: the layers with candidates, those kept dense and why, and the dense cost."""

    layers: tuple[LayerCandidates, ...]
    kept_dense: tuple[LeftAlone, ...]
    dense: Cost
    by_name: Mapping[str, LayerCandidates] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {layer.spec.name: layer for layer in self.layers})

    @property
    def size(self) -> int:
        """Number of different plans, the dense one included."""
        return math.prod(1 + len(layer.candidates) for layer in self.layers)

    def with_errors(self, errors: Mapping[tuple[str, Choice], Errors]) -> SearchSpace:
        """Return the space with what each candidate does to its layer; a candidate that is not named has nothing."""
        layers = (
            replace(
                layer,
                candidates=tuple(replace(c, errors=errors.get((layer.spec.name, c.choice))) for c in layer.candidates),
            )
            for layer in self.layers
        )
        return SearchSpace(tuple(layers), self.kept_dense, self.dense)

    def with_spectra(self, spectra: Mapping[str, Spectrum]) -> SearchSpace:
        """Return the space with the spectra of the layers' kernels, by name."""
        layers = (replace(layer, spectrum=spectra.get(layer.spec.name)) for layer in self.layers)
        return SearchSpace(tuple(layers), self.kept_dense, self.dense)

    def cost(self, plan: Plan) -> Cost:
        """Return the cost of `plan` in closed form: the dense cost, less the dense layers, plus what replaces them.

        Bytes follow the parameters at the dense model's bytes per parameter, but for layers with bits.
        Latency is the prediction from the table
        of layer times, and None unless every layer that the plan names was timed.

        Parameters
        ----------
        plan : Plan
            May name choices that are not among the candidates (their latency is unknown then).

        Returns
        -------
        Cost

        Raises
        ------
        SpaceError
            The plan names a layer that is not in the space.
        """
        chosen: list[tuple[LayerCandidates, Candidate]] = []
        for name, choice in plan.layers:
            layer = self.by_name.get(name)
            if layer is None:
                raise SpaceError(f"layer {name!r} is not in the search space; {nearest(name, self.by_name)}")
            chosen.append((layer, layer.by_choice.get(choice) or Candidate(choice, _cost(layer.spec, choice))))
        return self.cost_with(chosen)

    def cost_with(self, chosen: Iterable[tuple[LayerCandidates, Candidate]]) -> Cost:
        """Return the cost of the model with each of these layers replaced by the candidate beside it."""
        macs, params, latency = self.dense.macs, self.dense.params, self.dense.latency_ms
        size, bops = self.dense.bytes, self.dense.bops
        pairs: list[tuple[float, float]] | None = None if latency is None else []
        for layer, candidate in chosen:
            macs += candidate.cost.macs - layer.spec.macs
            params += candidate.cost.params - layer.spec.params
            size += self.bytes_of(layer.spec, candidate.cost) - self._width(layer.spec) * layer.spec.params
            if bops is not None:
                bops += bops_of(candidate.cost) - bit_operations(layer.spec.macs, None, None)
            if pairs is not None:
                if candidate.latency_ms is None or layer.dense_latency_ms is None:
                    pairs = None
                else:
                    pairs.append((layer.dense_latency_ms, candidate.latency_ms))
        latency = None if latency is None or pairs is None else predicted_latency(latency, pairs)
        return Cost(macs, params, size, latency, bops)

    def with_bops(self) -> SearchSpace:
        """Return the space with bit operations in its costs."""
        return replace(self, dense=replace(self.dense, bops=bit_operations(self.dense.macs, None, None)))

    @cached_property
    def quantizes(self) -> bool:
        """Whether some candidate has bits."""
        return any(c.choice.weight_bits is not None for layer in self.layers for c in layer.candidates)

    def bytes_of(self, spec: LayerSpec, cost: LayerCost) -> int:
        """Return the bytes of a layer; without bits they follow the parameters."""
        return self._width(spec) * cost.params if cost.bytes is None else cost.bytes

    def _width(self, spec: LayerSpec) -> int:
        """Bytes of one parameter: the dense model's, or the layer's own where that model has several number types."""
        width, rest = divmod(self.dense.bytes, max(self.dense.params, 1))
        return width if width and not rest else _WIDTHS.get(spec.dtype, 4)


def bops_of(cost: LayerCost) -> int:
    """Return the bit operations of a layer; without bits they follow the MACs."""
    return bit_operations(cost.macs, None, None) if cost.bops is None else cost.bops


def _cost(spec: LayerSpec, choice: Choice) -> LayerCost:
    """Return what a choice costs that is not among the candidates."""
    from autorank import formats

    plain = choice.in_float
    cost = LayerCost(spec.macs, spec.params)
    if choice.format != DENSE:
        cost = formats.get(choice.format).cost(spec, choice.rank, choice.options)
    ((_, found),) = with_bits(spec, plain, cost, [(choice.weight_bits, choice.activation_bits)])
    return found


def predicted_latency(dense_ms: float, pairs: Iterable[tuple[float, float]]) -> float:
    """Return the milliseconds of a model in which layers are replaced, from times of the layers alone.

    Parameters
    ----------
    dense_ms : float
        The whole dense model.
    pairs : iterable of (float, float)
        Milliseconds of a dense layer and of what replaces it.
    """
    pairs = list(pairs)
    # Layers timed alone can add up to more than the whole model; what replaces them is the least that remains.
    return max(dense_ms + sum(new - old for old, new in pairs), sum(new for _, new in pairs))


def build_space(
    file: SpaceFile,
    profile: ModelProfile,
    latencies: Mapping[tuple[str, Choice | None], float] | None = None,
) -> SearchSpace:
    """Apply a search-space file to a profiled model.

    Parameters
    ----------
    file : SpaceFile
    profile : ModelProfile
    latencies : mapping, optional
        (layer name, choice or None for the dense layer) → milliseconds, measured.

    Returns
    -------
    SearchSpace
        Layers in the order of the profile. With `latencies`, the dense latency is the profile's, or else the sum over
        the timed dense layers.

    Raises
    ------
    SpaceError
        A pattern matches no layer, a rule names a layer that all its formats refuse, an option or mode does not exist,
        or no layer has a candidate.
    """
    dense_names = check_patterns(file, profile)
    times = latencies or {}
    layers: list[LayerCandidates] = []
    kept: list[LeftAlone] = []
    for spec in profile.layers:
        if spec.name in dense_names:
            kept.append(_kept(spec, f"kept dense by {dense_names[spec.name]!r}"))
            continue
        settings = LayerSettings.of(file, spec, matching_rules(file, spec))
        found = candidates_of(file, spec, settings)
        if found.candidates:
            candidates = [
                Candidate(choice, cost, times.get((spec.name, choice))) for choice, cost in found.candidates.items()
            ]
            layers.append(LayerCandidates(spec, tuple(sorted(candidates, key=_order)), times.get((spec.name, None))))
            continue
        why = "; ".join(found.reasons)
        if found.refused and settings.named:
            raise SpaceError(f"{file.source}: {settings.named} names layer {spec.name!r}, but {why}")
        kept.append(_kept(spec, why))
    if not layers:
        raise SpaceError(f"{file.source}: no layer has a candidate: {_why_empty(kept, profile)}")
    dense = profile.dense
    if latencies and dense.latency_ms is None:
        dense = replace(dense, latency_ms=sum(t for (_, choice), t in times.items() if choice is None))
    space = SearchSpace(tuple(layers), tuple(kept), dense)
    return space.with_bops() if space.quantizes else space


def _order(candidate: Candidate) -> tuple[object, ...]:
    choice = candidate.choice
    bits = -(choice.weight_bits or 32), -(choice.activation_bits or 32)
    return candidate.cost.macs, candidate.cost.params, choice.format, repr(choice.options), choice.rank, bits


def _kept(spec: LayerSpec, reason: str) -> LeftAlone:
    return LeftAlone(spec.name, spec.kind, reason, spec.params, spec.macs)


def _why_empty(kept: Sequence[LeftAlone], profile: ModelProfile) -> str:
    known = [*kept, *profile.left_alone]
    if not known:
        return "the model has no layer that can be decomposed"
    rest = f" and {len(known) - 3} more layers" if len(known) > 3 else ""
    return "; ".join(f"{layer.name}: {layer.reason}" for layer in known[:3]) + rest
