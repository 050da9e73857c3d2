"""Seconds of a whole optimizer step: the plan's action lists walked with the times of its layers.

`predict_timeline` is the walk with every event; `predict_time` walks the same lists without keeping events, and in as
few micro-batches as the result needs: beyond a start-up the walk repeats itself, each p further micro-batches adding
the same time (a max-plus linear system, Baccelli et al. 1992), which tests/test_timing.py checks against the full walk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from planner.accuracy import accuracy
from planner.contention import Demand, placement, shared_walk, shares_cores
from planner.economics import hardware_flops, model_flops, run_cost, step_tokens
from planner.graph import LayerKind
from planner.kernels import core_share, peak_flops_per_second
from planner.layer_time import (
    LayerSeconds,
    layer_seconds,
    optimizer_seconds,
    parameters_per_rank,
    reduce_seconds,
    software_of,
    timed_layer,
    transfer_seconds,
)
from planner.plan import Decisions, Inputs, Recompute, Time, block_levels, has_embedding, has_head, stage_ranks
from planner.schedule import Action, actions, compute_order, plan_actions
from planner.software import Software
from planner.timeline import DeadlockError, Timeline, bubble_fraction, simulate

__all__ = [
    "LayerSeconds",
    "TimePrediction",
    "layer_seconds",
    "optimizer_seconds",
    "predict_time",
    "predict_timeline",
    "reduce_seconds",
    "transfer_seconds",
]


WARM_ROUNDS = (2, 6)
"""Rounds of p micro-batches that are walked before the rest is extrapolated: the second where the first is too few."""
FULL_WALK = 600
"""Stages times micro-batches up to which the walk is done in full at once."""
MAX_WALKED = 20_000
"""Stages times micro-batches that are walked in full where rounds have not settled."""


class TimePrediction(NamedTuple):
    """What `predict_time` says. The tuples hold one figure per pipeline rank, for one micro-batch through all its stages."""

    time: Time
    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    breakdown: dict[str, float]
    """Seconds of the step on its slowest rank, by what they go to; they add up to the step."""


class _Durations(NamedTuple):
    """Times by stage, and by rank for the optimizer."""

    forward: list[float]
    backward: list[float]
    backward_input: list[float]
    backward_weight: list[float]
    communication: list[float]
    """Of forward and backward, the tensor-parallel part."""
    reduce: list[float]
    optimizer: list[float]
    transfer: list[float]
    """Messages from a stage to the next one, either way."""


def predict_time(
    inputs: Inputs, decisions: Decisions, software: Software | None = None, num_tokens: float | None = None
) -> TimePrediction:
    """The time of one optimizer step of a plan, and what follows from it."""
    program = software or software_of(inputs)
    durations = _durations(inputs, decisions, program)
    p, m = decisions.pipeline_parallel, decisions.num_microbatches
    shared = _shared_timeline(inputs, decisions, durations) if shares_cores(inputs.cluster, decisions.world_size) else None
    ends = _last_ends(shared, p) if shared else _rank_ends(decisions, durations, program.blocking_transfers)
    slowest = max(range(p), key=ends.__getitem__)
    step = ends[slowest] + program.step_seconds
    owned: list[list[int]] = [[] for _ in range(p)]
    for index, stage in enumerate(decisions.stages):
        owned[stage.pipeline_rank].append(index)
    forward = tuple(sum(durations.forward[i] for i in stages) for stages in owned)
    backward = tuple(sum(durations.backward[i] for i in stages) for stages in owned)
    mine = owned[slowest]
    communication = m * sum(durations.communication[i] for i in mine)
    reduction = sum(durations.reduce[i] for i in mine)
    busy = m * (forward[slowest] + backward[slowest])
    breakdown = {
        "compute": busy - communication,
        "tensor_parallel_communication": communication,
        "bubble_and_pipeline_communication": max(0.0, ends[slowest] - busy - reduction - durations.optimizer[slowest]),
        "data_parallel_communication": reduction,
        "optimizer": durations.optimizer[slowest],
        "fixed": program.step_seconds,
    }
    final = _last_stages(decisions.schedule, p, decisions.num_virtual_stages, m)
    tails = [durations.reduce[final[r]] + durations.optimizer[r] for r in range(p)]
    span = max(end - tail for end, tail in zip(ends, tails, strict=True))
    bubble = 1.0 - sum(m * (f + b) for f, b in zip(forward, backward, strict=True)) / (p * span) if span > 0 else 0.0
    if shared:
        bubble = bubble_fraction(shared)
        breakdown["compute"] = max(0.0, step - sum(seconds for name, seconds in breakdown.items() if name != "compute"))
    return TimePrediction(_time(inputs, decisions, step, bubble, breakdown, num_tokens), forward, backward, breakdown)


def predict_timeline(inputs: Inputs, decisions: Decisions, software: Software | None = None) -> Timeline:
    """The walk of the plan's action lists, event by event."""
    program = software or software_of(inputs)
    durations = _durations(inputs, decisions, program)
    if shares_cores(inputs.cluster, decisions.world_size):
        return _shared_timeline(inputs, decisions, durations)
    by_kind = _by_kind(durations)
    lists = plan_actions(decisions)
    optimizer = iter(durations.optimizer)
    optimizers = {id(ranks[-1]): next(optimizer) for ranks in lists}

    def seconds(action: Action) -> float:
        if action.kind == "OPTIMIZER":
            return optimizers.get(id(action), max(durations.optimizer))
        return by_kind[action.kind][action.stage]

    def transfer(action: Action) -> float:
        return durations.transfer[action.stage if action.kind == "SEND_F" else action.stage - 1]

    blocking = program.blocking_transfers
    return simulate(lists, seconds, transfer, blocking_send_seconds=transfer if blocking else None)


