"""Reports: one self-contained HTML page each, drawn with plotly, that needs no network.

`report` is a plan's page, with its dry run and run where there are any. The others lay many plans side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.accuracy import step_interval
from planner.compare import check_same_plan, compare
from planner.either import AnyPlan
from planner.paradigms import Paradigm, Paradigms
from planner.plan import plan_hash
from planner.published import Validation, ValidationRow
from planner.report import figures, parts
from planner.report.figures import ParadigmBar, Point, SweepPoint
from planner.report.page import Section, bullets, page, table, tiles
from planner.report.text import percent, show_bytes, show_seconds, signed_percent
from planner.run import DryRun, Run
from planner.timeline import Timeline

__all__ = ["SweepPoint", "paradigms_report", "report", "sweep_report", "validation_report"]


def report(
    plan: AnyPlan,
    run: Run | None = None,
    dry_run: DryRun | None = None,
    *,
    simulated: Timeline | None = None,
    measured: Timeline | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The page of a plan as HTML text: verdict, memory, pipeline, times, losses, comparison, runners-up, assumptions.

    `simulated` is `planner.either.predict_timeline`'s and `measured` is `planner.run.load_actions`', of global ranks.
    Raises InputError when the run or the dry run is not of this plan.
    """
    check_same_plan(plan, run, dry_run)
    comparison = compare(plan, run, dry_run, actions=measured) if run is not None else None
    sections = [
        parts.verdict(plan, run),
        parts.memory(plan, run, dry_run),
        parts.pipeline(plan, run, simulated, measured),
        parts.step_time(plan),
        *parts.training(plan, run),
        *parts.comparison(comparison),
        parts.stages(plan),
        parts.runners_up(plan),
        parts.assumptions(plan, run, notes),
    ]
    return page(
        title=f"{plan.inputs.model.name} on {plan.inputs.cluster.num_gpus} × {plan.inputs.cluster.gpu.name}",
        subtitle=parts.subtitle(plan),
        after_title=tiles(parts.headline(plan, run)),
        sections=[section for section in sections if section is not None],
        footer=f"Meshwright. Plan {plan_hash(plan)[:16]}. GiB = 2^30 bytes; MFU counts model FLOPs only, without recomputation.",
    )


def paradigms_report(document: Paradigms) -> str:
    """The page that lays the ways of splitting training side by side."""
    bars = [
        ParadigmBar(
            name=row.name,
            sent_bytes=(_sum(row.communication_bytes), _sum(row.measured_communication_bytes)),
            peak_bytes=(row.peak_bytes, row.measured_peak_bytes),
            bubble_fraction=(row.bubble_fraction, row.measured_bubble_fraction),
            step_seconds=(row.step_seconds, row.measured_step_seconds),
        )
        for row in document.paradigms
        if row.decisions is not None
    ]
    measured = any(row.measured_step_seconds is not None for row in document.paradigms)
    figure = Section(
        "What each way sends, holds, wastes and takes",
        charts=(figures.paradigms_figure(bars),),
        caption=f"Predicted{' (blue) and measured (orange)' if measured else ''}, on the rank that sends or holds most.",
    )
    return page(
        title=f"Ways of splitting {document.model} over {document.world_size} ranks",
        subtitle=f"Global batch {document.global_batch_size}, sequence length {document.sequence_length}",
        sections=[figure, Section("In figures", body=_paradigms_table(document.paradigms, measured))],
        footer="Meshwright. GiB = 2^30 bytes.",
    )


def _sum(by_axis: dict[str, float] | dict[str, int]) -> float | None:
    return float(sum(by_axis.values())) if by_axis else None


def _paradigms_table(rows: Sequence[Paradigm], measured: bool) -> str:
    columns = ["", "what is split; what is sent", "tp × pp × dp", "sent", "memory", "bubble", "step"]
    columns += ["measured: sent", "memory", "bubble", "step"] if measured else []
    body = []
    for row in rows:
        decided = row.decisions
        degrees = f"{decided.tensor_parallel} × {decided.pipeline_parallel} × {decided.data_parallel}" if decided else None
        values: list[object] = [
            show_bytes(_sum(row.communication_bytes)),
            f"{show_bytes(row.peak_bytes)}{' (does not fit)' if row.fits is False else ''}",
            percent(row.bubble_fraction),
            show_seconds(row.step_seconds),
        ]
        if measured:
            values += [
                show_bytes(_sum(row.measured_communication_bytes)),
                show_bytes(row.measured_peak_bytes),
                percent(row.measured_bubble_fraction),
                show_seconds(row.measured_step_seconds),
            ]
        words = f"not possible: {row.why_not}" if row.why_not else f"{row.what_is_split}. Sent: {row.what_is_sent}"
        body.append((row.name, words, degrees, *values))
    return table(columns, body, left=(0, 1))


