"""What a search may choose from: the constraints of the user, and all decisions but the stages that keep the rules of a plan.

The space is a tree. A `Degrees` fixes how the GPUs and the batch are divided; `variants` adds placement, sequence
parallelism and schedule. Bounds exist for each level (`planner.bounds`), so that most of the
tree is never written out.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from planner.defaults import Fixed, by_option
from planner.errors import InputError
from planner.plan import (
    INTERLEAVED_SCHEDULES,
    SCHEDULES,
    Axis,
    Decisions,
    Inputs,
    Recompute,
    check_schedule,
    check_tensor_parallel,
)

AXES: tuple[Axis, ...] = ("tp", "dp", "pp")
LEVELS: tuple[Recompute, ...] = ("none", "selective", "full")
FORBIDDABLE = ("tensor_parallel", "pipeline_parallel", "data_parallel", "zero_stage", "data_parallel_replicate", "micro_batch_size",
               "schedule", "num_virtual_stages", "recompute", "sequence_parallel", "rank_order")  # fmt: skip


SCHEDULE_ORDER = ("1F1B", "GPipe", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "Naive")
"""From plain to exotic: which of equally fast plans is taken."""
MAX_VIRTUAL_STAGES = 12
"""Stages per rank that are looked at unless a number is asked for; Megatron-LM's published runs have at most 6."""
NOTHING_FIXED = Fixed()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraints:
    """What the user has decided, excluded, or limited."""

    fixed: Fixed = NOTHING_FIXED
    """Decisions that are made; None where open."""
    rank_order: tuple[Axis, ...] | None = None
    """The order of the mesh axes, if decided."""
    forbidden: tuple[tuple[str, object], ...] = ()
    """Pairs of a decision's name and a value that it must not take, such as ("schedule", "GPipe")."""
    time_limit_seconds: float | None = None
    """Wall-clock seconds of the search; then the best plan found is given with its gap."""
    accepted_gap: float = 0.01
    """Once a search has taken 7 CPU-seconds, a plan within this share of the bound is enough; 0: never."""
    free_cuts: bool = False
    """Whether schedules with several stages per rank may cut anywhere, too; by default their cuts are regular (`chain.regular_sizes`)."""
    solver: str | None = None
    """"HiGHS" or "CBC"; by default the first that is installed."""
    num_runners_up: int = 6

    def allows(self, name: str, value: object) -> bool:
        """Whether a decision may take a value."""
        decided = getattr(self.fixed, name, None) if name != "rank_order" else self.rank_order
        return (decided is None or decided == value) and (name, value) not in self.forbidden


class Degrees(NamedTuple):
    """How GPUs and batch are divided."""

    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    micro_batch_size: int
    num_microbatches: int


