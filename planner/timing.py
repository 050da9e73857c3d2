"""Seconds of a whole optimizer step: the plan's action lists walked with the times of its layers.

`predict_timeline` is the walk with every event; `predict_time` walks the same lists without keeping events (planner.walk).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from planner.accuracy import step_interval
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
from planner.plan import Decisions, Inputs, Recompute, RecomputeCounts, Time
from planner.schedule import Action, compute_order, plan_actions
from planner.software import Software
from planner.timeline import Timeline, bubble_fraction, simulate
from planner.walk import StageTimes, rank_ends

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
    receive = inputs.cluster.efficiency.receive_seconds
    ends = _last_ends(shared, p) if shared else _rank_ends(decisions, durations, program.blocking_transfers, receive)
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
    busy = sum(m * (f + b) for f, b in zip(forward, backward, strict=True))
    bubble = max(0.0, 1.0 - busy / (p * span)) if span > 0 else 0.0
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
    receive = inputs.cluster.efficiency.receive_seconds
    return simulate(lists, seconds, transfer, blocking_send_seconds=transfer if blocking else None, receive_seconds=receive)


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

    receive = cluster.efficiency.receive_seconds
    return shared_walk(plan_actions(decisions), demand, transfer, cluster.cores_per_node or 1, placement(cluster, decisions), receive)


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

    @functools.cache
    def sums(num_blocks: int, recompute: Recompute | RecomputeCounts, first: bool, last: bool) -> tuple[float, ...]:
        """Over a stage's layers: forward, backward, its two halves, communication, parameters held. Most stages are alike."""
        layers = [*((*of("block", level), count) for level, count in _levels(recompute, num_blocks))]
        layers += [(*of("embedding", "none"), 1)] * first + [(*of("head", "none"), 1)] * last
        halves = [sum(count * layer[part] for layer, _, _, count in layers) for part in range(4)]
        return (*halves, sum(count * sent for _, sent, _, count in layers), sum(count * held for _, _, held, count in layers))

    p, end = decisions.pipeline_parallel, inputs.model.num_layers + 2
    found, parameters = [], [0.0] * p
    for stage in decisions.stages:
        first, last = stage.first_layer == 0, stage.first_layer + stage.num_layers == end
        found.append(sums(stage.num_layers - first - last, stage.recompute, first, last))
        parameters[stage.pipeline_rank] += found[-1][5]
    forward, backward, backward_input, backward_weight, communication, held = (list(part) for part in zip(*found, strict=True))
    reductions = {count: reduce_seconds(inputs, decisions, count, program) for count in set(held)}
    optimizers = {count: optimizer_seconds(inputs, decisions, count, program) for count in set(parameters)}
    links = [transfer_seconds(inputs, decisions, rank, program) for rank in range(p)]
    return _Durations(
        forward, backward, backward_input, backward_weight, communication, [reductions[count] for count in held],
        [optimizers[count] for count in parameters], [links[stage.pipeline_rank] for stage in decisions.stages],
    )  # fmt: skip


def _levels(recompute: Recompute | RecomputeCounts, num_blocks: int) -> list[tuple[Recompute, int]]:
    """How many of a stage's blocks are recomputed at which level."""
    if not isinstance(recompute, RecomputeCounts):
        return [(recompute, num_blocks)] if num_blocks else []
    found: list[tuple[Recompute, int]] = [("full", recompute.full), ("selective", recompute.selective), ("none", recompute.none)]
    return [item for item in found if item[1]]


def _rank_ends(decisions: Decisions, durations: _Durations, blocking: bool, receive: float = 0.0) -> list[float]:
    """When each rank ends its step. Where sends block, a pass lasts as long as its message on top, which has then arrived."""
    schedule, p, v, m = decisions.schedule, decisions.pipeline_parallel, decisions.num_virtual_stages, decisions.num_microbatches
    if p == 1:
        return [m * (durations.forward[0] + durations.backward[0]) + durations.reduce[0] + durations.optimizer[0]]
    forward, backward, half, transfers = durations.forward, durations.backward, durations.backward_input, durations.transfer
    if blocking:
        owners = [stage.pipeline_rank for stage in decisions.stages]
        hops = [transfers[i] if owners[i] != owners[i + 1] else 0.0 for i in range(len(owners) - 1)]
        down, up = [*hops, 0.0], [0.0, *hops]
        forward, backward, half = _sum(forward, down), _sum(backward, up), _sum(half, up)
        transfers = [0.0] * len(transfers)
    times = StageTimes(forward, backward, half, durations.backward_weight, durations.reduce, durations.optimizer, transfers, receive)
    return rank_ends(schedule, p, v, m, times)


def _sum(left: list[float], right: list[float]) -> list[float]:
    return [a + b for a, b in zip(left, right, strict=True)]


def _time(
    inputs: Inputs, decisions: Decisions, step: float, bubble: float, breakdown: dict[str, float], num_tokens: float | None
) -> Time:
    """The step time with what follows from it; the utilizations by the conventions of planner.economics."""
    tokens, flops = step_tokens(inputs), model_flops(inputs)
    peak = peak_flops_per_second(inputs.cluster, inputs.training.precision) * decisions.world_size
    cost = None if num_tokens is None else run_cost(inputs, decisions, step, num_tokens)
    return Time(
        step_seconds=step,
        step_seconds_interval=step_interval(step),
        bubble_fraction=bubble,
        model_flops_utilization=flops / step / peak if step > 0 else None,
        hardware_flops_utilization=hardware_flops(inputs, decisions) / step / peak if step > 0 else None,
        tokens_per_second=tokens / step if step > 0 else None,
        training_days=cost.training_days if cost else None,
        gpu_years=cost.gpu_years if cost else None,
        step_flops=flops,
        breakdown_seconds=breakdown,
    )


