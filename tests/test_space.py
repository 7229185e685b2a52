"""Search spaces: reading, patterns, candidates and their exact costs."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from autorank import formats, measure
from autorank.errors import SpaceError
from autorank.plan import apply
from autorank.profiling import profile
from autorank.space import SearchSpace, build_space, read_space, shipped, shipped_text
from autorank.types import CallSize, Choice, Cost, LayerSpec, LeftAlone, ModelProfile, Plan


def conv(name, out, in_, kernel=3, size=16, bias=False):
    return LayerSpec(
        name,
        "conv2d",
        (out, in_, kernel, kernel),
        (1, 1),
        (kernel // 2,) * 2,
        dilation=(1, 1),
        bias=bias,
        calls=(CallSize(1, (size, size), (size, size)),),
    )


LAYERS = (
    conv("conv1", 16, 3),
    conv("layer1.0.conv1", 16, 16),
    conv("layer1.1.conv1", 16, 16),
    conv("layer2.0.downsample.0", 32, 16, 1),
    conv("layer3.0.conv1", 64, 64, size=8),
    conv("layer3.1.conv1", 64, 64, size=8),
    LayerSpec("fc", "linear", (10, 64), bias=True, calls=(CallSize(1, (), ()),)),
)
ALONE = (LeftAlone("up", "ConvTranspose2d", "it is never called", 90, 900),)
MACS = sum(spec.macs for spec in LAYERS) + 1234
PARAMS = sum(spec.params for spec in LAYERS) + 56
PROFILE = ModelProfile(LAYERS, ALONE, Cost(MACS, PARAMS, 4 * PARAMS))


def build(defaults=None, rules=(), dense=(), model=PROFILE, latencies=None) -> SearchSpace:
    data = {"version": 1, "defaults": defaults or {}, "rules": list(rules), "dense": list(dense)}
    return build_space(read_space(data), model, latencies)


def ranks(space, layer):
    return [candidate.choice.rank for candidate in space.by_name[layer].candidates]


# Shipped spaces


@pytest.mark.parametrize("name", shipped())
def test_shipped_space_builds(name):
    assert shipped_text(name).startswith("# ")
    space = build_space(read_space(name), PROFILE)
    assert len(space.layers) >= 4
    assert {layer.spec.name for layer in space.layers} | {item.name for item in space.kept_dense} == {
        spec.name for spec in LAYERS
    }
    for layer in space.layers:
        costs = [candidate.cost.macs for candidate in layer.candidates]
        assert costs == sorted(costs)
        assert len({candidate.choice for candidate in layer.candidates}) == len(costs)
        for candidate in layer.candidates:
            saves = candidate.cost.macs < layer.spec.macs or candidate.cost.params < layer.spec.params
            assert saves or space.bytes_of(layer.spec, candidate.cost) < 4 * layer.spec.params
    for item in space.kept_dense:
        assert item.reason


class EveryKind(nn.Module):
    """A layer of each kind, with shapes that some options have no use for."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                "sequence": nn.Conv1d(8, 12, 5, padding=2),
                "flat": nn.Conv2d(8, 12, (1, 5), padding=(0, 2)),
                "odd": nn.Conv2d(9, 13, 3),
                "grouped": nn.Conv2d(8, 8, 3, groups=4),
                "depthwise": nn.Conv2d(8, 8, 3, groups=8),
                "volume": nn.Conv3d(4, 8, (3, 1, 3)),
                "up1": nn.ConvTranspose1d(8, 8, 4, stride=2),
                "up2": nn.ConvTranspose2d(8, 8, 3, stride=2, groups=2),
                "up3": nn.ConvTranspose3d(4, 8, 2),
                "linear": nn.Linear(9, 12),
            }
        )
        convolutions = {name: layer for name, layer in self.layers.items() if name != "linear"}
        self.shapes = {
            name: (layer.in_channels, *(6,) * len(layer.kernel_size)) for name, layer in convolutions.items()
        }

    def forward(self, x):
        found = [self.layers["linear"](x)]
        for name, (channels, *size) in self.shapes.items():
            found.append(self.layers[name](x[:, :channels].reshape(1, -1, *[1] * len(size)).repeat(1, 1, *size)))
        return found


