"""When each pipeline rank ends its step: the compute actions of a schedule walked without keeping events.

`planner.timeline.simulate` walks the same lists and writes down every event; tests compare the two. The walk is a
max-plus linear system (Baccelli et al. 1992, "Synchronization and Linearity"): once a round of micro-batches takes every
rank the same time as the round before, all further rounds do, so a long step is walked for a few rounds only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import NamedTuple

from planner.plan import stage_ranks
from planner.schedule import Action, actions
from planner.timeline import DeadlockError

FULL_WALK = 600
"""Stages times micro-batches up to which the walk is done in full at once."""
MAX_WALKED = 20_000
"""Stages times micro-batches that are walked in full where rounds have not settled."""
WARM_ROUNDS = (2, 6)
"""Rounds of p micro-batches that are walked before the rest is extrapolated: the second where the first is too few."""
ROUND_SCHEDULES = ("Interleaved1F1B", "InterleavedZeroBubble")
"""Their lists repeat after a round of micro-batches, and not after each."""


Picker = Callable[[Sequence[float]], tuple[float, ...]]
"""Picks several items at once."""


class StageTimes(NamedTuple):
    """Seconds by stage, and by rank for the optimizer."""

    forward: Sequence[float]
    backward: Sequence[float]
    backward_input: Sequence[float]
    backward_weight: Sequence[float]
    reduce: Sequence[float]
    optimizer: Sequence[float]
    transfer: Sequence[float]
    """Messages from a stage to the next one, either way."""
    receive: float = 0.0
    """Above 0 where a message begins to move this long after it is asked for, so that a receive takes it and the transfer at least."""


class _Program(NamedTuple):
    """Action lists in an order that respects their dependencies. Entry 0 is the start of the step."""

    actions: tuple[tuple[int, Action], ...]
    """Rank and action of each entry but the first."""
    previous: tuple[int, ...]
    """The entry before it on its rank."""
    needs: tuple[int, ...]
    """The entry of a neighbouring stage that it waits for; 0 where it waits for none."""
    last: tuple[int, ...]
    """The last entry of each rank."""
    seconds: Picker
    """Picks each entry's time out of those of the stages and ranks."""
    messages: Picker
    """Picks the time of the message that lies between an entry and what it needs out of those of the stages, 0 behind them."""


class _Windows(NamedTuple):
    """The last entries of every rank's last full round, and in the same order those of the round before."""

    last: Picker
    before: Picker


def rank_ends(schedule: str, p: int, v: int, m: int, times: StageTimes) -> list[float]:
    """When each rank ends a step of m micro-batches on p ranks of v stages each."""
    if v * p * m <= FULL_WALK:
        return walk(schedule, p, v, m, times)
    for first, unit in _attempts(schedule, p, v, m):
        windows = _windows(schedule, p, v, first, unit) if first < m else None
        if windows is None:
            break
        ends = _walk(schedule, p, v, first, times)
        gains = list(map(float.__sub__, windows.last(ends), windows.before(ends)))
        gain = max(gains)
        if gain - min(gains) <= 1e-9 * gain:
            more = (m - first) // unit * gain
            return [ends[index] + more for index in _program(schedule, p, v, first).last]
    if schedule != "GPipe" and v * p * m <= MAX_WALKED:
        return walk(schedule, p, v, m, times)
    return _by_whole_walks(schedule, p, v, m, times)


def walk(schedule: str, p: int, v: int, m: int, times: StageTimes) -> list[float]:
    """When each rank ends, every action walked."""
    ends = _walk(schedule, p, v, m, times)
    return [ends[index] for index in _program(schedule, p, v, m).last]


def _walk(schedule: str, p: int, v: int, m: int, times: StageTimes) -> list[float]:
    """When each entry of the program ends."""
    program = _program(schedule, p, v, m)
    seconds = program.seconds([value for part in times[:6] for value in part])
    messages = program.messages([*times.transfer, 0.0])
    ends = [0.0]
    append = ends.append
    if times.receive > 0.0:
        received = program.messages([*(times.receive + transfer for transfer in times.transfer), 0.0])
        for previous, needs, duration, message, receive in zip(program.previous, program.needs, seconds, messages, received, strict=True):
            append(max(ends[previous] + receive, ends[needs] + message) + duration)
        return ends
    for previous, needs, duration, message in zip(program.previous, program.needs, seconds, messages, strict=True):
        start, ready = ends[previous], ends[needs] + message
        append((ready if ready > start else start) + duration)
    return ends


@functools.lru_cache(maxsize=128)
def _program(schedule: str, p: int, v: int, m: int) -> _Program:
    """The action lists of a schedule, put in one order in which every entry comes after what it waits for."""
    lists = [tuple(action for action in own if not action.kind.startswith(("SEND", "RECV"))) for own in actions(schedule, p, v, m)]
    stages = p * v
    offsets = {"F": 0, "B": stages, "I": 2 * stages, "W": 3 * stages, "REDUCE": 4 * stages}
    owner = stage_ranks(schedule, p, v)
    positions, last = [0] * p, [0] * p
    made: dict[Action, int] = {}
    order: list[tuple[int, Action]] = []
    previous: list[int] = []
    needed: list[int] = []
    slots: list[int] = []
    links: list[int] = []
    remaining = sum(map(len, lists))
    while remaining:
        before = remaining
        for rank, own in enumerate(lists):
            for action in own[positions[rank] :]:
                source = _source(action, stages)
                need = made.get(source, -1) if source else 0
                if need < 0:
                    break
                message = source is not None and owner[source.stage] != rank
                links.append(min(source.stage, action.stage) if source and message else stages)
                slots.append(5 * stages + rank if action.kind == "OPTIMIZER" else offsets[action.kind] + action.stage)
                order.append((rank, action))
                previous.append(last[rank])
                needed.append(need)
                made[action] = last[rank] = len(order)
                positions[rank] += 1
                remaining -= 1
        if remaining == before:
            raise DeadlockError(f"{schedule} with {p} x {v} stages and {m} micro-batches waits for itself")
    return _Program(tuple(order), tuple(previous), tuple(needed), tuple(last), _picker(slots), _picker(links))


