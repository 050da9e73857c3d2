"""Plans for tests, with predictions but without a search."""

from __future__ import annotations

from typing import Any

import planner.model as models
from planner.cluster import load_cluster
from planner.estimate import predict
from planner.plan import (
    Decisions,
    Inputs,
    Plan,
    RunnerUp,
    SolverReport,
    Training,
    as_recompute,
    check,
    digest,
    even_stages,
    make_stages,
    replace,
    stage_ranks,
)


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
            global_batch_size=dp * micro * m, sequence_length=sequence_length or min(spec.max_sequence_length, 2048), precision=precision
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
