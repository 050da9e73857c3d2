"""What the stages of one pipeline rank may recompute, where their sizes are given: every choice that can be part of a faster step.

Ranks share no memory, so what fits one says nothing of another. A choice (how many layers of each of the rank's stages have
which option) may be left out

- if it doesn't fit at one of the rank's moments: bytes at a moment are a sum over the rank's stages, one term each;
- if another one that fits is at least as fast on each stage, in each kind of action: no path gets longer with that one;
- if it makes a path through the schedule's graph as long as the cutoff, with all other ranks at their shortest on that path.

The last is repeated until nothing more falls out. What is left is for the ILP, which takes one choice per rank: a program without rows
for memory, and with a far tighter relaxation, which can't mix a rank's choices into fractions of layers that fit. And since ranks choose
apart, each path, with every rank at its shortest, is a lower bound on the step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from planner.critical_path import Path, path_seconds
from planner.forced import recomputed_run
from planner.pipeline import Choice, Moment, Pipeline, StageLoad, stage_load, stage_seconds

MOST, WATCHED = 10_000, 3
"""Choices of a rank, fitting or not, that are looked at (one with more is left to the rows for memory), and moments by which
they are given up early."""


class Chosen(NamedTuple):
    """The choices of each rank, none where there are too many to list, and a lower bound on the step in seconds."""

    choices: tuple[tuple[Choice, ...], ...]
    bound: float
    """Infinite if no choice of some rank fits or is fast enough."""


class _Kept(NamedTuple):
    """A choice with what it adds to each of the rank's actions, as `_Rank.keys` lists them."""

    choice: Choice
    extra: tuple[float, ...]


class _Rank(NamedTuple):
    keys: tuple[tuple[str, int], ...]
    kept: list[_Kept]


def rank_choices(pipeline: Pipeline, rows: Sequence[Sequence[Sequence[int]]], paths: Sequence[Path], cutoff: float) -> Chosen:
    """All choices for stages with these layers by run and option (the option plays no part) that may lead below `cutoff` seconds."""
    chosen = recomputed_run(pipeline)
    none = ((),) * len(pipeline.limits)
    if chosen is None or pipeline.edges:
        return Chosen(none, 0.0)
    fastest = [[[sum(row)] + [0] * (len(row) - 1) if index == chosen else list(row) for index, row in enumerate(stage)] for stage in rows]
    seconds = stage_seconds(pipeline, fastest)
    lengths = [path_seconds(path, seconds) for path in paths]
    ranks = []
    for rank in range(len(pipeline.limits)):
        found = _choices_of(pipeline, fastest, chosen, rank, paths, lengths, cutoff)
        if found is not None and not found.kept:
            return Chosen(none, math.inf)
        ranks.append(found)
    bound = _fix(ranks, paths, lengths, cutoff)
    if bound >= cutoff:
        return Chosen(none, math.inf)
    return Chosen(tuple(tuple(item.choice for item in rank.kept) if rank else () for rank in ranks), bound)


def _choices_of(
    pipeline: Pipeline, rows: Sequence[Sequence[Sequence[int]]], chosen: int, rank: int,
    paths: Sequence[Path], lengths: Sequence[float], cutoff: float,
) -> _Rank | None:  # fmt: skip
    """The choices of a rank that fit, are within the cutoff on the paths that are longest on it, and that no other one is as fast as."""
    run, limit = pipeline.runs[chosen], pipeline.limits[rank]
    mine = [stage for stage, owner in enumerate(pipeline.ranks) if owner == rank]
    moments = [moment for moment in pipeline.moments if moment.rank == rank]
    kinds = [kind for kind in pipeline.kinds if any(option.seconds(kind) != run.options[0].seconds(kind) for option in run.options)]
    keys = tuple((kind, stage) for stage in mine for kind in kinds)
    ways: list[list[tuple[tuple[int, ...], StageLoad, tuple[float, ...]]]] = []
    for stage in mine:
        count, here = sum(rows[stage][chosen]), []
        for row in _ways(count, len(run.options)):
            load = stage_load(pipeline, [row if index == chosen else other for index, other in enumerate(rows[stage])])
            more = tuple(
                sum(n * (option.seconds(kind) - run.options[0].seconds(kind)) for n, option in zip(row, run.options, strict=True)) for kind in kinds
            )
            here.append((row, load, more))
        ways.append(sorted(here, key=lambda item: sum(item[2])))
    if math.prod(map(len, ways)) > MOST:
        return None
    room = limit + 1e-9 * abs(limit)
    tables = [table for table in (_moment_table(moment, mine, ways) for moment in moments) if sum(max(column) for column in table) > room]
    tables.sort(key=lambda table: -sum(column[0] for column in table))
    costs = []
    for index in _heaviest(keys, paths, lengths):
        times = dict(paths[index])
        costs.append((
            [[sum(times.get((kind, stage), 0) * value for kind, value in zip(kinds, more, strict=True)) for _, _, more in here]
             for stage, here in zip(mine, ways, strict=True)],
            cutoff - lengths[index],
        ))  # fmt: skip
    kept = []
    for picked in _search(tables, room, costs):
        taken = [here[way] for way, here in zip(picked, ways, strict=True)]
        kept.append(_Kept(tuple(row for row, _, _ in taken), tuple(value for _, _, more in taken for value in more)))
    return _Rank(keys, _minimal(kept))


