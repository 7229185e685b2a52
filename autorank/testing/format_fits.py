"""The part of the format contract about fits, plain and whitened."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from autorank.errors import FormatError
from autorank.formats import Factors, Options
from autorank.solvers.kept import KEPT
from autorank.solvers.whitening import LayerStats, output_error
from autorank.testing import cases
from autorank.testing.cases import Case, random
from autorank.testing.format_base import ContractBase
from autorank.types import LayerSpec


class FitContract(ContractBase):
    """The factors that a format finds for a weight."""

    # The fit

    def test_identity_at_full_rank(self, sample: Case) -> None:
        """The largest rank loses nothing."""
        if not self.exact_at_max_rank:
            return
        for options in self.choices(sample.spec):
            weight = random(sample.spec.weight_shape, 0).float()
            assert self.error(weight, sample.spec, self.format.max_rank(sample.spec, options), options) < 1e-4

    def test_error_falls_as_the_rank_grows(self, sample: Case) -> None:
        """More rank is never worse, and in the end better."""
        weight = random(sample.spec.weight_shape, 0)
        for options in self.choices(sample.spec):
            top = self.format.max_rank(sample.spec, options)
            ranks = [tuple(max(1, math.ceil(r * share)) for r in top) for share in (0.01, 0.25, 0.5, 0.75, 1)]
            errors = [self.error(weight, sample.spec, rank, options) for rank in ranks]
            assert all(later <= earlier + self.slack for earlier, later in itertools.pairwise(errors))
            assert errors[-1] < errors[0] <= 1 + self.slack

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
    def test_weight_that_is_not_finite_names_the_layer(self, value: float, sample: Case) -> None:
        """NaN and infinite weights are errors that name the layer."""
        weight = torch.ones(sample.spec.weight_shape)
        weight.view(-1)[3] = value
        for options in self.choices(sample.spec):
            with pytest.raises(FormatError, match=sample.spec.name):
                self.format.fit(weight, sample.spec, self.middle_rank(sample.spec, options), options)

    def test_weight_of_another_shape_names_the_layer(self, sample: Case) -> None:
        """A weight of another shape is an error that names the layer."""
        for options in self.choices(sample.spec):
            with pytest.raises(FormatError, match=sample.spec.name):
                self.format.fit(torch.ones(4, 4), sample.spec, self.middle_rank(sample.spec, options), options)

    @pytest.mark.parametrize("hard", list(cases.HARD_WEIGHTS))
    @pytest.mark.parametrize("whiten", ["none", "input"])
    def test_hard_weights_stay_finite(self, hard: str, whiten: str, sample: Case) -> None:
        """Zero, constant, tiny, huge and rank-deficient weights give finite factors and outputs."""
        spec = sample.spec
        weight = cases.HARD_WEIGHTS[hard](spec.weight_shape).float()
        for options in self.whitened(spec, whiten):
            stats = cases.real_statistics(sample)
            for rank in (self.middle_rank(spec, options), self.format.max_rank(spec, options)):
                factors = self.format.fit(weight, spec, rank, options, stats)
                approx = self.format.reconstruct(factors, spec, rank, options)
                assert torch.isfinite(approx).all()
                y = self.format.layer(spec, rank, options, factors)(sample.input(1, dtype=torch.float32))
                assert torch.isfinite(y).all()
            if self.exact_at_max_rank:
                error = (approx.double() - weight.double()).norm()
                assert error <= 1e-4 * weight.double().norm()

    def test_same_seed_same_factors_bit_for_bit(self, sample: Case) -> None:
        """The fit is a function of its arguments: no global random state, no change to the weight."""
        weight = random(sample.spec.weight_shape, 0).float()
        before = weight.clone()
        stats = cases.real_statistics(sample)
        for whiten in ("none", "input"):
            for options in self.whitened(sample.spec, whiten):
                rank = self.middle_rank(sample.spec, options)
                state = torch.random.get_rng_state()
                one = self.format.fit(weight, sample.spec, rank, options, stats, seed=3)
                assert torch.equal(state, torch.random.get_rng_state()), "the fit draws from the global generator"
                with torch.random.fork_rng():
                    torch.manual_seed(99)
                    two = self.format.fit(weight, sample.spec, rank, options, stats, seed=3)
                assert all(torch.equal(one[name], two[name]) for name in one)
        assert torch.equal(weight, before), "the fit changed the weight"

    def test_what_was_fitted_before_changes_nothing(self, sample: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ranks in any order, after other weights or with nothing kept: the same factors, bit for bit."""
        spec, weight = sample.spec, random(sample.spec.weight_shape, 0).float()
        stats = cases.real_statistics(sample)
        for whiten in ("none", "input"):
            for options in self.whitened(spec, whiten):
                top = self.format.max_rank(spec, options)
                ranks = [*dict.fromkeys(tuple(max(1, r * n // 4) for r in top) for n in range(5))]

                def fit(rank: tuple[int, ...], options: Options = options) -> Factors:
                    return self.format.fit(weight, spec, rank, options, stats, seed=3)

                cold = {}
                for rank in ranks:
                    KEPT.clear()
                    cold[rank] = fit(rank)
                for order in (ranks, ranks[::-1]):
                    KEPT.clear()
                    for rank in order:
                        found = fit(rank)
                        assert all(torch.equal(found[name], cold[rank][name]) for name in cold[rank])
                        for factor in found.values():
                            factor.zero_()  # they are the caller's own
                with monkeypatch.context() as patch:
                    patch.setattr(KEPT, "limit", 0)
                    KEPT.clear()
                    assert all(torch.equal(fit(ranks[0])[name], cold[ranks[0]][name]) for name in cold[ranks[0]])
                # Weights and statistics that are changed in place are others.
                weight.data.mul_(2)
                stats.covariance.mul_(torch.linspace(1, 3, stats.covariance.shape[1])[:, None])
                stats.covariance.copy_((stats.covariance + stats.covariance.mT) / 2)
                changed = fit(ranks[-1])
                KEPT.clear()
                again = fit(ranks[-1])
                assert all(torch.equal(changed[name], again[name]) for name in again)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_weights_of_other_types(self, dtype: torch.dtype, sample: Case) -> None:
        """Weights of every floating-point type give float32 factors without gradients."""
        weight = nn.Parameter(random(sample.spec.weight_shape, 0).to(dtype))
        for options in self.choices(sample.spec):
            factors = self.format.fit(weight, sample.spec, self.middle_rank(sample.spec, options), options)
            assert all(f.dtype == torch.float32 and not f.requires_grad for f in factors.values())

    # Whitening

    @pytest.mark.parametrize("whiten", ["input", "output", "both"])
    def test_whitened_error_is_at_most_the_plain_one(self, whiten: str, sample: Case) -> None:
        """Whitening lowers the error that it is meant to lower: that of the output, of the loss, or of both."""
        spec = sample.spec
        weight = random(spec.weight_shape, 0)
        # Separable statistics: what a format whitens by is then the whole truth, whichever axes it merges.
        stats = cases.separable_statistics(spec)
        seen = replace(stats, gradient=cases.gradient_covariance(spec))
        for plain in self.choices(spec):
            if whiten not in self.format.whitenings(spec, plain):
                continue
            rank = self.middle_rank(spec, plain)
            errors = []
            for options in (plain, tuple(sorted((*plain, ("whiten", whiten), ("shrink", 0.0))))):
                factors = self.format.fit(weight, spec, rank, options, seen)
                approx = self.format.reconstruct(factors, spec, rank, options)
                errors.append(_weighted_error(weight, approx, spec, seen, whiten))
            assert errors[1] <= errors[0] * (1 + max(self.slack, 1e-5))

    def test_sensitivity_is_the_squared_norm_of_the_jacobian(self, sample: Case) -> None:
        """The closed form equals what automatic differentiation of the reconstruction gives."""
        spec = sample.spec
        for options in self.choices(spec):
            rank = tuple(min(2, top) for top in self.format.max_rank(spec, options))
            factors = self.format.fit(random(spec.weight_shape, 0), spec, rank, options)
            doubled = {name: factor.double() for name, factor in factors.items()}

            def weight_of(found: Factors, rank: tuple[int, ...] = rank, options: Options = options) -> Tensor:
                return self.format.reconstruct(found, spec, rank, options)

            jacobians = torch.func.jacrev(weight_of)(doubled)
            expected = sum(float(jacobian.square().sum()) for jacobian in jacobians.values())
            assert self.format.sensitivity(factors, spec, rank, options) == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30], ids=["dead", "tiny", "huge"])
    def test_whitening_by_extreme_or_singular_statistics(self, scale: float, sample: Case) -> None:
        """Dead inputs and extreme scales stay finite, and full rank still loses nothing."""
        spec = sample.spec
        weight = random(spec.weight_shape, 0).float()
        stats = cases.separable_statistics(spec)
        covariance = stats.covariance.clone()
        covariance[:, : covariance.shape[1] // 2] = 0
        covariance[:, :, : covariance.shape[1] // 2] = 0
        for options in self.whitened(spec, "input"):
            top = self.format.max_rank(spec, options)
            for cov in (covariance, stats.covariance * scale):
                factors = self.format.fit(weight, spec, top, options, LayerStats(cov, 10))
                assert all(torch.isfinite(factor).all() for factor in factors.values())
                if self.exact_at_max_rank:
                    error = (self.format.reconstruct(factors, spec, top, options) - weight).norm() / weight.norm()
                    assert error < 1e-4

    def test_whitening_needs_the_layers_own_statistics(self, sample: Case) -> None:
        """Missing, foreign or broken statistics are errors that name the layer."""
        spec = sample.spec
        nan = torch.full_like(cases.separable_statistics(spec).covariance, float("nan"))
        for options in self.whitened(spec, "input"):
            rank = self.middle_rank(spec, options)
            for stats in (None, LayerStats(torch.eye(2)[None], 1), LayerStats(nan, 1)):
                with pytest.raises(FormatError, match=spec.name):
                    self.format.fit(random(spec.weight_shape, 0), spec, rank, options, stats)

    def test_whitening_by_factorised_statistics(self, sample: Case) -> None:
        """Channel statistics alone give what full ones give when the kernel positions are white."""
        spec = sample.spec
        weight = random(spec.weight_shape, 0)
        full = cases.separable_statistics(spec)
        channels = LayerStats(full.reduced(spec.kernel, ()), full.count, factorised=True)
        for options in self.whitened(spec, "input"):
            rank = self.middle_rank(spec, options)
            one, two = (
                self.format.reconstruct(self.format.fit(weight, spec, rank, options, stats), spec, rank, options)
                for stats in (full, channels)
            )
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)

    def test_whitening_by_diagonal_statistics(self, sample: Case) -> None:
        """Variances alone give what a full covariance gives when the channels are uncorrelated."""
        spec = sample.spec
        weight = random(spec.weight_shape, 0)
        channels = spec.weight_shape[1]
        variances = torch.logspace(0, -2, channels).expand(spec.groups, channels).contiguous()
        each = variances.repeat_interleave(math.prod(spec.kernel), dim=1)
        forms = (LayerStats(each.diag_embed(), 9), LayerStats(each, 9), LayerStats(variances, 9, factorised=True))
        for options in self.whitened(spec, "input"):
            rank = self.middle_rank(spec, options)
            found = [self.format.fit(weight, spec, rank, options, stats) for stats in forms]
            approx = [self.format.reconstruct(factors, spec, rank, options) for factors in found]
            errors = [output_error(weight, a, stats) for a, stats in zip(approx, forms, strict=True)]
            for other, error in zip(approx[1:], errors[1:], strict=True):
                torch.testing.assert_close(other, approx[0], rtol=1e-4, atol=1e-4)
                assert error == pytest.approx(errors[0], rel=1e-4)


def _weighted_error(weight: Tensor, approx: Tensor, spec: LayerSpec, stats: LayerStats, whiten: str) -> float:
    """Return tr(G Δ Σ Δᵀ), with the identity in the place of what is not whitened, by the covariances themselves."""
    delta = (approx.double() - weight).reshape(spec.groups, spec.out_channels // spec.groups, -1)
    if whiten != "output":
        delta_input = torch.einsum("gts,gsu->gtu", delta, stats.covariance.double())
    else:
        delta_input = delta
    gradient = stats.gradient if whiten != "input" else None
    delta_output = delta if gradient is None else torch.einsum("gtu,gus->gts", gradient.double(), delta)
    return float((delta_input * delta_output).sum())
