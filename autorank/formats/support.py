"""Which format takes which kind of layer, asked of the formats themselves."""

from __future__ import annotations

from dataclasses import dataclass

from autorank import formats
from autorank.formats.base import Options
from autorank.types import LayerSpec


def _layer(kind: str, shape: tuple[int, ...], groups: int = 1) -> LayerSpec:
    d = len(shape) - 2
    return LayerSpec(
        "layer",
        kind,  # type: ignore[arg-type]
        shape,
        (1,) * d,
        (0,) * d,
        dilation=(1,) * d,
        groups=groups,
        output_padding=(0,) * d if kind.startswith("conv_transpose") else (),
    )


def typical(channels: int = 64) -> dict[str, LayerSpec]:
    """Return a layer of each kind, by what people call it, with this many input and output channels."""
    c = channels
    return {
        "linear": _layer("linear", (c, c)),
        "conv1d": _layer("conv1d", (c, c, 3)),
        "conv2d": _layer("conv2d", (c, c, 3, 3)),
        "conv2d 1×1": _layer("conv2d", (c, c, 1, 1)),
        "conv2d, 4 groups": _layer("conv2d", (c, c // 4, 3, 3), 4),
        "conv2d, depthwise": _layer("conv2d", (c, 1, 3, 3), c),
        "conv3d": _layer("conv3d", (c, c, 3, 3, 3)),
        "conv_transpose1d": _layer("conv_transpose1d", (c, c, 3)),
        "conv_transpose2d": _layer("conv_transpose2d", (c, c, 3, 3)),
        "conv_transpose3d": _layer("conv_transpose3d", (c, c, 3, 3, 3)),
    }


@dataclass(frozen=True)
class Support:
    """Whether a format takes a kind of layer.

    Attributes
    ----------
    format, layer : str
        Name of the format, and of the kind of layer in `typical`.
    options : tuple of options
        The option sets under which it takes the layer; empty when it refuses.
    reason : str
        Why it refuses; empty otherwise.
    """

    format: str
    layer: str
    options: tuple[Options, ...]
    reason: str


def support(channels: int = 64) -> tuple[Support, ...]:
    """Return, for every registered format and every kind of layer, whether it takes it or why not."""
    found = []
    for name in formats.names():
        fmt = formats.get(name)
        for layer, spec in typical(channels).items():
            taken = tuple(options for options in fmt.variants(spec) if fmt.supports(spec, options) is None)
            reason = "" if taken else str(fmt.supports(spec) or fmt.supports(spec, fmt.variants(spec)[0]))
            found.append(Support(name, layer, taken, reason))
    return tuple(found)


def markdown() -> str:
    """Return the table of formats and kinds of layers in Markdown, the reasons for refusals below it."""
    rows = support()
    notes = list(dict.fromkeys((row.format, row.reason) for row in rows if row.reason))
    layers = typical()
    lines = [f"| | {' | '.join(layers)} |", f"|---|{'---|' * len(layers)}"]
    for name in formats.names():
        cells = [
            "yes" if row.options else f"no ({notes.index((name, row.reason)) + 1})"
            for row in rows
            if row.format == name
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", *(f"{i}. `{name}`: {reason}" for i, (name, reason) in enumerate(notes, start=1))]
    return "\n".join(lines) + "\n"
