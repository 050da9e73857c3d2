"""Recomputation that memory forces on a pipeline rank whose stages' sizes are given: a knapsack for each of its fullest moments.

A moment needs `base` bytes with nothing recomputed. Of c1 layers at the first slower option and c2 at the second, none can free
more than the c1 + c2 largest savings of the first option and the c2 largest differences between the two; the cheapest
(c1, c2) that may free what the moment lacks is then a lower bound on the seconds of recomputation, in whole layers. Where
all layers of a moment save in proportion to the micro-batches in flight, it is the exact minimum for that moment. From there on
choices are tried in the order of their seconds until one frees what all the moments lack.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from planner.critical_path import Key, Path, path_seconds
from planner.pipeline import Moment, Option, Pipeline, Run

MOMENTS, TRIES = 8, 600
"""Moments of a rank that are looked at, those that need most with nothing recomputed, and choices that are tried on all of them."""
MOST_NUMBERS = 1 << 16
"""Of layers by option, beyond which no choices are tried."""


class Forced(NamedTuple):
    """The least extra seconds of one micro-batch through the layers of each rank, infinite where they can't fit at all."""

    seconds: tuple[float, ...]
    kinds: str
    """The kinds of action that take longer when layers are recomputed."""


def recomputed_run(pipeline: Pipeline) -> int | None:
    """The one run that has several options, the first of which is the fastest; None where that is not so."""
    several = [index for index, run in enumerate(pipeline.runs) if len(run.options) > 1]
    if len(several) != 1 or len(pipeline.runs[several[0]].options) > 3:
        return None
    first, *others = pipeline.runs[several[0]].options
    faster = any(other.seconds(kind) < first.seconds(kind) for other in others for kind in pipeline.kinds)
    return None if faster else several[0]


def forced(pipeline: Pipeline, rows: Sequence[Sequence[Sequence[int]]]) -> Forced:
    """What stages with these layers, by run and option, must recompute; which option they are at plays no part."""
    chosen = recomputed_run(pipeline)
    if chosen is None or pipeline.edges:
        return Forced((0.0,) * len(pipeline.limits), "")
    run = pipeline.runs[chosen]
    counts = [[sum(row) for row in stage] for stage in rows]
    extra = [sum(option.seconds(kind) - run.options[0].seconds(kind) for kind in pipeline.kinds) for option in run.options[1:]]
    slower = "".join(
        kind for kind in pipeline.kinds if any(option.seconds(kind) > run.options[0].seconds(kind) for option in run.options[1:])
    )
    by_rank: dict[int, list[Moment]] = {}
    for moment in pipeline.moments:
        by_rank.setdefault(moment.rank, []).append(moment)
    found = []
    held = [_plain(pipeline, stage) for stage in counts]
    least_transients = [
        {direction: _least_transients(pipeline, stage, direction) for direction in "FBW"} for stage in counts
    ]
    for rank, limit in enumerate(pipeline.limits):
        bases = sorted(
            ((_held(held, moment) + least_transients[moment.stage][moment.direction], moment) for moment in by_rank.get(rank, ())),
            key=lambda item: -item[0],
        )
        least = 0.0
        for base, moment in bases[:MOMENTS]:
            if base <= limit * (1 + 1e-12):
                break
            least = max(least, _cheapest(run, counts, chosen, moment, extra, base - limit))
        if 0 < least < math.inf:
            fullest = [(moment, base - limit) for base, moment in bases[:MOMENTS]]
            least = _together(run, counts, chosen, fullest, extra, least)
        found.append(least)
    return Forced(tuple(found), slower)


def forced_in_the_mean(
    pipeline: Pipeline, rows: Sequence[Sequence[Sequence[int]]], means: Sequence[Sequence[float]], slack: float
) -> tuple[float, ...]:
    """As `forced`, from one moment of each rank, the mean over several: `means` are the micro-batches saved of its stages.

    Of that moment no transients are known, which may be negative by `slack` bytes.
    """
    chosen = recomputed_run(pipeline)
    if chosen is None:
        return (0.0,) * len(means)
    run = pipeline.runs[chosen]
    counts = [[sum(row) for row in stage] for stage in rows]
    extra = [sum(option.seconds(kind) - run.options[0].seconds(kind) for kind in pipeline.kinds) for option in run.options[1:]]
    held, found = [_plain(pipeline, stage) for stage in counts], []
    stages_of: list[list[int]] = [[] for _ in means]
    for stage, owner in enumerate(pipeline.ranks):
        stages_of[owner].append(stage)
    for rank, flight in enumerate(means):
        mine = stages_of[rank]
        moment = Moment(rank, tuple((stage, saved, 0) for stage, saved in zip(mine, flight, strict=True)), mine[0], "")  # type: ignore[misc]
        lack = _held(held, moment) - pipeline.limits[rank] - slack
        found.append(_cheapest(run, counts, chosen, moment, extra, lack) if lack > 0 else 0.0)
    return tuple(found)