@pytest.mark.parametrize("name", shipped())
def test_shipped_space_serves_a_model_with_layers_of_every_kind(name):
    model = EveryKind()
    space = build_space(read_space(name), profile(model, (torch.ones(1, 9),)))
    reasons = {item.name: item.reason for item in space.kept_dense}
    assert {layer.spec.name for layer in space.layers} | reasons.keys() >= {f"layers.{key}" for key in model.layers}
    assert space.layers
    assert not any("\n" in reason for reason in reasons.values())


@pytest.mark.parametrize("name", shipped())
def test_what_a_shipped_space_is_for_fits_on_a_line(name):
    assert len(shipped_text(name).split("\n", 1)[0]) <= 100


def test_expected_spaces_are_shipped():
    assert set(shipped()) >= {"default", "quantized", "channel_svd", "spatial_svd", "tucker2", "tucker2_whitened"}
    assert build_space(read_space("small"), PROFILE).size < build_space(read_space("default"), PROFILE).size


@pytest.mark.parametrize(
    ("name", "whiten"), [("tucker2", {"none"}), ("tucker2_whitened", {"input"})], ids=["plain", "whitened"]
)
def test_shipped_whitening(name, whiten):
    space = build_space(read_space(name), PROFILE)
    assert {c.choice.option("whiten", "none") for layer in space.layers for c in layer.candidates} == whiten


# Costs


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=True)
        self.body = nn.Sequential(
            nn.Conv2d(12, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding="same"),
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("seed", range(4))
def test_cost_of_a_plan_is_what_fvcore_counts(seed):
    torch.manual_seed(0)
    model, inputs = Net().eval(), (torch.randn(1, 3, 16, 16),)
    space = build(
        {"formats": ["channel_svd", "spatial_svd", "tucker2"], "whiten": "none"}, model=profile(model, inputs)
    )
    rng = torch.Generator().manual_seed(seed)
    plan = {}
    for layer in space.layers:
        pick = int(torch.randint(0, len(layer.candidates) + 1, (), generator=rng))
        if pick:
            plan[layer.spec.name] = layer.candidates[pick - 1].choice
    changed, _ = apply(model, Plan.of(plan))
    assert space.cost(Plan.of(plan)) == measure.count(changed, inputs)[0]


def test_cost_is_dense_less_what_goes_plus_what_comes():
    space = build({"formats": ["tucker2"]})
    assert space.cost(Plan()) == space.dense
    a, b = (space.by_name[name].candidates[2] for name in ("conv1", "layer3.0.conv1"))
    cost = space.cost(Plan.of({"conv1": a.choice, "layer3.0.conv1": b.choice}))
    assert cost.macs == MACS - LAYERS[0].macs - LAYERS[4].macs + a.cost.macs + b.cost.macs
    assert cost.params == PARAMS - LAYERS[0].params - LAYERS[4].params + a.cost.params + b.cost.params
    assert cost.bytes == 4 * cost.params
    assert cost.latency_ms is None
    assert space.size == math.prod(len(layer.candidates) + 1 for layer in space.layers)


def test_cost_of_a_choice_that_is_no_candidate():
    space = build({"formats": ["tucker2"], "ranks": {"counts": [4]}})
    choice = Choice("channel_svd", (7,))
    expected = formats.get("channel_svd").cost(LAYERS[4], (7,))
    assert space.cost(Plan.of({"layer3.0.conv1": choice})).macs == MACS - LAYERS[4].macs + expected.macs


def test_bytes_follow_the_dense_model():
    half = ModelProfile(LAYERS, (), Cost(MACS, PARAMS, 2 * PARAMS))
    space = build({"formats": ["tucker2"]}, model=half)
    cost = space.cost(Plan.of({"conv1": space.by_name["conv1"].candidates[0].choice}))
    assert cost.bytes == 2 * cost.params


def test_cost_of_a_layer_that_is_not_in_the_space():
    space = build({"formats": ["tucker2"]})
    with pytest.raises(
        SpaceError, match=r"layer 'layer3\.conv1' is not in the search space; the nearest layers are layer3\.0"
    ):
        space.cost(Plan.of({"layer3.conv1": Choice("tucker2", (1, 1))}))


def test_latency_is_the_sum_of_the_table():
    plain = build({"formats": ["tucker2"]})
    table = {(spec.name, None): 2.0 for spec in LAYERS}
    table |= {(layer.spec.name, c.choice): 0.5 for layer in plain.layers for c in layer.candidates}
    first = {name: plain.by_name[name].candidates[0].choice for name in ("conv1", "layer3.0.conv1")}
    summed = build({"formats": ["tucker2"]}, latencies=table)
    assert summed.dense.latency_ms == 2.0 * len(LAYERS)
    assert summed.cost(Plan.of(first)).latency_ms == pytest.approx(2.0 * len(LAYERS) - 3.0)
    measured = ModelProfile(LAYERS, (), Cost(MACS, PARAMS, 4 * PARAMS, latency_ms=9.0))
    space = build({"formats": ["tucker2"]}, model=measured, latencies=table)
    assert space.cost(Plan.of(first)).latency_ms == pytest.approx(6.0)
    everything = {layer.spec.name: layer.candidates[0].choice for layer in space.layers}
    assert space.cost(Plan.of(everything)).latency_ms == pytest.approx(
        max(9.0 - 1.5 * len(everything), 0.5 * len(everything))
    )
    assert space.cost(Plan.of({"conv1": Choice("channel_svd", (1,))})).latency_ms is None


# Ranks


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"ranks": {"counts": [4, 8, 1000]}}, [(4,), (8,)]),
        ({"ranks": {"fractions": [0.1, 0.25, 0.5]}}, [(6,), (16,), (32,)]),
        ({"ranks": {"counts": [4, 8, 9, 13]}, "multiple_of": 8}, [(8,), (16,)]),
        ({"ranks": {"fractions": [0.01]}}, [(1,)]),
        ({"ranks": {"counts": 5}}, [(5,)]),
    ],
    ids=["counts", "fractions", "multiples", "at-least-one", "single-value"],
)
def test_ranks_of_one_mode(settings, expected):
    space = build({"formats": ["channel_svd"], **settings})
    assert ranks(space, "layer3.0.conv1") == expected


