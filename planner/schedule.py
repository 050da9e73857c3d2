"""Pipeline schedules as data: for each pipeline rank, the list of actions of one optimizer step, in order.

The simulator walks these lists to predict, and the executor runs the same lists, so they can't disagree.

An action is `(kind, stage, microbatch)`:

| kind | what | kind | what |
| --- | --- | --- | --- |
| F | forward of a stage | SEND_F, RECV_F | its output to, its input from, a stage on another rank |
| B | backward, gradients of input and weights | SEND_B, RECV_B | the gradient of its input, of its output |
| I | backward, gradient of the input only | REDUCE | gradients of a stage over the data-parallel ranks |
| W | backward, gradients of the weights only | OPTIMIZER | the optimizer's step on a rank (stage -1) |

A receive stands right before the compute that needs it, a send right after the compute that made it; sends don't
block. With these rules any order whose dependencies have no cycle runs without deadlock. In IN_TURN_SCHEDULES a send may
wait for the one before it, which bounds the messages that are under way.

Sources: GPipe, Huang et al. 2019 (arXiv 1811.06965); 1F1B and interleaving, Narayanan et al. 2021 (arXiv 2104.04473,
section 2.2); split backward and ZB-H1's delayed weight gradients, Qi et al. 2023 (arXiv 2401.10241); the V-shaped
placement, Qi et al. 2024 (arXiv 2405.15362). Interleaving with a number of micro-batches that is no multiple of the
pipeline degree runs them in max(1, m // p) equal rounds.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from planner.plan import SPLIT_BACKWARD_SCHEDULES, Decisions, stage_ranks

COMPUTE_KINDS = frozenset("FBIW")
IN_TURN_SCHEDULES = frozenset({"Naive", "GPipe", "1F1B", "ZBVZeroBubble"})
"""Schedules in which a message may wait until its receiver has begun to wait for, or has taken, the one before it of the same stage and
direction: no rank can then wait for itself, and with passes of fixed length none ends later. Interleaved ones can't: a stage's messages
would wait for those of another."""


class Action(NamedTuple):
    kind: str
    stage: int
    microbatch: int


Actions = tuple[Action, ...]
Order = list[tuple[str, int, int]]
"""Actions as plain tuples, which are much cheaper to make: for the search, which looks at hundreds of schedules."""


@functools.lru_cache(maxsize=256)
def compute_actions(schedule: str, pipeline_parallel: int, num_virtual_stages: int, num_microbatches: int) -> tuple[Actions, ...]:
    """The forward and backward actions of each pipeline rank, without communication.

    The arguments must have passed `planner.plan.check_schedule`.
    """
    lists = compute_order(schedule, pipeline_parallel, num_virtual_stages, num_microbatches)
    return tuple(tuple(map(Action._make, order)) for order in lists)


@functools.lru_cache(maxsize=64)
def compute_order(schedule: str, pipeline_parallel: int, num_virtual_stages: int, num_microbatches: int) -> tuple[Order, ...]:
    """`compute_actions` as plain tuples, not to be changed by whoever reads them."""
    p, v, m = pipeline_parallel, num_virtual_stages, num_microbatches
    if schedule == "ZBVZeroBubble":
        return tuple(_zbv(rank, p, m) for rank in range(p))
    lists = []
    for rank in range(p):
        local = [rank + chunk * p for chunk in range(v)]
        rounds = max(1, m // p) if v > 1 else m
        forwards = _in_rounds(local, m, rounds)
        backwards = _in_rounds(local[::-1], m, rounds)
        if schedule == "Naive":
            warmup, lag = 0, None
        elif schedule == "GPipe":
            warmup, lag = m, None
        elif schedule == "1F1B":
            warmup, lag = p - 1 - rank, None
        elif schedule == "Interleaved1F1B":
            warmup, lag = (v - 1) * (m // rounds) + 2 * (p - 1 - rank), None
        elif schedule == "InterleavedZeroBubble":
            warmup, lag = (v - 1) * (m // rounds) + (p - 1 - rank), rank
        else:
            raise ValueError(f"unknown schedule {schedule}")
        lists.append(_one_forward_one_backward(forwards, backwards, warmup, lag))
    return tuple(lists)


@functools.lru_cache(maxsize=64)
def actions(
    schedule: str, pipeline_parallel: int, num_virtual_stages: int, num_microbatches: int, reduce_every_microbatch: bool = False
) -> tuple[Actions, ...]:
    """The whole step of each pipeline rank: compute, sends and receives, gradient reductions, optimizer."""
    ranks = stage_ranks(schedule, pipeline_parallel, num_virtual_stages)
    last = len(ranks) - 1
    lists = compute_actions(schedule, pipeline_parallel, num_virtual_stages, num_microbatches)
    final_kind = "W" if schedule in SPLIT_BACKWARD_SCHEDULES else "B"
    whole = []
    for rank, compute in enumerate(lists):
        remaining = {stage: num_microbatches for stage, owner in enumerate(ranks) if owner == rank}
        out: list[Action] = []
        for action in compute:
            kind, stage, microbatch = action
            if kind == "F" and stage > 0 and ranks[stage - 1] != rank:
                out.append(Action("RECV_F", stage, microbatch))
            if kind in "BI" and stage < last and ranks[stage + 1] != rank:
                out.append(Action("RECV_B", stage, microbatch))
            out.append(action)
            if kind == "F" and stage < last and ranks[stage + 1] != rank:
                out.append(Action("SEND_F", stage, microbatch))
            if kind in "BI" and stage > 0 and ranks[stage - 1] != rank:
                out.append(Action("SEND_B", stage, microbatch))
            if kind == final_kind:
                remaining[stage] -= 1
                if remaining[stage] == 0 or reduce_every_microbatch:
                    out.append(Action("REDUCE", stage, microbatch))
        out.append(Action("OPTIMIZER", -1, 0))
        whole.append(tuple(out))
    return tuple(whole)


def plan_actions(decisions: Decisions) -> tuple[Actions, ...]:
    """The whole step of each pipeline rank of a plan."""
    return actions(
        decisions.schedule,
        decisions.pipeline_parallel,
        decisions.num_virtual_stages,
        decisions.num_microbatches,
    )


def num_in_flight(compute: Actions) -> int:
    """The most (stage, micro-batch) pairs of a rank whose forward has begun and whose backward has not ended.

    With a split backward, a pair counts until its weight gradients are done, since they need the saved inputs.
    """
    live = peak = 0
    for kind, _, _ in compute:
        if kind == "F":
            live += 1
            peak = max(peak, live)
        elif kind in "BW":
            live -= 1
    return peak


def _in_rounds(stages: list[int], num_microbatches: int, rounds: int) -> list[tuple[int, int]]:
    """(stage, micro-batch) pairs: the micro-batches in equal rounds, each round through the stages in turn."""
    size = num_microbatches // rounds
    return [
        (stage, start + offset)
        for start in range(0, num_microbatches, size)
        for stage in stages
        for offset in range(size)
    ]


def _one_forward_one_backward(
    forwards: list[tuple[int, int]], backwards: list[tuple[int, int]], warmup: int, weight_lag: int | None
) -> Order:
    """`warmup` forwards, then forward and backward in turn, then the rest of the backwards.

    With `weight_lag`, a backward is split, and its weight gradients run once more than that many are owed: a rank
    that waits longer in the drain keeps more of them to fill it with.
    """
    forward: Order = [("F", stage, microbatch) for stage, microbatch in forwards]
    backward: Order = [("B" if weight_lag is None else "I", stage, microbatch) for stage, microbatch in backwards]
    weights: Order = [] if weight_lag is None else [("W", stage, microbatch) for stage, microbatch in backwards]
    out = forward[:warmup]
    rest = forward[warmup:]
    for index, action in enumerate(backward):
        if index < len(rest):
            out.append(rest[index])
        out.append(action)
        if weight_lag is not None and index >= weight_lag:
            out.append(weights[index - weight_lag])
    if weight_lag is not None:
        out += weights[max(len(backward) - weight_lag, 0) :]
    return out


def _zbv(rank: int, pipeline_parallel: int, num_microbatches: int) -> Order:
    """One rank of the ZB-V schedule: stage `rank` on the way down, stage `2p - 1 - rank` on the way up.

    Each phase says which of the two stages acts; micro-batches follow in order, and an action whose micro-batch does
    not exist is left out, so that fewer than 2p - 1 micro-batches work too.
    """
    down, up = rank, 2 * pipeline_parallel - 1 - rank
    counts: dict[tuple[str, int], int] = {}
    out: Order = []

    def act(kind: str, stage: int) -> None:
        microbatch = counts.get((kind, stage), 0)
        counts[kind, stage] = microbatch + 1
        if microbatch < num_microbatches:
            out.append((kind, stage, microbatch))

    def done(kind: str, stage: int) -> int:
        return counts.get((kind, stage), 0)

    for _ in range(2 * (pipeline_parallel - rank) - 1):
        act("F", down)
    for _ in range(rank):
        act("F", up)
        act("F", down)
    for _ in range(pipeline_parallel - rank):
        act("F", up)
        act("I", up)
        act("W", up)
    total = max(num_microbatches, 2 * pipeline_parallel - 1)
    while done("F", up) < total:
        if done("F", down) < total:
            act("F", down)
        act("I", down)
        act("W", down)
        act("F", up)
        act("I", up)
        act("W", up)
    for _ in range(rank):
        act("I", down)
        act("I", up)
    for _ in range(pipeline_parallel - rank):
        act("I", down)
        act("W", down)
    for stage in (up, down):
        while done("W", stage) < num_microbatches:
            act("W", stage)
    return out