@functools.lru_cache(maxsize=1024)
def _last_stages(schedule: str, pipeline_parallel: int, num_virtual_stages: int, num_microbatches: int) -> tuple[int, ...]:
    """The stage of each rank's last pass: only its reduction comes after the pipeline, those of the rank's other stages within."""
    p, m = pipeline_parallel, num_microbatches
    if num_virtual_stages == 1:
        return tuple(range(p))
    return tuple(order[-1][1] for order in compute_order(schedule, p, num_virtual_stages, m if m <= 4 * p else 4 * p + m % p))


def zero_bubble_2p_seconds(inputs: Inputs, decisions: Decisions, software: Software | None = None) -> float:
    """Step time of the zero-bubble schedule that keeps twice 1F1B's activations, which no plan has, in closed form.

    m passes of the slowest stage and a bubble of (p - 1)·max(0, F + I - 2·W) (Qi et al. 2023, arXiv 2401.10241, table 2).
    """
    times = _durations(inputs, decisions, software or software_of(inputs))
    p, m = decisions.pipeline_parallel, decisions.num_microbatches
    forward, whole, backward, weight = max(
        zip(times.forward, times.backward, times.backward_input, times.backward_weight, strict=True), key=lambda item: item[0] + item[1]
    )
    bubble = (p - 1) * max(0.0, forward + backward - 2 * weight)
    return m * (forward + whole) + bubble + max(times.reduce) + max(times.optimizer)


def _by_kind(durations: _Durations) -> dict[str, list[float]]:
    return {
        "F": durations.forward,
        "B": durations.backward,
        "I": durations.backward_input,
        "W": durations.backward_weight,
        "REDUCE": durations.reduce,
    }


def _shared_timeline(inputs: Inputs, decisions: Decisions, durations: _Durations) -> Timeline:
    """The walk where ranks share cores. The durations are those with all ranks computing; alone, each is faster by that share."""
    cluster = inputs.cluster
    share = core_share(cluster, cluster.num_gpus)
    by_kind = _by_kind(durations)

    def demand(rank: int, action: Action) -> Demand:
        if action.kind == "OPTIMIZER":
            return Demand(durations.optimizer[rank] / share)
        seconds = by_kind[action.kind][action.stage]
        if action.kind == "REDUCE":
            return Demand(0.0, seconds)
        wait = 0.0 if action.kind == "W" else min(seconds, durations.communication[action.stage] / 2)
        return Demand((seconds - wait) / share, wait)

    def transfer(action: Action) -> float:
        return durations.transfer[action.stage if action.kind == "SEND_F" else action.stage - 1]

    return shared_walk(plan_actions(decisions), demand, transfer, cluster.cores_per_node or 1, placement(cluster, decisions))


def _last_ends(timeline: Timeline, num_ranks: int) -> list[float]:
    ends = [0.0] * num_ranks
    for event in timeline.events:
        ends[event.rank] = max(ends[event.rank], event.end)
    return ends