def test_multiples_never_exceed_the_largest_rank():
    space = build({"formats": ["tucker2"], "ranks": {"counts": [2, 4, 100]}, "multiple_of": 8})
    assert set(ranks(space, "conv1")) <= {(8, 3), (16, 3)}  # three input channels: no multiple of eight fits
    assert set(ranks(space, "layer3.0.conv1")) <= {(8, 8), (64, 64)}


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ({"counts": [4, 8]}, {(4, 4), (8, 8)}),
        ({"counts": [4, 8], "combine": "product"}, {(4, 4), (4, 8), (8, 4), (8, 8)}),
        ({"modes": {"R_out": {"counts": [4]}, "R_in": {"fractions": [0.25, 0.5]}}}, {(4, 16), (4, 32)}),
    ],
    ids=["equal", "product", "per-mode"],
)
def test_ranks_of_two_modes(grid, expected):
    space = build({"formats": ["tucker2"], "ranks": grid})
    assert set(ranks(space, "layer3.0.conv1")) == expected


@pytest.mark.parametrize("name", ["channel_svd", "spatial_svd", "tucker2"])
def test_macs_grid_takes_the_nearest_rank(name):
    shares = [0.1, 0.3, 0.5, 0.7]
    space = build({"formats": [name], "ranks": {"macs_kept": shares}})
    spec, fmt = LAYERS[4], formats.get(name)
    by_options = {}
    for candidate in space.by_name[spec.name].candidates:
        by_options.setdefault(candidate.choice.options, []).append(candidate)
    for options, found in by_options.items():
        largest = fmt.max_rank(spec, options)
        diagonal = {tuple(max(1, round(i * m / max(largest))) for m in largest) for i in range(1, max(largest) + 1)}
        costs = [fmt.cost(spec, rank, options).macs for rank in diagonal]
        best = {min(abs(c - share * spec.macs) for c in costs) for share in shares}
        got = {min(abs(c.cost.macs - share * spec.macs) for c in found) for share in shares}
        assert got == best


