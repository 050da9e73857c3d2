"""When a pipeline rank may need most memory: the micro-batches of each of its stages that are in flight, from the action lists.

What is in flight is a vector with one entry per stage of the rank and kind (saved, deferred). Vectors are packed into one
integer, entry by entry, so that a step of the walk is one addition and a comparison of all entries one subtraction.
"""

from __future__ import annotations

import functools

from planner.pipeline import Moment
from planner.schedule import compute_order

_WIDTH = 40
"""Bits of an entry. The highest of them stays free, for borrows; sums over a walk need the others."""
_MASK = (1 << _WIDTH) - 1


def memory_moments(schedule: str, pipeline_parallel: int, num_virtual_stages: int, num_microbatches: int) -> tuple[Moment, ...]:
    """The moments at which a rank may need most: of those at the same work, the ones that no other covers.

    Micro-batches in flight repeat their pattern once the pipeline is full, so a few rounds of them show all.
    """
    return _memory_moments(
        schedule, pipeline_parallel, num_virtual_stages, _enough_microbatches(schedule, pipeline_parallel, num_microbatches)
    )


@functools.lru_cache(maxsize=256)
def _memory_moments(schedule: str, pipeline_parallel: int, num_virtual_stages: int, m: int) -> tuple[Moment, ...]:
    found: list[Moment] = []
    for rank, order in enumerate(compute_order(schedule, pipeline_parallel, num_virtual_stages, m)):
        stages = sorted({stage for _, stage, _ in order})
        saved = {stage: 1 << (2 * index * _WIDTH) for index, stage in enumerate(stages)}
        deferred = {stage: unit << _WIDTH for stage, unit in saved.items()}
        live, seen = 0, dict[tuple[int, str], set[int]]()
        for kind, stage, _ in order:
            if kind == "F":
                live += saved[stage]
            at = seen.get((stage, kind))
            if at is None:
                at = seen[stage, kind] = set()
            at.add(live)
            if kind == "B":
                live -= saved[stage]
            elif kind == "I":
                live += deferred[stage] - saved[stage]
            elif kind == "W":
                live -= deferred[stage]
        for (stage, kind), vectors in seen.items():
            for vector in _maximal(vectors, 2 * len(stages)):
                entries = _entries(vector, 2 * len(stages))
                flight = tuple(zip(stages, entries[::2], entries[1::2], strict=True))
                found.append(Moment(rank, flight, stage, "B" if kind == "I" else kind))
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def least_in_flight(
    schedule: str, pipeline_parallel: int, num_virtual_stages: int, num_microbatches: int
) -> tuple[tuple[float, float, float], ...]:
    """For each pipeline rank, micro-batches that a block, the embedding and the head keep in flight at the least.

    The mean over moments of memory is a moment that memory must allow for as well. Of a block it is not known on which of
    the rank's stages it lies, so the stage with the least counts.
    """
    p, m = pipeline_parallel, num_microbatches
    if num_virtual_stages == 1:
        counts = [float(m if schedule == "GPipe" else 1 if schedule == "Naive" else min(m, p - rank)) for rank in range(p)]
        return tuple((count, count, count) for count in counts)
    return tuple((min(means), means[0], means[-1]) for means in mean_in_flight(schedule, p, num_virtual_stages, m))


def mean_in_flight(schedule: str, p: int, num_virtual_stages: int, num_microbatches: int) -> tuple[tuple[float, ...], ...]:
    """For each rank, the micro-batches saved of each of its stages, in the mean over the moments at which it has most of them."""
    m = num_microbatches
    rounds = 2 * (m // max(1, m // p)) if schedule != "ZBVZeroBubble" else 3 * p  # enough to fill the pipeline
    return _mean_in_flight(schedule, p, num_virtual_stages, min(m, rounds))


@functools.lru_cache(maxsize=1024)
def _mean_in_flight(schedule: str, p: int, num_virtual_stages: int, m: int) -> tuple[tuple[float, ...], ...]:
    found = []
    for order in compute_order(schedule, p, num_virtual_stages, m):
        unit = {stage: 1 << (index * _WIDTH) for index, stage in enumerate(sorted({stage for _, stage, _ in order}))}
        live = most = total = times = summed = 0
        for kind, stage, _ in order:
            if kind == "F":
                live += unit[stage]
                total += 1
                if total > most:
                    most, times, summed = total, 1, live
                elif total == most:
                    times, summed = times + 1, summed + live
            elif kind != "W":
                live -= unit[stage]
                total -= 1
        found.append(tuple(entry / times for entry in _entries(summed, len(unit))))
    return tuple(found)


def _entries(vector: int, count: int) -> list[int]:
    return [(vector >> (index * _WIDTH)) & _MASK for index in range(count)]


def _maximal(vectors: set[int], count: int) -> list[int]:
    """Those that no other is at least as large as in every entry.

    a >= b in every entry if no entry of a - b borrows from the bit that is put above it.
    """
    guard = sum(1 << (index * _WIDTH + _WIDTH - 1) for index in range(count))
    kept: list[int] = []
    for vector in sorted(vectors, key=lambda item: (-sum(_entries(item, count)), item)):
        if not any(((other | guard) - vector) & guard == guard for other in kept):
            kept.append(vector)
    return kept


def _enough_microbatches(schedule: str, p: int, m: int) -> int:
    if schedule == "GPipe" or m <= 4 * p:
        return m
    if schedule in ("Interleaved1F1B", "InterleavedZeroBubble"):
        return 4 * (m // max(1, m // p))  # rounds of as many micro-batches, which set the warm-up
    return 4 * p
