"""The strategies in words: the docs hold what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from autorank import strategies
from autorank.strategies import overview

DOCS = Path(__file__).parents[2] / "docs" / "strategies.md"


def test_the_docs_hold_the_table_as_the_command_prints_it() -> None:
    begin, end = "<!-- autorank strategies --markdown -->\n", "<!-- end -->"
    shown = DOCS.read_text(encoding="utf-8").split(begin)[1].split(end)[0].strip()
    assert shown == overview.markdown().strip(), "docs/strategies.md is out of date: put in what the command prints"


@pytest.mark.parametrize("row", overview.rows(), ids=lambda row: row.name)
def test_every_strategy_and_option_says_what_it_does(row: overview.StrategyRow) -> None:
    assert row.summary.endswith(".")
    assert len(row.summary) <= 130
    for key, option in row.options:
        assert option.help, key
        assert option.check(option.default, key) == option.default


def test_every_strategy_of_the_package_is_listed() -> None:
    expected = (
        "auto knapsack greedy-one-step greedy-multi-step multi-stage vbmf layer-wise learned-rank tpe nsga2 random"
    )
    assert [row.name for row in overview.rows()][:11] == expected.split()
    assert set(strategies.names()) == {row.name for row in overview.rows()}
