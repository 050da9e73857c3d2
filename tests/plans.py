"""Plans for tests, with predictions but without a search."""

from __future__ import annotations

from typing import Any

import planner.model as models
from planner.cluster import load_cluster
from planner.estimate import predict
from planner.plan import (
    Decisions,
    Inputs,
    Memory,
    Plan,
    RunnerUp,
    SolverReport,
    Training,
    as_recompute,
    check,
    digest,
    even_stages,
    make_stages,
    plan_hash,
    replace,
    stage_ranks,
)
from planner.run import Coordinates, DryRun, DryRunRank, Run, RunRank, Step, Summary
from planner.schedule import Action, plan_actions
from planner.timeline import Timeline, bubble_fraction, bubble_fractions, busy_seconds, simulate
from planner.timing import predict_timeline


def make_plan(
    model: Any = "tiny-gpt",
    cluster: str | None = None,
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    micro: int = 1,
    m: int = 4,
    schedule: str = "1F1B",
    virtual: int = 1,
    recompute: Any = "none",
    sizes: tuple[int, ...] = (),
    sequence_length: int | None = None,
    precision: str = "mixed-bf16",
    optimizer: str = "adam",
    attention: Any = None,
    runners_up: bool = False,
    **decisions: Any,
) -> Plan:
    """A checked plan. `sizes` are layers per stage, embedding and head included; `recompute` is a level or one per stage."""
    spec = models.load_model(model) if isinstance(model, str) else model
    world = tp * pp * dp
    inputs = Inputs(
        model=spec,
        cluster=load_cluster(cluster or f"a100-80gb:{world}"),
        training=Training(
            global_batch_size=dp * micro * m,
            sequence_length=sequence_length or min(spec.max_sequence_length, 2048),
            precision=precision,
            optimizer=optimizer,
            attention=attention,
        ),
    )
    stages = even_stages(spec, schedule, pp, virtual, "none")
    counts = sizes or tuple(stage.num_layers for stage in stages)
    levels = [recompute] * len(counts) if isinstance(recompute, str) else list(recompute)
    decided = Decisions(
        data_parallel=dp,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        micro_batch_size=micro,
        num_microbatches=m,
        schedule=schedule,
        num_virtual_stages=virtual,
        stages=make_stages(
            counts, [level if isinstance(level, str) else as_recompute(**level) for level in levels], stage_ranks(schedule, pp, virtual)
        ),
        **decisions,
    )
    check(inputs, decided)
    others = ()
    if runners_up:
        lost = replace(decided, schedule="GPipe")
        others = (RunnerUp(decisions=lost, step_seconds=9.5, peak_bytes=2**34, why_not="a larger bubble <b>than</b> the winner"),)
    return Plan(
        inputs=inputs,
        inputs_hash=digest(inputs),
        decisions=decided,
        predictions=predict(inputs, decided),
        solver=SolverReport(
            name="none", status="given", objective_seconds=None, bound_seconds=None, gap_fraction=None,
            num_candidates=1, num_pruned=0, wall_seconds=0.0, runners_up=others,
        ),
    )  # fmt: skip


def make_run(plan: Plan, *, forward: float = 1.0, message: float = 0.0, rehearsed: bool = False, memory: float = 1.0) -> tuple[Run, Timeline]:
    """A run of `plan` that went as predicted, but forward passes take `forward` times as long and messages `message` s more."""
    predicted = predict_timeline(plan.inputs, plan.decisions)
    seconds = {(event.kind, event.stage): event.end - event.start for event in predicted.events if not event.kind.startswith(("RECV", "SEND"))}

    optimizer = [event.end - event.start for event in predicted.events if event.kind == "OPTIMIZER"]
    seconds["OPTIMIZER", -1] = sum(optimizer) / len(optimizer)

    def duration(action: Action) -> float:
        return seconds[action.kind, action.stage] * (forward if action.kind == "F" else 1.0)

    walked = simulate(plan_actions(plan.decisions), duration, lambda action: message)
    decisions, ranks, events = plan.decisions, [], []
    degrees = {"tp": decisions.tensor_parallel, "dp": decisions.data_parallel, "pp": decisions.pipeline_parallel}
    for rank in range(decisions.world_size):
        place, rest = {}, rank
        for axis in decisions.rank_order:
            place[axis], rest = rest % degrees[axis], rest // degrees[axis]
        events += [event._replace(rank=rank) for event in walked.events if event.rank == place["pp"]]
        need = plan.predictions.pipeline_ranks[place["pp"]].memory
        parts = [getattr(need, f"{name}_bytes") * memory for name in ("weights", "gradients", "optimizer", "activations", "buffers")]
        ranks.append(
            RunRank(
                rank=rank,
                coordinates=Coordinates(**place),
                memory=Memory.of(*parts),
                bubble_fraction=bubble_fractions(walked)[place["pp"]],
                busy_seconds=busy_seconds(walked)[place["pp"]],
                actions_file=f"run.rank{rank}.json",
            )
        )
    tokens = plan.inputs.training.global_batch_size * plan.inputs.training.sequence_length
    steps = tuple(
        Step(step=index, loss=5.5 - 0.3 * index, seconds=walked.end * (1.05 if index == 0 else 1.0), num_tokens=tokens) for index in range(6)
    )
    run = Run(
        plan_hash=plan_hash(plan),
        rehearsed=rehearsed,
        environment={"torch": "2.13.0", "device": "cpu"},
        steps=steps,
        ranks=tuple(ranks),
        summary=Summary(
            step_seconds=walked.end,
            bubble_fraction=bubble_fraction(walked),
            peak_bytes=max(rank.memory.total_bytes for rank in ranks),
            tokens_per_second=tokens / walked.end,
        ),
    )
    return run, Timeline(source="rehearsed" if rehearsed else "measured", events=tuple(events))


def make_dry_run(plan: Plan) -> DryRun:
    """A dry run that traced what was predicted."""
    traced = tuple(
        DryRunRank(pipeline_rank=rank.pipeline_rank, rank=rank.pipeline_rank, memory=rank.memory, wall_seconds=1.0)
        for rank in plan.predictions.pipeline_ranks
    )
    return DryRun(plan_hash=plan_hash(plan), pipeline_ranks=traced)
