"""Figures and tables as text: what every view is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

GIB = 2**30
WIDEST = 220
"""Columns of text beyond which a table's cells are wrapped."""
WORDS = frozenset({"why", "why it lost", "why not", "counted per", "place"})
"""Columns that hold words, which are aligned left and may be wrapped."""


def show(*parts: RenderableType | str, width: int | None = None) -> str:
    """The parts as plain or coloured text for a terminal, one below the other.

    Tables are never squeezed below what they need: a terminal can wrap or scroll, a cut figure is lost.
    """
    console = Console(highlight=False)
    widest = console.options.update(width=WIDEST)
    need = max((Measurement.get(console, widest, part).maximum for part in parts if not isinstance(part, str)), default=0)
    console.width = width or max(console.width, need)
    with console.capture() as capture:
        for part in parts:
            console.print(Text(part) if isinstance(part, str) else part, soft_wrap=isinstance(part, str))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> Table:
    """A plain table; the first `left` columns, and those of words, are aligned left, the others right."""
    out = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        words = index < left or column in WORDS
        out.add_column(Text(column), justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for row in rows:
        out.add_row(*(Text("–" if cell is None else str(cell)) for cell in row))
    return out


def notes(title: str, lines: Iterable[str]) -> str:
    lines = list(lines)
    return "\n".join([f"{title}:", *(f"  - {line}" for line in lines)]) if lines else ""


def gib(value: float | None) -> str:
    """GiB for a table's cell, or MiB marked by "Mi"."""
    if value is None:
        return "–"
    if value and abs(value) < 0.1 * GIB:
        return f"{value / 2**20:,.2f} Mi"
    return f"{value / GIB:,.2f}"


def size(value: float) -> str:
    """Bytes with their unit, for a sentence."""
    text = gib(value)
    return f"{text}B" if text.endswith(" Mi") else f"{text} GiB"


def seconds(value: float | None) -> str:
    """A time with the unit that reads best."""
    if value is None:
        return "–"
    if value >= 100:
        return f"{value:,.0f} s"
    if value >= 1:
        return f"{value:.2f} s"
    if value >= 1e-3:
        return f"{value * 1e3:.1f} ms"
    return f"{value * 1e6:.0f} µs"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def count(value: float | None) -> str:
    """A count in the short form that papers use."""
    if value is None:
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:,.1f}{unit}"
    return f"{value:,.0f}"
