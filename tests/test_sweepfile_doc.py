"""docs/sweepfile.md names every key of a sweep file with its default, and no other."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from autorank.candidates import BUILTIN
from autorank.config import LatencyConfig, PruningConfig, StrategyConfig, SweepConfig
from autorank.errors import ConfigError
from autorank.journal import Journal
from autorank.quant.settings import QuantSettings
from autorank.recover import Recovery
from autorank.spacefile import Defaults, Match, Ranks, Rule, SpaceFile
from autorank.sweep import resume
from autorank.tasks.options import ImageOptions
from tests.sweep_samples import header

PAGE = (Path(__file__).parents[1] / "docs" / "sweepfile.md").read_text(encoding="utf-8")
TEXTS = dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n?)*)", PAGE, re.MULTILINE))
TOP = ("Model, data, search space", "What is searched, and for how long", "Where it runs")


def rows(*sections: str) -> dict[str, str]:
    """Return key → default, as the tables of these sections tell."""
    found = [re.findall(r"^\| `(\w+)` \| (.+?) \| .+ \|$", TEXTS[section], re.MULTILINE) for section in sections]
    pairs = [pair for section in found for pair in section]
    assert len(dict(pairs)) == len(pairs), "a key stands there twice"
    return dict(pairs)


def written(name: str, value: Any) -> str:
    """Return a default as the page writes it."""
    if value is None:
        return "–"
    if isinstance(value, BaseModel) or is_dataclass(value):
        return f"[below](#{name})"
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True, width=1000)
    return f"`{text.removesuffix(chr(10)).removesuffix('...').strip()}`"


def defaults(kind: type) -> dict[str, Any]:
    made = kind()
    names = kind.model_fields if issubclass(kind, BaseModel) else [field.name for field in fields(kind)]
    return {name: getattr(made, name) for name in names}


@pytest.mark.parametrize(
    ("kind", "sections"),
    [
        pytest.param(SweepConfig, TOP, id="whole file"),
        pytest.param(StrategyConfig, ("strategy",), id="strategy"),
        pytest.param(Recovery, ("recovery",), id="recovery"),
        pytest.param(QuantSettings, ("quantization",), id="quantization"),
        pytest.param(PruningConfig, ("pruning",), id="pruning"),
        pytest.param(LatencyConfig, ("latency",), id="latency"),
        pytest.param(ImageOptions, ("data_args",), id="data_args"),
    ],
)
def test_page_has_every_key_and_its_default(kind: type, sections: tuple[str, ...]) -> None:
    assert rows(*sections) == {name: written(name, value) for name, value in defaults(kind).items()}


def test_page_has_every_setting_of_a_search_space_and_its_default() -> None:
    told = {key: default for key, default in rows("space").items() if key in BUILTIN}
    written_out = {
        key: value.model_dump(exclude_defaults=True) if key == "ranks" else value for key, value in BUILTIN.items()
    }
    assert told == {key: written(key, value) for key, value in written_out.items()}


@pytest.mark.parametrize("kind", [SpaceFile, Defaults, Rule, Match, Ranks], ids=lambda kind: kind.__name__)
def test_page_names_every_key_of_a_search_space(kind: type[BaseModel]) -> None:
    unnamed = [name for name in kind.model_fields if f"`{name}" not in TEXTS["space"]]
    assert not unnamed


def test_page_tells_what_may_change_when_a_sweep_is_resumed(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.write_header(header())
    with pytest.raises(ConfigError) as error:
        resume(tmp_path, seed=1)
    allowed = re.search(r"only (.+) can$", str(error.value))
    told = re.search(r"`autorank\.resume` takes (.+?) anew", TEXTS["Where it runs"], re.DOTALL)
    assert allowed is not None
    assert told is not None
    assert set(re.findall(r"`(\w+)`", told[1])) == set(allowed[1].split(", "))
