"""Which layers the patterns of a search-space file mean, and what to say when they mean none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import regex

from autorank.errors import SpaceError
from autorank.spacefile import Match, SpaceFile
from autorank.types import LayerSpec, ModelProfile

PATIENCE_S = 1.0
"""Seconds that a regular expression may take on a name: some never come to an end."""


class EndlessError(SpaceError):
    """A regular expression does not come to an end."""


def matches(pattern: str, name: str, kind: str) -> bool:
    """Say whether `pattern` means the layer.

    It is a glob on its name; after ``re:`` a regular expression over the whole name; after ``type:`` a glob on its
    kind. In a glob dots are ordinary characters: ``layer3.*`` means everything inside ``layer3``. Case counts in names
    and not in kinds.

    Raises
    ------
    EndlessError
        A regular expression takes more than `PATIENCE_S` on the name.
    """
    if pattern.startswith("re:"):
        try:
            return regex.fullmatch(pattern[3:], name, timeout=PATIENCE_S) is not None
        except TimeoutError:
            raise EndlessError(
                f"the regular expression {pattern!r} takes more than {PATIENCE_S:g} s to match the name {name!r}; "
                "write it without repeats inside repeats"
            ) from None
    if pattern.startswith("type:"):
        return fnmatchcase(kind.lower(), pattern[5:].lower())
    return fnmatchcase(name, pattern)


def rule_matches(match: Match, spec: LayerSpec) -> bool:
    """Say whether all conditions of a rule hold for the layer."""
    return (
        (match.name is None or any(matches(pattern, spec.name, spec.kind) for pattern in match.name))
        and (match.kind is None or spec.kind in match.kind)
        and (match.kernel is None or list(spec.kernel) in match.kernel)
    )


def matching_rules(file: SpaceFile, spec: LayerSpec) -> list[int]:
    """Return the positions of the rules that match the layer, in the order of the file."""
    return [i for i, rule in enumerate(file.rules) if rule_matches(rule.match, spec)]


def nearest(word: str, names: Iterable[str]) -> str:
    """Return ``the nearest layers are a, b`` for a name or pattern that means nothing."""
    names = list(names)
    if not names:
        return "there are no such layers"
    plain = word.removeprefix("re:").replace("\\", "").replace(".*", "").replace("*", "").strip(".")
    depth = plain.count(".") + 1

    def likeness(name: str) -> float:
        # A pattern for a whole block should be compared with the names of blocks, not with the layers inside them.
        block = ".".join(name.split(".")[:depth])
        return max(difflib.SequenceMatcher(None, plain, text).ratio() for text in (name, block))

    near = sorted(names, key=lambda name: -likeness(name))[:3]
    near = [name for name in near if likeness(name) >= 0.5] or names[:3]
    return f"the nearest layer is {near[0]}" if len(near) == 1 else f"the nearest layers are {', '.join(near)}"


def check_patterns(file: SpaceFile, profile: ModelProfile) -> dict[str, str]:
    """Check that every pattern of the file means at least one layer of the model.

    Parameters
    ----------
    file : SpaceFile
    profile : ModelProfile

    Returns
    -------
    dict
        Name of each layer that the file keeps dense → the pattern that does so.

    Raises
    ------
    SpaceError
        A pattern, or the conditions of a rule together, match no layer. A pattern under ``dense`` may also mean a layer
        that the profile leaves alone anyway; one of a rule may not, and the message gives the profile's reason.
    """
    try:
        return _checked(file, profile)
    except EndlessError as error:
        raise SpaceError(f"{file.source}: {error}") from None


def _checked(file: SpaceFile, profile: ModelProfile) -> dict[str, str]:
    specs = profile.layers
    dense: dict[str, str] = {}
    for i, pattern in enumerate(file.dense):
        found = [spec.name for spec in specs if matches(pattern, spec.name, spec.kind)]
        dense.update((name, pattern) for name in found if name not in dense)
        if not found and not any(matches(pattern, item.name, item.type) for item in profile.left_alone):
            raise SpaceError(f"{file.source}: dense[{i}]: {_no_match(pattern, specs)}")
    for i, rule in enumerate(file.rules):
        where = f"{file.source}: rules[{i}].match"
        for j, pattern in enumerate(rule.match.name or ()):
            if any(matches(pattern, spec.name, spec.kind) for spec in specs):
                continue
            alone = [item for item in profile.left_alone if matches(pattern, item.name, item.type)]
            if alone:
                raise SpaceError(
                    f"{where}.name[{j}]: pattern {pattern!r} matches only layers that cannot be decomposed, "
                    f"such as {alone[0].name} ({alone[0].reason})"
                )
            raise SpaceError(f"{where}.name[{j}]: {_no_match(pattern, specs)}")
        if not any(rule_matches(rule.match, spec) for spec in specs):
            raise SpaceError(f"{where}: no layer meets these conditions together; {_present(rule.match, specs)}")
    return dense


def _no_match(pattern: str, specs: Sequence[LayerSpec]) -> str:
    if pattern.startswith("type:"):
        kinds = ", ".join(sorted({spec.kind for spec in specs})) or "none"
        return f"pattern {pattern!r} matches no layer; the kinds in this model are {kinds}"
    return f"pattern {pattern!r} matches no layer; {nearest(pattern, [spec.name for spec in specs])}"


def _present(match: Match, specs: Sequence[LayerSpec]) -> str:
    """Say what kinds and kernels there are among the layers whose name would do."""
    named = [s for s in specs if match.name is None or any(matches(p, s.name, s.kind) for p in match.name)]
    kinds = sorted({f"{s.kind} {'×'.join(map(str, s.kernel))}".strip() for s in named})
    return f"{'those named so' if match.name else 'the layers'} are {', '.join(kinds) or 'none'}"
