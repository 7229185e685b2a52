"""Tensor train, tensor ring and tensor chain against the contract."""

import functools
import itertools

from autorank.solvers import ring
from autorank.testing.formats import CONVOLUTIONS, FormatContract

SPLIT = ("conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d")


class Loops(FormatContract):
    """One option set is enough where every fit is iterative; test_trains has the others."""

    exact_at_max_rank = False
    slack = 3e-2
    every = 5

    def choices(self, spec):
        yield from itertools.islice(super().choices(spec), 1)

    def test_what_was_fitted_before_changes_nothing(self, sample, monkeypatch):
        """As for every format; a few sweeps show it as well as many."""
        monkeypatch.setattr(ring, "fit", functools.partial(ring.fit, sweeps=3))
        super().test_what_was_fitted_before_changes_nothing(sample, monkeypatch)


class TestTensorTrain(FormatContract):
    format_name = "tensor_train"
    kinds = CONVOLUTIONS
    # The inner bonds are smaller than the largest ones, see test_trains.
    exact_at_max_rank = False
    slack = 1e-3
    every = 3


class TestTensorChain(Loops):
    format_name = "tensor_chain"
    kinds = CONVOLUTIONS


class TestTensorRing(Loops):
    format_name = "tensor_ring"
    kinds = SPLIT
