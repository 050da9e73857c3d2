"""Predictions against what others published: the rows that ship with the package, or any file of such rows.

Errors are signed fractions, predicted / measured - 1. Means are over groups of the means within a group, since the rows
of one group are one experiment. Groups that a constant was fitted to (planner/data/accuracy.json) are reported apart:
an error on them is no prediction. Rows whose source leaves out something that a step time needs are predicted, and stay
out of the means.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from planner.accuracy import Accuracy, accuracy, step_interval
from planner.documents import Document, parse_json, read_text
from planner.errors import InputError, MeshwrightError
from planner.framework_memory import facts as memory_facts
from planner.published_memory import ran_out_of_memory, row_memory
from planner.rows import Case, Measured, NotExpressible, case_of, measured_of
from planner.timing import predict_time, zero_bubble_2p_seconds
from planner.values import SIGNED

SCHEMA = "meshwright.validation/1"


class PredictedFigures(Document, frozen=True, kw_only=True):
    step_seconds: float | None = None
    step_seconds_interval: tuple[float, float] | None = None
    peak_bytes: float | None = None
    """As the tool of the row's source would report it."""
    fits: bool | None = None
    """Whether its GPU has that much memory."""


class MeasuredFigures(Document, frozen=True, kw_only=True):
    step_seconds: float | None = None
    peak_bytes: float | None = None
    ran_out_of_memory: bool = False


class ValidationRow(Document, frozen=True, kw_only=True):
    """One published configuration. `why_not` says why there is no prediction."""

    RULES = {"step_time_error_fraction": SIGNED, "memory_error_fraction": SIGNED}

    id: str
    group: str
    predicted: PredictedFigures
    measured: MeasuredFigures
    step_time_error_fraction: float | None = None
    memory_error_fraction: float | None = None
    why_not: str | None = None
    calibrated: bool = False
    """Whether a constant was fitted to this row's group."""
    complete: bool = True
    """Whether the source gives all that a step time needs; only then does the row count in the means."""


class MemoryFit(Document, frozen=True, kw_only=True):
    """Runs of known fate against the prediction whether they fit: those that ran out of memory, and those whose memory was measured."""

    out_of_memory_runs: int = 0
    out_of_memory_caught: int = 0
    fitting_runs: int = 0
    fitting_refused: int = 0


class GroupErrors(Document, frozen=True, kw_only=True):
    """Errors of the counted rows of one group, as fractions."""

    RULES = dict.fromkeys(("step_time_mean_error", "step_time_worst_error", "rank_correlation"), SIGNED)

    group: str
    calibrated: bool
    num_rows: int
    step_time_mean_abs_error: float | None
    step_time_mean_error: float | None
    step_time_worst_error: float | None
    interval_coverage: float | None
    """Share of the rows whose measured time lies in their 80 % interval."""
    num_timed_rows: int = 0
    """Rows with a predicted and a measured time that count."""
    memory_mean_abs_error: float | None
    memory_calibrated: bool = False
    """Whether a constant of the memory of programs was fitted to this group."""
    rank_correlation: float | None
    """Spearman's, of predicted and measured tokens per GPU-second, where at least 3 rows can be compared."""
    memory_fit: MemoryFit = MemoryFit()


class ErrorMeans(Document, frozen=True, kw_only=True):
    """Means over groups of the means within a group."""

    RULES = {"step_time_mean_error": SIGNED}

    num_groups: int
    num_rows: int
    step_time_mean_abs_error: float | None
    step_time_mean_error: float | None
    interval_coverage: float | None
    memory_mean_abs_error: float | None
    interval_row_coverage: float | None = None
    """The share of all rows, which large groups weigh more in."""
    num_step_time_groups: int = 0
    """Groups that the step time's means are over: those with a counted row."""
    num_memory_groups: int = 0
    """Groups that the memory's mean is over: whether constants were fitted to a group differs between time and memory."""


class ValidationSummary(Document, frozen=True, kw_only=True):
    """The whole: `num_rows` and `num_groups` are all that were read; each mean is over fewer groups, which have a number of their own.

    A row counts for step time where it is `complete` and has a predicted and a measured time, for memory where it has both peaks.
    """

    num_rows: int
    num_groups: int
    step_time_mean_abs_error: float | None
    num_step_time_groups: int = 0
    """Groups that `step_time_mean_abs_error` is over."""
    memory_mean_abs_error: float | None
    num_memory_groups: int = 0
    """Groups that `memory_mean_abs_error` is over."""
    untouched: ErrorMeans
    calibrated: ErrorMeans
    memory_fit: MemoryFit = MemoryFit()


