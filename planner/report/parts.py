"""The sections of a plan's page. Each function returns one, or None where there is nothing to show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from planner.accuracy import step_interval
from planner.chain_plan import ChainPlan, recomputed
from planner.cluster import in_precision
from planner.compare import Comparison, Row
from planner.either import AnyPlan
from planner.estimate import capacity_bytes, capacity_words, fits, warnings
from planner.plan import Decisions, Plan, Stage, has_embedding, has_head, recompute_counts, stage_blocks
from planner.report import figures
from planner.report.figures import Lane, MemoryBar
from planner.report.page import Section, bullets, paragraphs, table
from planner.report.text import MISSING, percent, show_bytes, show_count, show_seconds, signed_percent
from planner.run import DryRun, Run, RunRank, Summary
from planner.timeline import Timeline, bubble_fraction, window

MEASURED_WORDS = {"measured": "measured", "rehearsed": "rehearsed (computation replaced by its predicted time)"}
MAX_RANKS = 16
"""Ranks listed in the comparison table at most."""


def degrees(decisions: Decisions) -> str:
    words = [
        f"tensor {decisions.tensor_parallel}{' + sequence' if decisions.sequence_parallel else ''}",
        f"pipeline {decisions.pipeline_parallel}",
        f"data {decisions.data_parallel}",
    ]
    replicas = decisions.data_parallel_replicate
    over = f" over {decisions.data_parallel // replicas} ranks × {replicas} replicas" if replicas > 1 else ""
    return " × ".join(words) + (f", ZeRO-{decisions.zero_stage}{over}" if decisions.zero_stage else "")


def subtitle(plan: AnyPlan) -> str:
    decisions, training = plan.decisions, plan.inputs.training
    schedule = f"{decisions.schedule}{f' with {decisions.num_virtual_stages} stages a rank' if decisions.num_virtual_stages > 1 else ''}"
    return (
        f"{degrees(decisions)}; {schedule}; global batch {training.global_batch_size} = {decisions.data_parallel} × {decisions.micro_batch_size} ×"
        f" {decisions.num_microbatches} micro-batches{'' if samples_alone(plan) else f' of {training.sequence_length} tokens'}; {training.precision}"
    )


def samples_alone(plan: AnyPlan) -> bool:
    """Whether a sample has no tokens to count: an image."""
    return isinstance(plan, ChainPlan) and plan.inputs.training.sequence_length == 1


def interval_of(plan: AnyPlan, seconds: float | None) -> tuple[float, float] | None:
    """The interval of a predicted step; none for traced modules, since errors were measured for transformers only."""
    return None if isinstance(plan, ChainPlan) else step_interval(seconds)


def _throughput(plan: AnyPlan, measured: Summary | None, verb: str) -> tuple[str, str, str]:
    time, batch = plan.predictions.time, plan.inputs.training.global_batch_size
    if samples_alone(plan):
        predicted = batch / time.step_seconds if time.step_seconds else None
        return "Samples per second", show_count(predicted), f"{verb} {show_count(batch / measured.step_seconds)}" if measured else ""
    duration = _duration(time.training_days, time.gpu_years)
    return (
        "Tokens per second", show_count(time.tokens_per_second), f"{verb} {show_count(measured.tokens_per_second)}" if measured else duration
    )  # fmt: skip


def show_interval(interval: tuple[float, float] | None) -> str:
    """The interval of a predicted time for a table's cell."""
    return f"{show_seconds(interval[0])} to {show_seconds(interval[1])}" if interval else MISSING


def headline(plan: AnyPlan, run: Run | None) -> list[tuple[str, str, str]]:
    """The tiles: (name, predicted value, what was measured or what else there is to say)."""
    time, memory = plan.predictions.time, plan.predictions.memory
    capacity = capacity_bytes(plan.inputs)
    measured = run.summary if run is not None else None
    verb = "rehearsed" if run is not None and run.rehearsed else "measured"
    interval = time.step_seconds_interval
    spread = f"between {show_seconds(interval[0])} and {show_seconds(interval[1])}" if interval else ""
    return [
        ("GPUs", f"{plan.decisions.world_size:,}", degrees(plan.decisions)),
        (
            "Heaviest GPU",
            show_bytes(memory.total_bytes),
            f"{verb} {show_bytes(measured.peak_bytes)}" if run is not None and measured and not run.rehearsed else f"of {show_bytes(capacity)}",
        ),
        ("Step time", show_seconds(time.step_seconds), f"{verb} {show_seconds(measured.step_seconds)}" if measured else spread),
        ("Bubble", percent(time.bubble_fraction), f"{verb} {percent(measured.bubble_fraction)}" if measured else "of the pipeline phase"),
        ("MFU", percent(time.model_flops_utilization), "of the GPU's peak"),
        _throughput(plan, measured, verb),
    ]