def test_max_candidates_thins_evenly_along_the_macs():
    grid = {"counts": list(range(1, 57))}
    whole = build({"formats": ["channel_svd"], "ranks": grid, "max_candidates": 1000})
    thin = build({"formats": ["channel_svd"], "ranks": grid, "max_candidates": 5})
    all_ranks, few = ranks(whole, "layer3.0.conv1"), ranks(thin, "layer3.0.conv1")
    assert len(all_ranks) == 56
    assert len(few) == 5
    assert (few[0], few[-1]) == (all_ranks[0], all_ranks[-1])
    steps = [b[0] - a[0] for a, b in pairwise(few)]
    assert max(steps) - min(steps) <= 1
    assert ranks(build({"formats": ["channel_svd"], "ranks": grid, "max_candidates": 1}), "layer3.0.conv1") == [(28,)]


# Options


def options_of(space, layer="layer3.0.conv1"):
    return {candidate.choice.options for candidate in space.by_name[layer].candidates}


@pytest.mark.parametrize(
    ("entry", "whiten", "expected"),
    [
        ("channel_svd", ["none"], {()}),
        ("channel_svd", ["none", "input"], {(), (("whiten", "input"),)}),
        ({"name": "spatial_svd", "first": "h"}, "none", {(("first", "h"),)}),
        ({"name": "spatial_svd", "first": ["h", "w"]}, "none", {(("first", "h"),), (("first", "w"),)}),
        ("spatial_svd", "none", {(("first", "h"),), (("first", "w"),)}),
        (
            {"name": "channel_svd", "shrink": [0.0, 0.1]},
            ["none", "input"],
            {(), (("shrink", 0.0), ("whiten", "input")), (("shrink", 0.1), ("whiten", "input"))},
        ),
    ],
    ids=["plain", "both", "one-order", "both-orders", "all-orders", "shrink"],
)
def test_options(entry, whiten, expected):
    assert options_of(build({"formats": [entry], "whiten": whiten, "ranks": {"counts": [4]}})) == expected


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"name": "kronecker", "a": "8x4x1x1"}, {"a": {"8x4x1x1"}}),
        ({"name": "kronecker", "a": ["outputs", "64x8x1x1", "2x2x3x1"]}, {"a": {"64x8x1x1", "2x2x3x1"}}),
        ({"name": "sekron", "shapes": "4x4x1x1/4x4x3x3"}, {"shapes": {"4x4x1x1/4x4x3x3"}}),
        ({"name": "sekron", "shapes": ["rows", "8x8x3x1"]}, {"shapes": {"64x1x3x1/1x1x1x3", "8x8x3x1"}}),
        ({"name": "tensor_chain", "closing": [2, 4, 6]}, {"closing": {2, 4, 6}}),
        ({"name": "tensor_ring", "closing": 4, "inner": [1, 2.0]}, {"closing": {4}, "inner": {1.0, 2.0}}),
        ({"name": "tensor_ring", "inner": 0.5}, {"closing": {2, 3}, "inner": {0.5}}),
        ({"name": "tensor_train", "inner": 1.5}, {"inner": {1.5}}),
    ],
    ids=["shape", "word-and-shapes", "sequence", "word-and-sequence", "closing", "ring", "ring-inner", "inner"],
)
def test_options_with_values_of_the_users_own(entry, expected):
    rule = {"match": {"name": "layer3.0.*"}, "formats": [entry], "ranks": {"counts": [1, 2]}, "whiten": "none"}
    found = options_of(build({"formats": ["channel_svd"]}, [rule]))
    assert {key: {dict(options)[key] for options in found} for key in expected} == expected


