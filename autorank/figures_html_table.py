"""A table of layers as one HTML file: sorted by a click or by the keyboard, light and dark."""

from __future__ import annotations

import html

from autorank.figures_html import page
from autorank.layerrows import Column, Entry, LayerTable

_STYLE = """h1 { font-size: 17px; margin: 0; }
main { padding: 16px 20px; }
p { color: var(--soft); font-size: 13px; margin: 6px 0 14px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 4px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th.word, td.word { text-align: left; }
thead th { padding: 0; vertical-align: bottom; position: sticky; top: 0; background: var(--ground); }
thead button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; cursor: pointer;
  padding: 4px 10px; width: 100%; text-align: inherit; white-space: normal; }
thead button:focus-visible { outline: 2px solid #0072B2; outline-offset: -2px; }
th[aria-sort="ascending"] button::after { content: " ▲"; }
th[aria-sort="descending"] button::after { content: " ▼"; }
tfoot td { font-weight: 600; border-top: 2px solid var(--soft); border-bottom: 0; }
td.bar { background: linear-gradient(to right, rgba(0, 114, 178, 0.3) var(--kept), transparent var(--kept)); }
td.flagged { color: var(--ink); background: rgba(213, 94, 0, 0.25); font-weight: 600; }"""

_SCRIPT = """<script>
const body = document.querySelector("tbody");
const heads = [...document.querySelectorAll("thead th")];
function key(row, column) {
  const cell = row.cells[column], value = cell.dataset.value;
  return value === undefined ? (heads[column].className === "word" ? cell.textContent : null) : Number(value);
}
heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
  const up = head.getAttribute("aria-sort") !== "ascending";
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const rows = [...body.rows].map(row => [key(row, column), row]);
  rows.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) :
    (up ? 1 : -1) * (typeof a === "number" ? a - b : a.localeCompare(b, undefined, {numeric: true})));
  body.append(...rows.map(([, row]) => row));
}));
</script>"""

_BAR = "MACs kept"


def layers_page(table: LayerTable) -> str:
    """Return the HTML page of a table of layers."""
    heads = "".join(
        f'<th scope="col"{_word(column)}><button type="button" title="{html.escape(column.explained)}">'
        f"{html.escape(column.heading)}</button></th>"
        for column in table.columns
    )
    rows = "\n".join(f"<tr>{_cells(table, row)}</tr>" for row in table.rows)
    body = f"""<main>
<h1>{html.escape(table.title)}</h1>
<p>{html.escape(table.subtitle)}</p>
<div class="wide"><table>
<thead><tr>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
<tfoot><tr>{_cells(table, table.total)}</tr></tfoot>
</table></div>
<p>{html.escape(table.note)}</p>
</main>
{_SCRIPT}"""
    return page(f"{table.title} — {table.subtitle}", _STYLE, body)


def _word(column: Column) -> str:
    return "" if column.number else ' class="word"'


def _cells(table: LayerTable, row: tuple[Entry, ...]) -> str:
    return "".join(_cell(column, entry) for column, entry in zip(table.columns, row, strict=True))


def _cell(column: Column, entry: Entry) -> str:
    sorting = "" if entry.value is None else f' data-value="{entry.value!r}"'
    kind = _word(column)
    if entry.flagged:
        kind = ' class="flagged"'
    elif column.heading == _BAR and entry.value is not None:
        kind = f' class="bar" style="--kept: {min(entry.value, 1):.1%}"'
    return f"<td{kind}{sorting}>{html.escape(entry.text)}</td>"
