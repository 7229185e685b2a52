"""What finished trials teach about the predicted loss of plans: a small Bayesian model in closed form.

The predicted loss of a plan is a sum over its layers of a table, B(x) = Σ_l exp(θ_l(x_l))·loss_l(x_l), and what is
observed is taken to be a power of it: the logarithm of the observed drop is

    z = c + (1 + q)·log B(x) + r(share) + noise,

with weights θ = α_layer + β_format + γ_layer,format of normal prior around 0 (no correction), c and q per rung of
fidelity, and a smooth residual r along the cost axis. θ enters through the shares of the layers in B, so the model is
linear about the present weights and Bayesian ridge regression (MacKay, Neural Computation 4(3), 1992) gives the next
ones: a few Gauss-Newton steps. Strength of the prior and noise are those of largest marginal likelihood on a grid. With
few trials the prior stands; weights are positive whatever was observed. Pure functions on numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]
T = TypeVar("T")

_SCALES = (0.1, 0.3, 0.6, 1.0)
"""Standard deviations of the logarithm of a layer's weight among which the evidence chooses."""
_NOISES = (0.03, 0.1, 0.2, 0.4)
"""Standard deviations of the logarithm of a drop."""
_FORMAT, _PAIR, _RULE = 0.7, 0.7, 1.5
"""Spread of the corrections of formats, of layer and format together, and of other rules, relative to a layer's."""
_OFFSET, _SLOPE = 3.0, 0.3
"""Prior spread of c and of q."""
_BEND, _REACH = 0.2, 0.2
"""Size and length of the residual along the cost axis."""
_RUNG_NOISE = 0.25
"""What a cheaper rung says differently than the full fidelity, as additional noise."""
_STEPS = 4
_LEAST = 1e-9


@dataclass(frozen=True)
class Tables:
    """Predicted losses of all candidates, as arrays.

    Attributes
    ----------
    losses : layers × candidates
        Predicted loss increase; 0 for index 0, the dense layer. Padded at will.
    formats : layers × candidates
        Number of the candidate's format; -1 for dense.
    rules : rules × layers × candidates
        Other additive measures of harm, which count only as far as trials show that they do.
    """

    losses: Floats
    formats: Whole
    rules: Floats

    @cached_property
    def count(self) -> int:
        """Number of formats."""
        return int(self.formats.max(initial=-1)) + 1

    @cached_property
    def scaled_rules(self) -> Floats:
        """The rules, each at the size of a tenth of the losses, so that at first they hardly count."""
        total = self.losses.sum()
        sums = self.rules.sum(axis=(1, 2), keepdims=True)
        return 0.1 * self.rules * total / np.maximum(sums, _LEAST)


@dataclass(frozen=True)
class Trials:
    """What was observed.

    Attributes
    ----------
    vectors : trials × layers
    shares : trials
        Position on the cost axis.
    logs : trials
        Logarithm of the drop.
    spreads : trials
        Standard deviation of that logarithm by noise of the score alone; see `log_drop`.
    rungs : trials
        0 for the full fidelity, 1, 2, … for cheaper ones.
    """

    vectors: Whole
    shares: Floats
    logs: Floats
    spreads: Floats
    rungs: Whole


def log_drop(gains: Floats, dense: float, noise: float = 0.005) -> tuple[Floats, Floats]:
    """Return the logarithm of what was lost against the dense model, and how far noise blurs it.

    The drop is −log(gain / dense) where the dense gain is positive, so that it adds up over layers that each lose a
    share; log(1 + (dense − gain) / |dense|) where it is not, as for a loss to be minimised.

    Parameters
    ----------
    gains : array
        Scores, turned so that more is better.
    dense : float
        That of the dense model.
    noise : float
        Standard deviation of a score, relative to the dense one. No drop counts as smaller than this.
    """
    size = abs(dense) or 1.0
    lost = (dense - gains) / size
    if dense > 0:
        drop = -np.log(np.maximum(1.0 - lost, 0.02))
    else:
        drop = np.log1p(np.maximum(lost, 0.0))
    drop = np.maximum(drop, noise)
    return np.log(drop), noise / drop


def gain_of(logs: Floats, dense: float) -> Floats:
    """Return the gains whose logarithm of the drop is `logs`."""
    drop = np.exp(np.minimum(logs, 5.0))
    if dense > 0:
        return dense * np.exp(-drop)
    return dense - (abs(dense) or 1.0) * np.expm1(drop)


