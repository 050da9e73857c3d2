"""How far predictions of step time were off on published runs, and which of those runs a constant was fitted to."""

from __future__ import annotations

import functools
from importlib import resources

from planner.documents import Document, convert, parse_json

SCHEMA = "meshwright.accuracy/1"


class Accuracy(Document, frozen=True, kw_only=True):
    schema: str = SCHEMA
    groups: dict[str, str]
    """Groups of published rows that constants were fitted to, and which constants."""
    step_seconds_interval: tuple[float, float]
    """Factors on a predicted step time between which four of five measured ones lie, groups weighing the same."""
    source: str


@functools.cache
def accuracy() -> Accuracy:
    text = (resources.files("planner") / "data" / "accuracy.json").read_text(encoding="utf-8")
    return convert(parse_json(text, "accuracy.json"), Accuracy, "accuracy.json", SCHEMA)


def step_interval(seconds: float | None) -> tuple[float, float] | None:
    """Between which four of five measured step times lie that are predicted as `seconds`."""
    if seconds is None:
        return None
    low, high = accuracy().step_seconds_interval
    return low * seconds, high * seconds
