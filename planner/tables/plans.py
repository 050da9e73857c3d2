"""Models, clusters, estimates and plans as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.table import Table

from planner.accuracy import step_interval
from planner.chain_plan import ChainInputs
from planner.cluster import ClusterSpec
from planner.estimate import Estimate, capacity_bytes, capacity_words, warnings
from planner.explain import Term
from planner.model import ModelSpec
from planner.plan import (
    Decisions,
    Inputs,
    Memory,
    PipelineRankPrediction,
    Plan,
    SolverReport,
    Stage,
    Time,
    has_embedding,
    has_head,
    recompute_counts,
    stage_blocks,
)
from planner.schedule import COMPUTE_KINDS
from planner.tables.text import GIB, count, gib, percent, seconds, size, table
from planner.timeline import Timeline, window


def models_table(models: Iterable[ModelSpec]) -> Table:
    rows = [
        (m.name, m.num_layers, m.hidden_size, m.num_attention_heads, m.num_key_value_heads, m.ffn_hidden_size, m.vocab_size, f"{m.num_parameters:,}")
        for m in models
    ]
    return table("Model presets", ("name", "layers", "hidden", "heads", "kv heads", "ffn", "vocabulary", "parameters"), rows)


def clusters_table(clusters: Iterable[ClusterSpec]) -> Table:
    rows = [
        (
            c.name,
            c.gpu.name,
            f"{c.gpu.memory_bytes / GIB:.1f}",
            f"{max(c.gpu.peak_flops_per_second.get('bf16', 0), c.gpu.peak_flops_per_second.get('fp16', 0)) / 1e12:,.3g}",
            f"{c.gpu.memory_bandwidth_bytes_per_second / 1e9:,.4g}",
            c.gpus_per_node,
            f"{c.intra_node.bandwidth_bytes_per_second / 1e9:,.4g}",
            f"{c.inter_node.bandwidth_bytes_per_second / 1e9:,.4g}",
        )
        for c in clusters
    ]
    columns = ("name", "GPU", "GiB", "16-bit TFLOP/s", "memory GB/s", "per node", "inside GB/s", "between GB/s")
    return table("Cluster presets (links: one direction, per GPU)", columns, rows, left=2)


def fields_table(title: str, values: dict[str, object]) -> Table:
    return table(title, ("field", "value"), [(key, value) for key, value in values.items() if value is not None], left=2)


def _layers(stage: Stage, model: ModelSpec) -> str:
    parts = []
    blocks = stage_blocks(stage, model)
    if has_embedding(stage):
        parts.append("embedding")
    if len(blocks) == 1:
        parts.append(f"block {blocks[0]}")
    elif blocks:
        parts.append(f"blocks {blocks[0]}–{blocks[-1]}")
    if has_head(stage, model):
        parts.append("head")
    return " + ".join(parts)


def _recompute(stage: Stage, model: ModelSpec) -> str:
    blocks = len(stage_blocks(stage, model))
    counts = recompute_counts(stage, blocks)
    named = [(counts.full, "full"), (counts.selective, "selective"), (counts.none, "none")]
    used = [(number, name) for number, name in named if number]
    if len(used) <= 1:
        return used[0][1] if used else "none"
    return ", ".join(f"{number} {name}" for number, name in used)


def degrees(decisions: Decisions) -> str:
    """The plan in one line."""
    parts = [f"TP {decisions.tensor_parallel} x PP {decisions.pipeline_parallel} x DP {decisions.data_parallel}"]
    if decisions.pipeline_parallel > 1:
        virtual = f" with {decisions.num_virtual_stages} stages a rank" if decisions.num_virtual_stages > 1 else ""
        parts.append(f"{decisions.schedule}{virtual}")
    parts.append(f"micro-batch {decisions.micro_batch_size} x {decisions.num_microbatches}")
    if decisions.data_parallel > 1:
        shards = decisions.data_parallel // decisions.data_parallel_replicate
        over = f" over {shards} ranks x {decisions.data_parallel_replicate} replicas" if decisions.data_parallel_replicate > 1 else ""
        parts.append(f"ZeRO-{decisions.zero_stage}{over}" if decisions.zero_stage else "no ZeRO")
    if decisions.sequence_parallel:
        parts.append("sequence parallel")
    return ", ".join(parts)


def verdict(inputs: Inputs, decisions: Decisions, memory: Memory, time: Time, fits: bool | None, ranks: Sequence[PipelineRankPrediction]) -> str:
    """The answer first: does it fit, where is it tight, how fast is it."""
    answer = "FITS" if fits else "DOES NOT FIT"
    lines = [
        f"{answer}: {inputs.model.name} on {inputs.cluster.num_gpus:,} x {inputs.cluster.gpu.name} ({degrees(decisions)})",
        memory_line(inputs, memory, ranks),
    ]
    lines.append(
        f"  step: {seconds(time.step_seconds)}{in_brackets(time.step_seconds_interval)}, bubble {percent(time.bubble_fraction)}, "
        f"MFU {percent(time.model_flops_utilization)}, {count(time.tokens_per_second)} tokens/s"
    )
    lines.append(training_line(time))
    return "\n".join(line for line in lines if line)


def memory_line(inputs: Inputs | ChainInputs, memory: Memory, ranks: Sequence[PipelineRankPrediction]) -> str:
    """The peak of the heaviest GPU, where it is, and what is left of the memory that can be used."""
    worst = max(ranks, key=lambda rank: rank.memory.total_bytes, default=None)
    where = f"pipeline rank {worst.pipeline_rank}" if worst and len(ranks) > 1 else "every GPU"
    room = capacity_bytes(inputs) - memory.total_bytes
    left = f"{size(room)} to spare" if room >= 0 else f"{size(-room)} too much"
    return f"  memory: {size(memory.total_bytes)} at its peak on {where}, of {capacity_words(inputs, size)}: {left}"


def in_brackets(interval: tuple[float, float] | None) -> str:
    """The interval of a predicted time, to be written behind it."""
    return f" (80 % interval {seconds(interval[0])} to {seconds(interval[1])})" if interval else ""


def between(interval: tuple[float, float] | None) -> str | None:
    """The interval of a predicted time for a table's cell."""
    return f"{seconds(interval[0])} to {seconds(interval[1])}" if interval else None


