"""Figures of a plan as people read them."""

from __future__ import annotations

import math

from planner.plan import Decisions

GIB = 2**30


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    return f"{seconds:.2f} s" if abs(seconds) >= 1 else f"{seconds * 1e3:.2f} ms"


def rounded_up(value: float, digits: int = 4) -> str:
    """The least figure of so many digits that is not below `value`, for a limit that is to be met."""
    if value <= 0:
        return f"{value:.{digits}g}"
    places = digits - 1 - math.floor(math.log10(value))
    up = math.ceil(round(value * 10**places, 6)) / 10**places
    return f"{up:.0f}" if places <= 0 else f"{up:.{digits}g}"


def gib(num_bytes: float, *, up: bool = False) -> str:
    """With one decimal, the nearest or, with `up`, the next."""
    unit, name = (GIB, "GiB") if num_bytes >= 0.1 * GIB else (2**20, "MiB")
    return f"{math.ceil(10 * num_bytes / unit) / 10 if up else num_bytes / unit:.1f} {name}"


def degrees_in_words(decisions: Decisions, left_out: str = "") -> str:
    """The degrees of a plan that are above 1: "tp 8, pp 8"."""
    names = {"tp": "tensor_parallel", "pp": "pipeline_parallel", "dp": "data_parallel"}
    words = [f"{short} {getattr(decisions, name)}" for short, name in names.items() if name != left_out and getattr(decisions, name) > 1]
    return ", ".join(words) or "no parallelism"