@pytest.mark.parametrize(
    ("entry", "layer", "expected"),
    [
        ({"name": "cp", "spatial": ["whole", "split"]}, "flat", {("spatial", "whole")}),
        ({"name": "tensor_train", "inner": [1, 0.75]}, "flat", {("inner", 1.0)}),
        ({"name": "block_term", "blocks": [2, 8]}, "narrow", {("blocks", 2)}),
        ({"name": "grouped_svd", "groups": [2, 4]}, "odd", {("groups", 2)}),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else None,
)
def test_a_value_that_one_layer_has_no_use_for_gives_it_no_candidate(entry, layer, expected):
    flat = LayerSpec("flat", "conv1d", (32, 32, 3), (1,), (1,), dilation=(1,), calls=(CallSize(1, (9,), (9,)),))
    layers = {spec.name: spec for spec in (flat, conv("narrow", 12, 12), conv("odd", 16, 18))}
    model = ModelProfile((layers[layer],), (), PROFILE.dense)
    space = build({"formats": [entry], "whiten": "none", "ranks": {"fractions": [0.2]}}, model=model)
    assert {pair for options in options_of(space, layer) for pair in options} == expected


def test_words_mean_another_shape_for_another_layer():
    entry = {"name": "kronecker", "a": "inputs"}
    space = build({"formats": [entry], "ranks": {"counts": [1]}, "whiten": "none"})
    found = {layer.spec.name: layer.candidates[0].choice.option("a", "") for layer in space.layers}
    assert found["conv1"] == "4x1x3x3"
    assert found["layer3.0.conv1"] == "8x1x3x3"
    assert found["fc"] == "5x1"


def test_layer_without_a_shape_for_the_word_is_kept_dense():
    space = build({"formats": [{"name": "kronecker", "a": "rows"}], "whiten": "none"})
    reasons = {item.name: item.reason for item in space.kept_dense}
    assert reasons["fc"] == "kronecker offers none of the options or whitenings asked for"


# Rules


def test_later_rules_win_key_by_key():
    space = build(
        {"formats": ["channel_svd"], "ranks": {"counts": [3]}},
        [
            {"match": {"name": "layer3.*"}, "formats": ["tucker2"]},
            {"match": {"name": "layer3.1.*"}, "ranks": {"counts": [5]}},
            {"match": {"kind": "conv2d", "kernel": [1, 1]}, "multiple_of": 4},
        ],
    )
    found = {layer.spec.name: {(c.choice.format, c.choice.rank) for c in layer.candidates} for layer in space.layers}
    assert found["conv1"] == {("channel_svd", (3,))}
    assert found["layer3.0.conv1"] == {("tucker2", (3, 3))}
    assert found["layer3.1.conv1"] == {("tucker2", (5, 5))}
    assert found["layer2.0.downsample.0"] == {("channel_svd", (4,))}


def test_a_format_keeps_its_own_settings_until_a_later_rule_sets_them_for_all():
    own = {"name": "channel_svd", "ranks": {"counts": [7]}}
    defaults = {"formats": [own, "tucker2"], "ranks": {"counts": [3]}}
    space = build(defaults, [{"match": {"name": "layer3.1.conv1"}, "ranks": {"counts": [5]}}])
    assert set(ranks(space, "layer3.0.conv1")) == {(7,), (3, 3)}
    assert set(ranks(space, "layer3.1.conv1")) == {(5,), (5, 5)}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("conv1", {"conv1"}),
        ("layer1.*", {"layer1.0.conv1", "layer1.1.conv1"}),
        ("*downsample*", {"layer2.0.downsample.0"}),
        (r"re:layer[13]\.0\..*", {"layer1.0.conv1", "layer3.0.conv1"}),
        ("type:linear", {"fc"}),
        ("type:Conv*", {spec.name for spec in LAYERS} - {"fc"}),
    ],
)
def test_dense_patterns(pattern, expected):
    space = build({"formats": ["channel_svd"]}, dense=[pattern])
    assert {item.name for item in space.kept_dense} == expected
    assert all(repr(pattern) in item.reason for item in space.kept_dense)


