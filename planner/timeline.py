"""Timelines: actions with start and end, predicted or measured, in one type.

One bubble formula, one trace writer and one picture serve both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from planner.documents import Document
from planner.schedule import COMPUTE_KINDS, Action, Actions
from planner.values import SIGNED

SCHEMA = "meshwright.timeline/1"


class Event(NamedTuple):
    """One action of one rank, in seconds from the start of the step."""

    rank: int
    kind: str
    stage: int
    microbatch: int
    start: float
    end: float


class Timeline(Document, frozen=True, kw_only=True):
    """The events of one step. `rank` is a pipeline rank in a simulation and a global rank in a measurement."""

    RULES = {"events": SIGNED}

    schema: str = SCHEMA
    source: str
    """"simulated", "measured" or "rehearsed"."""
    events: tuple[Event, ...]

    @property
    def ranks(self) -> list[int]:
        return sorted({event.rank for event in self.events})

    @property
    def end(self) -> float:
        return max((event.end for event in self.events), default=0.0)


class DeadlockError(RuntimeError):
    """The action lists wait for each other in a circle."""


def simulate(
    lists: Sequence[Actions],
    seconds: Callable[[Action], float],
    transfer_seconds: Callable[[Action], float],
    *,
    blocking_send_seconds: Callable[[Action], float] | None = None,
    receive_seconds: float = 0.0,
) -> Timeline:
    """Walks the action lists of all pipeline ranks and returns when each action starts and ends.

    `seconds` is the time of a compute, REDUCE or OPTIMIZER action, `transfer_seconds` of a message, given its SEND
    action, from the start of the send to its arrival. A rank does one action at a time in the order of its list. A send
    holds its rank for `blocking_send_seconds` (default 0); a receive lasts until its message has arrived. With
    `receive_seconds` above 0 a message only begins to move when it is asked for, so long after that: a receive takes both at least.
    """
    clocks = [0.0] * len(lists)
    positions = [0] * len(lists)
    arrivals: dict[tuple[str, int, int], float] = {}
    transfers: dict[tuple[str, int, int], float] = {}
    ends: dict[Action, float] = {}
    events: list[Event] = []
    remaining = sum(len(actions) for actions in lists)
    last_stage = max((action.stage for actions in lists for action in actions), default=0)
    while remaining:
        before = remaining
        for rank, actions in enumerate(lists):
            clock, position = clocks[rank], positions[rank]
            while position < len(actions):
                action = actions[position]
                kind, stage, microbatch = action
                start = clock
                if kind in COMPUTE_KINDS:
                    ready = _local_dependency(action, last_stage)
                    if ready is not None and ready in ends:
                        start = max(start, ends[ready])
                    clock = start + seconds(action)
                    ends[action] = clock
                elif kind == "SEND_F":
                    message = ("RECV_F", stage + 1, microbatch)
                    transfers[message] = transfer_seconds(action)
                    arrivals[message] = start + transfers[message]
                    clock = start + (blocking_send_seconds(action) if blocking_send_seconds else 0.0)
                elif kind == "SEND_B":
                    message = ("RECV_B", stage - 1, microbatch)
                    transfers[message] = transfer_seconds(action)
                    arrivals[message] = start + transfers[message]
                    clock = start + (blocking_send_seconds(action) if blocking_send_seconds else 0.0)
                elif kind in ("RECV_F", "RECV_B"):
                    arrival = arrivals.get(action)
                    if arrival is None:
                        break
                    least = receive_seconds + transfers[action] if receive_seconds > 0.0 else 0.0
                    clock = max(clock + least, arrival)
                else:
                    clock = start + seconds(action)
                events.append(Event(rank, kind, stage, microbatch, start, clock))
                position += 1
                remaining -= 1
            clocks[rank], positions[rank] = clock, position
        if remaining == before:
            waiting = [actions[position] for actions, position in zip(lists, positions, strict=True) if position < len(actions)]
            raise DeadlockError(f"the schedule waits for itself: {waiting}")
    return Timeline(source="simulated", events=tuple(events))


def _local_dependency(action: Action, last_stage: int) -> Action | None:
    """The neighbouring stage's compute that `action` needs; it is looked up only where both are on one rank."""
    kind, stage, microbatch = action
    if kind == "F" and stage > 0:
        return Action("F", stage - 1, microbatch)
    if kind in "BI" and stage < last_stage:
        return Action(kind, stage + 1, microbatch)
    return None


