"""Several rounds of the same measurements as one, for machines whose speed changes from minute to minute."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from planner.measurements import Measurements, StepPoint

_Point = TypeVar("_Point", bound=NamedTuple)

GROUPS = ("matmuls", "memory", "layers", "optimizer", "collectives", "messages", "steps", "late_receives")


def typical(rounds: Sequence[Measurements]) -> Measurements:
    """Each point with the medians of its seconds over the rounds that have it; where it was measured, as the first round says."""
    medians: dict[str, Any] = {group: tuple(_medians([getattr(each, group) for each in rounds])) for group in GROUPS}
    return rounds[0]._replace(**medians)


def spread_fraction(rounds: Sequence[Measurements]) -> float:
    """How far the rounds differ: half of the range of what training took under a plan over its mean, the mean over the plans."""
    ranges = []
    for points in zip(*(each.steps for each in rounds), strict=True):
        seconds = [_whole(point) for point in points]
        ranges.append((max(seconds) - min(seconds)) / 2 / statistics.fmean(seconds))
    return statistics.fmean(ranges) if ranges else 0.0


def _whole(point: StepPoint) -> float:
    """A rank's step without its pipeline's bubble, in seconds."""
    passes = point.decisions.num_microbatches * (point.forward_seconds + point.backward_seconds) / point.decisions.pipeline_parallel
    return passes + point.communication_seconds + point.reduction_seconds + point.rest_seconds


def _medians(rounds: Iterable[Sequence[_Point]]) -> list[_Point]:
    """A point is known by all that is not seconds, and by its place among those of its round that are alike in that."""
    found: dict[str, list[_Point]] = defaultdict(list)
    for points in rounds:
        seen: dict[str, int] = defaultdict(int)
        for point in points:
            name = repr([value for field, value in zip(point._fields, point, strict=True) if not _is_seconds(field)])
            found[f"{seen[name]} {name}"].append(point)
            seen[name] += 1
    return [_median(same) for same in found.values()]


def _median(same: Sequence[_Point]) -> _Point:
    seconds: dict[str, Any] = {field: statistics.median(getattr(point, field) for point in same) for field in same[0]._fields if _is_seconds(field)}
    return same[0]._replace(**seconds)


def _is_seconds(field: str) -> bool:
    return field == "seconds" or field.endswith("_seconds")