def test_dense_wins_over_rules_and_may_name_what_is_left_alone_anyway():
    rule = {"match": {"name": "conv1"}, "formats": ["tucker2"]}
    space = build({"formats": ["channel_svd"]}, [rule], dense=["conv1", "up", "type:convtranspose2d"])
    assert [item.name for item in space.kept_dense] == ["conv1"]


def test_refused_layers_are_kept_dense_with_the_reason():
    space = build({"formats": ["tucker2"]})
    reasons = {item.name: item.reason for item in space.kept_dense}
    assert set(reasons) == {"layer2.0.downsample.0", "fc"}
    assert "linear" in reasons["fc"]
    assert "tucker2" in reasons["fc"]


def test_layer_without_a_saving_is_kept_dense():
    rule = {"match": {"name": "layer1.*"}, "ranks": {"fractions": [1.0]}}
    space = build({"formats": ["channel_svd"]}, [rule])
    assert {item.name: item.reason for item in space.kept_dense}["layer1.0.conv1"].endswith(
        "has no rank that saves MACs or parameters"
    )


# What is wrong with a file


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


WRONG = {
    "unknown key": ({"verson": 1}, r"unknown key 'verson' \(did you mean 'version'\?\); allowed are version, defaults"),
    "no version": ({"defaults": {}}, "version: this key is missing"),
    "other version": ({"version": 2}, "version: 2 is not known; allowed are 1"),
    "fraction": (
        {"version": 1, "rules": [{"match": {"name": "a"}, "ranks": {"fractions": [0.5, 1.5]}}]},
        r"rules\[0\].ranks.fractions\[1\]: 1.5 must be at most 1",
    ),
    "fraction of zero": (
        {"version": 1, "defaults": {"ranks": {"fractions": [0]}}},
        r"fractions\[0\]: 0 must be above 0",
    ),
    "count": ({"version": 1, "defaults": {"ranks": {"counts": [2.5]}}}, r"counts\[0\]: 2.5 is not a whole number"),
    "text": ({"version": 1, "defaults": {"ranks": {"counts": ["many"]}}}, r"counts\[0\]: 'many' is not a whole number"),
    "twice": ({"version": 1, "defaults": {"ranks": {"counts": [4, 4]}}}, "ranks.counts: 4 is given twice"),
    "empty list": ({"version": 1, "defaults": {"ranks": {"counts": []}}}, "ranks.counts: "),
    "two grids": (
        {"version": 1, "defaults": {"ranks": {"counts": [1], "fractions": [0.5]}}},
        "give one of fractions, counts, macs_kept, modes",
    ),
    "no grid": ({"version": 1, "defaults": {"ranks": {}}}, "none of them is given"),
    "product of macs": (
        {"version": 1, "defaults": {"ranks": {"macs_kept": [0.5], "combine": "product"}}},
        "product goes",
    ),
    "misspelt grid": ({"version": 1, "defaults": {"ranks": {"fraction": [0.5]}}}, "did you mean 'fractions'"),
    "unknown format": (
        {"version": 1, "defaults": {"formats": ["tucker"]}},
        r"defaults.formats\[0\]: unknown format 'tucker' \(did you mean 'tucker2'\?\); allowed are channel_svd",
    ),
    "format without name": (
        {"version": 1, "defaults": {"formats": [{"first": "h"}]}},
        r"formats\[0\].name: this key is",
    ),
    "whitening": (
        {"version": 1, "defaults": {"whiten": ["inputs"]}},
        r"whiten\[0\]: 'inputs' is not known \(did you mean 'input'\?\); allowed are 'none', 'input', 'output'",
    ),
    "multiple": ({"version": 1, "defaults": {"multiple_of": 0}}, "multiple_of: 0 must be at least 1"),
    "truth as number": ({"version": 1, "defaults": {"multiple_of": True}}, "multiple_of: True is not a whole number"),
    "kind": (
        {"version": 1, "rules": [{"match": {"kind": "conv"}}]},
        r"rules\[0\].match.kind\[0\]: 'conv' is not known \(did you mean 'conv.d'\?\)",
    ),
    "kernel": ({"version": 1, "rules": [{"match": {"kernel": [[3, 0]]}}]}, r"kernel\[0\]\[1\]: 0 must be at least 1"),
    "empty match": ({"version": 1, "rules": [{"match": {}}]}, "at least one of name, kind, kernel"),
    "no match": ({"version": 1, "rules": [{"formats": ["tucker2"]}]}, r"rules\[0\].match: this key is missing"),
    "rules as mapping": ({"version": 1, "rules": {"a": 1}}, "rules: .* is not a list"),
    "bad expression": ({"version": 1, "dense": ["re:("]}, r"dense\[0\]: re:\( is not a regular expression"),
    "expression that grows": (
        {"version": 1, "dense": ["re:((a{1000}){1000}){10}"]},
        r"is not a regular expression: its repeats are more than 10,000 together",
    ),
    "long expression": (
        {"version": 1, "dense": ["re:" + "(a|b)?" * 20000]},
        r"re:\(a\|b\).*\.\.\. is not a regular expression: it has 120000 characters, and may have 1000",
    ),
    "empty pattern": ({"version": 1, "dense": [""]}, r"dense\[0\]: an empty pattern"),
    "section as list": ({"version": 1, "defaults": []}, r"defaults: \[\] is not a mapping"),
}