def divisors(number: int) -> list[int]:
    """All divisors in increasing order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def all_degrees(inputs: Inputs, constraints: Constraints) -> list[Degrees]:
    """Every division that the rules and the constraints allow. Raises InputError when there is none."""
    check_constraints(inputs, constraints)
    found = list(_degrees(inputs, constraints))
    if not found:
        raise conflict(inputs, constraints)
    return found


def _degrees(inputs: Inputs, constraints: Constraints) -> Iterator[Degrees]:
    model, gpus, batch = inputs.model, inputs.cluster.num_gpus, inputs.training.global_batch_size
    for tp in divisors(gpus):
        if not constraints.allows("tensor_parallel", tp) or not _splits(inputs, tp):
            continue
        for pp in divisors(gpus // tp):
            dp = gpus // tp // pp
            if pp > model.num_layers + 2 or batch % dp or dp % (constraints.fixed.data_parallel_replicate or 1):
                continue
            if not (constraints.allows("pipeline_parallel", pp) and constraints.allows("data_parallel", dp)):
                continue
            for micro in divisors(batch // dp):
                if constraints.allows("micro_batch_size", micro):
                    yield Degrees(tp, pp, dp, micro, batch // dp // micro)


def is_possible(inputs: Inputs, constraints: Constraints) -> bool:
    """Whether any plan keeps the constraints, memory aside."""
    try:
        check_constraints(inputs, constraints)
    except InputError:
        return False
    return bool(recompute_levels(constraints)) and any(
        sequence_parallel_choices(inputs, degrees, constraints)
        and any(schedules(inputs, degrees, constraints))
        and any(shardings(inputs, degrees, order, constraints) for order in rank_orders(degrees, constraints))
        for degrees in _degrees(inputs, constraints)
    )


def conflict(inputs: Inputs, constraints: Constraints) -> InputError:
    """The error that names the constraints which no plan keeps together: a least set of them, so that freeing any one helps."""
    given = [(name, value) for name, value in dataclasses.asdict(constraints.fixed).items() if value is not None]
    given += [("rank_order", constraints.rank_order)] if constraints.rank_order else []
    asked: list[tuple[str, Any]] = [*given, *(("forbid", pair) for pair in constraints.forbidden)]
    needed = list(asked)
    for item in asked:
        fewer = [other for other in needed if other is not item]
        if not is_possible(inputs, _only(constraints, fewer)):
            needed = fewer
    if not needed:
        model, gpus = inputs.model, inputs.cluster.num_gpus
        allowed = (
            f"no division of {gpus} GPUs into tensor x pipeline x data parallel fits {model.name} and the batch; "
            f"the data-parallel degree must divide the batch, and pipeline parallel is at most {model.num_layers + 2}"
        )
        return InputError("--global-batch-size", inputs.training.global_batch_size, allowed)
    (option, value), *others = [_said(name, value) for name, value in needed]
    words = " and ".join(f"{other} {words}".rstrip() for other, words in others)
    also = f" together with {words}; change one of them" if others else ""
    where = f"on {inputs.cluster.num_gpus} GPUs with a global batch of {inputs.training.global_batch_size} no plan"
    return InputError(option, value, f"{where} of {inputs.model.name} has it{also}")


def _only(constraints: Constraints, kept: list[tuple[str, Any]]) -> Constraints:
    """The constraints with nothing fixed or forbidden but what is `kept`."""
    fixed = {name: value for name, value in kept if name not in ("rank_order", "forbid")}
    order = next((value for name, value in kept if name == "rank_order"), None)
    forbidden = tuple(value for name, value in kept if name == "forbid")
    return dataclasses.replace(constraints, fixed=Fixed(**fixed), rank_order=order, forbidden=forbidden)


def _said(name: str, value: Any) -> tuple[str, object]:
    """The option that makes a constraint, and its value."""
    if name == "forbid":
        decision, refused = value
        text = "-".join(refused) if isinstance(refused, tuple) else str(refused)
        return "--forbid", f"{decision}={text.lower() if isinstance(refused, bool) else text}"
    if name == "sequence_parallel":
        return "--sequence-parallel" if value else "--no-sequence-parallel", ""
    return f"--{name.replace('_', '-')}", "-".join(value) if name == "rank_order" else value


def check_constraints(inputs: Inputs, constraints: Constraints) -> None:
    """Raises InputError that names the decision which can't be kept."""
    fixed, gpus, batch = constraints.fixed, inputs.cluster.num_gpus, inputs.training.global_batch_size
    if fixed.tensor_parallel:
        check_tensor_parallel(inputs.model, fixed.tensor_parallel, "--tensor-parallel")
    product = 1
    for name in ("tensor_parallel", "pipeline_parallel", "data_parallel"):
        degree = getattr(fixed, name)
        if degree:
            product *= degree
            if gpus % product:
                raise InputError(f"--{name.replace('_', '-')}", degree, f"the degrees given must divide the {gpus} GPUs of the cluster")
    if fixed.tensor_parallel and fixed.pipeline_parallel and fixed.data_parallel and product != gpus:
        allowed = f"data x tensor x pipeline parallel = {product} must be the {gpus} GPUs of the cluster"
        raise InputError("--data-parallel", fixed.data_parallel, allowed)
    samples = (fixed.data_parallel or 1) * (fixed.micro_batch_size or 1)
    if batch % samples:
        raise InputError("--global-batch-size", batch, f"a multiple of data parallel x micro-batch size = {samples} is expected")
    if fixed.pipeline_parallel and fixed.pipeline_parallel > inputs.model.num_layers + 2:
        allowed = f"{inputs.model.name} has {inputs.model.num_layers + 2} layers, embedding and head included"
        raise InputError("--pipeline-parallel", fixed.pipeline_parallel, allowed)
    replicas = fixed.data_parallel_replicate or 1
    if replicas > 1 and fixed.zero_stage == 0:
        raise InputError("--data-parallel-replicate", replicas, "it needs ZeRO-1, 2 or 3: without, every rank is a replica")
    if fixed.data_parallel and fixed.data_parallel % replicas:
        raise InputError("--data-parallel-replicate", replicas, f"a divisor of data parallel {fixed.data_parallel} is expected")
    if fixed.sequence_parallel and fixed.tensor_parallel == 1:
        raise InputError("--sequence-parallel", True, "it needs tensor parallel above 1")
    if fixed.schedule and fixed.pipeline_parallel and fixed.num_virtual_stages:
        p, v = fixed.pipeline_parallel, fixed.num_virtual_stages
        number = batch // samples if fixed.data_parallel and fixed.micro_batch_size else p
        by_option(functools.partial(check_schedule, fixed.schedule, p, v, number, "options: decisions"))
    for name, value in constraints.forbidden:
        if name not in FORBIDDABLE:
            raise InputError("forbidden", f"{name}={value}", f"one of {', '.join(FORBIDDABLE)} is expected")