def _duration(days: float | None, years: float | None) -> str:
    return "" if days is None else f"{days:,.0f} days of training" + (f", {years:,.0f} GPU-years" if years else "")


def verdict(plan: AnyPlan, run: Run | None) -> Section:
    predictions, capacity = plan.predictions, capacity_bytes(plan.inputs)
    heaviest = max(predictions.pipeline_ranks, key=lambda rank: rank.memory.total_bytes, default=None)
    need = predictions.memory.total_bytes
    if fits(predictions):
        share = (capacity - need) / capacity if capacity else 0.0
        texts = [
            f"It fits: the heaviest GPU{f', on pipeline rank {heaviest.pipeline_rank},' if heaviest else ''} needs {show_bytes(need)} of"
            f" {capacity_words(plan.inputs, show_bytes)}; {'over 99%' if share > 0.99 else f'{share:.0%}'} is free."
        ]
    else:
        over, usable = show_bytes(need - capacity), capacity_words(plan.inputs, show_bytes)
        texts = [f"It does not fit: the heaviest GPU needs {show_bytes(need)}, {over} more than the {usable}."]
    time = predictions.time
    if time.step_seconds is not None:
        texts.append(
            f"A step is predicted to take {show_seconds(time.step_seconds)}, with the GPUs idle for {percent(time.bubble_fraction)} of the pipeline"
            f" phase and {percent(time.model_flops_utilization)} of their peak used for the model's own FLOPs (MFU)."
        )
    if run is not None:
        verb = "was rehearsed, with computation replaced by its predicted time," if run.rehearsed else "was run"
        ranks, measured = len(run.ranks), run.summary
        memory = "" if run.rehearsed else f", a heaviest rank of {show_bytes(measured.peak_bytes)}"
        texts.append(
            f"It {verb} on {ranks} ranks for {len(run.steps)} steps: {show_seconds(measured.step_seconds)} a step,"
            f" a bubble of {percent(measured.bubble_fraction)}{memory}."
        )
    texts += [f"{warning[0].upper()}{warning[1:]}." for warning in warnings(plan.inputs, predictions)]
    kind = "verdict bad" if not fits(predictions) else "verdict note" if run is not None and run.rehearsed else "verdict"
    return Section("", body=paragraphs(texts), kind=kind)


def memory(plan: AnyPlan, run: Run | None, dry_run: DryRun | None) -> Section:
    """Memory by pipeline rank: predicted, the dry run's, and the heaviest measured rank's."""
    bars = [MemoryBar(f"rank {rank.pipeline_rank}", "predicted", rank.memory) for rank in plan.predictions.pipeline_ranks]
    sources = ["predicted (plain)"]
    if dry_run is not None:
        bars += [MemoryBar(f"rank {rank.pipeline_rank}", "dry run", rank.memory) for rank in dry_run.pipeline_ranks]
        sources.append("dry run (dotted)")
    if run is not None and not run.rehearsed:
        bars += [MemoryBar(f"rank {place}", "measured", rank.memory) for place, rank in _heaviest(run).items()]
        sources.append("measured (hatched)")
    capacity = capacity_bytes(plan.inputs)
    caption = f"Peak of each pipeline rank by category: {', '.join(sources)}. A GPU may use {show_bytes(capacity)}."
    if len(sources) > 1 and sources[-1].startswith("measured"):
        caption += " The measured bar is the heaviest of the ranks that hold the same stages."
    return Section("Memory", caption=caption, charts=(figures.memory_figure(bars, capacity),))