class Validation(Document, frozen=True, kw_only=True):
    schema: str = SCHEMA
    rows: tuple[ValidationRow, ...]
    groups: tuple[GroupErrors, ...]
    summary: ValidationSummary


@functools.cache
def published_rows() -> tuple[dict[str, Any], ...]:
    """The measurements that ship with the package."""
    text = (resources.files("planner") / "data" / "published.json").read_text(encoding="utf-8")
    return tuple(json.loads(text))


def load_rows(path: str | Path | None = None) -> Sequence[Any]:
    """The rows of a file: a JSON array, or an object with the array under "rows"; of None, those that ship with the package.

    Raises InputError when the file is neither.
    """
    if path is None:
        return published_rows()
    value = parse_json(read_text(path, "--rows"), str(path))
    if isinstance(value, dict) and isinstance(value.get("rows"), list):
        value = value["rows"]
    if not isinstance(value, list):
        raise InputError("--rows", str(path), "a JSON array of measurements is expected")
    return value


def validate(rows: Iterable[Any] | None = None) -> Validation:
    """Predictions of `rows` (default: those that ship with the package) beside what they measured.

    The summary's means are over the groups with rows that count for them, `num_step_time_groups` and `num_memory_groups` of all `num_groups`.
    """
    facts = accuracy()
    done = tuple(_row(row, index, facts) for index, row in enumerate(published_rows() if rows is None else rows))
    names = list(dict.fromkeys(row.group for row in done))
    groups = tuple(_group(name, [row for row in done if row.group == name]) for name in names)
    timed = [group for group in groups if group.step_time_mean_abs_error is not None or group.memory_mean_abs_error is not None]
    everything = _means(timed)
    summary = ValidationSummary(
        num_rows=len(done),
        num_groups=len(groups),
        step_time_mean_abs_error=everything.step_time_mean_abs_error,
        num_step_time_groups=everything.num_step_time_groups,
        memory_mean_abs_error=everything.memory_mean_abs_error,
        num_memory_groups=everything.num_memory_groups,
        memory_fit=_memory_fit(done),
        untouched=_means([group for group in timed if not group.calibrated], [group for group in timed if not group.memory_calibrated]),
        calibrated=_means([group for group in timed if group.calibrated], [group for group in timed if group.memory_calibrated]),
    )
    return Validation(rows=done, groups=groups, summary=summary)


def predict_row(row: Any) -> PredictedFigures:
    """Step time and peak memory of one row. Raises NotExpressible with the reason when there is no prediction."""
    case = case_of(row)
    try:
        seconds = case_seconds(case)
        memory = row_memory(row, case)
    except (MeshwrightError, ArithmeticError, ValueError, LookupError, TypeError) as error:
        raise NotExpressible(f"no prediction: {error}") from None
    if not (math.isfinite(seconds) and seconds > 0):
        raise NotExpressible("no prediction: the numbers of the row are out of range")
    return PredictedFigures(step_seconds=seconds, step_seconds_interval=step_interval(seconds), peak_bytes=memory.reported, fits=memory.fits)


def case_seconds(case: Case) -> float:
    """Step time of a case. With the zero-bubble schedule of Qi et al. 2023 that keeps twice 1F1B's activations (ZB-2p) by its
    closed form: m passes of the slowest stage, and a bubble of (p - 1)·max(0, F + I - 2·W) (their table 2).
    """
    if case.zero_bubble_memory == 2.0:
        return zero_bubble_2p_seconds(case.inputs, case.decisions, case.software)
    return predict_time(case.inputs, case.decisions, case.software).time.step_seconds or 0.0


def _row(row: Any, index: int, facts: Accuracy) -> ValidationRow:
    known = row if isinstance(row, dict) else {}
    name, group = str(known.get("id") or f"row {index}"), str(known.get("group") or "none")
    measured = measured_of(row)
    why_not = None
    try:
        predicted = predict_row(row)
    except NotExpressible as error:
        predicted, why_not = PredictedFigures(), str(error)
    return ValidationRow(
        id=name,
        group=group,
        predicted=predicted,
        measured=MeasuredFigures(
            step_seconds=measured.step_seconds, peak_bytes=measured.peak_bytes, ran_out_of_memory=ran_out_of_memory(row)
        ),
        step_time_error_fraction=_error(predicted.step_seconds, measured.step_seconds),
        memory_error_fraction=_error(predicted.peak_bytes, measured.peak_bytes),
        why_not=why_not,
        calibrated=group in facts.groups,
        complete=known.get("complete_for_step_time") is not False,
    )