def _durations(inputs: Inputs, decisions: Decisions, program: Software) -> _Durations:
    known: dict[tuple[LayerKind, Recompute], tuple[LayerSeconds, float, float]] = {}

    def of(kind: LayerKind, level: Recompute) -> tuple[LayerSeconds, float, float]:
        if (kind, level) not in known:
            held = parameters_per_rank(inputs.model, decisions.tensor_parallel, kind)
            known[kind, level] = (*timed_layer(inputs, decisions, kind, level, program), held)
        return known[kind, level]

    out = _Durations([], [], [], [], [], [], [0.0] * decisions.pipeline_parallel, [])
    parameters = [0.0] * decisions.pipeline_parallel
    links: dict[int, float] = {}
    reductions: dict[float, float] = {}
    for stage in decisions.stages:
        counts: dict[tuple[LayerKind, Recompute], int] = {}
        if has_embedding(stage):
            counts["embedding", "none"] = 1
        if has_head(stage, inputs.model):
            counts["head", "none"] = 1
        for level in block_levels(stage, inputs.model):
            counts["block", level] = counts.get(("block", level), 0) + 1
        sums = [0.0] * 6
        for key, count in counts.items():
            layer, communication, held = of(*key)
            for index, value in enumerate((*layer, communication, held)):
                sums[index] += count * value
        for target, value in zip(out[:5], sums, strict=False):
            target.append(value)
        parameters[stage.pipeline_rank] += sums[5]
        if sums[5] not in reductions:
            reductions[sums[5]] = reduce_seconds(inputs, decisions, sums[5], program)
        out.reduce.append(reductions[sums[5]])
        if stage.pipeline_rank not in links:
            links[stage.pipeline_rank] = transfer_seconds(inputs, decisions, stage.pipeline_rank, program)
        out.transfer.append(links[stage.pipeline_rank])
    for rank, held in enumerate(parameters):
        out.optimizer[rank] = optimizer_seconds(inputs, decisions, held, program)
    return out


class _Program(NamedTuple):
    """Action lists in an order that respects their dependencies.

    Each entry: rank, index into the flat durations, index of the entry it waits for (-1: none), and of the transfer that
    lies between (-1: none).
    """

    entries: tuple[tuple[int, int, int, int], ...]


@functools.lru_cache(maxsize=128)
def _program(schedule: str, p: int, v: int, m: int) -> _Program:
    """The action lists of a schedule, put in one order in which every entry comes after what it waits for."""
    lists = actions(schedule, p, v, m)
    stages = p * v
    offsets = {"F": 0, "B": stages, "I": 2 * stages, "W": 3 * stages, "REDUCE": 4 * stages}
    positions = [0] * p
    made: dict[Action, int] = {}
    entries: list[tuple[int, int, int, int]] = []
    remaining = sum(len(ranks) for ranks in lists)
    while remaining:
        before = remaining
        for rank, own in enumerate(lists):
            position = positions[rank]
            while position < len(own):
                action = own[position]
                kind, stage, microbatch = action
                wait = link = -1
                if kind == "F" and stage > 0:
                    wait, link = made.get(Action("F", stage - 1, microbatch), -2), stage - 1
                elif kind in "BI" and stage < stages - 1:
                    wait, link = made.get(Action(kind, stage + 1, microbatch), -2), stage
                if wait == -2:
                    break
                position += 1
                remaining -= 1
                if kind.startswith(("SEND", "RECV")):
                    continue
                if wait >= 0 and entries[wait][0] == rank:
                    link = -1
                slot = 5 * stages + rank if kind == "OPTIMIZER" else offsets[kind] + stage
                made[action] = len(entries)
                entries.append((rank, slot, wait, link))
            positions[rank] = position
        if remaining == before:
            raise DeadlockError(f"{schedule} with {p} x {v} stages and {m} micro-batches waits for itself")
    return _Program(tuple(entries))


def _walk(schedule: str, p: int, v: int, m: int, flat: list[float], transfers: list[float]) -> list[float]:
    """When each rank ends."""
    clocks = [0.0] * p
    ends: list[float] = []
    append = ends.append
    for rank, slot, wait, link in _program(schedule, p, v, m).entries:
        clock = clocks[rank]
        if wait >= 0:
            ready = ends[wait] + transfers[link] if link >= 0 else ends[wait]
            if ready > clock:
                clock = ready
        clock += flat[slot]
        clocks[rank] = clock
        append(clock)
    return clocks