def _heaviest(run: Run) -> dict[int, RunRank]:
    found: dict[int, RunRank] = {}
    for rank in run.ranks:
        place = rank.coordinates.pp
        if place not in found or rank.memory.total_bytes > found[place].memory.total_bytes:
            found[place] = rank
    return dict(sorted(found.items()))


def pipeline(plan: AnyPlan, run: Run | None, simulated: Timeline | None, measured: Timeline | None) -> Section | None:
    """The schedule as a Gantt chart: predicted above measured on one axis."""
    lanes = []
    if simulated is not None and simulated.events:
        labels = {rank: f"rank {rank}" for rank in simulated.ranks}
        lanes.append(Lane(f"predicted (bubble {percent(bubble_fraction(simulated))})", simulated, labels))
    if measured is not None and measured.events:
        chosen = _one_replica(run, measured)
        shown = Timeline(source=measured.source, events=tuple(event for event in measured.events if event.rank in chosen))
        words = MEASURED_WORDS.get(measured.source, measured.source)
        lanes.append(Lane(f"{words}, last step (bubble {percent(bubble_fraction(shown))})", _from_zero(shown), chosen))
    if not lanes:
        return None
    figure, complete = figures.gantt_figure(lanes)
    caption = "One step, one row a pipeline rank; a number is the micro-batch. White is waiting: for a message, or for the fill and drain."
    if len(lanes) == 2 and plan.decisions.tensor_parallel * plan.decisions.data_parallel > 1:
        caption += " Measured: the first of the ranks that hold the same stages."
    if not complete:
        caption += " Some of the ranks are shown; `plan simulate --trace` writes all of them."
    return Section("Pipeline", caption=caption, charts=(figure,))


def _one_replica(run: Run | None, measured: Timeline) -> dict[int, str]:
    """The first global rank of each pipeline rank, with its label."""
    if run is None:
        return {rank: f"rank {rank}" for rank in measured.ranks}
    present, chosen = set(measured.ranks), dict[int, RunRank]()
    for rank in sorted(run.ranks, key=lambda item: (item.coordinates.pp, item.coordinates.dp, item.coordinates.tp)):
        if rank.rank in present:
            chosen.setdefault(rank.coordinates.pp, rank)
    alone = len(run.ranks) == len(chosen)
    return {rank.rank: f"rank {place}{'' if alone else f' (#{rank.rank})'}" for place, rank in chosen.items()}


def _from_zero(timeline: Timeline) -> Timeline:
    """The timeline with its first forward pass at time 0."""
    first, _ = window(timeline)
    events = tuple(event._replace(start=event.start - first, end=event.end - first) for event in timeline.events)
    return Timeline(source=timeline.source, events=events)


def step_time(plan: AnyPlan) -> Section | None:
    breakdown = {name: value for name, value in plan.predictions.time.breakdown_seconds.items() if value > 0}
    if not breakdown:
        return None
    return Section("What a step is made of", caption="Predicted, on the slowest rank.", charts=(figures.breakdown_figure(breakdown),))


def training(plan: AnyPlan, run: Run | None) -> list[Section]:
    if run is None or not run.steps:
        return []
    steps, time = run.steps, plan.predictions.time
    numbers = [step.step + 1 for step in steps]  # counted from 1, as the terminal does
    source = "rehearsed" if run.rehearsed else "measured"
    seconds = figures.step_seconds_figure(numbers, [step.seconds for step in steps], time.step_seconds, time.step_seconds_interval, source)
    interval = "The band is the prediction's interval." if time.step_seconds_interval else ""
    out = [Section("Step time", caption=interval, charts=(seconds,), kind="half")]
    if not run.rehearsed:
        loss = figures.loss_figure(numbers, [step.loss for step in steps])
        out.insert(0, Section("Loss", caption="Of the global batch, before each update.", charts=(loss,), kind="half"))
    return out


_QUANTITIES = {
    "step_seconds": "step time",
    "tokens_per_second": "tokens per second",
    "bubble_fraction": "bubble",
    "peak_bytes": "heaviest rank",
    "total_bytes": "total memory",
}
"""The quantities shown, in words; the comparison document has more."""


