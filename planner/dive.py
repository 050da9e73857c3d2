"""Which candidates look fastest before anything is proven: guesses, none of which is a bound."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator

from planner import bounds
from planner.candidates import (
    Constraints,
    Degrees,
    decisions_of,
    degrees_of,
    plainness,
    rank_orders,
    schedules,
    sequence_parallel_choices,
    shape_of,
    shardings,
)
from planner.chain import Costs
from planner.moments import least_in_flight
from planner.plan import Decisions, Recompute, replace

DEGREES, LAYOUTS, TRIES = 40, 6, 16
"""What is looked among: degrees, layouts of them, candidates."""

Guess = tuple[float, tuple[object, ...], Decisions]
"""Seconds of a step, what orders equal guesses, and the candidate."""


def promising(costs: Costs, constraints: Constraints, levels: tuple[Recompute, ...], known: Iterable[tuple[float, Degrees]]) -> Iterator[Decisions]:
    """Candidates of degrees with these bounds, those that look fastest first."""
    rough = [(bound * (1 + (degrees.pipeline_parallel - 1) / degrees.num_microbatches / 8), degrees) for bound, degrees in known]
    looks: list[Guess] = []
    for _, degrees in sorted(rough)[:DEGREES]:
        choice = sequence_parallel_choices(costs.inputs, degrees, constraints)[0]
        for order in sorted(rank_orders(degrees, constraints), key=lambda order: order.index("tp"))[:1]:
            ways = shardings(costs.inputs, degrees, order, constraints)
            plain = [(zero, replicas) for zero, replicas in ways if zero in (1, 3) and replicas == 1]
            for zero, replicas in plain or ways:
                layout = decisions_of(degrees, sequence_parallel=choice, rank_order=order, zero_stage=zero, data_parallel_replicate=replicas)
                looks.append((_look(costs, layout, levels), plainness(layout), layout))
    guesses = [guess for _, _, layout in heapq.nsmallest(LAYOUTS, looks) for guess in _guesses(costs, constraints, layout, levels)]
    for _, _, candidate in heapq.nsmallest(TRIES, guesses):
        if bounds.rank_rooms(costs, candidate, least_in_flight(*shape_of(candidate)), levels) is not None:
            yield candidate


def _look(costs: Costs, layout: Decisions, levels: tuple[Recompute, ...]) -> float:
    """A guess of the step time with a schedule that fills and drains in an eighth of 1F1B's time."""
    rooms = bounds.rank_rooms(costs, layout, least_in_flight(*shape_of(layout)), levels)
    p, m = layout.pipeline_parallel, layout.num_microbatches
    if rooms is None:
        return math.inf
    tail = bounds.mean_tail(bounds.tail_of(costs, layout), costs.total_parameters(layout) / p)
    return bounds.least_work(rooms, costs.inputs.model.num_layers) * (m + (p - 1) / 8) / p + tail


def _guesses(costs: Costs, constraints: Constraints, layout: Decisions, levels: tuple[Recompute, ...]) -> list[Guess]:
    """A guess of the step time with each schedule, which takes longer where stages can't be equal."""
    blocks, found = costs.inputs.model.num_layers, list[Guess]()
    least, whole = bounds.least_stages(costs, layout, levels), bounds.whole_seconds(costs.seconds(layout), blocks, levels)
    for name, v in schedules(costs.inputs, degrees_of(layout), constraints):
        candidate = replace(layout, schedule=name, num_virtual_stages=v)
        if v == 1:
            tail = bounds.mean_tail(bounds.tail_of(costs, layout), costs.total_parameters(layout) / layout.pipeline_parallel)
            guess = bounds.schedule_bound(candidate, whole, least) + tail
        else:
            rough = bounds.regular_bounds(costs, candidate, levels)
            stages = candidate.num_stages
            guess = min(bound * (1 + 0.1 * (max(sizes[0][1:-1], default=1) * stages / (blocks + 2) - 1)) for bound, sizes in rough)
        found.append((guess, plainness(candidate), candidate))
    return found
