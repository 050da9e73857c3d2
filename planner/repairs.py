"""What to change where nothing fits, and what numbers of GPUs divide better: each found by a search, with its step time."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator

from planner.candidates import (
    Constraints,
    Degrees,
    all_degrees,
    conflict,
    decisions_of,
    is_possible,
    recompute_levels,
    schedules,
    sequence_parallel_choices,
    zero_stages,
)
from planner.chain import Costs
from planner.cluster import with_num_gpus
from planner.errors import DoesNotFitError, InputError, SolverError
from planner.estimate import capacity_bytes, predict
from planner.explore import explore
from planner.memory import predict_memory
from planner.plan import Decisions, Inputs, check, even_stages, replace
from planner.words import degrees_in_words, duration, gib

FLAGS = {
    "zero_stage": "--zero-stage",
    "data_parallel_replicate": "--data-parallel-replicate",
    "recompute": "--recompute",
    "micro_batch_size": "--micro-batch-size",
    "sequence_parallel": "--sequence-parallel",
    "schedule": "--schedule",
    "tensor_parallel": "--tensor-parallel",
    "pipeline_parallel": "--pipeline-parallel",
    "data_parallel": "--data-parallel",
}
MOST_GPUS = 65536
"""Up to which more GPUs are tried."""
UNEVEN = 0.1
"""Share of the capacity that even stages may lack where uneven ones are still looked for."""
REPAIR_SECONDS = 4.0
"""Wall-clock seconds that one relaxed search for a repair may take."""


def shortage(inputs: Inputs, plan: Decisions) -> tuple[int, float, int]:
    """The fullest pipeline rank, the bytes it is over its capacity, and the bytes it needs."""
    needs = [need.total_bytes for need in predict_memory(inputs, plan)]
    rank = max(range(len(needs)), key=needs.__getitem__)
    return rank, needs[rank] - capacity_bytes(inputs), needs[rank]


def does_not_fit(costs: Costs, constraints: Constraints, least: tuple[Decisions, int, float, int]) -> DoesNotFitError:
    """The error that says which stage is short of what, by how much, and what would repair it; `least` is the `closest` plan."""
    inputs = costs.inputs
    plan, rank, over, need = least
    stages = [index for index, stage in enumerate(plan.stages) if stage.pipeline_rank == rank]
    memory = predict_memory(inputs, plan)[rank]
    largest = max(("weights", "gradients", "optimizer", "activations", "buffers"), key=lambda part: getattr(memory, f"{part}_bytes"))
    where = f"stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages[:4]))} (pipeline rank {rank})" if len(plan.stages) > 1 else "the GPU"
    message = (
        f"{inputs.model.name} does not fit {inputs.cluster.num_gpus} x {inputs.cluster.gpu.name}: at best (tp {plan.tensor_parallel}, "
        f"pp {plan.pipeline_parallel}, dp {plan.data_parallel}, ZeRO-{plan.zero_stage}, micro-batch {plan.micro_batch_size}) {where} needs "
        f"{gib(need)} of memory where {gib(capacity_bytes(inputs))} can be used: {gib(over)} short; most of it is {largest}"
    )
    return DoesNotFitError(message, tuple(repairs(inputs, constraints, need)))


def closest(inputs: Inputs, constraints: Constraints) -> tuple[Decisions, int, float, int]:
    """The plan that is least over: plan, fullest rank, bytes over, bytes needed. Raises InputError where none keeps the constraints."""
    if not is_possible(inputs, constraints):
        raise conflict(inputs, constraints)
    level = recompute_levels(constraints)[-1]
    best: tuple[Decisions, int, float, int] | None = None
    least: dict[tuple[int, int], Degrees] = {}
    for degrees in all_degrees(inputs, constraints):
        known = least.setdefault(degrees[:2], degrees)
        if degrees.micro_batch_size < known.micro_batch_size:
            least[degrees[:2]] = degrees
    for degrees in least.values():
        fewest: dict[str, int] = {}
        for schedule, v in schedules(inputs, degrees, constraints):
            fewest.setdefault(schedule, v)
        for schedule, v in fewest.items():
            zeros, choices = zero_stages(degrees, constraints), sequence_parallel_choices(inputs, degrees, constraints)
            for zero in zeros[-2:]:
                for choice in choices[:1]:
                    replicas = constraints.fixed.data_parallel_replicate or 1 if zero else 1
                    plan = decisions_of(
                        degrees, schedule=schedule, num_virtual_stages=v, zero_stage=zero, sequence_parallel=choice, data_parallel_replicate=replicas
                    )
                    plan = replace(plan, stages=even_stages(inputs.model, schedule, degrees.pipeline_parallel, v, level))
                    rank, over, need = shortage(inputs, plan)
                    if best is None or over < best[2]:
                        best = (plan, rank, over, need)
    assert best is not None
    return best


def repairs(inputs: Inputs, constraints: Constraints, need: float) -> Iterator[str]:
    """Changes that would make a plan fit, each found by a search with that one constraint relaxed, with its step time."""
    fixed, changes = constraints.fixed, []
    for name, flag in FLAGS.items():
        if getattr(fixed, name) is not None:
            also = {"schedule": "num_virtual_stages", "tensor_parallel": "data_parallel", "pipeline_parallel": "data_parallel"}.get(name, name)
            relaxed = dataclasses.replace(constraints, fixed=dataclasses.replace(fixed, **{name: None, also: None}))
            changes.append((flag, name, inputs, relaxed))
    if constraints.forbidden:
        changes.append(("what is forbidden", "", inputs, dataclasses.replace(constraints, forbidden=())))
    found: list[tuple[float, str]] = []
    for flag, name, given, relaxed in changes:
        plan = _quick(given, relaxed)
        if plan is not None:
            value = "the levels that the ILP chooses" if name == "recompute" else getattr(plan[1], name, None)
            change = f"{flag} {value}" if name else f"allow {flag}"
            found.append((plan[0], f"{change} ({degrees_in_words(plan[1], name)}): a step of {duration(plan[0])}"))
    found += more_memory(inputs, constraints, need)
    yield from (text for _, text in sorted(found))
    more = more_gpus(inputs, constraints)
    if more is not None:
        yield more
    enough = (need + inputs.cluster.gpu.reserved_bytes) / inputs.training.memory_fraction
    yield f"GPUs with {gib(enough, up=True)} of memory or more"


def more_memory(inputs: Inputs, constraints: Constraints, need: float) -> Iterator[tuple[float, str]]:
    """The least share of the GPU's memory, in whole percent, with which a plan fits, or all of it; with its step time."""
    if inputs.training.memory_fraction == 1:
        return
    least = math.ceil(100 * (need + inputs.cluster.gpu.reserved_bytes) / inputs.cluster.gpu.memory_bytes) / 100
    for share in sorted({min(least, 1.0), 1.0}):
        plan = _least_or_better(replace(inputs, training=replace(inputs.training, memory_fraction=share)), constraints)
        if plan is not None:
            yield plan[0], f"--memory-fraction {share} ({degrees_in_words(plan[1])}): a step of {duration(plan[0])}"
            return


