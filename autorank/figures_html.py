"""The page around an interactive figure: one HTML file, with everything inlined, that draws with no network."""

from __future__ import annotations

import html
import json

from autorank.plotting_base import FONT, THEMES, Figure, theme_changes

# The policy forbids every request: what is not in the file cannot be loaded, by our page or by plotly.js.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:; \
base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {night} }} }}
html, body {{ height: 100%; margin: 0; background: var(--ground); color: var(--ink); font-family: {font}; }}
{style}
</style>
{head}</head>
<body>
{body}
</body>
</html>
"""

_STYLE = "#figure { width: 100%; height: 100vh; min-height: 420px; }"

_BODY = """<div id="figure" role="img" aria-label="{title}"></div>
<script>
const figure = {figure};
const themes = {themes};
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const node = document.getElementById("figure");
function theme() {{
  const changes = themes[dark.matches ? 1 : 0];
  Plotly.relayout(node, changes.layout);
  if (changes.inked.length) Plotly.restyle(node, changes.traces, changes.inked);
}}
Plotly.newPlot(node, figure.data, figure.layout, {{responsive: true, displaylogo: false,
  typesetMath: false, showSendToCloud: false, plotlyServerURL: "",
  modeBarButtonsToRemove: ["lasso2d", "select2d"], toImageButtonOptions: {{scale: 2}}}}).then(theme);
dark.addEventListener("change", theme);
</script>"""


def page(title: str, style: str, body: str, head: str = "") -> str:
    """Return a page that may load nothing; `title` is plain text, the others are CSS and HTML of our own making."""
    light, night = (" ".join(f"--{name}: {colour};" for name, colour in THEMES[dark].items()) for dark in (False, True))
    return _PAGE.format(
        title=html.escape(title), font=FONT, light=light, night=night, style=style, head=head, body=body
    )


def _embedded(value: object) -> str:
    """Return JSON that may stand inside a <script> element whatever the strings in it say."""
    text = json.dumps(value, allow_nan=False)  # ASCII only, so the line separators of JavaScript are escaped as well
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def figure_page(figure: Figure, title: str) -> str:
    """Return the HTML page of a figure of `plotting`; `title` is plain text."""
    from plotly.offline import get_plotlyjs

    themes = [theme_changes(figure, dark) for dark in (False, True)]
    body = _BODY.format(title=html.escape(title), figure=_embedded(figure), themes=_embedded(themes))
    return page(title, _STYLE, body, f"<script>{get_plotlyjs()}</script>\n")
