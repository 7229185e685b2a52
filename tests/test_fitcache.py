"""The fit cache: the same answer bit for bit, another key for whatever matters, and damaged files fitted again."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autorank import fitcache, formats
from autorank.fitcache import FitCache
from autorank.formats import Factors
from autorank.formats.channel_svd import ChannelSVD
from autorank.solvers import kept
from autorank.solvers.whitening import LayerStats
from autorank.types import CallSize, Choice, LayerSpec

SPEC = LayerSpec("a", "conv2d", (12, 8, 3, 3), (1, 1), (1, 1), "zeros", (1, 1), 1, True, (CallSize(1, (5, 5), (5, 5)),))
CHOICE = Choice("tucker2", (4, 3))


class Counting(ChannelSVD):
    """Channel SVD that counts its fits."""

    fits = 0

    def fit(self, *args: Any, **kwargs: Any) -> Factors:
        type(self).fits += 1
        return super().fit(*args, **kwargs)


@pytest.fixture
def fmt() -> Counting:
    Counting.fits = 0
    return Counting()


def weight(seed: int = 0) -> Tensor:
    return torch.randn(SPEC.weight_shape, generator=torch.Generator().manual_seed(seed))


def stats(seed: int = 0, gradient: int | None = None) -> LayerStats:
    x = torch.randn(1, 72, 200, generator=torch.Generator().manual_seed(seed))
    if gradient is None:
        return LayerStats(x @ x.mT / 200, 200)
    g = torch.randn(1, 12, 30, generator=torch.Generator().manual_seed(gradient))
    return LayerStats(x @ x.mT / 200, 200, gradient=g @ g.mT)


PLAIN = Choice("channel_svd", (5,))


@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "memory"])
def test_the_second_time_is_bit_equal_and_not_fitted(fmt: Counting, tmp_path: Path, on_disk: bool) -> None:
    cache = FitCache(tmp_path / "deep" / "er" if on_disk else None)
    first, info = cache.get_or_fit(fmt, weight(), SPEC, PLAIN, stats(), 0)
    other = FitCache(cache.directory) if on_disk else cache
    second, again = other.get_or_fit(fmt, weight(), SPEC, PLAIN, stats(), 0)
    assert fmt.fits == 1
    assert (info["hit"], again["hit"]) == (False, True)
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name])
        assert first[name].dtype == second[name].dtype == torch.float32
    assert {k: v for k, v in info.items() if k != "hit"} == {k: v for k, v in again.items() if k != "hit"}


@pytest.mark.parametrize("name", formats.names())
def test_what_comes_out_is_what_the_format_fits(name: str, tmp_path: Path) -> None:
    choice = Choice(name, (2,) * len(formats.get(name).rank_names))
    direct = formats.get(name).fit(weight(), SPEC, choice.rank, choice.options, None, 3)
    for _ in range(2):
        factors, info = FitCache(tmp_path).get_or_fit(formats.get(name), weight(), SPEC, choice, None, 3)
        assert list(factors) == list(direct)
        assert all(torch.equal(factors[k], direct[k]) for k in direct)
    dense = weight().double()
    approx = formats.get(name).reconstruct(direct, SPEC, choice.rank, choice.options).double()
    assert info["weight_error"] == pytest.approx(float((dense - approx).norm() / dense.norm()))
    assert info["output_error"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"weight": weight(1)},
        {"weight": weight().double()},
        {"spec": replace(SPEC, stride=(2, 1))},
        {"choice": Choice("channel_svd", (4,))},
        {"choice": Choice("channel_svd", (5,), (("whiten", "input"),))},
        {"choice": Choice("channel_svd", (5,), (("shrink", 0.5),))},
        {"stats": stats(1)},
        {"stats": None},
        {"seed": 1},
    ],
    ids=["weight", "dtype", "stride", "rank", "whiten", "shrink", "stats", "no_stats", "seed"],
)
def test_everything_that_matters_is_in_the_key(fmt: Counting, tmp_path: Path, change: dict[str, Any]) -> None:
    base: dict[str, Any] = {"weight": weight(), "spec": SPEC, "choice": PLAIN, "stats": stats(), "seed": 0}
    for arguments in (base, base | change):
        FitCache(tmp_path).get_or_fit(fmt, *arguments.values())
    assert fmt.fits == 2


@pytest.mark.parametrize("whiten", ["none", "input", "output", "both"])
def test_gradients_are_in_the_key_whenever_there_are_any(fmt: Counting, tmp_path: Path, whiten: str) -> None:
    """The predicted rise of the loss depends on them even where the fit does not."""
    choice = Choice("channel_svd", (5,), (("whiten", whiten),))
    found = [FitCache(tmp_path).get_or_fit(fmt, weight(), SPEC, choice, stats(0, g), 0) for g in (1, 2, 1)]
    assert fmt.fits == 2
    assert torch.equal(found[0][0]["first"], found[1][0]["first"]) == (whiten in ("none", "input"))
    assert found[0][1]["loss_increase"] != found[1][1]["loss_increase"]
    assert torch.equal(found[0][0]["first"], found[2][0]["first"])
    assert found[0][1]["loss_increase"] == found[2][1]["loss_increase"]


def test_the_predicted_rise_is_the_trace_of_the_errors_moments(tmp_path: Path) -> None:
    choice, given = Choice("channel_svd", (5,), (("whiten", "both"),)), stats(0, 1)
    factors, info = FitCache(tmp_path).get_or_fit(ChannelSVD(), weight(), SPEC, choice, given, 0)
    delta = (weight() - ChannelSVD().reconstruct(factors, SPEC, choice.rank, choice.options)).double().reshape(12, 72)
    assert given.gradient is not None
    expected = torch.einsum("ab,bi,ij,aj->", given.gradient[0].double(), delta, given.covariance[0].double(), delta) / 2
    assert info["loss_increase"] == pytest.approx(float(expected))


def test_the_code_of_the_formats_is_in_the_key(fmt: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FitCache(tmp_path).get_or_fit(fmt, weight(), SPEC, PLAIN, None, 0)
    monkeypatch.setattr(fitcache, "_code", lambda module: "changed")
    FitCache(tmp_path).get_or_fit(fmt, weight(), SPEC, PLAIN, None, 0)
    assert fmt.fits == 2


def test_the_name_and_the_calls_of_a_layer_are_not_in_the_key(fmt: Counting, tmp_path: Path) -> None:
    FitCache(tmp_path).get_or_fit(fmt, weight(), SPEC, PLAIN, None, 0)
    FitCache(tmp_path).get_or_fit(fmt, weight(), replace(SPEC, name="b", calls=(), bias=False), PLAIN, None, 0)
    assert fmt.fits == 1


@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "memory"])
def test_what_a_caller_does_to_the_factors_does_not_reach_the_cache(tmp_path: Path, on_disk: bool) -> None:
    cache = FitCache(tmp_path if on_disk else None)
    fmt = formats.get("tucker2")
    clean = fmt.fit(weight(), SPEC, CHOICE.rank, (), None, 0)
    for _ in range(3):
        factors, _ = cache.get_or_fit(fmt, weight(), SPEC, CHOICE, None, 0)
        assert all(torch.equal(factors[k], clean[k]) for k in clean)
        for factor in factors.values():
            factor.zero_()


def middle_of_the_data(data: bytes) -> bytes:
    return data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[: len(data) // 2], id="half"),
        pytest.param(lambda data: data[:-1], id="one_byte_short"),
        pytest.param(lambda data: data[:6], id="header_cut"),
        pytest.param(lambda data: b"\xff" * len(data), id="garbage"),
        pytest.param(lambda data: os.urandom(8) + data[8:], id="header_length"),
        pytest.param(middle_of_the_data, id="one_bit"),
        pytest.param(lambda data: data.replace(b"weight_error", b"weight_errur"), id="metadata"),
        pytest.param(lambda data: data.replace(b'"digest"', b'"disgest'), id="json"),
        pytest.param(lambda data: data.replace(b'"digest"', b'"diggst"'), id="no_digest"),
    ],
)
def test_a_damaged_file_is_fitted_again_and_replaced(fmt: Counting, tmp_path: Path, damage: Any) -> None:
    first, info = FitCache(tmp_path).get_or_fit(fmt, weight(), SPEC, PLAIN, None, 0)
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    bad = damage(good)
    assert bad != good
    file.write_bytes(bad)
    second, again = FitCache(tmp_path).get_or_fit(fmt, weight(), SPEC, PLAIN, None, 0)
    assert fmt.fits == 2
    assert info == again
    assert all(torch.equal(first[k], second[k]) for k in first)
    FitCache(tmp_path).get_or_fit(fmt, weight(), SPEC, PLAIN, None, 0)
    assert fmt.fits == 2
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_file_under_the_wrong_name_is_not_believed(fmt: Counting, tmp_path: Path) -> None:
    FitCache(tmp_path).get_or_fit(fmt, weight(), SPEC, PLAIN, None, 0)
    (one,) = tmp_path.iterdir()
    FitCache(tmp_path).get_or_fit(fmt, weight(1), SPEC, PLAIN, None, 0)
    (two,) = set(tmp_path.iterdir()) - {one}
    two.write_bytes(one.read_bytes())
    _, info = FitCache(tmp_path).get_or_fit(fmt, weight(1), SPEC, PLAIN, None, 0)
    assert not info["hit"]


def test_a_directory_in_place_of_the_file_is_no_error(fmt: Counting, tmp_path: Path) -> None:
    FitCache(tmp_path).get_or_fit(fmt, weight(), SPEC, PLAIN, None, 0)
    (file,) = tmp_path.iterdir()
    file.unlink()
    file.mkdir()
    with pytest.warns(UserWarning, match="could not be cached"):
        FitCache(tmp_path).get_or_fit(fmt, weight(), SPEC, PLAIN, None, 0)
    assert fmt.fits == 2
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_cache_that_cannot_be_written_costs_only_time(fmt: Counting, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.warns(UserWarning, match="could not be cached"):
        factors, info = FitCache(blocked).get_or_fit(fmt, weight(), SPEC, PLAIN, None, 0)
    assert factors
    assert not info["hit"]


def test_statistics_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[tuple[int, ...]] = []
    real = kept.digest
    monkeypatch.setattr(kept, "digest", lambda x: hashed.append(tuple(x.shape)) or real(x))
    cache, given = FitCache(None), stats()
    for rank in range(1, 5):
        cache.get_or_fit(formats.get("channel_svd"), weight(), SPEC, Choice("channel_svd", (rank,)), given, 0)
    assert hashed.count((1, 72, 72)) == 1
    given.covariance.mul_(2)
    cache.get_or_fit(formats.get("channel_svd"), weight(), SPEC, Choice("channel_svd", (1,)), given, 0)
    assert hashed.count((1, 72, 72)) == 2


def test_the_code_hash_is_the_same_in_every_process() -> None:
    command = "from autorank.fitcache import _code; print(_code('autorank.formats.tucker2'))"
    found = {
        subprocess.run(
            [sys.executable, "-c", command], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {fitcache._code("autorank.formats.tucker2").encode() + b"\n"}


def fit_many(directory: str, barrier: Any, results: Any) -> None:
    torch.set_num_threads(1)
    cache = FitCache(Path(directory))
    barrier.wait()
    sums = []
    for rank in range(1, 9):
        choice = Choice("channel_svd", (rank,))
        factors, info = cache.get_or_fit(formats.get("channel_svd"), weight(), SPEC, choice, None, 0)
        sums.append([info["weight_error"], *(kept.digest(f) for f in factors.values())])
    results.put(sums)


def test_several_processes_share_one_directory(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    workers = [context.Process(target=fit_many, args=(str(tmp_path), barrier, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert found[0] == found[1] == found[2]
    assert len(list(tmp_path.iterdir())) == 8
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}
