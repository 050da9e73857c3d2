"""Tables for people, drawn with rich. Memory in GiB, time in ms or s, and GB (10^9) only where the label says so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from planner.cluster import ClusterSpec
from planner.estimate import Estimate
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
from planner.timeline import Timeline, window

if TYPE_CHECKING:
    from planner.compare import Comparison, Row
    from planner.explain import Term
    from planner.paradigms import Paradigms
    from planner.published import Validation
    from planner.run import DryRun, Run

GIB = 2**30
WIDEST = 220
"""Columns of text beyond which a table's cells are wrapped."""
WORDS = frozenset({"why", "why it lost", "why not", "counted per", "place"})
"""Columns that hold words, which are aligned left and may be wrapped."""


def show(*parts: RenderableType | str, width: int | None = None) -> str:
    """The parts as plain or coloured text for a terminal, one below the other.

    Tables are never squeezed below what they need: a terminal can wrap or scroll, a cut figure is lost.
    """
    console = Console(highlight=False)
    widest = console.options.update(width=WIDEST)
    need = max((Measurement.get(console, widest, part).maximum for part in parts if not isinstance(part, str)), default=0)
    console.width = width or max(console.width, need)
    with console.capture() as capture:
        for part in parts:
            console.print(Text(part) if isinstance(part, str) else part, soft_wrap=isinstance(part, str))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> Table:
    """A plain table; the first `left` columns, and those of words, are aligned left, the others right."""
    out = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        words = index < left or column in WORDS
        out.add_column(Text(column), justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for row in rows:
        out.add_row(*(Text("–" if cell is None else str(cell)) for cell in row))
    return out


def gib(value: float | None) -> str:
    """GiB for a table's cell, or MiB marked by "Mi"."""
    if value is None:
        return "–"
    if value and abs(value) < 0.1 * GIB:
        return f"{value / 2**20:,.2f} Mi"
    return f"{value / GIB:,.2f}"


def size(value: float) -> str:
    """Bytes with their unit, for a sentence."""
    text = gib(value)
    return f"{text}B" if text.endswith(" Mi") else f"{text} GiB"


def seconds(value: float | None) -> str:
    """A time with the unit that reads best."""
    if value is None:
        return "–"
    if value >= 100:
        return f"{value:,.0f} s"
    if value >= 1:
        return f"{value:.2f} s"
    if value >= 1e-3:
        return f"{value * 1e3:.1f} ms"
    return f"{value * 1e6:.0f} µs"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def count(value: float | None) -> str:
    """A count in the short form that papers use."""
    if value is None:
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:,.1f}{unit}"
    return f"{value:,.0f}"


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
        parts.append(f"ZeRO-{decisions.zero_stage}" if decisions.zero_stage else "no ZeRO")
    if decisions.sequence_parallel:
        parts.append("sequence parallel")
    return ", ".join(parts)


def verdict(inputs: Inputs, decisions: Decisions, memory: Memory, time: Time, fits: bool | None, ranks: Sequence[PipelineRankPrediction]) -> str:
    """The answer first: does it fit, where is it tight, how fast is it."""
    capacity = inputs.cluster.gpu.memory_bytes
    worst = max(ranks, key=lambda rank: rank.memory.total_bytes)
    where = f"pipeline rank {worst.pipeline_rank}" if len(ranks) > 1 else "every GPU"
    answer = "FITS" if fits else "DOES NOT FIT"
    headroom = worst.headroom_bytes or 0
    room = f"{size(headroom)} to spare" if headroom >= 0 else f"{size(-headroom)} too much"
    lines = [
        f"{answer}: {inputs.model.name} on {inputs.cluster.num_gpus:,} x {inputs.cluster.gpu.name} ({degrees(decisions)})",
        f"  memory: {size(memory.total_bytes)} at its peak on {where}, of {size(capacity)} ({room})",
    ]
    low_high = ""
    if time.step_seconds_interval:
        low_high = f" (80 % interval {seconds(time.step_seconds_interval[0])} to {seconds(time.step_seconds_interval[1])})"
    lines.append(
        f"  step: {seconds(time.step_seconds)}{low_high}, bubble {percent(time.bubble_fraction)}, "
        f"MFU {percent(time.model_flops_utilization)}, {count(time.tokens_per_second)} tokens/s"
    )
    lines.append(training_line(time))
    return "\n".join(line for line in lines if line)


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