class Surrogate:
    """The posterior after some trials; without any, the prior.

    Parameters
    ----------
    tables : Tables
    trials : Trials, optional
    """

    def __init__(self, tables: Tables, trials: Trials | None = None) -> None:
        self.tables = tables
        layers, width = tables.losses.shape
        self._layer = np.arange(layers)
        self._slots = np.zeros((layers, width), np.int64)  # of γ; -1 in `formats` is masked below
        self._slots[:] = tables.formats + tables.count * self._layer[:, None]
        self._rungs = 1 + (int(trials.rungs.max(initial=0)) if trials is not None else 0)
        sizes = (2 * self._rungs, layers, tables.count, layers * tables.count, len(tables.rules))
        self._ends = np.cumsum((0, *sizes))
        self._theta = np.zeros(self._ends[-1])
        self._trials = trials
        self._middle = 0.0
        self.scale, self.noise = _SCALES[1], _NOISES[2]
        self._factor: Floats | None = None
        if trials is not None and len(trials.logs):
            self._fit(trials)

    # The table of weighted losses, and what a plan sums up to

    def _part(self, theta: Floats, number: int) -> Floats:
        return theta[self._ends[number] : self._ends[number + 1]]

    def weighted(self, theta: Floats | None = None) -> Floats:
        """Return layers × candidates: losses with their weights, and the rules with theirs, to be summed and small."""
        theta = self._theta if theta is None else theta
        tables = self.tables
        known = tables.formats >= 0
        format_ = np.where(known, tables.formats, 0)
        slots = np.where(known, self._slots, 0)
        logs = self._part(theta, 1)[:, None] + np.where(
            known, self._part(theta, 2)[format_] + self._part(theta, 3)[slots], 0.0
        )
        rules = np.exp(np.clip(self._part(theta, 4), -5.0, 5.0))
        values = tables.losses * np.exp(np.clip(logs, -5.0, 5.0))
        return values + np.tensordot(rules, tables.scaled_rules, 1)

    def _jacobian(self, vectors: Whole, rungs: Whole, theta: Floats, middle: float) -> tuple[Floats, Floats]:
        """Return f(θ) without the residual, and its derivatives, trials × parameters."""
        tables, count = self.tables, len(vectors)
        own = self.weighted(theta)
        rules = np.exp(np.clip(self._part(theta, 4), -5.0, 5.0))
        of_rules = np.einsum("r,rnl->nr", rules, tables.scaled_rules[:, self._layer, vectors])
        both = own[self._layer, vectors]
        parts = both - np.einsum("r,rnl->nl", rules, tables.scaled_rules[:, self._layer, vectors])
        total = np.maximum(both.sum(axis=1), _LEAST)
        logs = np.log(total)
        slope = 1.0 + theta[2 * rungs + 1]
        jacobian = np.zeros((count, self._ends[-1]))
        rows = np.arange(count)
        jacobian[rows, 2 * rungs] = 1.0
        jacobian[rows, 2 * rungs + 1] = logs - middle
        shares = slope[:, None] * parts / total[:, None]
        jacobian[:, self._ends[1] : self._ends[2]] = shares
        formats = tables.formats[self._layer, vectors]
        known = formats >= 0
        at, layer = np.nonzero(known)
        np.add.at(jacobian, (at, self._ends[2] + formats[at, layer]), shares[at, layer])
        jacobian[at, self._ends[3] + self._slots[layer, vectors[at, layer]]] = shares[at, layer]
        jacobian[:, self._ends[4] :] = slope[:, None] * of_rules / total[:, None]
        return theta[2 * rungs] + slope * (logs - middle), jacobian

    # Fitting

    def _prior(self, scale: float) -> Floats:
        """Return the prior variance of every parameter."""
        sizes = np.diff(self._ends)
        link = np.tile([_OFFSET**2, _SLOPE**2], self._rungs)
        own = [np.full(size, (scale * s) ** 2) for size, s in zip(sizes[1:], (1.0, _FORMAT, _PAIR, _RULE), strict=True)]
        return np.concatenate([link, *own])

    def _fit(self, trials: Trials) -> None:
        vectors, rungs = trials.vectors, trials.rungs
        self._middle = float(np.log(np.maximum(self.weighted()[self._layer, vectors].sum(axis=1), _LEAST)).mean())
        bend = _kernel(trials.shares, trials.shares)
        theta = self._theta
        for step in range(_STEPS):
            value, jacobian = self._jacobian(vectors, rungs, theta, self._middle)
            rest = trials.logs - value + jacobian @ theta
            if step in (0, _STEPS - 1):
                self.scale, self.noise = self._evidence(jacobian, bend, rest, trials)
            variance = self._prior(self.scale)
            gram = (jacobian * variance) @ jacobian.T + bend + np.diag(self._variances(trials, self.noise))
            self._factor = np.linalg.inv(np.linalg.cholesky(gram))
            self._solved = self._factor.T @ (self._factor @ rest)
            theta = variance * (jacobian.T @ self._solved)
            # Steps beyond a factor of ten in a weight leave the range in which the model is linear.
            theta[self._ends[1] :] = np.clip(theta[self._ends[1] :], -2.3, 2.3)
        self._theta, self._rows, self._variance = theta, jacobian, variance

    def _variances(self, trials: Trials, noise: float) -> Floats:
        return noise**2 + trials.spreads**2 + np.where(trials.rungs > 0, _RUNG_NOISE**2, 0.0)

    def _evidence(self, jacobian: Floats, bend: Floats, rest: Floats, trials: Trials) -> tuple[float, float]:
        """Return the scale of the prior and the noise under which the observations are most likely."""
        links = jacobian[:, : self._ends[1]]
        fixed = (links * self._prior(1.0)[: self._ends[1]]) @ links.T + bend
        free = jacobian[:, self._ends[1] :]
        gram = (free * self._prior(1.0)[self._ends[1] :]) @ free.T
        best = (-np.inf, _SCALES[1], _NOISES[2])
        for scale in _SCALES:
            for noise in _NOISES:
                total = fixed + scale**2 * gram + np.diag(self._variances(trials, noise))
                lower = np.linalg.cholesky(total)
                solved = np.linalg.solve(lower, rest)
                # Weak preferences for moderate settings decide while there are few trials.
                prior = -((np.log(scale / 0.4) / 1.5) ** 2) / 2 - (np.log(noise / 0.15) / 1.5) ** 2 / 2
                likelihood = float(-0.5 * solved @ solved - np.log(np.diag(lower)).sum() + prior)
                best = max(best, (likelihood, scale, noise))
        return best[1], best[2]

    # Predictions

    def predict(self, vectors: Whole, shares: Floats) -> tuple[Floats, Floats]:
        """Return mean and standard deviation of the logarithm of the drop at full fidelity, without noise.

        Parameters
        ----------
        vectors : plans × layers
        shares : plans
        """
        rungs = np.zeros(len(vectors), np.int64)
        mean, jacobian = self._jacobian(vectors, rungs, self._theta, self._middle)
        if self._factor is None or self._trials is None:
            return mean, np.full(len(vectors), 0.5)
        scaled = jacobian * self._variance
        bend = _kernel(shares, self._trials.shares)
        cross = scaled @ self._rows.T + bend
        known = cross @ self._factor.T
        variance = (scaled * jacobian).sum(axis=1) + _BEND**2 - (known * known).sum(axis=1)
        return mean + bend @ self._solved, np.sqrt(np.maximum(variance, 1e-6))

    def drawn(self, rng: np.random.Generator) -> Floats:
        """Return a table of weighted losses drawn from the posterior (Matheron's rule)."""
        variance = self._prior(self.scale)
        theta = rng.standard_normal(len(variance)) * np.sqrt(variance)
        if self._factor is not None and self._trials is not None:
            noise = rng.standard_normal(len(self._trials.logs)) * np.sqrt(self._variances(self._trials, self.noise))
            bend = _kernel(self._trials.shares, self._trials.shares) + 1e-9 * np.eye(len(noise))
            residual = np.linalg.cholesky(bend) @ rng.standard_normal(len(noise))
            made = self._rows @ theta + noise + residual
            theta = self._theta + theta - variance * (self._rows.T @ (self._factor.T @ (self._factor @ made)))
        return self.weighted(theta)


def _kernel(a: Floats, b: Floats) -> Floats:
    """Return the covariance of the residual between positions on the cost axis."""
    return np.asarray(_BEND**2 * np.exp(-0.5 * ((a[:, None] - b[None, :]) / _REACH) ** 2))


def limited(order: Sequence[T], limit: int) -> list[T]:
    """Return at most `limit` of the entries, evenly thinned, the last ones always kept."""
    if len(order) <= limit:
        return list(order)
    recent, rest = order[-limit // 2 :], order[: -limit // 2]
    kept = limit - len(recent)
    return [rest[i * len(rest) // kept] for i in range(kept)] + list(recent)
