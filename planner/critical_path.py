"""The walk of a schedule as a longest path, and the critical path as a linear bound on the step time.

The action lists of a schedule fix an acyclic graph: each action waits for the one before it on its rank, and for the
neighbouring stage's action on the same micro-batch, which arrives after its transfer. The step takes as long as the
longest path. Every path, critical or not, is a *lower bound* on the step time that is linear in the seconds of the
stages, whatever those are; this is what lets an ILP minimise the walked step time exactly (`planner.solver`).

`planner.timeline.simulate` walks the same lists and writes down every event; `Graph.longest` only adds up. A test
compares the two.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.plan import SPLIT_BACKWARD_SCHEDULES, stage_ranks
from planner.schedule import compute_order

Key = tuple[str, int]
"""What takes time: ("F" | "B" | "I" | "W" | "REDUCE" | "SEND_F" | "SEND_B", stage) or ("OPTIMIZER", pipeline rank)."""

RECEIVE: Key = ("RECEIVE", 0)
"""What a receive takes beside its message where the message only begins to move when it is asked for; the rank does nothing else meanwhile."""

Path = tuple[tuple[Key, int], ...]
"""How often each `Key` lies on one path through the graph, in a fixed order."""


def path_seconds(path: Path, seconds: Mapping[Key, float]) -> float:
    """The length of a path; a key without seconds takes none."""
    return sum(count * seconds.get(key, 0.0) for key, count in path)


@dataclass(frozen=True, slots=True)
class Graph:
    """The actions of one step in an order in which every action comes after those that it waits for."""

    keys: tuple[Key, ...]
    """The distinct keys; the lists below hold indices into it."""
    key_of: Sequence[int]
    previous: Sequence[int]
    """Index of the action before it on its rank; -1 where it is the first."""
    needs: Sequence[int]
    """Index of the neighbouring stage's action that it needs; -1 where it needs none."""
    message: Sequence[int]
    """The key of the message between the two; -1 where both are on one rank."""
    last: tuple[int, ...]
    """Index of the last action of each pipeline rank."""

    def ends(self, seconds: Mapping[Key, float]) -> list[float]:
        """When each action ends, in seconds from the start of the step; one more entry, of 0, stands for no action."""
        durations = [seconds.get(key, 0.0) for key in self.keys]
        durations.append(0.0)  # message -1
        found = [0.0] * (len(self.key_of) + 1)  # action -1
        receive, indices = seconds.get(RECEIVE, 0.0), range(len(self.key_of))
        if receive:
            for index, key, previous, needs, message in zip(indices, self.key_of, self.previous, self.needs, self.message, strict=True):
                start = found[previous] + (receive + durations[message] if message >= 0 else 0.0)
                found[index] = max(start, found[needs] + durations[message]) + durations[key]
            return found
        for index, key, previous, needs, message in zip(indices, self.key_of, self.previous, self.needs, self.message, strict=True):
            start, arrival = found[previous], found[needs] + durations[message]
            found[index] = (arrival if arrival > start else start) + durations[key]
        return found

    def longest(self, seconds: Mapping[Key, float]) -> float:
        """Seconds of the step: the end of its last action."""
        ends = self.ends(seconds)
        return max(ends[index] for index in self.last)

    def critical_paths(self, seconds: Mapping[Key, float]) -> tuple[float, tuple[Path, ...]]:
        """Seconds of the step, and its critical paths: ties go along the rank in one, along the messages in the other."""
        ends = self.ends(seconds)
        length = max(ends[index] for index in self.last)
        tolerance = 1e-9 * length
        finals = [index for index in self.last if ends[index] >= length - tolerance]
        found: dict[Path, None] = {}
        for final in {finals[0], finals[-1]}:
            for along_rank in (True, False):
                found[self._path(final, ends, seconds, along_rank)] = None
        return length, tuple(found)

    def rank_paths(self) -> tuple[Path, ...]:
        """For each rank two paths that follow it without a pause: to its own end, and up from its last backward to rank 0."""
        owner = [-1] * len(self.key_of)
        for index, previous in enumerate(self.previous):
            owner[index] = owner[previous] if previous >= 0 else index
        found: dict[Path, None] = {}
        for final in self.last:
            for begin in {final, self.last[0]}:
                counts: dict[Key, int] = {}
                index = begin
                while index >= 0:
                    key = self.keys[self.key_of[index]]
                    counts[key] = counts.get(key, 0) + 1
                    on_rank = owner[index] == owner[final]
                    needs, previous = self.needs[index], self.previous[index]
                    if needs >= 0 and (previous < 0 or not on_rank) and (owner[needs] != owner[index] or previous < 0):
                        if self.message[index] >= 0:
                            sent = self.keys[self.message[index]]
                            counts[sent] = counts.get(sent, 0) + 1
                        index = needs
                    else:
                        index = previous
                found[tuple(sorted(counts.items()))] = None
        return tuple(found)

    def _path(self, final: int, ends: list[float], seconds: Mapping[Key, float], along_rank: bool) -> Path:
        counts: dict[Key, int] = {}
        slack = 1e-9 * ends[final] * (-1 if along_rank else 1)
        index = final
        while index >= 0:
            key = self.keys[self.key_of[index]]
            counts[key] = counts.get(key, 0) + 1
            previous, needs = self.previous[index], self.needs[index]
            if needs >= 0:
                message = self.keys[self.message[index]] if self.message[index] >= 0 else None
                transfer, receive = (seconds.get(message, 0.0), seconds.get(RECEIVE, 0.0)) if message else (0.0, 0.0)
                late = receive + transfer if receive else 0.0
                arrives = (previous < 0 and not late) or ends[needs] + transfer + slack > ends[previous] + late  # ends[-1] is 0, the start
                if message and (arrives or late):
                    counts[message] = counts.get(message, 0) + 1
                if arrives:
                    index = needs
                    continue
                if late:
                    counts[RECEIVE] = counts.get(RECEIVE, 0) + 1
            index = previous
        return tuple(sorted(counts.items()))


