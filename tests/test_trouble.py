"""What was made good is told once, to whoever listens."""

from __future__ import annotations

import pytest

from autorank.trouble import listening, tell


def test_a_listener_hears_every_text_once() -> None:
    heard: list[str] = []
    with listening(heard.append):
        for text in ("a", "b", "a"):
            tell(text)
    assert heard == ["a", "b"]


def test_the_innermost_listener_hears_it() -> None:
    outer: list[str] = []
    inner: list[str] = []
    with listening(outer.append):
        with listening(inner.append):
            tell("in")
        tell("out")
    assert (outer, inner) == (["out"], ["in"])


def test_it_is_a_warning_where_nobody_listens() -> None:
    with pytest.warns(UserWarning, match="by the way"):
        tell("by the way")