def training_line(time: Time) -> str:
    """The whole training run in one line, or nothing where the number of tokens is not known."""
    if time.training_days is None:
        return ""
    parts = [f"{time.training_days:,.1f} days", f"{time.gpu_hours or 0:,.0f} GPU-hours", f"{time.gpu_years or 0:,.1f} GPU-years"]
    if time.cost is not None:
        parts.append(f"cost {time.cost:,.0f}")
    if time.energy_kwh is not None:
        parts.append(f"{time.energy_kwh / 1000:,.0f} MWh at full power")
    return f"  training: {', '.join(parts)}"


def unproven(plan: Plan | None) -> str:
    """What a search has left unproven, in words; nothing where its plan is the best."""
    gap = plan.solver.gap_fraction if plan else None
    return f"not proven, gap {gap:.2%}" if gap else ""


def sweep_table(name: str, points: Sequence[tuple[int, Plan | None, str]]) -> Table:
    """The best plan for each number of GPUs."""
    rows: list[tuple[object, ...]] = []
    for number, plan, why in points:
        if plan is None:
            rows.append((f"{number:,}", why, *[None] * 8))
            continue
        time = plan.predictions.time
        rows.append(
            (
                f"{number:,}",
                "; ".join(word for word in (degrees(plan.decisions), unproven(plan)) if word),
                seconds(time.step_seconds),
                between(time.step_seconds_interval),
                percent(time.bubble_fraction),
                percent(time.model_flops_utilization),
                count(time.tokens_per_second),
                gib(plan.predictions.memory.total_bytes),
                None if time.training_days is None else f"{time.training_days:,.1f}",
                None if time.cost is None else f"{time.cost:,.0f}",
            )
        )
    columns = ("GPUs", "best plan", "step", "80 % interval", "bubble", "MFU", "tokens/s", "peak GiB", "days", "cost")
    return table(f"{name}: the best plan for each number of GPUs", columns, rows, left=2)


def sweep_warnings(points: Sequence[tuple[int, Plan | None, str]]) -> list[str]:
    """What is implausible or risky about the plans of a sweep."""
    return [f"{number:,} GPUs: {word}" for number, plan, _ in points if plan for word in warnings(plan.inputs, plan.predictions)]


def stage_table(inputs: Inputs, decisions: Decisions, ranks: Sequence[PipelineRankPrediction]) -> Table:
    """A row per pipeline rank: what is on it and what it needs."""
    rows = []
    for rank in ranks:
        mine = [decisions.stages[index] for index in rank.stages]
        rows.append(
            (
                rank.pipeline_rank,
                "; ".join(_layers(stage, inputs.model) for stage in mine),
                "; ".join(dict.fromkeys(_recompute(stage, inputs.model) for stage in mine)),
                gib(rank.memory.weights_bytes),
                gib(rank.memory.gradients_bytes),
                gib(rank.memory.optimizer_bytes),
                gib(rank.memory.activations_bytes),
                rank.num_in_flight,
                gib(rank.memory.buffers_bytes),
                gib(rank.memory.total_bytes),
                gib(rank.headroom_bytes),
                seconds(rank.forward_seconds),
                seconds(rank.backward_seconds),
            )
        )
    columns = (
        "rank", "layers", "recompute", "weights", "gradients", "optimizer", "activations", "in flight", "buffers", "peak", "headroom",
        "forward", "backward",
    )  # fmt: skip
    return table("Per pipeline rank (GiB; Mi = MiB; times per micro-batch)", columns, rows, left=3)