@functools.lru_cache(maxsize=256)
def graph(schedule: str, pipeline_parallel: int, num_virtual_stages: int, num_microbatches: int) -> Graph:
    """The graph of a schedule's step: its compute actions, a reduction after each stage's last backward, the optimizer."""
    m, ranks = num_microbatches, stage_ranks(schedule, pipeline_parallel, num_virtual_stages)
    lists = compute_order(schedule, pipeline_parallel, num_virtual_stages, m)
    numbers: dict[Key, int] = {}
    steps = _steps(schedule, ranks, m, numbers)
    final_kind = "W" if schedule in SPLIT_BACKWARD_SCHEDULES else "B"
    left = [m] * len(ranks)
    place = [-2] * (3 * len(ranks) * m)  # of each forward, backward and weight gradient; -2 as long as it is not there
    key_of: list[int] = []
    previous: list[int] = []
    needs: list[int] = []
    message: list[int] = []
    positions, last = [0] * len(lists), [-1] * len(lists)
    going = True
    while going:
        going = False
        for rank, order in enumerate(lists):
            position, latest = positions[rank], last[rank]
            for kind, stage, microbatch in order[position:] if position else order:
                key, mine, source, sent = steps[kind, stage]
                need = place[source + microbatch] if source >= 0 else -1
                if need == -2:
                    break
                place[mine + microbatch] = index = len(key_of)
                key_of.append(key)
                previous.append(latest)
                needs.append(need)
                message.append(sent)
                latest = index
                position += 1
                if kind == final_kind:
                    left[stage] -= 1
                    if left[stage] == 0:
                        key_of.append(numbers.setdefault(("REDUCE", stage), len(numbers)))
                        previous.append(latest)
                        needs.append(-1)
                        message.append(-1)
                        latest = index + 1
            going = going or position > positions[rank]
            positions[rank], last[rank] = position, latest
    if any(position < len(order) for position, order in zip(positions, lists, strict=True)):
        raise RuntimeError(f"{schedule} with {pipeline_parallel} ranks and {m} micro-batches waits for itself")
    for rank, latest in enumerate(last):
        key_of.append(numbers.setdefault(("OPTIMIZER", rank), len(numbers)))
        previous.append(latest)
        needs.append(-1)
        message.append(-1)
        last[rank] = len(key_of) - 1
    return Graph(tuple(numbers), key_of, previous, needs, message, tuple(last))


@functools.lru_cache(maxsize=64)
def rank_paths(schedule: str, pipeline_parallel: int, num_virtual_stages: int, num_microbatches: int) -> tuple[Path, ...]:
    """`Graph.rank_paths` of a schedule's graph."""
    return graph(schedule, pipeline_parallel, num_virtual_stages, num_microbatches).rank_paths()


def _steps(schedule: str, ranks: Sequence[int], m: int, numbers: dict[Key, int]) -> dict[tuple[str, int], tuple[int, int, int, int]]:
    """For each kind of action of each stage: its key, its place, the place of what it needs (-1: nothing) and its message's key.

    Places are those of micro-batch 0; the others follow. A backward pass has the place of its input gradients.
    """
    final, found = len(ranks) - 1, {}
    for stage, rank in enumerate(ranks):
        for kind, row, source, sends in (
            ("F", 0, stage - 1, "SEND_F"), ("B", 1, stage + 1, "SEND_B"), ("I", 1, stage + 1, "SEND_B"), ("W", 2, -1, ""),
        ):  # fmt: skip
            if (kind in "IW") != (schedule in SPLIT_BACKWARD_SCHEDULES) and kind != "F":
                continue
            waits = 0 <= source <= final
            sent = numbers.setdefault((sends, source), len(numbers)) if waits and ranks[source] != rank else -1
            need = (row * (final + 1) + source) * m if waits else -1
            found[kind, stage] = (numbers.setdefault((kind, stage), len(numbers)), (row * (final + 1) + stage) * m, need, sent)
    return found
