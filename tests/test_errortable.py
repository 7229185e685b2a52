"""The table of what candidates do to their layers: the trials' own fits, made by any number of processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from autorank import errortable, formats
from autorank.errortable import candidate_errors, from_json, interpolated, to_json
from autorank.fitcache import FitCache
from autorank.fitestimate import Family, families, thinned
from autorank.fitting import Unit, fit_ahead
from autorank.formats.channel_svd import ChannelSVD
from autorank.layout import canonical_weight
from autorank.plan import apply
from autorank.profiling import profile
from autorank.progress import Silent
from autorank.solvers import whitening
from autorank.solvers.curvature import predicted_loss_increase
from autorank.solvers.whitening import LayerStats
from autorank.space import Candidate, LayerCandidates, SearchSpace, build_space, read_space
from autorank.types import Choice, Errors, LayerCost, Plan
from tests.models import Decoder, TinyConv

ROOT = Path(__file__).parents[1]
ALL = ["channel_svd", "spatial_svd", "tucker2", "cp"]


class Told(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[str, int, int]] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def step(self, what: str, done: int, total: int) -> None:
        self.steps.append((what, done, total))


def space_of(
    model: nn.Module,
    inputs: torch.Tensor,
    names: list[str],
    whiten: str = "both",
    shares: tuple[float, ...] = (0.3, 0.6),
) -> SearchSpace:
    file = read_space(
        {"version": 1, "defaults": {"formats": names, "whiten": [whiten], "ranks": {"macs_kept": list(shares)}}}
    )
    return build_space(file, profile(model, (inputs,)))


def statistics(space: SearchSpace, model: nn.Module, inputs: torch.Tensor) -> dict[str, LayerStats]:
    specs = [layer.spec for layer in space.layers]
    found = whitening.collect(model, specs, [(inputs,)])
    generator = torch.Generator().manual_seed(5)
    with_gradients = {}
    for spec in specs:
        t = spec.out_channels // spec.groups
        g = torch.randn(spec.groups, t, 2 * t, generator=generator)
        with_gradients[spec.name] = replace(found[spec.name], gradient=g @ g.mT)
    return with_gradients


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return TinyConv().eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def space(model: nn.Module, images: torch.Tensor) -> SearchSpace:
    return space_of(model, images[:1], ALL)


@pytest.fixture(scope="module")
def stats(space: SearchSpace, model: nn.Module, images: torch.Tensor) -> dict[str, LayerStats]:
    return statistics(space, model, images)


def test_errors_are_those_of_the_fitted_layers(
    model: nn.Module, space: SearchSpace, stats: dict[str, LayerStats], tmp_path: Path
) -> None:
    table = candidate_errors(model, space.layers, stats, tmp_path, 3)
    assert list(table) == [(layer.spec.name, c.choice) for layer in space.layers for c in layer.candidates]
    for layer in space.layers:
        spec = layer.spec
        weight = model.get_submodule(spec.name).weight.detach()
        for candidate in layer.candidates:
            choice, fmt = candidate.choice, formats.get(candidate.choice.format)
            factors = fmt.fit(weight, spec, choice.rank, choice.options, stats[spec.name], 3)
            approx = fmt.reconstruct(factors, spec, choice.rank, choice.options)
            errors = table[spec.name, choice]
            assert errors.weight == pytest.approx(float((weight - approx).norm() / weight.norm()), rel=1e-4)
            assert errors.output == pytest.approx(whitening.output_error(weight, approx, stats[spec.name]), rel=1e-4)
            assert errors.loss == pytest.approx(predicted_loss_increase(weight, approx, stats[spec.name]), rel=1e-4)
            assert errors.sensitivity is not None


def test_trials_find_every_fit_again(
    model: nn.Module, space: SearchSpace, stats: dict[str, LayerStats], tmp_path: Path
) -> None:
    table = candidate_errors(model, space.layers, stats, tmp_path, 3)
    before = sorted(tmp_path.iterdir())
    for which in (0, -1):
        plan = Plan.of({layer.spec.name: layer.candidates[which].choice for layer in space.layers}, 3)
        specs = [layer.spec for layer in space.layers]
        _, results = apply(model, plan, specs=specs, stats=stats, cache=FitCache(tmp_path))
        for result in results:
            errors = table[result.name, result.choice]
            found = (errors.weight, errors.output, errors.sensitivity)
            assert found == (result.weight_error, result.output_error, result.sensitivity)
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture
def spawning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errortable, "SPAWN_FROM_S", 0.0)


def contents(folder: Path) -> dict[str, dict[str, str]]:
    """What the files of a cache hold; the header of a safetensors file has no fixed order."""
    found = {}
    for path in folder.iterdir():
        with safe_open(str(path), framework="pt") as file:
            found[path.name] = dict(file.metadata())
    return found


@pytest.mark.usefixtures("spawning")
def test_other_processes_fit_the_same_bits(
    model: nn.Module, space: SearchSpace, stats: dict[str, LayerStats], tmp_path: Path
) -> None:
    alone = candidate_errors(model, space.layers, stats, tmp_path / "alone", 0)
    told = Told()
    made: list[int] = []
    together = candidate_errors(model, space.layers, stats, tmp_path / "together", 0, told, 2)
    assert together == alone
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")
    counts = [done for _, done, _ in told.steps]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, len(together))
    fit_ahead([], {}, {}, tmp_path, 0, processes=2, progress=made.append)
    assert made == [0]


def test_every_kind_of_layer_and_of_statistics_travels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Decoder().eval(), torch.randn(4, 4, 5, 5)
    space = space_of(model, inputs[:1], ["channel_svd", "tucker2"])
    stats = statistics(space, model, inputs)
    stats.pop(space.layers[0].spec.name)
    plain = space_of(model, inputs[:1], ["channel_svd", "tucker2"], "none")
    layers = (plain.layers[0], *space.layers[1:])
    weights = {
        layer.spec.name: canonical_weight(model.get_submodule(layer.spec.name).weight.detach(), layer.spec)
        for layer in layers
    }
    units = [Unit(layer.spec, tuple(c.choice for c in layer.candidates), 1.0) for layer in layers]
    made = fit_ahead(units, weights, stats, tmp_path, 0, processes=1)
    assert made == sum(len(unit.choices) for unit in units)
    before = contents(tmp_path)
    table = candidate_errors(model, layers, stats, tmp_path, 0)
    assert contents(tmp_path) == before
    first = [errors for (name, _), errors in table.items() if name == layers[0].spec.name]
    assert all(errors.output is None and errors.loss is None for errors in first)


class OwnSVD(ChannelSVD):
    """A format of the user's."""

    name = "own_svd"