def _search(tables: list[list[list[float]]], room: float, costs: list[tuple[list[list[float]], float]]) -> list[tuple[int, ...]]:
    """The ways, one per stage, with the bytes of every table within the room and the seconds of every cost below its most.

    Both are summed over stages, `tables` and the first part of `costs` by stage and way; the first way is the fastest. A partial
    choice is given up when what it lacks can't be freed in the seconds that are left, at the best bytes per second of the stages
    to come.
    """
    (cost, most), others = costs[0], costs[1:]
    places = len(cost)
    watched = []
    for table in tables[:WATCHED]:
        lacks = _suffix_sums([column[0] for column in table])
        rates = [0.0] * (places + 1)
        for place in reversed(range(places)):
            best = rates[place + 1]
            for way in range(1, len(table[place])):
                freed, taken = table[place][0] - table[place][way], cost[place][way] - cost[place][0]
                if freed > 0:
                    best = max(best, freed / taken * (1 + 1e-9) if taken > 0 else math.inf)
            rates[place] = best
        watched.append((table, [lack - room for lack in lacks], rates))
    found: list[tuple[int, ...]] = []

    def search(place: int, picked: tuple[int, ...], left: float, held: list[float]) -> None:
        if place == places:
            if all(sum(column[way] for column, way in zip(table, picked, strict=True)) <= room for table in tables) and all(
                sum(column[way] for column, way in zip(table, picked, strict=True)) < limit for table, limit in others
            ):
                found.append(picked)
            return
        for way, taken in enumerate(cost[place]):
            budget = left - taken
            if budget <= 0:
                continue
            needs = []
            for value, (table, lacks, rates) in zip(held, watched, strict=True):
                need = value + table[place][way]
                short = need + lacks[place + 1]
                if short > 0 and short > rates[place + 1] * budget:
                    break
                needs.append(need)
            else:
                search(place + 1, (*picked, way), budget, needs)

    search(0, (), most, [0.0] * len(watched))
    return found


def _ways(count: int, options: int) -> list[tuple[int, ...]]:
    """All ways to give `count` layers one of the options each."""
    return [row for row in itertools.product(range(count + 1), repeat=options) if sum(row) == count]


def _moment_table(
    moment: Moment, mine: Sequence[int], ways: Sequence[Sequence[tuple[tuple[int, ...], StageLoad, tuple[float, ...]]]]
) -> list[list[float]]:
    """Bytes at a moment (`pipeline.moment_bytes`) by stage and way."""
    flight = {stage: (saved, deferred) for stage, saved, deferred in moment.in_flight}
    table = []
    for stage, here in zip(mine, ways, strict=True):
        saved, deferred = flight.get(stage, (0, 0))
        column = []
        for _, load, _ in here:
            need = load.states + saved * load.saved + deferred * load.deferred
            if stage == moment.stage:
                need += load.transients[moment.direction]
            column.append(need)
        table.append(column)
    return table


def _suffix_sums(values: Sequence[float]) -> list[float]:
    return list(itertools.accumulate(reversed(values), initial=0.0))[::-1]


def _heaviest(keys: Sequence[tuple[str, int]], paths: Sequence[Path], lengths: Sequence[float]) -> list[int]:
    """The paths that are longest with a second more on each of the rank's actions, up to three."""
    wanted = set(keys)
    total = max((sum(count for _, count in path) for path in paths), default=1)
    longest = max(lengths, default=0.0)
    scores = [
        (length / (longest or 1.0) + sum(count for key, count in path if key in wanted) / total, index)
        for index, (path, length) in enumerate(zip(paths, lengths, strict=True))
    ]
    return [index for _, index in sorted(scores, reverse=True)[:3]]


def _minimal(kept: list[_Kept]) -> list[_Kept]:
    """Those that no other one is as fast as, action by action."""
    found: list[_Kept] = []
    for item in sorted(kept, key=lambda item: (sum(item.extra), item.choice)):
        if not any(all(a <= b for a, b in zip(other.extra, item.extra, strict=True)) for other in found):
            found.append(item)
    return found


def _fix(ranks: list[_Rank | None], paths: Sequence[Path], lengths: Sequence[float], cutoff: float) -> float:
    """Takes out choices that make a path too long, until nothing changes; gives the longest path with each rank at its shortest."""
    tables = []
    for path, length in zip(paths, lengths, strict=True):
        times = dict(path)
        weights = [[times.get(key, 0) for key in rank.keys] if rank else [] for rank in ranks]
        tables.append((length, weights))
    costs = [
        [[sum(n * value for n, value in zip(weight, item.extra, strict=True)) for item in rank.kept] if rank and any(weight) else None
         for rank, weight in zip(ranks, weights, strict=True)]
        for _, weights in tables
    ]  # fmt: skip
    alive = [[True] * len(rank.kept) if rank else [] for rank in ranks]
    bound, changed = 0.0, True
    while changed:
        changed, bound = False, 0.0
        for (length, _), by_rank in zip(tables, costs, strict=True):
            least = [min((cost for cost, lives in zip(row, living, strict=True) if lives), default=math.inf) if row else 0.0
                     for row, living in zip(by_rank, alive, strict=True)]  # fmt: skip
            total = length + sum(least)
            bound = max(bound, total)
            if total >= cutoff:
                return total
            for row, living, low in zip(by_rank, alive, least, strict=True):
                if row and total - low + max(row) >= cutoff:
                    for index, cost in enumerate(row):
                        if living[index] and total - low + cost >= cutoff:
                            living[index] = False
                            changed = True
    for rank, living in zip(ranks, alive, strict=True):
        if rank:
            rank.kept[:] = [item for item, lives in zip(rank.kept, living, strict=True) if lives]
    return bound