def comparison(document: Comparison | None) -> list[Section]:
    """Predicted beside measured: the whole run and the totals of each rank, and which constant is off."""
    if document is None:
        return []
    whole = [row for row in document.rows if row.rank is None]
    ranks = sorted({row.rank for row in document.rows if row.rank is not None})
    shown = set(ranks[:MAX_RANKS])
    kept = [row for row in document.rows if row.rank in shown and row.quantity in ("total_bytes", "bubble_fraction")]
    kept.sort(key=lambda row: (row.quantity != "total_bytes", row.rank or 0))
    has_dry_run = any(row.dry_run is not None for row in document.rows)
    columns = ["", "rank", "predicted", *(["dry run"] if has_dry_run else []), "rehearsed" if document.rehearsed else "measured", "error"]
    body = []
    for row in (*whole, *kept):
        values = [_shown(row.quantity, value) for value in (row.predicted, row.dry_run, row.measured)]
        if not has_dry_run:
            del values[1]
        name = _QUANTITIES.get(row.quantity, row.quantity)
        body.append([name, "all" if row.rank is None else row.rank, *values, _error(row)])
    caption = "Error = (predicted − measured) / measured; for a bubble the difference in percentage points."
    if len(ranks) > MAX_RANKS:
        caption += f" The first {MAX_RANKS} of {len(ranks)} ranks; `plan compare` has all."
    out = []
    if document.causes:
        out.append(
            Section(
                "Where the difference lies",
                caption="Each predicted constant beside its measurement, by how much it moves the predicted step.",
                body=bullets(cause.words[0].upper() + cause.words[1:] for cause in document.causes),
            )
        )
    return [*out, Section("Predicted and measured", caption=caption, body=table(columns, body))]


def _error(row: Row) -> str:
    """The error as a share, or for a bubble, itself a share, in percentage points."""
    if row.quantity == "bubble_fraction" and row.predicted is not None and row.measured is not None:
        return f"{100 * (row.predicted - row.measured):+.1f} points"
    return signed_percent(row.error_fraction)


def _shown(quantity: str, value: float | None) -> str:
    if value is None:
        return MISSING
    if quantity.endswith("_bytes"):
        return show_bytes(value)
    if quantity.endswith("_fraction"):
        return percent(value)
    return show_seconds(value) if quantity.endswith("_seconds") else show_count(value)


def _stage_words(plan: AnyPlan, stage: Stage) -> tuple[str, str]:
    """A stage's layers, and how many of them are recomputed."""
    if isinstance(plan, ChainPlan):
        first, last = stage.first_layer, stage.first_layer + stage.num_layers - 1
        names = [plan.inputs.model.layers[index].name for index in (first, last)]
        again = len(recomputed(stage))
        words = ", ".join(f"{name} {count}" for name, count in (("full", again), ("none", stage.num_layers - again)) if count)
        return f"{first}: {names[0]}" if first == last else f"{first}–{last}: {names[0]} to {names[1]}", words
    return _block_words(plan, stage)


def _block_words(plan: Plan, stage: Stage) -> tuple[str, str]:
    blocks = stage_blocks(stage, plan.inputs.model)
    layers = [
        *(["embedding"] if has_embedding(stage) else []),
        *([f"blocks {blocks[0]}–{blocks[-1]}" if len(blocks) > 1 else f"block {blocks[0]}"] if blocks else []),
        *(["head"] if has_head(stage, plan.inputs.model) else []),
    ]
    counts = recompute_counts(stage, len(blocks))
    level = ", ".join(
        f"{name} {count}" for name, count in (("full", counts.full), ("selective", counts.selective), ("none", counts.none)) if count
    )
    return " + ".join(layers), level


def stages(plan: AnyPlan) -> Section:
    """Every stage with its layers and what is predicted for its rank."""
    ranks = {rank.pipeline_rank: rank for rank in plan.predictions.pipeline_ranks}
    rows = []
    for index, stage in enumerate(plan.decisions.stages):
        layers, level = _stage_words(plan, stage)
        rank = ranks.get(stage.pipeline_rank)
        rows.append(
            (
                index,
                stage.pipeline_rank,
                layers,
                stage.num_layers,
                level or MISSING,
                rank.num_in_flight if rank else None,
                show_bytes(rank.memory.total_bytes) if rank else None,
                show_bytes(rank.headroom_bytes) if rank and rank.headroom_bytes is not None else None,
            )
        )
    unit = "layers" if isinstance(plan, ChainPlan) else "blocks"
    columns = ("stage", "rank", "layers", "count", f"recompute ({unit})", "in flight", "peak of its rank", "headroom")
    return Section("Stages", caption="Peak, micro-batches in flight and headroom are of the pipeline rank.", body=table(columns, rows, left=(2, 4)))