@pytest.fixture
def own() -> Iterator[None]:
    formats.register(OwnSVD())
    yield
    del formats._FORMATS["own_svd"]


@pytest.mark.usefixtures("own", "spawning")
def test_formats_that_only_this_process_knows_are_fitted_here(
    model: nn.Module, images: torch.Tensor, tmp_path: Path
) -> None:
    space = space_of(model, images[:1], ["own_svd", "channel_svd"], "none")
    table = candidate_errors(model, space.layers, None, tmp_path, 0, None, 2)
    same = {(name, choice.rank): errors for (name, choice), errors in table.items() if choice.format == "channel_svd"}
    for (name, choice), errors in table.items():
        assert errors == same[name, choice.rank]
        assert errors.loss is None


@pytest.mark.usefixtures("spawning")
def test_processes_that_die_cost_only_time(
    model: nn.Module,
    space: SearchSpace,
    stats: dict[str, LayerStats],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = candidate_errors(model, space.layers, stats, tmp_path / "alone", 0)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert candidate_errors(model, space.layers, stats, tmp_path / "died", 0, None, 2) == alone
    monkeypatch.setattr(sys, "executable", str(tmp_path / "not-there"))
    assert candidate_errors(model, space.layers, stats, tmp_path / "missing", 0, None, 2) == alone


SCRIPT = """
import signal, sys, torch
from pathlib import Path
from autorank import errortable
from autorank.errortable import candidate_errors
from autorank.profiling import profile
from autorank.progress import Silent
from autorank.space import build_space, read_space

class Loud(Silent):
    def step(self, what, done, total):
        print(done, flush=True)

errortable.SPAWN_FROM_S = 0.0
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(96, 96, 3, padding=1), torch.nn.Conv2d(96, 96, 3, padding=1)).eval()
space = build_space(
    read_space({"version": 1, "defaults": {"formats": ["%s"], "whiten": ["none"], "ranks": {"macs_kept": %s}}}),
    profile(model, (torch.zeros(1, 96, 8, 8),)),
)
print(len(candidate_errors(model, space.layers, None, Path(sys.argv[1]), 0, Loud(), 2)), flush=True)
"""


def started(tmp_path: Path, form: str, shares: list[float]) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT % (form, shares))
    return subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "cache")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_script_without_a_main_guard_works(tmp_path: Path) -> None:
    out, err = started(tmp_path, "tucker2", [0.3, 0.6]).communicate()
    assert out.split()[-1] == "4", err
    assert out.split().count("4") == 2  # one table, one last step: nothing ran the script again


