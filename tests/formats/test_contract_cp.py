"""CP and Tucker-CP against the contract."""

import functools

from autorank.solvers import cp
from autorank.testing.formats import CONVOLUTIONS, FormatContract


class Components(FormatContract):
    """What both have in common."""

    kinds = CONVOLUTIONS
    exact_at_max_rank = False
    slack = 0.02
    every = 5

    def test_what_was_fitted_before_changes_nothing(self, sample, monkeypatch):
        """As for every format; a sweep shows it as well as many."""
        monkeypatch.setattr(cp, "cp", functools.partial(cp.cp, max_sweeps=1))
        monkeypatch.setattr(cp, "TRIAL_SWEEPS", 1)
        monkeypatch.setattr(cp, "ROUNDS", 0)
        monkeypatch.setattr(cp, "CORRECTIONS", 0)
        super().test_what_was_fitted_before_changes_nothing(sample, monkeypatch)


class TestCP(Components):
    format_name = "cp"


class TestTuckerCP(Components):
    format_name = "tucker_cp"
