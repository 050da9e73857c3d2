"""Stages by simple rules: cuts of equal time or equal length, and as little recomputation as makes each rank fit.

The search starts from them, and `benchmarks/search.py` compares them with the optimum.
"""

from __future__ import annotations

import math

from planner.critical_path import Graph, Key, Path, path_seconds
from planner.pipeline import Counts, Moment, Pipeline, excess_bytes, moment_bytes, stage_load, stage_seconds

Rows = list[list[list[int]]]


def even_sizes(pipeline: Pipeline) -> list[int]:
    """Layers per stage: as even as can be, the longer stages in the middle."""
    base, extra = divmod(pipeline.num_layers, pipeline.num_stages)
    start = (pipeline.num_stages - extra + 1) // 2
    return [base + (1 if start <= stage < start + extra else 0) for stage in range(pipeline.num_stages)]


def balanced_sizes(pipeline: Pipeline) -> list[int]:
    """Layers per stage so that stages take equally long when nothing is recomputed, each at least one layer."""
    weights = []
    for run in pipeline.runs:
        fastest = min(sum(option.seconds(kind) for kind in pipeline.kinds) for option in run.options)
        weights += [fastest] * run.length
    total, count = sum(weights), pipeline.num_stages
    sizes, taken, done = [], 0, 0.0
    for stage in range(count):
        target, size = total * (stage + 1) / count, 0
        most = len(weights) - taken - (count - stage - 1)
        while size < most and (size < 1 or done + weights[taken + size] / 2 <= target or stage == count - 1):
            done += weights[taken + size]
            size += 1
        sizes.append(size)
        taken += size
    return sizes


def place(pipeline: Pipeline, sizes: list[int], option: int = 0) -> Rows:
    """Stages of these sizes, all layers with the option of that index, or their last one where they have fewer."""
    rows: Rows = []
    run = used = 0
    for size in sizes:
        row = [[0] * len(item.options) for item in pipeline.runs]
        left = size
        while left:
            take = min(left, pipeline.runs[run].length - used)
            row[run][min(option, len(row[run]) - 1)] += take
            used, left = used + take, left - take
            if used == pipeline.runs[run].length:
                run, used = run + 1, 0
        rows.append(row)
    return rows


def frozen(rows: Rows) -> Counts:
    return tuple(tuple(tuple(row) for row in stage) for stage in rows)


def fit(pipeline: Pipeline, sizes: list[int]) -> Counts | None:
    """Stages of these sizes with recomputation added, the most bytes per second first, until each rank fits; None if none do."""
    rows = place(pipeline, sizes)
    by_rank: dict[int, list[Moment]] = {}
    for moment in pipeline.moments:
        by_rank.setdefault(moment.rank, []).append(moment)
    for rank, moments in by_rank.items():
        limit = pipeline.limits[rank]
        loads = {stage: stage_load(pipeline, rows[stage]) for stage, owner in enumerate(pipeline.ranks) if owner == rank}
        for _ in range(8 * len(pipeline.ranks)):  # what helps one moment may hurt another, over and over
            worst = max(moments, key=lambda moment: moment_bytes(moment, loads))
            over = moment_bytes(worst, loads) - limit
            if over <= 0:
                break
            while over > 0:
                stage = _relieve(pipeline, rows, worst, over)
                if stage is None:
                    return None
                loads[stage] = stage_load(pipeline, rows[stage])
                over = moment_bytes(worst, loads) - limit
        else:
            return None
    counts = frozen(rows)
    return None if pipeline.edges and excess_bytes(pipeline, counts)[0] > 0 else counts


def _relieve(pipeline: Pipeline, rows: Rows, moment: Moment, over: float) -> int | None:
    """Moves layers of one run on one stage to an option that saves memory; says which stage that was, None if there was none."""
    best: tuple[float, int, int, int, int, float] | None = None
    for stage, flight, put_off in moment.in_flight:
        for r, run in enumerate(pipeline.runs):
            for a, old in enumerate(run.options):
                if not rows[stage][r][a]:
                    continue
                for b, new in enumerate(run.options):
                    freed = flight * (old.saved - new.saved) + put_off * (old.deferred - new.deferred)
                    if freed <= 0:
                        continue
                    slower = sum(new.seconds(kind) - old.seconds(kind) for kind in pipeline.kinds)
                    ratio = freed / slower if slower > 0 else math.inf
                    if best is None or ratio > best[0]:
                        best = (ratio, stage, r, a, b, freed)
    if best is None:
        return None
    _, stage, r, a, b, freed = best
    moved = min(rows[stage][r][a], max(1, math.ceil(over / freed)))
    rows[stage][r][a] -= moved
    rows[stage][r][b] += moved
    return stage