def _splits(inputs: Inputs, tensor_parallel: int) -> bool:
    try:
        check_tensor_parallel(inputs.model, tensor_parallel, "")
    except InputError:
        return False
    return True


def rank_orders(degrees: Degrees, constraints: Constraints) -> list[tuple[Axis, ...]]:
    """The orders of the mesh axes that differ: an axis of size 1 stays where the default order has it."""
    sizes = {"tp": degrees.tensor_parallel, "dp": degrees.data_parallel, "pp": degrees.pipeline_parallel}
    found: dict[tuple[Axis, ...], tuple[Axis, ...]] = {}
    for order in itertools.permutations(AXES):
        if constraints.allows("rank_order", order):
            found.setdefault(tuple(axis for axis in order if sizes[axis] > 1), order)
    return list(found.values())


def sequence_parallel_choices(inputs: Inputs, degrees: Degrees, constraints: Constraints) -> list[bool]:
    possible = degrees.tensor_parallel > 1 and inputs.training.sequence_length % degrees.tensor_parallel == 0
    return [value for value in ((True, False) if possible else (False,)) if constraints.allows("sequence_parallel", value)]


def schedules(inputs: Inputs, degrees: Degrees, constraints: Constraints) -> Iterator[tuple[str, int]]:
    """Schedules with their number of stages per rank. Without a pipeline all are 1F1B; Naive only when asked for."""
    p, m, fixed = degrees.pipeline_parallel, degrees.num_microbatches, constraints.fixed
    for name in SCHEDULES:
        if not constraints.allows("schedule", name) or (name == "Naive" and fixed.schedule != "Naive"):
            continue
        if p == 1 and name != (fixed.schedule or "1F1B"):
            continue
        most = (inputs.model.num_layers + 2) // p
        if name not in INTERLEAVED_SCHEDULES:
            numbers: range = range(1, 2)
        elif name == "ZBVZeroBubble":
            numbers = range(2, min(most, 2) + 1)
        else:
            numbers = range(2, (most if fixed.num_virtual_stages else min(most, MAX_VIRTUAL_STAGES)) + 1)
        for v in numbers:
            if constraints.allows("num_virtual_stages", v) and _runs(name, p, v, m):
                yield name, v


