"""The search space as whole numbers: a plan is one index per layer, and its costs are sums looked up in tables.

Index 0 keeps a layer dense; index k is its k-th candidate, cheapest MACs first. A *variant* is a format with one set of
options; its *ladder* lists its ranks from cheap to dear, with the dense layer as the rung at ratio 1.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from random import Random

from autorank.errors import ConfigError
from autorank.space import Candidate, LayerCandidates, SearchSpace, bops_of
from autorank.types import Choice, Constraint, LayerCost, Plan

Vector = tuple[int, ...]
Ladder = tuple[tuple[float, int], ...]

COST_NAMES = ("macs_kept", "params_kept", "bytes_kept", "latency_kept", "bops_kept")
_MINOR = 0.25
"""A layer with less than this part of an average layer's MACs and parameters is not worth its accuracy in a seed."""
_SEARCH_LIMIT = 200_000
"""Steps after which the hunt for one more plan is given up; only contradictory constraints ever need that many."""


def amount(space: SearchSpace, layer: LayerCandidates, candidate: Candidate | None, name: str) -> float:
    """Return what a layer costs, in MACs, bytes, milliseconds and so on; None as candidate means dense."""
    cost = candidate.cost if candidate else LayerCost(layer.spec.macs, layer.spec.params)
    if name != "latency_kept":
        return {
            "macs_kept": cost.macs,
            "params_kept": cost.params,
            "bytes_kept": space.bytes_of(layer.spec, cost),
            "bops_kept": bops_of(cost),
        }[name]
    value = candidate.latency_ms if candidate else layer.dense_latency_ms
    if value is None:
        raise ConfigError(f"latency needs a measured time of every candidate, and layer {layer.spec.name!r} has none")
    return value


def variant(choice: Choice) -> str:
    """Return what a choice is but for its rank: format, options and bits."""
    options = ",".join(f"{key}={value}" for key, value in choice.options)
    return f"{choice.format}({options}){choice.bits}"


def whole(space: SearchSpace, name: str) -> float:
    """Return what the whole dense model costs, in the unit of `amount`."""
    dense = space.dense
    return {
        "macs_kept": dense.macs,
        "params_kept": dense.params,
        "bytes_kept": dense.bytes,
        "bops_kept": dense.bops or bops_of(LayerCost(dense.macs, dense.params)),
        "latency_kept": dense.latency_ms or 0.0,
    }[name]


def same_sum(space: SearchSpace, first: str, second: str) -> bool:
    """Say whether two costs are one in two units: without bits, bytes are parameters and bit operations MACs."""
    same = ({"params_kept", "bytes_kept"}, {"macs_kept", "bops_kept"})
    return first == second or (not space.quantizes and {first, second} in same)


