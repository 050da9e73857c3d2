"""Numbers as people read them, each with its unit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

MISSING = "–"


class Unit(NamedTuple):
    """A unit to show values in: its name and how many base units it holds."""

    name: str
    size: float


def byte_unit(values: Iterable[float]) -> Unit:
    """GiB, or MiB or KiB where all values are small."""
    largest = max(values, default=0)
    return next((unit for unit in (Unit("GiB", 2**30), Unit("MiB", 2**20)) if largest >= 0.1 * unit.size), Unit("KiB", 2**10))


def second_unit(values: Iterable[float]) -> Unit:
    """Seconds, or ms where all values are below ten seconds."""
    return Unit("s", 1.0) if max(values, default=0) >= 10 else Unit("ms", 1e-3)


def show_bytes(value: float | None) -> str:
    if value is None:
        return MISSING
    if value == 0:
        return "0 B"
    unit = byte_unit([abs(value)])
    return f"{value / unit.size:,.2f} {unit.name}"


def show_seconds(value: float | None) -> str:
    if value is None:
        return MISSING
    if value >= 100:
        return f"{value:,.0f} s"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} µs"


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1%}"


def signed_percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.1%}"


def show_count(value: float | None) -> str:
    if value is None:
        return MISSING
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):,.1f}{unit}"
    return f"{value:,.0f}"