def _rank_ends(decisions: Decisions, durations: _Durations, blocking: bool) -> list[float]:
    """When each rank ends its step; long runs of micro-batches by extrapolation from two short walks.

    Where sends block, a pass that sends lasts as long as its message on top, which has then arrived.
    """
    schedule, p, v, m = decisions.schedule, decisions.pipeline_parallel, decisions.num_virtual_stages, decisions.num_microbatches
    if p == 1:
        return [m * (durations.forward[0] + durations.backward[0]) + durations.reduce[0] + durations.optimizer[0]]
    parts = [durations.forward, durations.backward, durations.backward_input, durations.backward_weight]
    transfers = durations.transfer
    if blocking:
        owners = [stage.pipeline_rank for stage in decisions.stages]
        hops = [transfers[i] if owners[i] != owners[i + 1] else 0.0 for i in range(len(owners) - 1)]
        down, up = [*hops, 0.0], [0.0, *hops]
        parts = [_sum(parts[0], down), _sum(parts[1], up), _sum(parts[2], up), parts[3]]
        transfers = [0.0] * len(transfers)
    flat = [*(value for part in parts for value in part), *durations.reduce, *durations.optimizer]
    busy = [0.0] * p
    for rank, forward, backward in zip(stage_ranks(schedule, p, v), parts[0], parts[1], strict=True):
        busy[rank] += forward + backward
    return _ends_of_many(schedule, p, v, m, max(busy), lambda count: _walk(schedule, p, v, count, flat, transfers))


def _ends_of_many(schedule: str, p: int, v: int, m: int, busiest: float, walk: Callable[[int], list[float]]) -> list[float]:
    """`walk(m)`, or the same from walks of fewer micro-batches once they have settled.

    They have when two rounds in a row add the same time on every rank, and no less than the busiest rank works in a
    round (`busiest` for each micro-batch), which is what it must come to in the end.
    """
    if v * p * m <= FULL_WALK:
        return walk(m)
    # Interleaved schedules run in equal rounds of m / (m // p) micro-batches, which the short walks must keep.
    unit = m // max(1, m // p) if schedule in ("Interleaved1F1B", "InterleavedZeroBubble") and v > 1 else p
    for rounds in WARM_ROUNDS:
        first = rounds * unit + m % unit
        if m <= first + 3 * unit:
            break
        walks = [walk(first), walk(first + unit)]
        gains = [[end - start for start, end in zip(*walks, strict=True)]]
        least, close = unit * busiest, 1e-9 * walks[1][0]
        if any(abs(gain - least) > close for gain in gains[0]):
            walks.append(walk(first + 2 * unit))
            gains.append([end - start for start, end in zip(walks[1], walks[2], strict=True)])
        even = all(abs(x - y) <= close for x, y in zip(gains[0], gains[-1], strict=True))
        if even and min(gains[-1]) >= least - close:
            more = (m - first) // unit + 1 - len(walks)
            return [end + more * gain for end, gain in zip(walks[-1], gains[-1], strict=True)]
    if v * p * m <= MAX_WALKED or m <= first + 3 * unit:
        return walk(m)
    more = (m - first) // unit + 1 - len(walks)
    return [end + more * max(gain, unit * busiest) for end, gain in zip(walks[-1], gains[-1], strict=True)]


def _sum(left: list[float], right: list[float]) -> list[float]:
    return [a + b for a, b in zip(left, right, strict=True)]


def _time(
    inputs: Inputs, decisions: Decisions, step: float, bubble: float, breakdown: dict[str, float], num_tokens: float | None
) -> Time:
    """The step time with what follows from it; the utilizations by the conventions of planner.economics."""
    low, high = accuracy().step_seconds_interval
    tokens, flops = step_tokens(inputs), model_flops(inputs)
    peak = peak_flops_per_second(inputs.cluster, inputs.training.precision) * decisions.world_size
    cost = None if num_tokens is None else run_cost(inputs, decisions, step, num_tokens)
    return Time(
        step_seconds=step,
        step_seconds_interval=(low * step, high * step),
        bubble_fraction=bubble,
        model_flops_utilization=flops / step / peak if step > 0 else None,
        hardware_flops_utilization=hardware_flops(inputs, decisions) / step / peak if step > 0 else None,
        tokens_per_second=tokens / step if step > 0 else None,
        training_days=cost.training_days if cost else None,
        gpu_years=cost.gpu_years if cost else None,
        step_flops=flops,
        breakdown_seconds=breakdown,
    )