def fitting_processes() -> set[int]:
    """The fitting processes of this machine, by number."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"autorank.fitting" in command:
            found.add(int(path.parent.name))
    return found


def children(pid: int) -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see processes")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["ctrl-c", "terminated", "killed"])
def test_no_process_outlives_the_one_that_started_it(tmp_path: Path, how: signal.Signals) -> None:
    process = started(tmp_path, "cp", [0.1 * i for i in range(1, 10)])
    workers: set[int] = set()
    while len(workers) < 2:
        assert process.poll() is None, process.communicate()
        workers = children(process.pid) & fitting_processes()
        time.sleep(0.05)
    process.send_signal(how)
    process.communicate()
    while workers & fitting_processes():
        time.sleep(0.05)
    assert process.returncode != 0


def family(model: nn.Module, images: torch.Tensor, form: str, count: int = 9) -> Family:
    shares = tuple(0.9 * (i + 1) / count for i in range(count))
    space = space_of(model, images[:1], [form], "none", shares)
    layer = next(layer for layer in space.layers if layer.spec.name == "conv2")
    return families(layer)[0]


def test_families_hold_every_candidate_once(space: SearchSpace) -> None:
    for layer in space.layers:
        grouped = [c for each in families(layer) for c in each.candidates]
        assert sorted(map(repr, grouped)) == sorted(map(repr, layer.candidates))
        for each in families(layer):
            assert len({(c.choice.format, c.choice.options) for c in each.candidates}) == 1
            assert [c.cost.macs for c in each.candidates] == sorted(c.cost.macs for c in each.candidates)


@pytest.mark.parametrize("count", [2, 3, 5, 8, 20])
def test_a_spread_holds_both_ends(model: nn.Module, images: torch.Tensor, count: int) -> None:
    whole = family(model, images, "cp")
    some = whole.spread(count)
    assert len(some.candidates) == min(count, len(whole.candidates))
    assert some.candidates[0] == whole.candidates[0]
    assert some.candidates[-1] == whole.candidates[-1]


def test_the_slowest_families_are_thinned_until_the_budget_holds(model: nn.Module, images: torch.Tensor) -> None:
    ranked = [family(model, images, form) for form in ("channel_svd", "tucker2", "cp")]
    total = sum(each.seconds for each in ranked)
    assert thinned(ranked, total) == ranked
    last = len(ranked[-1].candidates)
    for share in (0.9, 0.6, 0.4):
        some = thinned(ranked, share * total)
        assert sum(each.seconds for each in some) <= share * total
        assert some[:2] == ranked[:2]
        assert 2 <= len(some[2].candidates) < last
        last = len(some[2].candidates)
    assert [len(each.candidates) for each in thinned(ranked, 0.0)] == [len(ranked[0].candidates), 2, 2]


def test_what_is_not_fitted_lies_on_the_line_between_neighbours() -> None:
    def candidate(rank: int) -> Candidate:
        return Candidate(Choice("cp", (rank,)), LayerCost(100 * rank, 10 * rank))

    spec = SPEC
    whole = Family(spec, tuple(candidate(rank) for rank in (1, 2, 3, 5)))
    fitted = Family(spec, (whole.candidates[0], whole.candidates[-1]))
    table = {
        ("a", Choice("cp", (1,))): Errors(0.8, 0.4, 1.6, 10.0),
        ("a", Choice("cp", (5,))): Errors(0.05, 0.4, 0.1, 10.0),
    }
    found = interpolated(whole, fitted, table)
    assert set(found) == {("a", Choice("cp", (2,))), ("a", Choice("cp", (3,)))}
    assert found["a", Choice("cp", (3,))].weight == pytest.approx(0.2)
    assert found["a", Choice("cp", (3,))].loss == pytest.approx(0.4)
    assert found["a", Choice("cp", (2,))].loss == pytest.approx(0.8)
    assert found["a", Choice("cp", (2,))].output == pytest.approx(0.4)


SPEC = LayerCandidates(replace(profile(TinyConv(), (torch.zeros(1, 3, 8, 8),)).layers[1], name="a"), ()).spec


def test_a_budget_bounds_the_fits_and_is_told(
    model: nn.Module,
    images: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(errortable, "TELL_FROM_S", 0.0)
    shares = tuple(0.1 * i for i in range(1, 10))
    space = space_of(model, images[:1], ["cp"], "none", shares)
    told = Told()
    table = candidate_errors(model, space.layers, None, tmp_path, 0, told, budget_s=0.0)
    assert len(table) == sum(len(layer.candidates) for layer in space.layers)
    fits = len(list(tmp_path.iterdir()))
    assert fits < len(table)
    assert told.lines[0].startswith(f"layer errors: {fits} fits")
    assert f"the errors of {len(table) - fits} more are interpolated" in told.lines[0]
    whole = candidate_errors(model, space.layers, None, tmp_path, 0, budget_s=None)
    for key, errors in whole.items():
        assert table[key].weight == pytest.approx(errors.weight, abs=0.3)
    assert list(table) == list(whole)


@pytest.mark.usefixtures("spawning")
def test_only_what_is_not_there_yet_is_announced_and_fitted(
    model: nn.Module, images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errortable, "TELL_FROM_S", 0.01)
    few = space_of(model, images[:1], ["cp"], "none", (0.3,))
    more = space_of(model, images[:1], ["cp"], "none", (0.3, 0.6))
    first, told = Told(), Told()
    candidate_errors(model, few.layers, None, tmp_path, 0, first)
    fits = len(list(tmp_path.iterdir()))
    whole = candidate_errors(model, more.layers, None, tmp_path, 0, told, 2)
    assert told.lines[0].startswith(f"layer errors: {len(whole) - fits} fits")
    counts = [done for _, done, _ in told.steps]
    assert counts == sorted(counts)
    again = Told()
    assert candidate_errors(model, more.layers, None, tmp_path, 0, again, 2) == whole
    assert again.lines == []


def test_a_table_comes_back_from_json(
    model: nn.Module, space: SearchSpace, stats: dict[str, LayerStats], tmp_path: Path
) -> None:
    table = candidate_errors(model, space.layers, stats, tmp_path, 0)
    again = from_json(json.loads(json.dumps(to_json(table))))
    assert again == table
    assert list(again) == list(table)


@pytest.mark.parametrize("row", [{}, {"layer": "a", "choice": {"format": "cp", "rank": [0]}}], ids=["empty", "rank"])
def test_a_damaged_table_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises((KeyError, ValueError, TypeError)):
        from_json([row])