def wall_view(estimate: Estimate) -> list[RenderableType | str]:
    """The memory wall of a whole model."""
    wall = estimate.wall
    assert wall is not None
    memory = estimate.memory
    title = f"{estimate.model['name']}: {estimate.model['num_parameters']:,} parameters"
    rows = [
        (label, f"{held / 1e9:,.1f}", f"{held / GIB:,.1f}", f"{held / wall.gpu_memory_bytes:,.1f}")
        for label, held in (
            (f"weights ({wall.bytes_per_parameter[0]} B)", memory.weights_bytes),
            (f"gradients ({wall.bytes_per_parameter[1]} B)", memory.gradients_bytes),
            (f"optimizer ({wall.bytes_per_parameter[2]} B)", memory.optimizer_bytes),
            ("together", memory.total_bytes),
        )
    ]
    parts: list[RenderableType | str] = [
        table(title, ("what training keeps", "GB (10^9)", "GiB", f"x {wall.gpu}"), rows),
        f"The states alone fill {wall.num_gpus_for_states:,} x {wall.gpu} ({gib(wall.gpu_memory_bytes)} GiB each).",
        "Activations of one sample: "
        + ", ".join(f"{size(held)} ({level})" for level, held in wall.activations_bytes_per_sample.items())
        + " by level of recomputation.",
        f"FLOPs per token: {wall.forward_flops_per_token:.4g} forward, {wall.training_flops_per_token:.4g} with backward.",
    ]
    if wall.v100_years is not None and wall.training_flops is not None:
        parts.append(
            f"Training on {count(wall.num_tokens)} tokens: {wall.training_flops:.3g} FLOPs = {wall.v100_years:,.1f} years of one V100 at 28 TFLOP/s."
        )
    return parts


def offload_view(estimate: Estimate) -> Table:
    rows = [
        (row.offload_param, row.offload_optimizer, "yes" if row.zero_init else "no", gib(row.gpu_bytes), gib(row.cpu_bytes))
        for row in estimate.zero_offload_rows
    ]
    return table(
        "What DeepSpeed's own estimator says: model states only, no activations (GiB)",
        ("parameters offloaded to", "optimizer offloaded to", "zero.Init", "per GPU", "host per node"),
        rows,
        left=3,
    )


def runners_up_table(plan: Plan) -> Table:
    rows = [
        (degrees(runner.decisions), seconds(runner.step_seconds), between(step_interval(runner.step_seconds)), gib(runner.peak_bytes), runner.why_not)
        for runner in plan.solver.runners_up
    ]
    return table("Runners-up", ("plan", "step", "80 % interval", "peak GiB", "why it lost"), rows, left=1)


def solver_line(solver: SolverReport) -> str:
    """How good the plan is proven to be, in one line."""
    gap = "–" if solver.gap_fraction is None else f"{solver.gap_fraction:.2%}"
    return (
        f"  solver: {solver.name}, {solver.status}; objective {seconds(solver.objective_seconds)}, bound {seconds(solver.bound_seconds)}, gap {gap}; "
        f"{solver.num_candidates:,} candidates, {solver.num_pruned:,} pruned by proof, {solver.wall_seconds:.2f} s"
    )


def timeline_view(timeline: Timeline, width: int = 110) -> str:
    """The timeline drawn in characters: a row per rank, the micro-batch's last digit in each action's place."""
    first, last = window(timeline)
    scale = width / max(last - first, 1e-12)
    lines = ["", "One digit per micro-batch; forward plain, backward underlined by a row of its own (b), weights (w), idle (.)"]
    for rank in timeline.ranks:
        numbers, kinds = ["."] * width, [" "] * width
        for event in timeline.events:
            if event.rank != rank or event.kind not in COMPUTE_KINDS:
                continue
            begin = round((event.start - first) * scale)
            end = max(round((event.end - first) * scale), begin + 1)
            for column in range(begin, min(end, width)):
                numbers[column] = str(event.microbatch % 10)
                kinds[column] = {"F": " ", "B": "b", "I": "b", "W": "w"}[event.kind]
        lines.append(f"{rank:>4} {''.join(numbers)}")
        lines.append(f"     {''.join(kinds)}".rstrip())
    return "\n".join(lines)


def explain_table(terms: Iterable[Term]) -> Table:
    """The terms of the memory model."""
    rows = [(term.name, term.formula, f"{term.size:,.0f}", gib(term.size), term.unit, term.why) for term in terms]
    return table("Every term of the heaviest GPU", ("term", "formula", "bytes", "GiB", "counted per", "why"), rows, left=2)