def sweep_table(name: str, points: Sequence[tuple[int, Plan | None, str]]) -> Table:
    """The best plan for each number of GPUs."""
    rows: list[tuple[object, ...]] = []
    for number, plan, why in points:
        if plan is None:
            rows.append((f"{number:,}", why, None, None, None, None, None, None, None))
            continue
        time = plan.predictions.time
        rows.append(
            (
                f"{number:,}",
                degrees(plan.decisions),
                seconds(time.step_seconds),
                percent(time.bubble_fraction),
                percent(time.model_flops_utilization),
                count(time.tokens_per_second),
                gib(plan.predictions.memory.total_bytes),
                None if time.training_days is None else f"{time.training_days:,.1f}",
                None if time.cost is None else f"{time.cost:,.0f}",
            )
        )
    columns = ("GPUs", "best plan", "step", "bubble", "MFU", "tokens/s", "peak GiB", "days", "cost")
    return table(f"{name}: the best plan for each number of GPUs", columns, rows, left=2)


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


def notes(title: str, lines: Iterable[str]) -> str:
    lines = list(lines)
    return "\n".join([f"{title}:", *(f"  - {line}" for line in lines)]) if lines else ""


def runners_up_table(plan: Plan) -> Table:
    rows = [
        (degrees(runner.decisions), seconds(runner.step_seconds), gib(runner.peak_bytes), runner.why_not) for runner in plan.solver.runners_up
    ]
    return table("Runners-up", ("plan", "step", "peak GiB", "why it lost"), rows, left=1)


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


def dry_run_table(plan: Plan, document: DryRun) -> Table:
    """Traced peaks beside the predictions."""
    rows = []
    for traced in document.pipeline_ranks:
        predicted = plan.predictions.pipeline_ranks[traced.pipeline_rank].memory if plan.predictions.pipeline_ranks else None
        memory = traced.memory
        error = predicted.total_bytes / memory.total_bytes - 1 if predicted and memory.total_bytes else None
        rows.append(
            (
                traced.pipeline_rank,
                traced.rank,
                gib(memory.weights_bytes),
                gib(memory.gradients_bytes),
                gib(memory.optimizer_bytes),
                gib(memory.activations_bytes),
                gib(memory.buffers_bytes),
                gib(memory.total_bytes),
                gib(predicted.total_bytes) if predicted else None,
                percent(error),
                seconds(traced.wall_seconds),
            )
        )
    columns = (
        "pipeline rank", "rank", "weights", "gradients", "optimizer", "activations", "buffers", "peak", "predicted peak", "prediction's error", "took",
    )  # fmt: skip
    return table("Dry run: the traced peak of one rank of each stage (GiB; Mi = MiB)", columns, rows)