def improve(pipeline: Pipeline, graph: Graph, counts: Counts, tries: int = 120) -> tuple[Counts, tuple[Path, ...]]:
    """Stages that take no longer: recomputation undone, or moved to another stage of its rank, where that shortens the critical path.

    The cuts stay. Each change is kept only if its rank still fits and the walk is shorter; at most `tries` walks are made.
    The critical paths on the way are given too.
    """
    seen: dict[Path, None] = {}
    by_rank: dict[int, list[Moment]] = {}
    for moment in pipeline.moments:
        by_rank.setdefault(moment.rank, []).append(moment)
    seconds = stage_seconds(pipeline, counts)
    length, paths = graph.critical_paths(seconds)
    while tries > 0:
        seen.update(dict.fromkeys(paths))
        for change in _shortenings(pipeline, counts, paths[0]):
            changed = _changed(counts, change)
            rank = pipeline.ranks[change[0][0]]
            loads = {stage: stage_load(pipeline, changed[stage]) for stage, owner in enumerate(pipeline.ranks) if owner == rank}
            if any(moment_bytes(moment, loads) > pipeline.limits[rank] for moment in by_rank.get(rank, ())):
                continue
            after = {**seconds, **_changed_seconds(pipeline, seconds, change)}
            if any(path_seconds(path, after) >= length * (1 - 1e-9) for path in seen):
                continue
            tries -= 1
            if graph.longest(after) < length * (1 - 1e-9):
                counts, seconds = changed, stage_seconds(pipeline, changed)
                length, paths = graph.critical_paths(seconds)
                break
            if tries <= 0:
                break
        else:
            break
    seen.update(dict.fromkeys(paths))
    return counts, tuple(seen)


Change = tuple[tuple[int, int, int, int], ...]
"""Layers that change their option, one each: (stage, run, old option, new option)."""


def _shortenings(pipeline: Pipeline, counts: Counts, path: Path) -> list[Change]:
    """Changes that make a path shorter, by most first."""
    times = dict(path)
    found: list[tuple[float, Change]] = []
    for stage, rows in enumerate(counts):
        mates = [other for other, rank in enumerate(pipeline.ranks) if rank == pipeline.ranks[stage] and other != stage]
        for r, run in enumerate(pipeline.runs):
            for b, slow in enumerate(run.options):
                for a, fast in enumerate(run.options):
                    if not rows[r][b] or a == b:
                        continue
                    extra = [(kind, slow.seconds(kind) - fast.seconds(kind)) for kind in pipeline.kinds]
                    here = sum(times.get((kind, stage), 0) * value for kind, value in extra)
                    if here <= 0:
                        continue
                    found.append((here, ((stage, r, b, a),)))
                    for mate in mates:
                        there = sum(times.get((kind, mate), 0) * value for kind, value in extra)
                        if counts[mate][r][a] and there < here:
                            found.append((here - there, ((stage, r, b, a), (mate, r, a, b))))
    return [change for _, change in sorted(found, key=lambda item: -item[0])]


def _changed_seconds(pipeline: Pipeline, seconds: dict[Key, float], change: Change) -> dict[Key, float]:
    """Seconds of the actions that a change makes longer or shorter."""
    found: dict[Key, float] = {}
    for stage, run, old, new in change:
        options = pipeline.runs[run].options
        for kind in pipeline.kinds:
            key = kind, stage
            found[key] = found.get(key, seconds.get(key, 0.0)) + options[new].seconds(kind) - options[old].seconds(kind)
    return found


def _changed(counts: Counts, change: Change) -> Counts:
    rows = [[list(row) for row in stage] if index in {part[0] for part in change} else stage for index, stage in enumerate(counts)]
    for stage, run, old, new in change:
        rows[stage][run][old] -= 1  # type: ignore[index]
        rows[stage][run][new] += 1  # type: ignore[index]
    return tuple(tuple(tuple(row) for row in stage) for stage in rows)
