"""The table of formats and kinds of layers: every pair works or is refused with the reason, and the docs show it."""

from pathlib import Path

import pytest
import torch

from autorank import formats
from autorank.errors import FormatError
from autorank.formats import support
from autorank.testing.cases import dense, random

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"
CHANNELS = 16
PAIRS = support.support(CHANNELS)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.format}-{pair.layer}".replace(" ", "-"))
def test_every_pair_works_or_is_refused_with_the_reason(pair):
    fmt, spec = formats.get(pair.format), support.typical(CHANNELS)[pair.layer]
    weight = random(spec.weight_shape, 0).float()
    if not pair.options:
        assert spec.kind in pair.reason
        with pytest.raises(FormatError, match="layer"):
            fmt.fit(weight, spec, (1,) * len(fmt.rank_names))
        return
    assert not pair.reason
    size = (CHANNELS,) if spec.kind == "linear" else (CHANNELS, *(5,) * len(spec.kernel))
    for options in pair.options[:2]:
        rank = tuple(max(1, top // 3) for top in fmt.max_rank(spec, options))
        factors = fmt.fit(weight, spec, rank, options)
        approx = fmt.reconstruct(factors, spec, rank, options)
        assert (approx - weight).norm() < weight.norm()
        x = random((2, *size), 1).float()
        torch.testing.assert_close(
            fmt.layer(spec, rank, options, factors)(x), dense(spec, approx)(x), rtol=1e-3, atol=1e-3
        )


def test_a_larger_layer_is_taken_by_the_same_formats():
    assert [(p.format, p.layer, bool(p.options)) for p in support.support()] == [
        (p.format, p.layer, bool(p.options)) for p in PAIRS
    ]


def test_the_docs_hold_the_table_as_the_code_prints_it():
    begin, end = "<!-- autorank formats --markdown -->\n", "<!-- end -->"
    text = DOCS.read_text(encoding="utf-8")
    shown = text.split(begin)[1].split(end)[0].strip()
    assert shown == support.markdown().strip(), "docs/formats.md is out of date: put in what the command prints"