class Catalog:
    """Costs, constraints and neighbourhoods of plans as index vectors.

    Parameters
    ----------
    space : SearchSpace
    constraints : sequence of Constraint
        Bounds on costs; they are met by construction by everything that the catalog hands out.
    axis : str
        The cost along which ladders are ordered and plans are spread: ``macs_kept`` and so on.
    seed : int
        Goes into every plan.

    Raises
    ------
    ConfigError
        No plan of the space meets the constraints; the message names the best reachable value.
    """

    def __init__(self, space: SearchSpace, constraints: Sequence[Constraint], axis: str, seed: int) -> None:
        self.space, self.constraints, self.axis, self.seed = space, tuple(constraints), axis, seed
        names = dict.fromkeys([axis, *(c.name for c in constraints)])
        if "latency_kept" in names and not space.dense.latency_ms:
            raise ConfigError("latency is an objective or a constraint, but no layer of this search space was timed")
        self._amounts = {
            name: [
                [amount(space, layer, candidate, name) for candidate in (None, *layer.candidates)]
                for layer in space.layers
            ]
            for name in names
        }
        self._dense = {name: whole(space, name) for name in names}
        self.dense_vector: Vector = (0,) * len(space.layers)
        self._index = [{c.choice: k for k, c in enumerate(layer.candidates, start=1)} for layer in space.layers]
        self.variants: list[list[str]] = []
        self.ladders: list[list[Ladder]] = []
        for i, layer in enumerate(space.layers):
            rungs: dict[str, list[tuple[float, int]]] = {}
            for k, candidate in enumerate(layer.candidates, start=1):
                label = variant(candidate.choice)
                rungs.setdefault(label, []).append((self._ratio(i, k), k))
            self.variants.append(sorted(rungs))
            self.ladders.append([tuple(sorted([*rungs[label], (1.0, 0)])) for label in sorted(rungs)])
        self._rank = [
            {k: (v, ratio) for v, ladder in enumerate(ladders) for ratio, k in ladder if k} for ladders in self.ladders
        ]
        self.low, self.high = self._range()
        self.minor = self._minor()

    def _minor(self) -> frozenset[int]:
        """Return the layers that have far less than their share of both the MACs and the parameters."""
        least = _MINOR / len(self.space.layers)
        dense = self.space.dense
        return frozenset(
            i
            for i, layer in enumerate(self.space.layers)
            if layer.spec.macs < least * dense.macs and layer.spec.params < least * dense.params
        )

    def _ratio(self, layer: int, index: int) -> float:
        row = self._amounts[self.axis][layer]
        return row[index] / row[0] if row[0] else 1.0

    # Plans and their costs

    def plan(self, vector: Vector) -> Plan:
        """Return the plan of an index vector."""
        return Plan.of({layer.spec.name: c.choice for layer, c in self._chosen(vector)}, self.seed)

    def vector(self, plan: Plan) -> Vector | None:
        """Return the index vector of a plan; None when it has a choice that is no candidate."""
        choices = plan.choices
        vector = []
        for layer, index in zip(self.space.layers, self._index, strict=True):
            choice = choices.pop(layer.spec.name, None)
            if choice is not None and choice not in index:
                return None
            vector.append(0 if choice is None else index[choice])
        return None if choices else tuple(vector)

    def _chosen(self, vector: Vector) -> list[tuple[LayerCandidates, Candidate]]:
        return [(layer, layer.candidates[k - 1]) for layer, k in zip(self.space.layers, vector, strict=True) if k]

    def kept(self, vector: Vector) -> dict[str, float]:
        """Return every ratio to the dense model, in closed form."""
        return self.space.cost_with(self._chosen(vector)).kept(self.space.dense)

    def violations(self, vector: Vector) -> dict[str, float]:
        """Return constraint → how far it is missed; zero or less where it is met."""
        if not self.constraints:
            return {}
        kept = self.kept(vector)
        return {str(c): c.violation(kept[c.name]) for c in self.constraints}

    def feasible(self, vector: Vector) -> bool:
        """Say whether the plan meets every cost constraint."""
        return all(value <= 0 for value in self.violations(vector).values())

    def share(self, vector: Vector) -> float:
        """Return the ratio along the axis, as a plain sum over the layers."""
        return self._sum(self.axis, vector) / self._dense[self.axis]

    def _sum(self, name: str, vector: Vector) -> float:
        rows = self._amounts[name]
        return self._dense[name] + sum(row[k] - row[0] for row, k in zip(rows, vector, strict=True))

    # Reach

    def _range(self) -> tuple[float, float]:
        """Return the ends of the axis that plans can reach within the constraints on it."""
        for c in self.constraints:
            best = tuple(
                (min if c.operator == "<=" else max)(range(len(row)), key=row.__getitem__)
                for row in self._amounts[c.name]
            )
            reached = self.kept(best)[c.name]
            if c.violation(reached) > 0:
                end = "lowest" if c.operator == "<=" else "highest"
                raise ConfigError(f"no plan of this search space meets {c}; the {end} that it reaches is {reached:.4g}")
        ends = []
        for pick in (min, max):
            vector = tuple(pick(range(len(row)), key=row.__getitem__) for row in self._amounts[self.axis])
            ends.append(self.share(vector))
        mine = [c for c in self.constraints if c.name == self.axis]
        low = max([ends[0], *(c.bound for c in mine if c.operator == ">=")])
        high = min([ends[1], 1.0, *(c.bound for c in mine if c.operator == "<=")])
        return low, max(low, high)

    # Moves

    def rung(self, layer: int, variant: int, ratio: float) -> int:
        """Return the index of the variant's candidate whose ratio is nearest to `ratio` (0, dense, nearest to 1)."""
        ladder = self.ladders[layer][variant]
        at = bisect_left(ladder, (ratio, -1))
        if at in (0, len(ladder)):
            return ladder[min(at, len(ladder) - 1)][1]
        below, above = ladder[at - 1], ladder[at]
        return below[1] if ratio - below[0] <= above[0] - ratio else above[1]

    def place(self, layer: int, index: int) -> tuple[int | None, float]:
        """Return the variant (None for dense) and the ratio of an index."""
        return self._rank[layer][index] if index else (None, 1.0)

    def spread(self, target: float, rng: Random, noise: float, variants: Sequence[int] | None = None) -> Vector:
        """Return a plan whose share of the axis is near `target`, every layer varied around the common ratio.

        Parameters
        ----------
        target : float
            Share of the whole model's cost.
        rng : random.Random
        noise : float
            Standard deviation of the logarithm of a layer's ratio; 0 gives a uniform plan.
        variants : sequence of int, optional
            Variant per layer; drawn when not given.
        """
        chosen = variants if variants is not None else [rng.randrange(len(ladders)) for ladders in self.ladders]
        return self.at_share(target, chosen, [rng.gauss(0.0, noise) if noise else 0.0 for _ in self.ladders])

    def at_share(self, target: float, variants: Sequence[int], offsets: Sequence[float]) -> Vector:
        """Return the plan nearest to a share of the axis whose layers keep given proportions to each other.

        Parameters
        ----------
        target : float
            Share of the whole model's cost.
        variants : sequence of int
            Variant per layer.
        offsets : sequence of float
            Logarithm of each layer's ratio to the common one, which is found by bisection.
        """
        factors = [math.exp(offset) for offset in offsets]
        best: tuple[bool, float, Vector] | None = None
        low, high = 0.0, 8.0
        for _ in range(16):
            middle = (low + high) / 2
            vector = tuple(self.rung(i, v, middle * f) for i, (v, f) in enumerate(zip(variants, factors, strict=True)))
            share = self.share(vector)
            if best is None or vector != best[2]:
                found = (not self.feasible(vector), abs(share - target), vector)
                best = found if best is None else min(best, found)
            if share < target:
                low = middle
            else:
                high = middle
        assert best is not None
        return best[2]

    def repair(self, vector: Vector, rng: Random) -> Vector | None:
        """Move layers, one small step at a time, until every constraint is met; None when that does not succeed."""
        steps = sum(len(row) for row in self._amounts[self.axis]) + len(vector)
        for _ in range(steps):
            missed = [c for c in self.constraints if self.violations(vector)[str(c)] > 0]
            if not missed:
                return vector
            sign = 1 if missed[0].operator == "<=" else -1
            rows = self._amounts[missed[0].name]
            movable = [i for i, (row, k) in enumerate(zip(rows, vector, strict=True)) if self._next(row, i, k, sign)]
            if not movable:
                return None
            weights = [rows[i][vector[i]] or 1.0 for i in movable]
            i = rng.choices(movable, weights)[0]
            step = self._next(rows[i], i, vector[i], sign)
            vector = (*vector[:i], step[0] if step else vector[i], *vector[i + 1 :])
        return vector if self.feasible(vector) else None

    def _next(self, row: Sequence[float], layer: int, index: int, sign: int) -> tuple[int] | None:
        """Return the next cheaper (sign 1) or dearer (-1) index, of the same variant if it has one."""
        better = [k for k in range(len(row)) if sign * (row[k] - row[index]) < 0]
        if not better:
            return None
        variant = self.place(layer, index)[0]
        same = [k for k in better if self.place(layer, k)[0] == variant]
        return (max(same or better, key=lambda k: (sign * row[k], -k)),)

    def neighbour(self, vector: Vector, rng: Random, moves: int) -> Vector | None:
        """Return a feasible plan that differs from `vector` in about `moves` layers."""
        changed = list(vector)
        for i in rng.sample(range(len(vector)), min(moves, len(vector))):
            changed[i] = rng.randrange(len(self._amounts[self.axis][i]))
        return self.repair(tuple(changed), rng)

    def every(self) -> Iterator[Vector]:
        """Yield every feasible plan once, in a fixed order; ends early when constraints contradict each other."""
        lower = [c for c in self.constraints if c.operator == "<="]
        # What the layers from i on can contribute at least, so that hopeless branches are never entered.
        floors: dict[str, list[float]] = {}
        for c in lower:
            tail = [0.0]
            for row in reversed(self._amounts[c.name]):
                tail.append(tail[-1] + min(row) - row[0])
            floors[c.name] = tail[::-1]
        steps = 0

        def walk(head: list[int], sums: list[float]) -> Iterator[Vector]:
            nonlocal steps
            i = len(head)
            if i == len(self.ladders):
                if self.feasible(tuple(head)):
                    steps = 0
                    yield tuple(head)
                return
            for k in range(len(self._amounts[self.axis][i])):
                steps += 1
                if steps > _SEARCH_LIMIT:
                    return
                after = [
                    total + self._amounts[c.name][i][k] - self._amounts[c.name][i][0]
                    for c, total in zip(lower, sums, strict=True)
                ]
                reach = [total + floors[c.name][i + 1] for c, total in zip(lower, after, strict=True)]
                if all(r <= c.bound * self._dense[c.name] + 1e-9 * abs(r) for c, r in zip(lower, reach, strict=True)):
                    yield from walk([*head, k], after)

        return walk([], [self._dense[c.name] for c in lower])