@pytest.mark.parametrize(("data", "message"), WRONG.values(), ids=WRONG)
def test_wrong_file(data, message):
    with pytest.raises(SpaceError, match=message) as error:
        read_space(data)
    assert one_line(error).startswith("search space: ")


MISFITS = {
    "dense pattern": (
        {"dense": ["layer9.*"]},
        r"dense\[0\]: pattern 'layer9\.\*' matches no layer; the nearest layers are layer",
    ),
    "rule pattern": (
        {"rules": [{"match": {"name": ["conv1", "convl"]}}]},
        r"rules\[0\].match.name\[1\]: pattern 'convl' matches no layer; the nearest .* conv1",
    ),
    "expression": ({"dense": ["re:.*downsampel.*"]}, "re:.*downsampel.* matches no layer; the nearest .*downsample"),
    "endless expression": (
        {"dense": ["re:" + "(.*)" * 24 + r"\1(?<!1)"]},
        "'re:.*' takes more than 1 s to match the name 'layer1.0.conv1'; write it without repeats inside repeats",
    ),
    "type": ({"dense": ["type:conv3d"]}, "'type:conv3d' matches no layer; the kinds in this model are conv2d, linear"),
    "kind": (
        {"rules": [{"match": {"kind": "conv1d"}}]},
        "no layer meets these conditions together; the layers are conv2d",
    ),
    "kernel": (
        {"rules": [{"match": {"name": "layer3.*", "kernel": [5, 5]}}]},
        "those named so are conv2d 3×3",
    ),
    "left alone": (
        {"rules": [{"match": {"name": "up"}}]},
        r"'up' matches only layers that cannot be decomposed, such as up \(it is never called\)",
    ),
    "refused by name": (
        {"rules": [{"match": {"name": "fc"}, "formats": ["spatial_svd", "tucker2"]}]},
        r"rules\[0\] names layer 'fc', but spatial_svd refuses it .*; tucker2 refuses it",
    ),
    "unknown option": (
        {"rules": [{"match": {"name": "conv1"}, "formats": [{"name": "spatial_svd", "frist": "h"}]}]},
        r"rules\[0\].formats\[0\]: spatial_svd has no setting or option 'frist' .*did you mean 'first'",
    ),
    "option value": (
        {"rules": [{"match": {"name": "conv1"}, "formats": [{"name": "spatial_svd", "first": "x"}]}]},
        r"formats\[0\].first: spatial_svd has no first=x; allowed are h, w",
    ),
    "shape": (
        {"rules": [{"match": {"name": "conv1"}, "formats": [{"name": "kronecker", "a": "5x1x1x1"}]}]},
        r"formats\[0\].a: kronecker has no a=5x1x1x1; allowed for layer 'conv1' are outputs, .*T1 divides 16, S1 div",
    ),
    "sequence": (
        {"rules": [{"match": {"name": "conv1"}, "formats": [{"name": "sekron", "shapes": "outputs/rows"}]}]},
        r"formats\[0\].shapes: sekron has no shapes=outputs/rows; allowed for layer 'conv1' are pointwise, ",
    ),
    "shrink": (
        {"rules": [{"match": {"name": "conv1"}, "formats": [{"name": "channel_svd", "shrink": 2}]}]},
        r"shrink: 2 is not a number from 0 to 1",
    ),
    "modes": (
        {"rules": [{"match": {"name": "conv1"}, "ranks": {"modes": {"R_out": {"counts": [1]}}}}]},
        r"rules\[0\].ranks.modes: channel_svd has the modes R, not R_out",
    ),
    "nothing left": ({"dense": ["*"]}, r"no layer has a candidate: conv1: kept dense by '\*'; .* and 5 more layers"),
}