def window(timeline: Timeline, ranks: Iterable[int] | None = None) -> tuple[float, float]:
    """The pipeline phase of the step: from the first compute action's start to the last one's end, over all ranks or those given."""
    among = None if ranks is None else frozenset(ranks)
    compute = [event for event in timeline.events if event.kind in COMPUTE_KINDS and (among is None or event.rank in among)]
    if not compute:
        return (0.0, 0.0)
    return min(event.start for event in compute), max(event.end for event in compute)


def busy_seconds(timeline: Timeline) -> dict[int, float]:
    """Seconds that each rank spends in compute actions."""
    busy = dict.fromkeys(timeline.ranks, 0.0)
    for event in timeline.events:
        if event.kind in COMPUTE_KINDS:
            busy[event.rank] += event.end - event.start
    return busy


def bubble_fractions(timeline: Timeline, pipeline_of: Mapping[int, object] | None = None) -> dict[int, float]:
    """Idle time over total time of each rank within the pipeline phase; waiting for a message is idle.

    Where a timeline holds several pipelines (the replicas of data parallelism), `pipeline_of` says which one a rank belongs to, and
    the phase is that of its own: replicas need not start at the same moment. For equal stages without communication GPipe and 1F1B
    give (p - 1) / (m + p - 1) (Narayanan et al. 2021, section 2.2, as a share of the whole), and naive model parallelism 1 - 1/p.
    """
    spans: dict[object, float] = {}
    for pipeline in {pipeline_of[rank] if pipeline_of else None for rank in timeline.ranks}:
        first, last = window(timeline, [rank for rank in timeline.ranks if pipeline_of is None or pipeline_of[rank] == pipeline])
        spans[pipeline] = last - first
    fractions = {}
    for rank, busy in busy_seconds(timeline).items():
        span = spans[pipeline_of[rank] if pipeline_of else None]
        fractions[rank] = max(0.0, 1.0 - busy / span) if span > 0 else 0.0
    return fractions


def bubble_fraction(timeline: Timeline, pipeline_of: Mapping[int, object] | None = None) -> float:
    """The mean over the ranks."""
    fractions = bubble_fractions(timeline, pipeline_of)
    return sum(fractions.values()) / len(fractions) if fractions else 0.0


def exposed_communication_seconds(timeline: Timeline) -> dict[int, float]:
    """Seconds that each rank spends in sends, receives and reductions."""
    exposed = dict.fromkeys(timeline.ranks, 0.0)
    for event in timeline.events:
        if event.kind.startswith(("SEND", "RECV", "REDUCE")):
            exposed[event.rank] += event.end - event.start
    return exposed


def chrome_trace(timelines: Iterable[Timeline]) -> str:
    """The timelines as Chrome/Perfetto trace JSON: one process per rank, one thread per timeline, times in µs."""
    rows: list[dict[str, object]] = []
    for thread, timeline in enumerate(timelines):
        for rank in timeline.ranks:
            rows.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}})
            rows.append({"ph": "M", "pid": rank, "tid": thread, "name": "thread_name", "args": {"name": timeline.source}})
        for event in timeline.events:
            rows.append(
                {
                    "ph": "X",
                    "pid": event.rank,
                    "tid": thread,
                    "ts": round(event.start * 1e6, 3),
                    "dur": round((event.end - event.start) * 1e6, 3),
                    "cat": "compute" if event.kind in COMPUTE_KINDS else "communication",
                    "name": f"{event.kind} s{event.stage} m{event.microbatch}",
                }
            )
    return json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"}, separators=(",", ":"))