def _plain(pipeline: Pipeline, counts: Sequence[int]) -> tuple[float, float, float]:
    """Bytes of a stage with nothing recomputed: its states, and what a micro-batch saves and defers."""
    states = saved = deferred = 0.0
    for run, count in zip(pipeline.runs, counts, strict=True):
        if count:
            option = run.options[0]
            states, saved, deferred = states + count * run.states, saved + count * option.saved, deferred + count * option.deferred
    return states, saved, deferred


def _held(held: Sequence[tuple[float, float, float]], moment: Moment) -> float:
    """Bytes of states and activations at a moment with nothing recomputed; `held` as `_plain` gives them, by stage."""
    need = 0.0
    for stage, saved, deferred in moment.in_flight:
        states, each, put_off = held[stage]
        need += states + saved * each + deferred * put_off
    return need


def _least_transients(pipeline: Pipeline, counts: Sequence[int], direction: str) -> float:
    """Of what a stage needs beyond what it saves while it works, what every option needs."""
    most = back = 0.0
    for run, count in zip(reversed(pipeline.runs), reversed(counts), strict=True):
        if count:
            most = max(most, min(option.transient(direction) for option in run.options) - back)
            back += count * max(option.given_back(direction) for option in run.options)
    return most


def _cheapest(run: Run, counts: Sequence[Sequence[int]], chosen: int, moment: Moment, extra: Sequence[float], lack: float) -> float:
    """The least extra seconds with which the layers of a moment may free `lack` bytes."""
    first, others = run.options[0], run.options[1:]
    savings = [
        tuple(_saving(first, other, saved, deferred) for other in others)
        for stage, saved, deferred in moment.in_flight
        for _ in range(counts[stage][chosen])
    ]
    ones = _sums(saving[0] for saving in savings)
    more = _sums(saving[1] - saving[0] for saving in savings) if len(others) > 1 else [0.0]
    best, peak = math.inf, max(range(len(ones)), key=ones.__getitem__)
    for second in range(len(more)):
        wanted = lack * (1 - 1e-9) - more[second]
        total = bisect.bisect_left(ones, wanted, second, peak + 1) if second <= peak else second  # sums rise to their peak, then fall
        if total < len(ones) and ones[total] >= wanted:
            best = min(best, (total - second) * extra[0] + (second * extra[1] if second else 0.0))
    return best


def _together(
    run: Run, counts: Sequence[Sequence[int]], chosen: int, moments: Sequence[tuple[Moment, float]], extra: Sequence[float], least: float
) -> float:
    """The least extra seconds, from `least` up, of a choice that frees what all the moments lack, as far as TRIES of them go."""
    first, others = run.options[0], run.options[1:]
    places = [counts[stage][chosen] for stage, _, _ in moments[0][0].in_flight]
    savings = [
        [[_saving(first, other, saved, deferred) for other in others] for _, saved, deferred in moment.in_flight] for moment, _ in moments
    ]
    lacks = [lack - 1e-9 * abs(lack) for _, lack in moments]
    total, tries = sum(places), TRIES
    if (total + 1) ** len(others) > MOST_NUMBERS:
        return least
    numbers = itertools.product(range(total + 1), repeat=len(others))
    for cost, chosen_numbers in sorted((sum(n * each for n, each in zip(row, extra, strict=True)), row) for row in numbers if sum(row) <= total):
        if cost < least * (1 - 1e-9):
            continue
        for split in _splits(places, chosen_numbers):
            tries -= 1
            if tries < 0 or all(
                sum(n * each for row, saving in zip(split, stages, strict=True) for n, each in zip(row, saving, strict=True)) >= lack
                for stages, lack in zip(savings, lacks, strict=True)
            ):
                return cost
    return math.inf


def _splits(places: Sequence[int], numbers: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """All ways to put so many layers of each option on stages that have so many places."""
    if not places:
        if not any(numbers):
            yield ()
        return
    if sum(numbers) > sum(places):
        return
    for here in itertools.product(*(range(min(places[0], number) + 1) for number in numbers)):
        if sum(here) <= places[0]:
            rest = tuple(number - taken for number, taken in zip(numbers, here, strict=True))
            for others in _splits(places[1:], rest):
                yield (here, *others)


def _saving(first: Option, other: Option, saved: int, deferred: int) -> float:
    return saved * (first.saved - other.saved) + deferred * (first.deferred - other.deferred)


def _sums(values: Iterable[float]) -> list[float]:
    """The largest sum of none, one, two, ... of the values."""
    return list(itertools.accumulate(sorted(values, reverse=True), initial=0.0))


def path_bound(paths: Iterable[Path], seconds: Mapping[Key, float], need: Forced, ranks: Sequence[int]) -> float:
    """The longest of the paths with `seconds`, and what each rank must recompute as often as the path has all of its stages."""
    if math.inf in need.seconds:
        return math.inf
    longest = 0.0
    for path in paths:
        length = path_seconds(path, seconds)
        if any(need.seconds):
            times = dict(path)
            for rank, forced_seconds in enumerate(need.seconds):
                if forced_seconds:
                    mine = [stage for stage, owner in enumerate(ranks) if owner == rank]
                    length += forced_seconds * min(times.get((kind, stage), 0) for stage in mine for kind in need.kinds)
        longest = max(longest, length)
    return longest