@pytest.mark.parametrize(("data", "message"), MISFITS.values(), ids=MISFITS)
def test_file_that_does_not_fit_the_model(data, message):
    with pytest.raises(SpaceError, match=message) as error:
        build_space(read_space({"version": 1, "defaults": {"formats": ["channel_svd"]}, **data}), PROFILE)
    assert one_line(error).startswith("search space: ")


def test_no_formats_anywhere():
    with pytest.raises(SpaceError, match="neither the defaults nor a rule gives it a format"):
        build_space(read_space({"version": 1}), PROFILE)


def test_model_without_layers():
    empty = ModelProfile((), ALONE, Cost(10, 10, 40))
    with pytest.raises(SpaceError, match=r"no layer has a candidate: up: it is never called"):
        build_space(read_space("default"), empty)


TEXTS = {
    "syntax": ("version: 1\ndefaults: {formats: [tucker2\n", r"space\.yaml: line 3 "),
    "key twice": ("version: 1\nrules: []\nversion: 1\n", r"space\.yaml: line 3 key 'version' is given twice"),
    "nested key twice": ("version: 1\ndefaults:\n  whiten: none\n  whiten: input\n", r"line 4 key 'whiten' is given"),
    "empty": ("# nothing\n", r"space\.yaml: the file is empty"),
    "a list": ("- 1\n", r"space\.yaml: a search space is a mapping"),
    "python object": (
        "version: !!python/object/apply:os.getcwd []\n",
        r"space\.yaml: line 1 a value of type os\.getcwd has no place here",
    ),
    "wrong value": (
        "version: 1\ndefaults: {multiple_of: x}\n",
        r"space\.yaml: defaults.multiple_of: 'x' is not a whole",
    ),
    "pattern": ("version: 1\ndense: [nowhere]\n", r"space\.yaml: dense\[0\]: pattern 'nowhere' matches no layer"),
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS)
def test_wrong_text(tmp_path, text, message):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(SpaceError, match=message) as error:
        build_space(read_space(path), PROFILE)
    assert one_line(error).startswith(str(path))


def test_file_and_mapping_say_the_same(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(shipped_text("small"))
    contents = [read_space(source).model_dump() for source in (str(path), path, "small")]
    assert contents[0] == contents[1] == contents[2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda tmp: "defalt",
            r"no search space 'defalt' \(did you mean 'default'\?\); shipped are .*channel_svd, .*default",
        ),
        (lambda tmp: tmp / "missing.yaml", "missing.yaml: no such file; shipped search spaces are .*channel_svd"),
        (lambda tmp: tmp, "cannot be read"),
    ],
    ids=["name", "file", "directory"],
)
def test_no_such_space(tmp_path, make, message):
    with pytest.raises(SpaceError, match=message) as error:
        read_space(make(tmp_path))
    one_line(error)


def test_not_text(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpaceError, match="UTF-8"):
        read_space(path)