def _source(action: Action, stages: int) -> Action | None:
    """What an action needs from a neighbouring stage."""
    kind, stage, microbatch = action
    if kind == "F":
        return Action("F", stage - 1, microbatch) if stage > 0 else None
    return Action(kind, stage + 1, microbatch) if kind in "BI" and stage < stages - 1 else None


def _round_size(schedule: str, p: int, v: int, m: int) -> int:
    """Micro-batches after which the lists repeat. Interleaved schedules run in max(1, m // p) equal rounds."""
    return m // max(1, m // p) if schedule in ROUND_SCHEDULES and v > 1 else 1


def _attempts(schedule: str, p: int, v: int, m: int) -> tuple[tuple[int, int], ...]:
    """How many micro-batches to walk before looking whether they have settled, and in rounds of how many.

    Where compute governs, a step settles as soon as the pipeline is full; where messages do, it repeats after p micro-batches.
    """
    unit = _round_size(schedule, p, v, m)
    if unit > 1:
        return tuple((rounds * unit + m % unit, unit) for rounds in (3, 6))
    return (p + 2, 1), (2 * p + 2 + (m - 2) % p, p)


@functools.lru_cache(maxsize=128)
def _windows(schedule: str, p: int, v: int, m: int, unit: int) -> _Windows | None:
    """What a step of m micro-batches must be compared in to see whether it has settled, None where its lists don't repeat.

    They do when `unit` more micro-batches put one more round, the same as the last, between a rank's last round and what
    follows it. If all that follows needs only itself and the last actions of that round, it is a function of when those end.
    """
    short, long = _program(schedule, p, v, m), _program(schedule, p, v, m + unit)
    index, later = ({action: entry for entry, (_, action) in enumerate(program.actions, 1)} for program in (short, long))
    last: list[int] = []
    before: list[int] = []
    known, following = {0}, []
    for rank in range(p):
        own, more = ([action for other, action in program.actions if other == rank] for program in (short, long))
        size = len(more) - len(own)
        window = size // (v if schedule in ROUND_SCHEDULES and v > 1 else unit)
        common = next((place for place, (x, y) in enumerate(zip(own, more, strict=False)) if x != y), len(own))
        first = common - window
        shifted = [_later(action, unit) for action in own]
        if first < size or more[common:] != shifted[common - size :] or own[first:common] != shifted[first - size : common - size]:
            return None
        last += [index[action] for action in own[first:common]]
        before += [index[action] for action in own[first - size : common - size]]
        known |= {later[action] for action in more[first:]}
        following += [later[action] for action in more[common:]]
    if any(long.needs[entry - 1] not in known for entry in following):
        return None
    return _Windows(_picker(last), _picker(before))


def _picker(indices: Sequence[int]) -> Picker:
    picker: Picker = itemgetter(*indices)
    return picker


def _later(action: Action, unit: int) -> Action:
    """The same action of a micro-batch `unit` later."""
    return action if action.kind == "OPTIMIZER" else action._replace(microbatch=action.microbatch + unit)


def _by_whole_walks(schedule: str, p: int, v: int, m: int, times: StageTimes) -> list[float]:
    """From walks of fewer micro-batches where the lists don't repeat round by round, as GPipe's.

    They have settled when two rounds in a row add the same time on every rank, and no less than the busiest rank works
    in a round, which is what it must come to in the end.
    """
    busy = [0.0] * p
    for rank, forward, backward in zip(stage_ranks(schedule, p, v), times.forward, times.backward, strict=True):
        busy[rank] += forward + backward
    unit = _round_size(schedule, p, v, m) if schedule in ROUND_SCHEDULES and v > 1 else p
    for rounds in WARM_ROUNDS:
        first = rounds * unit + m % unit
        if m <= first + 3 * unit:
            break
        walks = [walk(schedule, p, v, first, times), walk(schedule, p, v, first + unit, times)]
        gains = [_gains(*walks)]
        least, close = unit * max(busy), 1e-9 * walks[1][0]
        if any(abs(gain - least) > close for gain in gains[0]):
            walks.append(walk(schedule, p, v, first + 2 * unit, times))
            gains.append(_gains(*walks[1:]))
        even = all(abs(x - y) <= close for x, y in zip(gains[0], gains[-1], strict=True))
        if even and min(gains[-1]) >= least - close:
            more = (m - first) // unit + 1 - len(walks)
            return [end + more * gain for end, gain in zip(walks[-1], gains[-1], strict=True)]
    if v * p * m <= MAX_WALKED or m <= first + 3 * unit:
        return walk(schedule, p, v, m, times)
    more = (m - first) // unit + 1 - len(walks)
    return [end + more * max(gain, unit * max(busy)) for end, gain in zip(walks[-1], gains[-1], strict=True)]


def _gains(earlier: list[float], later: list[float]) -> list[float]:
    return [end - start for start, end in zip(earlier, later, strict=True)]