def _error(predicted: float | None, measured: float | None) -> float | None:
    return predicted / measured - 1.0 if predicted and measured else None


def _group(name: str, rows: Sequence[ValidationRow]) -> GroupErrors:
    timed = [row for row in rows if row.complete and row.step_time_error_fraction is not None]
    errors = [row.step_time_error_fraction for row in timed if row.step_time_error_fraction is not None]
    memory = [abs(row.memory_error_fraction) for row in rows if row.memory_error_fraction is not None]
    pairs = [(row.predicted.step_seconds, row.measured.step_seconds) for row in timed]
    return GroupErrors(
        group=name,
        calibrated=rows[0].calibrated,
        num_rows=len(rows),
        step_time_mean_abs_error=_mean([abs(error) for error in errors]),
        step_time_mean_error=_mean(errors),
        step_time_worst_error=max(errors, key=abs, default=None),
        interval_coverage=_mean([float(_inside(row)) for row in timed]),
        num_timed_rows=len(timed),
        memory_mean_abs_error=_mean(memory),
        memory_calibrated=name in memory_facts().calibrated,
        memory_fit=_memory_fit(rows),
        rank_correlation=spearman([a or 0.0 for a, _ in pairs], [b or 0.0 for _, b in pairs]) if len(pairs) > 2 else None,
    )


def _inside(row: ValidationRow) -> bool:
    low, high = row.predicted.step_seconds_interval or (0.0, 0.0)
    return low <= (row.measured.step_seconds or 0.0) <= high


def _memory_fit(rows: Sequence[ValidationRow]) -> MemoryFit:
    known = [row for row in rows if row.predicted.fits is not None]
    failed = [row for row in known if row.measured.ran_out_of_memory]
    fitted = [row for row in known if row.measured.peak_bytes is not None and not row.measured.ran_out_of_memory]
    return MemoryFit(
        out_of_memory_runs=len(failed),
        out_of_memory_caught=sum(not row.predicted.fits for row in failed),
        fitting_runs=len(fitted),
        fitting_refused=sum(not row.predicted.fits for row in fitted),
    )


def _means(groups: Sequence[GroupErrors], memory_groups: Sequence[GroupErrors] | None = None) -> ErrorMeans:
    """Means over `groups`, those of memory over `memory_groups` where other groups were fitted to."""

    def over(name: str) -> float | None:
        return _mean([value for value in (getattr(group, name) for group in groups) if value is not None])

    memory = [group.memory_mean_abs_error for group in (groups if memory_groups is None else memory_groups)]
    remembered = [error for error in memory if error is not None]
    timed = sum(group.num_timed_rows for group in groups)
    return ErrorMeans(
        num_groups=len(groups),
        num_rows=sum(group.num_rows for group in groups),
        step_time_mean_abs_error=over("step_time_mean_abs_error"),
        step_time_mean_error=over("step_time_mean_error"),
        interval_coverage=over("interval_coverage"),
        interval_row_coverage=sum((group.interval_coverage or 0.0) * group.num_timed_rows for group in groups) / timed if timed else None,
        memory_mean_abs_error=_mean(remembered),
        num_step_time_groups=sum(group.step_time_mean_abs_error is not None for group in groups),
        num_memory_groups=len(remembered),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where one side is constant."""
    a, b = _ranks(left), _ranks(right)
    mean = (len(a) + 1) / 2
    over = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    under = math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))
    return over / under if under else None


def kendall(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Kendall's tau-b of two lists; None where one side is constant."""
    agree = ties_left = ties_right = pairs = 0
    for i in range(len(left)):
        for j in range(i):
            x, y = left[i] - left[j], right[i] - right[j]
            pairs += 1
            ties_left += x == 0
            ties_right += y == 0
            agree += (x * y > 0) - (x * y < 0)
    under = math.sqrt((pairs - ties_left) * (pairs - ties_right))
    return agree / under if under else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for position in range(start, end + 1):
            ranks[order[position]] = (start + end) / 2 + 1
        start = end + 1
    return ranks


__all__ = ["Measured", "Validation", "case_seconds", "kendall", "load_rows", "predict_row", "published_rows", "spearman", "validate"]
