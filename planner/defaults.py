"""Fills in what the user of `plan estimate` left open, by plain rules that are stated with the result."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

from planner.cluster import ClusterSpec, with_num_gpus
from planner.errors import InputError
from planner.estimate import capacity_bytes
from planner.memory import predict_memory
from planner.model import ModelSpec
from planner.plan import (
    INTERLEAVED_SCHEDULES,
    Decisions,
    Inputs,
    Recompute,
    Training,
    check,
    check_schedule,
    check_tensor_parallel,
    even_stages,
    replace,
)
from planner.states import state_bytes

MOST_DATA_PARALLEL = 64
"""The largest data-parallel degree that is suggested where no batch is given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed:
    """Decisions that the user has made; None where they are open."""

    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    data_parallel: int | None = None
    zero_stage: int | None = None
    data_parallel_replicate: int | None = None
    micro_batch_size: int | None = None
    schedule: str | None = None
    num_virtual_stages: int | None = None
    recompute: Recompute | None = None
    sequence_parallel: bool | None = None


@dataclasses.dataclass(frozen=True)
class Completed:
    inputs: Inputs
    decisions: Decisions
    assumptions: tuple[str, ...]


def complete(model: ModelSpec, cluster: ClusterSpec, training: Training, fixed: Fixed, *, batch_given: bool) -> Completed:
    """Decisions for `plan estimate`: 1 where a degree is open, data parallel over the GPUs that are left, micro-batches of
    one sample, 1F1B, no ZeRO, even stages, and the least recomputation that fits.

    Raises InputError when the degrees don't make up the cluster, or break another rule of a plan.
    """
    assumptions: list[str] = []
    tp, pp = fixed.tensor_parallel or 1, fixed.pipeline_parallel or 1
    check_tensor_parallel(model, tp, "--tensor-parallel")
    dp = fixed.data_parallel or max(cluster.num_gpus // (tp * pp), 1)
    if dp * tp * pp != cluster.num_gpus:
        if fixed.data_parallel:
            product = f"data x tensor x pipeline parallel = {dp} x {tp} x {pp} = {dp * tp * pp}"
            raise InputError("--data-parallel", dp, f"{product} must be the {cluster.num_gpus} GPUs of the cluster")
        option, degree = ("--pipeline-parallel", pp) if fixed.pipeline_parallel else ("--tensor-parallel", tp)
        raise InputError(option, degree, f"tensor x pipeline parallel = {tp} x {pp} must divide the {cluster.num_gpus} GPUs of the cluster")
    virtual = fixed.num_virtual_stages or (2 if fixed.schedule in INTERLEAVED_SCHEDULES else 1)
    schedule = fixed.schedule or ("Interleaved1F1B" if virtual > 1 else "1F1B")
    micro = fixed.micro_batch_size or 1
    if fixed.micro_batch_size is None:
        assumptions.append("micro-batches of 1 sample")
    if batch_given:
        if training.global_batch_size % (dp * micro):
            allowed = f"a multiple of data parallel x micro-batch size = {dp * micro} is expected"
            raise InputError("--global-batch-size", training.global_batch_size, allowed)
    else:
        count = 8 * pp if pp > 1 else 1
        training = replace(training, global_batch_size=dp * micro * count)
        assumptions.append(f"a global batch of {training.global_batch_size} samples: {count} micro-batches on each of {dp} data-parallel ranks")
    number = training.global_batch_size // (dp * micro)
    by_option(functools.partial(check_schedule, schedule, pp, virtual, number, "options: decisions"))
    zero, replicas = fixed.zero_stage or 0, fixed.data_parallel_replicate or 1
    if replicas > 1 and not zero:
        raise InputError("--data-parallel-replicate", replicas, "it needs --zero-stage 1, 2 or 3: without, every rank is a replica")
    if dp % replicas:
        raise InputError("--data-parallel-replicate", replicas, f"a divisor of data parallel {dp} is expected")
    inputs = Inputs(model=model, cluster=cluster, training=training)
    found: Decisions | None = None
    levels: tuple[Recompute, ...] = (fixed.recompute,) if fixed.recompute else ("none", "selective", "full")
    for level in levels:
        found = Decisions(
            data_parallel=dp,
            tensor_parallel=tp,
            pipeline_parallel=pp,
            zero_stage=zero,
            data_parallel_replicate=replicas,
            sequence_parallel=bool(fixed.sequence_parallel),
            micro_batch_size=micro,
            num_microbatches=number,
            schedule=schedule,  # type: ignore[arg-type]
            num_virtual_stages=virtual,
            stages=even_stages(model, schedule, pp, virtual, level),
        )
        by_option(functools.partial(check, inputs, found, "options"))
        if _fits(inputs, found):
            break
    assert found is not None
    if fixed.recompute is None:
        assumptions.append(f"recomputation: {found.stages[0].recompute}, the least that fits" if _fits(inputs, found) else "full recomputation")
    stages = "even pipeline stages" if pp > 1 else "one pipeline stage"
    assumptions.append(f"{stages}; `plan solve` chooses the cuts and what else is left open")
    return Completed(inputs, found, tuple(assumptions))


def by_option(checked: Callable[[], None]) -> None:
    """Runs a check; its InputError names the option that the decision is given by."""
    try:
        checked()
    except InputError as error:
        name = error.field.removeprefix("options: ").removeprefix("decisions.")
        if name == "num_microbatches":
            raise InputError("the number of micro-batches", error.value, error.allowed) from None
        raise InputError(f"--{name.replace('_', '-')}", error.value, error.allowed) from None


def _fits(inputs: Inputs, decisions: Decisions) -> bool:
    capacity = capacity_bytes(inputs)
    return all(need.total_bytes <= capacity for need in predict_memory(inputs, decisions))


def shortage(inputs: Inputs, decisions: Decisions) -> str:
    """What is short, where: one line."""
    needs = predict_memory(inputs, decisions)
    rank, worst = max(enumerate(needs), key=lambda item: item[1].total_bytes)
    capacity = capacity_bytes(inputs)
    where = f"pipeline rank {rank}" if len(needs) > 1 else "the GPU" if inputs.cluster.num_gpus == 1 else "each GPU"
    return (
        f"{inputs.model.name} does not fit: {where} needs {worst.total_bytes / 2**30:,.1f} GiB of the {capacity / 2**30:,.1f} GiB "
        f"usable on {inputs.cluster.gpu.name}, {(worst.total_bytes - capacity) / 2**30:,.1f} GiB too much"
    )


def repairs(inputs: Inputs, decisions: Decisions, *, batch_given: bool = False) -> tuple[str, ...]:
    """The smallest changes that would make a plan fit: each single change on these GPUs, else the fewest GPUs. A given batch is kept."""
    found = []
    for text, changed in _changes(inputs, decisions):
        try:
            check(inputs, changed, "repair")
        except InputError:
            continue
        if _fits(inputs, changed):
            found.append(text)
    if found:
        return tuple(found[:3])
    fewest = _fewest_gpus(inputs, batch_given)
    return (fewest,) if fewest else ()


def _changes(inputs: Inputs, decisions: Decisions) -> Iterator[tuple[str, Decisions]]:
    """Changes that need no more GPUs, mildest first."""

    def with_level(decided: Decisions, level: Recompute) -> Decisions:
        return replace(decided, stages=tuple(replace(stage, recompute=level) for stage in decided.stages))

    for level in ("selective", "full"):
        yield f"--recompute {level}", with_level(decisions, level)
    if decisions.tensor_parallel > 1 and not decisions.sequence_parallel:
        yield "--sequence-parallel", replace(decisions, sequence_parallel=True)
    if decisions.data_parallel > 1:
        for stage in range(decisions.zero_stage + 1, 4):
            yield f"--zero-stage {stage}", replace(decisions, zero_stage=stage)
    if decisions.micro_batch_size > 1:
        one = replace(decisions, micro_batch_size=1, num_microbatches=decisions.num_microbatches * decisions.micro_batch_size)
        yield "--micro-batch-size 1", one
        yield "--micro-batch-size 1 --recompute full", with_level(one, "full")
    if decisions.data_parallel > 1:
        for stage in range(decisions.zero_stage + 1, 4):
            yield f"--zero-stage {stage} --recompute full", with_level(replace(decisions, zero_stage=stage), "full")
    whole = decisions.world_size
    for tp in (1, 2, 4, 8):
        for pp in (1, 2, 4, 8, 16, 32, 64):
            if whole % (tp * pp) or tp > inputs.cluster.gpus_per_node or pp > inputs.model.num_layers:
                continue
            dp = whole // (tp * pp)
            if inputs.training.global_batch_size % dp:
                continue
            decided = _simple(inputs, tp, pp, dp, min(1, dp - 1))
            yield _simple_words(decided), decided


def _fewest_gpus(inputs: Inputs, batch_given: bool) -> str | None:
    """The fewest GPUs of this kind on which some plan fits, with that plan: every number up to 128, then in steps of 1/64.

    Skipped is what can't fit: fewer GPUs than hold the states, and a tensor-parallel degree at which not even the finest split does.
    """
    model, capacity = inputs.model, capacity_bytes(inputs)
    states = model.num_parameters * sum(state_bytes(inputs.training.precision, inputs.training.optimizer))

    def fits(tp: int, pp: int, dp: int) -> Decisions | None:
        batch = inputs.training.global_batch_size if batch_given else dp * 2 * pp
        if batch % dp:
            return None
        training = replace(inputs.training, global_batch_size=batch)
        changed = replace(inputs, cluster=with_num_gpus(inputs.cluster, tp * pp * dp), training=training)
        for zero in (1, 3) if dp > 1 else (0,):
            decided = _simple(changed, tp, pp, dp, zero)
            try:
                check(changed, decided, "repair")
            except InputError:
                return None
            if _fits(changed, decided):
                return decided
        return None

    most = inputs.training.global_batch_size if batch_given else MOST_DATA_PARALLEL
    degrees = [tp for tp in (1, 2, 4, 8) if tp <= inputs.cluster.gpus_per_node]
    degrees = [tp for tp in degrees if fits(tp, model.num_layers, 1) or fits(tp, model.num_layers, most) or fits(tp, 1, most)]
    count = max(1, math.ceil(states / max(capacity, 1)))
    while degrees and count <= max(degrees) * model.num_layers * most:
        for tp in degrees:
            for pp in range(1, min(model.num_layers, count // tp) + 1):
                if count % (tp * pp) == 0 and (dp := count // (tp * pp)) <= most and (found := fits(tp, pp, dp)):
                    return f"{count} GPUs: {_simple_words(found)}"
        count += max(1, count // 64)
    return None


def _simple_words(decided: Decisions) -> str:
    """The options of a plan of `_simple`."""
    sharded = f" --zero-stage {decided.zero_stage}" if decided.zero_stage else ""
    sequence = " --sequence-parallel" if decided.sequence_parallel else ""
    degrees = f"--tp {decided.tensor_parallel} --pp {decided.pipeline_parallel} --dp {decided.data_parallel}"
    return f"{degrees}{sharded}{sequence} --recompute full --micro-batch-size 1"


def _simple(inputs: Inputs, tp: int, pp: int, dp: int, zero: int) -> Decisions:
    """1F1B with even stages, micro-batches of one sample and full recomputation."""
    return Decisions(
        data_parallel=dp,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        zero_stage=zero,
        sequence_parallel=tp > 1 and inputs.training.sequence_length % tp == 0,
        micro_batch_size=1,
        num_microbatches=max(inputs.training.global_batch_size // dp, 1),
        stages=even_stages(inputs.model, "1F1B", pp, 1, "full"),
    )