def paradigms_view(document: Paradigms) -> list[RenderableType | str]:
    """The paradigms side by side; measured figures beside the predicted ones where there are any."""
    ran = any(paradigm.measured_step_seconds is not None for paradigm in document.paradigms)

    def pair(predicted: str, measured: str) -> str:
        return f"{predicted} / {measured}" if ran else predicted

    rows: list[tuple[object, ...]] = []
    missing = []
    for paradigm in document.paradigms:
        if paradigm.decisions is None:
            missing.append(f"{paradigm.name}: {paradigm.why_not}")
            continue
        sent = [
            pair(gib(paradigm.communication_bytes[axis]), gib(paradigm.measured_communication_bytes.get(axis)))
            if paradigm.communication_bytes[axis] or paradigm.measured_communication_bytes.get(axis)
            else None
            for axis in ("tp", "dp", "pp")
        ]
        d = paradigm.decisions
        rows.append(
            (
                paradigm.name,
                paradigm.what_is_split,
                paradigm.what_is_sent,
                f"{d.tensor_parallel} x {d.pipeline_parallel} x {d.data_parallel}",
                *sent,
                pair(gib(paradigm.peak_bytes), gib(paradigm.measured_peak_bytes)),
                pair(percent(paradigm.bubble_fraction), percent(paradigm.measured_bubble_fraction)),
                pair(seconds(paradigm.step_seconds), seconds(paradigm.measured_step_seconds)),
                "yes" if paradigm.fits else "no",
            )
        )
    title = f"{document.model} on {document.world_size} ranks, {document.global_batch_size} samples of {document.sequence_length} tokens a step"
    title += " (predicted / measured)" if ran else " (predicted)"
    columns = ("paradigm", "splits", "sends", "TP x PP x DP", "TP GiB", "DP GiB", "PP GiB", "peak GiB", "bubble", "step", "fits")
    parts: list[RenderableType | str] = [table(title, columns, rows, left=3)]
    parts.append("GiB sent: per step by the rank that sends most along that axis, ring algorithms (Mi = MiB).")
    if missing:
        parts.append(notes("Not possible here", missing))
    return parts


def explain_table(terms: Iterable[Term]) -> Table:
    """The terms of the memory model."""
    rows = [(term.name, term.formula, f"{term.size:,.0f}", gib(term.size), term.unit, term.why) for term in terms]
    return table("Every term of the heaviest GPU", ("term", "formula", "bytes", "GiB", "counted per", "why"), rows, left=2)


def _quantity(name: str, value: float | None) -> str:
    """A value in the unit that its quantity's name says."""
    if value is None:
        return "–"
    if name.endswith("_bytes"):
        return gib(value)
    if name.endswith("_seconds") and not name.startswith("tokens"):
        return seconds(value)
    if name.endswith("_fraction"):
        return percent(value)
    return count(value)


_SHORT = {
    "weights_bytes": "weights", "gradients_bytes": "gradients", "optimizer_bytes": "optimizer", "activations_bytes": "activations",
    "buffers_bytes": "buffers", "total_bytes": "peak", "bubble_fraction": "bubble", "busy_seconds": "busy", "step_seconds": "step",
    "peak_bytes": "peak of the heaviest rank", "tokens_per_second": "tokens/s",
}  # fmt: skip


def _error(row: Row) -> str:
    """An error in percent, or in points where the quantity is itself a fraction."""
    if row.quantity == "bubble_fraction" and row.predicted is not None and row.measured is not None:
        return f"{(row.predicted - row.measured) * 100:+.1f} points"
    return "–" if row.error_fraction is None else f"{row.error_fraction:+.1%}"


def comparison_view(document: Comparison, run: Run) -> list[RenderableType | str]:
    """Predicted, dry run and measured: the whole run first, then a row per rank, then the categories of the heaviest rank."""
    label = "rehearsed (compute replaced by its predicted time)" if document.rehearsed else "measured"
    whole = [
        (_SHORT.get(row.quantity, row.quantity), _quantity(row.quantity, row.predicted), _quantity(row.quantity, row.dry_run),
         _quantity(row.quantity, row.measured), _error(row))
        for row in document.rows if row.rank is None
    ]  # fmt: skip
    columns = ("quantity", "predicted", "dry run", label, "prediction's error")
    parts: list[RenderableType | str] = [table("The whole run (memory in GiB; Mi = MiB)", columns, whole)]
    by_rank: dict[int, dict[str, Row]] = {}
    for row in document.rows:
        if row.rank is not None:
            by_rank.setdefault(row.rank, {})[row.quantity] = row
    rows = []
    for rank in run.ranks:
        found = by_rank.get(rank.rank, {})
        place = f"pp {rank.coordinates.pp}, dp {rank.coordinates.dp}, tp {rank.coordinates.tp}"
        cells: list[object] = [rank.rank, place]
        for name in ("total_bytes", "bubble_fraction"):
            row = next((item for key, item in found.items() if key.endswith(name)), None)
            if row is None:
                cells += [None] * 4
                continue
            cells += [_quantity(name, row.predicted), _quantity(name, row.dry_run), _quantity(name, row.measured), _error(row)]
        rows.append(cells)
    columns = ("rank", "place", "peak predicted", "dry run", "measured", "error", "bubble predicted", "dry run", "measured", "error")
    keep = [index for index in range(len(columns)) if index != 7]
    parts.append(table("Each rank", [columns[i] for i in keep], [[cells[i] for i in keep] for cells in rows], left=2))
    heaviest = max(run.ranks, key=lambda rank: rank.memory.total_bytes)
    categories = [
        (_SHORT.get(name.removeprefix("memory."), name), _quantity(name, row.predicted), _quantity(name, row.dry_run),
         _quantity(name, row.measured), _error(row))
        for name, row in by_rank.get(heaviest.rank, {}).items() if name.endswith("_bytes")
    ]  # fmt: skip
    parts.append(table(f"Memory of rank {heaviest.rank}, the heaviest (GiB; Mi = MiB)", ("category", "predicted", "dry run", label, "error"), categories))
    return parts