def _runs(schedule: str, p: int, v: int, m: int) -> bool:
    try:
        check_schedule(schedule, p, v, m, "")
    except InputError:
        return False
    return True


def zero_stages(degrees: Degrees, constraints: Constraints) -> list[int]:
    """ZeRO stages worth telling apart: without data parallelism they are all the same."""
    allowed = [stage for stage in range(4) if constraints.allows("zero_stage", stage)]
    return allowed[:1] if degrees.data_parallel == 1 else allowed


def shardings(inputs: Inputs, degrees: Degrees, order: tuple[Axis, ...], constraints: Constraints) -> list[tuple[int, int]]:
    """ZeRO stages with the number of replicas of the group that shards (HSDP; 1: it is all data-parallel ranks).

    Unless a number of replicas is asked for, one is looked at beside 1, where the data-parallel ranks span several nodes: that with
    which the ranks that shard are as many of a node's as can be.
    """
    asked, dp, stride = constraints.fixed.data_parallel_replicate, degrees.data_parallel, 1
    sizes = {"tp": degrees.tensor_parallel, "dp": dp, "pp": degrees.pipeline_parallel}
    for axis in order[: order.index("dp")]:
        stride *= sizes[axis]
    node, numbers = inputs.cluster.gpus_per_node, [1]
    if asked:
        numbers = [asked]
    elif stride * dp > node:
        numbers += [dp // shards for shards in divisors(dp) if 1 < shards < dp and node % (shards * stride) == 0][-1:]
    return [
        (zero, replicas)
        for zero in zero_stages(degrees, constraints)
        for replicas in numbers
        if constraints.allows("data_parallel_replicate", replicas) and (replicas == 1 or (zero > 0 and dp % replicas == 0))
    ]


def recompute_levels(constraints: Constraints) -> tuple[Recompute, ...]:
    return tuple(level for level in LEVELS if constraints.allows("recompute", level))


def decisions_of(
    degrees: Degrees, *, schedule: str = "1F1B", num_virtual_stages: int = 1, zero_stage: int = 0, sequence_parallel: bool = False,
    rank_order: tuple[Axis, ...] = AXES, data_parallel_replicate: int = 1,
) -> Decisions:  # fmt: skip
    """Decisions without stages."""
    return Decisions(
        data_parallel=degrees.data_parallel,
        tensor_parallel=degrees.tensor_parallel,
        pipeline_parallel=degrees.pipeline_parallel,
        zero_stage=zero_stage,
        sequence_parallel=sequence_parallel,
        micro_batch_size=degrees.micro_batch_size,
        num_microbatches=degrees.num_microbatches,
        schedule=schedule,  # type: ignore[arg-type]
        num_virtual_stages=num_virtual_stages,
        rank_order=rank_order,
        data_parallel_replicate=data_parallel_replicate,
        stages=(),
    )


def shape_of(decisions: Decisions) -> tuple[str, int, int, int]:
    """What a schedule's action lists depend on."""
    return decisions.schedule, decisions.pipeline_parallel, decisions.num_virtual_stages, decisions.num_microbatches


def degrees_of(decisions: Decisions) -> Degrees:
    return Degrees(
        decisions.tensor_parallel, decisions.pipeline_parallel, decisions.data_parallel, decisions.micro_batch_size, decisions.num_microbatches
    )


def plainness(item: Degrees | Decisions) -> tuple[Any, ...]:
    """Orders candidates with equal bounds from plain to exotic, and makes the search deterministic."""
    if isinstance(item, Degrees):
        return (0, *item)
    return (
        1,
        SCHEDULE_ORDER.index(item.schedule),
        item.num_virtual_stages,
        item.zero_stage,
        item.data_parallel_replicate,
        item.rank_order != ("tp", "dp", "pp"),
        item.pipeline_parallel,
        item.tensor_parallel,
        item.micro_batch_size,
        item.sequence_parallel,
        item.rank_order,
    )
