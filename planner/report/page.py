"""The HTML page: sections of text, tables and charts, plotly.js once, and nothing loaded from anywhere.

Plan and run files are untrusted. Text reaches the page through `escape` alone, and the charts' JSON lies in a data
block with `<`, `>` and `&` as JSON escapes, so that no string in it can end the block. Strings from files enter a chart
through `figures.plain` alone, since plotly reads some HTML in its texts.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

INK, MUTED, LINE = "#1d2733", "#5d6b7a", "#dfe4ea"
FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"
LONG = 24
"""Rows above which a table scrolls by itself."""
_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7f9; color: INK; font: 15px/1.5 FONT; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 0 0 2px; }
p { margin: 0 0 10px; }
.sub, .caption { color: MUTED; }
.caption { font-size: 13.5px; margin-bottom: 8px; }
section { background: #fff; border: 1px solid LINE; border-radius: 10px; padding: 18px 20px; margin-top: 18px; break-inside: avoid; }
.verdict { border-left: 6px solid #2e7d4f; font-size: 16.5px; }
.verdict.bad { border-left-color: #b3372f; }
.verdict.note { border-left-color: #b07d1e; }
.verdict p:last-child { margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 18px; }
.tile { background: #fff; border: 1px solid LINE; border-radius: 10px; padding: 12px 14px; break-inside: avoid; }
.tile .name { color: MUTED; font-size: 13px; }
.tile .value { font-size: 22px; font-weight: 600; letter-spacing: -0.01em; }
.tile .more { color: MUTED; font-size: 13px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 18px; }
.pair > section { margin-top: 18px; min-width: 0; }
.scroll { overflow: auto; }
.scroll.long { max-height: 720px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: right; color: MUTED; font-weight: 600; padding: 6px 10px; border-bottom: 1.5px solid LINE; vertical-align: bottom; }
td { white-space: nowrap; text-align: right; padding: 5px 10px; border-bottom: 1px solid #eef1f4; vertical-align: top; }
th.left, td.left { text-align: left; white-space: normal; overflow-wrap: break-word; }
tr:last-child td { border-bottom: 0; }
ul { margin: 0; padding-left: 20px; }
li { margin-bottom: 4px; }
footer { color: MUTED; font-size: 13px; margin-top: 20px; }
.off { color: #b3372f; font-weight: 600; }
@media (max-width: 900px) { .pair { grid-template-columns: 1fr; } }
@media print {
  body { background: #fff; font-size: 12px; } main { padding: 0; max-width: none; }
  .scroll.long { max-height: none; }
  section, .tile { border-color: #ccc; margin-top: 10px; }
  .tiles { grid-template-columns: repeat(3, 1fr); gap: 6px; margin-top: 6px; } .tile { padding: 6px 10px; margin: 0; }
  .tile .value { font-size: 17px; } .verdict { font-size: 13px; }
}
"""
_SCRIPT = """
for (const node of document.querySelectorAll("div.chart")) {
  const figure = JSON.parse(document.getElementById(node.id + "-data").textContent);
  Plotly.newPlot(node, figure.data, figure.layout, {responsive: true, displaylogo: false, displayModeBar: false});
}
"""
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def escape(value: object) -> str:
    """`value` as text that is safe inside an element or a quoted attribute."""
    return html.escape(str(value), quote=True)


@dataclass(frozen=True)
class Section:
    """One part of the page. `body` is HTML made with the functions of this module; the rest is plain text."""

    title: str
    body: str = ""
    caption: str = ""
    charts: tuple[go.Figure, ...] = ()
    kind: str = ""
    """"", "half" (two of them share a row), or the class of a verdict box."""


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], left: Sequence[int] = (0,)) -> str:
    """An HTML table of plain values; None is shown as a dash. Columns in `left` are aligned left. A long one scrolls by itself."""
    sides = ["left" if index in left else "" for index in range(len(columns))]
    head = "".join(f'<th class="{side}">{escape(name)}</th>' for name, side in zip(columns, sides, strict=True))
    body = "".join("<tr>" + "".join(_cell(value, side) for value, side in zip(row, sides, strict=True)) + "</tr>" for row in rows)
    return f'<div class="scroll{" long" if len(rows) > LONG else ""}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: object, side: str) -> str:
    return f'<td class="{side}">{escape("–" if value is None else value)}</td>'


def paragraphs(texts: Iterable[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def bullets(texts: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def tiles(values: Iterable[tuple[str, str, str]]) -> str:
    """Figures at a glance: (name, value, what more there is to say)."""
    boxes = []
    for name, value, more in values:
        parts = (("name", name), ("value", value), ("more", more))
        boxes.append(f'<div class="tile">{"".join(f"<div class={kind}>{escape(text)}</div>" for kind, text in parts)}</div>')
    return f'<div class="tiles">{"".join(boxes)}</div>'


def page(title: str, subtitle: str, sections: Sequence[Section], after_title: str = "", footer: str = "") -> str:
    """The whole document. `after_title` is HTML from this module's functions, the other strings are plain text."""
    parts, charts = [], 0
    index = 0
    while index < len(sections):
        section = sections[index]
        pair = section.kind == "half" and index + 1 < len(sections) and sections[index + 1].kind == "half"
        group = sections[index : index + 2] if pair else [section]
        rendered = []
        for item in group:
            rendered.append(_section(item, charts))
            charts += len(item.charts)
        parts.append(f'<div class="pair">{"".join(rendered)}</div>' if pair else rendered[0])
        index += len(group)
    style = _CSS.replace("FONT", FONT).replace("INK", INK).replace("MUTED", MUTED).replace("LINE", LINE)
    library = f"<script>{get_plotlyjs()}</script>" if charts else ""
    run = f"<script>{_SCRIPT}</script>" if charts else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{style}</style>{library}</head>\n<body><main><h1>{escape(title)}</h1>"
        f'<p class="sub">{escape(subtitle)}</p>{after_title}\n'
        + "\n".join(parts)
        + f"\n<footer>{escape(footer)}</footer></main>{run}</body></html>\n"
    )


def _section(section: Section, first_chart: int) -> str:
    kind = f' class="{escape(section.kind)}"' if section.kind not in ("", "half") else ""
    heading = f"<h2>{escape(section.title)}</h2>" if section.title else ""
    caption = f'<p class="caption">{escape(section.caption)}</p>' if section.caption else ""
    charts = "".join(_chart(figure, f"chart-{first_chart + offset}") for offset, figure in enumerate(section.charts))
    return f"<section{kind}>{heading}{caption}{charts}{section.body}</section>"


def _chart(figure: go.Figure, name: str) -> str:
    height = int(figure.layout.height or 360)
    data = f'<script type="application/json" id="{name}-data">{safe_json(figure)}</script>'
    return f'<div class="chart" id="{name}" style="height:{height}px"></div>{data}'


def safe_json(figure: go.Figure) -> str:
    """The figure's JSON, with what could end a script block written as JSON escapes."""
    text = json.dumps(_finite(figure.to_plotly_json()), separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(value: Any) -> Any:
    """Plain JSON data; a number that is not finite becomes null, as JSON has none."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