def more_gpus(inputs: Inputs, constraints: Constraints) -> str | None:
    """The least number of GPUs on which a plan fits (of whole nodes, where there are whole nodes now), and its step time.

    The number is doubled until one does; then those between the last two are tried from below, for `REPAIR_SECONDS`.
    """
    fixed = dataclasses.replace(constraints.fixed, data_parallel=None)
    if fixed.tensor_parallel and fixed.pipeline_parallel:
        fixed = dataclasses.replace(fixed, pipeline_parallel=None)
    relaxed, per_node = dataclasses.replace(constraints, fixed=fixed), inputs.cluster.gpus_per_node

    def larger(count: int) -> Inputs:
        return replace(inputs, cluster=with_num_gpus(inputs.cluster, count))

    low = inputs.cluster.num_gpus
    for count in itertools.takewhile(lambda count: count <= MOST_GPUS, (low * 2**times for times in itertools.count(1))):
        if not _some_plan_fits(larger(count), relaxed):
            low = count
            continue
        until, step = time.monotonic() + REPAIR_SECONDS, per_node if low % per_node == 0 else 1
        for fewer in range(low + step, count, step):
            if time.monotonic() > until:
                break
            if _some_plan_fits(larger(fewer), relaxed):
                count = fewer
                break
        plan = _least_or_better(larger(count), relaxed)
        return f"{count} GPUs ({degrees_in_words(plan[1])}): a step of {duration(plan[0])}" if plan else None
    return None


def fewer_gpus(inputs: Inputs, constraints: Constraints, seconds: float) -> tuple[str, ...]:
    """What a number of GPUs that divides badly costs: the most of them, down to whole nodes, that are faster than all."""
    count, per_node = inputs.cluster.num_gpus, inputs.cluster.gpus_per_node
    whole = count // per_node * per_node or max(n for n in range(1, count + 1) if per_node % n == 0)
    until = time.monotonic() + REPAIR_SECONDS
    for fewer in range(count - 1, whole - 1, -1):
        if time.monotonic() > until:
            break
        plan = _quick(replace(inputs, cluster=with_num_gpus(inputs.cluster, fewer)), constraints, seconds)
        if plan is not None:
            return (f"{fewer} of these GPUs are faster: a step of {duration(plan[0])} ({degrees_in_words(plan[1])}), since {count} divide badly",)
    return ()


def _some_plan_fits(inputs: Inputs, constraints: Constraints) -> bool:
    """Whether even stages fit or, where they lack little, a short search finds others that do."""
    try:
        over = closest(inputs, constraints)[2]
    except InputError:
        return False
    return over <= 0 or (over <= UNEVEN * capacity_bytes(inputs) and _quick(inputs, constraints) is not None)


def _least_or_better(inputs: Inputs, constraints: Constraints) -> tuple[float, Decisions] | None:
    """The best plan that a short search finds, or else the one of even stages that needs least memory; None where even that does not fit."""
    found = _quick(inputs, constraints)
    if found is not None:
        return found
    try:
        least, _, over, _ = closest(inputs, constraints)
    except InputError:
        return None
    seconds = predict(inputs, least).time.step_seconds
    return (seconds, least) if over <= 0 and seconds is not None else None


def _quick(inputs: Inputs, constraints: Constraints, cutoff: float = math.inf) -> tuple[float, Decisions] | None:
    """The best plan that a short search finds, if it is faster than `cutoff`, or None."""
    try:
        outcome = explore(Costs(inputs), dataclasses.replace(constraints, time_limit_seconds=REPAIR_SECONDS), cutoff)
    except (InputError, SolverError):
        return None
    if outcome.best is None:
        return None
    check(inputs, outcome.best.decisions, "plan")
    return outcome.best.seconds, outcome.best.decisions