def validation_report(document: Validation) -> str:
    """The page of predictions against measurements: scatters by group, the errors of each group, and every row."""
    predicted = [row for row in document.rows if row.why_not is None]
    step = [
        Point(row.group, row.id, row.predicted.step_seconds, row.measured.step_seconds, row.complete)
        for row in predicted
        if row.predicted.step_seconds and row.measured.step_seconds
    ]
    memory = [
        Point(row.group, row.id, row.predicted.peak_bytes / 2**30, row.measured.peak_bytes / 2**30, row.complete)
        for row in predicted
        if row.predicted.peak_bytes and row.measured.peak_bytes
    ]
    sections = []
    for title, points, quantity in (("Step time", step, "step time (s)"), ("Memory", memory, "memory per GPU (GiB)")):
        if points:
            caption = f"{len(points)} rows; the band is ±10 %."
            if not all(point.counted for point in points):
                caption += " A hollow mark is a row whose source leaves something out; it does not count in the means."
            sections.append(Section(title, charts=(figures.scatter_figure(points, quantity),), caption=caption))
    refused = [(row.id, row.group, row.why_not) for row in document.rows if row.why_not is not None]
    sections.append(Section("By group", body=_group_table(document), caption="Mean errors are of absolute values; bias keeps the sign."))
    sections.append(Section("Every row", body=_validation_table(predicted)))
    if refused:
        sections.append(Section("Rows without a prediction", body=table(("row", "group", "why"), refused, left=(0, 1, 2))))
    summary = document.summary
    top = tiles(
        [
            ("Rows", f"{summary.num_rows:,}", f"{summary.num_groups} groups"),
            *(
                (f"{name}, {kind}", percent(value), f"mean absolute error, {count} groups")
                for kind, means in (("nothing fitted", summary.untouched), ("one constant fitted", summary.calibrated))
                for name, value, count in (
                    ("Step time", means.step_time_mean_abs_error, means.num_step_time_groups),
                    ("Memory", means.memory_mean_abs_error, means.num_memory_groups),
                )
                if value is not None
            ),
        ]
    )
    return page("Predictions against measurements", "Means over groups of the means within a group", sections, top, "Meshwright. GiB = 2^30 bytes.")


def _group_table(document: Validation) -> str:
    columns = ("group", "rows", "step time", "bias", "worst", "in the interval", "memory", "rank correlation", "fitted")
    rows = [
        (
            group.group,
            group.num_rows,
            percent(group.step_time_mean_abs_error),
            signed_percent(group.step_time_mean_error),
            signed_percent(group.step_time_worst_error),
            percent(group.interval_coverage),
            percent(group.memory_mean_abs_error),
            None if group.rank_correlation is None else f"{group.rank_correlation:.2f}",
            "yes" if group.calibrated else "",
        )
        for group in document.groups
    ]
    return table(columns, rows)


def _validation_table(rows: Sequence[ValidationRow]) -> str:
    columns = ("row", "group", "predicted step", "measured", "error", "predicted memory", "measured", "error")
    body = [
        (
            row.id,
            row.group,
            show_seconds(row.predicted.step_seconds),
            show_seconds(row.measured.step_seconds),
            signed_percent(row.step_time_error_fraction),
            show_bytes(row.predicted.peak_bytes),
            show_bytes(row.measured.peak_bytes),
            signed_percent(row.memory_error_fraction),
        )
        for row in rows
    ]
    return table(columns, body, left=(0, 1))


def sweep_report(title: str, points: Sequence[SweepPoint], notes: Sequence[str] = ()) -> str:
    """The page of one model on different numbers of GPUs."""
    rows = [
        (
            point.num_gpus,
            show_seconds(point.step_seconds),
            parts.show_interval(step_interval(point.step_seconds)),
            f"{point.tokens_per_second:,.0f}" if point.tokens_per_second is not None else None,
            percent(point.model_flops_utilization),
            show_bytes(point.peak_bytes),
        )
        for point in points
    ]
    body = table(("GPUs", "step", "80 % interval", "tokens per second", "MFU", "memory of the heaviest GPU"), rows)
    sections = [Section("Over the number of GPUs", charts=(figures.sweep_figure(points),)), Section("In figures", body=body + bullets(notes))]
    return page(title, "", sections, footer="Meshwright. GiB = 2^30 bytes.")
