"""What was traced, run and compared as tables."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType
from rich.table import Table

from planner.accuracy import accuracy, step_interval
from planner.compare import Comparison, Row
from planner.paradigms import Paradigms
from planner.plan import Plan
from planner.published import Validation
from planner.run import DryRun, Run
from planner.tables.plans import between
from planner.tables.text import count, gib, notes, percent, seconds, table


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
        "pipeline rank", "rank", "weights", "gradients", "optimizer", "activations", "buffers", "peak", "predicted peak",
        "prediction's error", "took",
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
        if paradigm.why_not is not None:
            missing.append(f"{paradigm.name}: {paradigm.why_not}")
        if paradigm.decisions is None:
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
    low, high = accuracy().step_seconds_interval
    parts.append(
        "GiB sent: per step by the rank that sends most along that axis, ring algorithms (Mi = MiB). "
        f"80 % interval of a predicted step: {low:g} to {high:g} times it."
    )
    if missing:
        parts.append(notes("Not possible here", missing))
    return parts


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


def _predicted(row: Row, with_interval: bool) -> str:
    """The predicted value, a step time with its interval where there is one."""
    interval = ""
    if with_interval and row.quantity == "step_seconds" and row.predicted is not None:
        interval = f" ({between(step_interval(row.predicted))})"
    return _quantity(row.quantity, row.predicted) + interval


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


def comparison_view(document: Comparison, run: Run, *, with_interval: bool = True) -> list[RenderableType | str]:
    """Predicted, dry run and measured: the whole run first, then a row per rank, then the categories of the heaviest rank."""
    stretched = run.environment.get("rehearsal_scale", 1.0)
    times = f"{stretched:.4g} times " if isinstance(stretched, float) and stretched != 1.0 else ""
    label = f"rehearsed (compute replaced by {times}its predicted time)" if document.rehearsed else "measured"
    whole = [
        (_SHORT.get(row.quantity, row.quantity), _predicted(row, with_interval), _quantity(row.quantity, row.dry_run),
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
            figure = found.get(name)
            if figure is None:
                cells += [None] * 4
                continue
            cells += [_quantity(name, figure.predicted), _quantity(name, figure.dry_run), _quantity(name, figure.measured), _error(figure)]
        rows.append(cells)
    names = ("rank", "place", "peak predicted", "dry run", "measured", "error", "bubble predicted", "dry run", "measured", "error")
    keep = [index for index in range(len(names)) if index != 7]
    parts.append(table("Each rank", [names[i] for i in keep], [[cells[i] for i in keep] for cells in rows], left=2))
    heaviest = max(run.ranks, key=lambda rank: rank.memory.total_bytes)
    categories = [
        (_SHORT.get(name.removeprefix("memory."), name), _quantity(name, row.predicted), _quantity(name, row.dry_run),
         _quantity(name, row.measured), _error(row))
        for name, row in by_rank.get(heaviest.rank, {}).items() if name.endswith("_bytes")
    ]  # fmt: skip
    title = f"Memory of rank {heaviest.rank}, the heaviest (GiB; Mi = MiB)"
    parts.append(table(title, ("category", "predicted", "dry run", label, "error"), categories))
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
                 correlation, percent(group.memory_mean_abs_error) + (" (fitted)" if group.memory_calibrated else ""))
            )  # fmt: skip
        if rows:
            means = document.summary.calibrated if calibrated else document.summary.untouched
            signed = "–" if means.step_time_mean_error is None else f"{means.step_time_mean_error:+.1%}"
            rows.append(
                ("mean over these groups", means.num_rows, percent(means.step_time_mean_abs_error), signed, "–", percent(means.interval_coverage),
                 "–", percent(means.memory_mean_abs_error))
            )  # fmt: skip
            parts.append(table(title, columns, rows))
            if means.interval_row_coverage is not None:
                rows_held, groups_held = percent(means.interval_row_coverage), percent(means.interval_coverage)
                held = f"{rows_held} of the counted rows, and for {groups_held} as a mean over the groups"
                parts.append(f"The 80 % interval held for {held}.\n")
    fit = document.summary.memory_fit
    if fit.out_of_memory_runs or fit.fitting_runs:
        found = [group for group in document.groups if group.memory_fit.out_of_memory_runs]
        named = ", ".join(f"{group.group} {group.memory_fit.out_of_memory_caught} of {group.memory_fit.out_of_memory_runs}" for group in found)
        parts.append(
            f"Runs that ran out of memory and are refused: {fit.out_of_memory_caught} of {fit.out_of_memory_runs}"
            f"{f' ({named})' if named else ''}; runs with measured memory that are accepted: "
            f"{fit.fitting_runs - fit.fitting_refused} of {fit.fitting_runs}."
        )
    silent = sum(1 for row in document.rows if row.why_not)
    parts.append(
        f"{document.summary.num_rows:,} rows in {document.summary.num_groups} groups; {silent:,} have no prediction, each with its reason in --json. "
        f"Means are over groups of the means within a group, those of step time over {document.summary.num_step_time_groups} "
        f"and those of memory over {document.summary.num_memory_groups}."
    )
    if document.rows and len(document.rows) <= 40:
        single = [
            (row.id, seconds(row.predicted.step_seconds), seconds(row.measured.step_seconds),
             "–" if row.step_time_error_fraction is None else f"{row.step_time_error_fraction:+.1%}",
             gib(row.predicted.peak_bytes), gib(row.measured.peak_bytes), row.why_not or "")
            for row in document.rows
        ]  # fmt: skip
        parts.append(table("Rows", ("row", "step predicted", "measured", "error", "peak GiB predicted", "measured", "why not"), single))
    return parts