def outside_words(document: Comparison, rows: Iterable[Row]) -> list[str]:
    """The quantities that are outside the tolerance, in words."""
    found = []
    for row in rows:
        where = "" if row.rank is None else f" of rank {row.rank}"
        found.append(f"{_SHORT.get(row.quantity, row.quantity)}{where} {_error(row)}")
    return found[:6] + ([f"and {len(found) - 6} more"] if len(found) > 6 else [])


def validation_view(document: Validation) -> list[RenderableType | str]:
    """Errors by group, untouched groups and calibrated ones apart."""
    parts: list[RenderableType | str] = []
    columns = ("group", "rows", "step time, mean |error|", "mean error", "worst", "in 80 % interval", "rank correlation", "memory, mean |error|")
    for calibrated, title in ((False, "Groups that no constant was fitted to"), (True, "Groups that constants were fitted to")):
        rows = []
        for group in document.groups:
            if group.calibrated != calibrated or (group.step_time_mean_abs_error is None and group.memory_mean_abs_error is None):
                continue
            signed = "–" if group.step_time_mean_error is None else f"{group.step_time_mean_error:+.1%}"
            worst = "–" if group.step_time_worst_error is None else f"{group.step_time_worst_error:+.1%}"
            correlation = "–" if group.rank_correlation is None else f"{group.rank_correlation:.2f}"
            rows.append(
                (group.group, group.num_rows, percent(group.step_time_mean_abs_error), signed, worst, percent(group.interval_coverage),
                 correlation, percent(group.memory_mean_abs_error))
            )  # fmt: skip
        if rows:
            means = document.summary.calibrated if calibrated else document.summary.untouched
            signed = "–" if means.step_time_mean_error is None else f"{means.step_time_mean_error:+.1%}"
            rows.append(
                ("mean over these groups", means.num_rows, percent(means.step_time_mean_abs_error), signed, "–", percent(means.interval_coverage),
                 "–", percent(means.memory_mean_abs_error))
            )  # fmt: skip
            parts.append(table(title, columns, rows))
    silent = sum(1 for row in document.rows if row.why_not)
    parts.append(
        f"{document.summary.num_rows:,} rows in {document.summary.num_groups} groups; {silent:,} have no prediction, each with its reason in --json. "
        "Means are over groups of the means within a group."
    )
    if document.rows and len(document.rows) <= 40:
        rows = [
            (row.id, seconds(row.predicted.step_seconds), seconds(row.measured.step_seconds),
             "–" if row.step_time_error_fraction is None else f"{row.step_time_error_fraction:+.1%}",
             gib(row.predicted.peak_bytes), gib(row.measured.peak_bytes), row.why_not or "")
            for row in document.rows
        ]  # fmt: skip
        parts.append(table("Rows", ("row", "step predicted", "measured", "error", "peak GiB predicted", "measured", "why not"), rows))
    return parts