def runners_up(plan: AnyPlan) -> Section | None:
    """The plans that lost, and why."""
    solver = plan.solver
    if not solver.runners_up and not solver.reasons:
        return None
    chosen = plan.predictions
    rows: list[Sequence[object]] = [_candidate(plan, plan.decisions, chosen.time.step_seconds, chosen.memory.total_bytes, "chosen")]
    rows += [_candidate(plan, other.decisions, other.step_seconds, other.peak_bytes, other.why_not) for other in solver.runners_up]
    columns = ("degrees", "micro-batch", "schedule", "recompute", "step", "80 % interval", "heaviest GPU", "why not")
    gap = "" if solver.gap_fraction is None else f", proven within {solver.gap_fraction:.2%} of the best"
    caption = (
        f"{solver.name}: {solver.status}{gap}; {solver.num_candidates:,} candidates, {solver.num_pruned:,} ruled out by bounds,"
        f" {solver.wall_seconds:.1f} s."
    )
    reasons = bullets(solver.reasons) if solver.reasons else ""
    return Section("Why this plan, and why not the others", caption=caption, body=reasons + table(columns, rows, left=(0, 2, 3, 7)))


def _candidate(
    plan: AnyPlan, decisions: Decisions, step_seconds: float | None, peak_bytes: float | None, why_not: str
) -> Sequence[object]:  # fmt: skip
    levels = {stage.recompute if isinstance(stage.recompute, str) else "by block" for stage in decisions.stages}
    schedule = f"{decisions.schedule}{f' × {decisions.num_virtual_stages}' if decisions.num_virtual_stages > 1 else ''}"
    return (
        degrees(decisions),
        f"{decisions.micro_batch_size} × {decisions.num_microbatches}",
        schedule,
        levels.pop() if len(levels) == 1 else "by stage" if levels else MISSING,
        show_seconds(step_seconds),
        show_interval(interval_of(plan, step_seconds)),
        show_bytes(peak_bytes),
        why_not,
    )


def assumptions(plan: AnyPlan, run: Run | None, notes: Iterable[str]) -> Section:
    """What the predictions stand on."""
    cluster, training = plan.inputs.cluster, plan.inputs.training
    precision = training.precision
    efficiency = in_precision(cluster, precision).efficiency
    peak = cluster.gpu.peak_flops_per_second.get("fp32" if precision == "fp32" else "bf16")
    texts = [
        f"Hardware: {cluster.name}, {cluster.num_gpus} GPUs in nodes of {cluster.gpus_per_node}; {cluster.gpu.name} with"
        f" {show_bytes(cluster.gpu.memory_bytes)}, of which {show_bytes(cluster.gpu.reserved_bytes)} are the runtime's"
        + (f"; peak {peak / 1e12:,.1f} TFLOP/s." if peak else "."),
        f"Reached of the peaks: {efficiency.matmul:.0%} of FLOP/s by large matrix products, {efficiency.memory:.0%} of memory bandwidth,"
        f" {efficiency.collective:.0%} of link bandwidth by collectives.",
        f"Links, one direction: {cluster.intra_node.bandwidth_bytes_per_second / 1e9:,.1f} GB/s inside a node,"
        f" {cluster.inter_node.bandwidth_bytes_per_second / 1e9:,.1f} GB/s per GPU between nodes (GB = 10^9 bytes).",
        f"Training: {precision}, {training.optimizer}; costs of the {training.profile} implementation; a plan may use"
        f" {training.memory_fraction:.0%} of a GPU's memory.",
        "The bubble is a rank's idle time over the pipeline phase, first forward pass to last backward pass; waiting for a message is idle.",
    ]
    if run is not None:
        texts.append("Run on: " + ", ".join(f"{name} {value}" for name, value in run.environment.items()) + ".")
    return Section("Assumptions", body=bullets([*texts, *notes]))
