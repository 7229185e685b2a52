"""The strategies in words: what each one does, and its options, from the classes themselves."""

from __future__ import annotations

from dataclasses import dataclass

from autorank import strategies
from autorank.strategies.base import Option


@dataclass(frozen=True, slots=True)
class StrategyRow:
    """One strategy: its name, what it does in a line, and its options."""

    name: str
    summary: str
    options: tuple[tuple[str, Option], ...]


def rows() -> tuple[StrategyRow, ...]:
    """Return a row for every registered strategy."""
    found = []
    for name in strategies.names():
        kind = strategies.get(name)
        first = (kind.__doc__ or "").strip().split("\n\n", 1)[0]
        found.append(StrategyRow(name, " ".join(first.split()), tuple(kind.allowed.items())))
    return tuple(found)


def allowed(option: Option) -> str:
    """Return which values an option takes, in words."""
    if option.choices:
        return ", ".join(option.choices)
    return f"{option.low:g} to {option.high:g}"


def markdown() -> str:
    """Return the strategies and their options as Markdown tables."""
    lines = ["| strategy | how it chooses plans |", "| --- | --- |"]
    lines += [f"| `{row.name}` | {row.summary} |" for row in rows()]
    lines += ["", "| strategy | option | default | allowed | meaning |", "| --- | --- | --- | --- | --- |"]
    for row in rows():
        for key, option in row.options:
            shown = option.default if option.choices else f"{option.default:g}"
            lines.append(f"| `{row.name}` | `{key}` | {shown} | {allowed(option)} | {option.help} |")
    return "\n".join(lines) + "\n"
