"""Predicted beside dry run beside measured, and which predicted constant is off.

`error_fraction` is (predicted - measured) / measured: +0.1 is a prediction 10 % too high. It is null where one of the two
is unknown, and where the measurement is 0 and the prediction is not.

A plan predicts by pipeline rank and a run measures by rank: `coordinates.pp` of a measured rank says which prediction is
its own. The memory that a rehearsed run measures is left out, since a rehearsal does not compute, and so are its times
where it stretched the predicted ones (`rehearsal_scale`), since messages are not stretched with them. Of its constants only
the message's is a measurement.

Within a tolerance x means, for every row with both figures:
- times, tokens per second, and the total of each rank's memory: |error_fraction| <= x;
- a category of memory: |predicted - measured| <= x of the rank's measured total, for a few stray bytes of a small
  category say nothing;
- the bubble, itself a fraction: |predicted - measured| <= x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from planner.documents import Document
from planner.either import AnyPlan, predict_timeline
from planner.errors import InputError
from planner.plan import Memory, PipelineRankPrediction, plan_hash
from planner.run import DryRun, Run, RunRank
from planner.schedule import Action, plan_actions
from planner.timeline import Event, Timeline, bubble_fractions, simulate
from planner.values import SIGNED

SCHEMA = "meshwright.comparison/1"
CATEGORIES = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes", "buffers_bytes", "total_bytes")
CONSTANTS: dict[str, tuple[str, ...]] = {
    "forward": ("F",),
    "backward": ("B", "I", "W"),
    "message": ("SEND_F", "SEND_B"),
    "reduction": ("REDUCE",),
    "optimizer": ("OPTIMIZER",),
}
"""What a prediction of time is made of, and the actions that it times."""
_NAMES = {
    "forward": "a stage's forward pass of one micro-batch",
    "backward": "a stage's backward pass of one micro-batch",
    "message": "a message between neighbouring stages",
    "reduction": "a rank's gradient reduction (waiting for the other ranks included)",
    "optimizer": "a rank's optimizer step",
}


class Row(Document, frozen=True, kw_only=True):
    """One quantity. `rank` is a global rank, or null for the whole run."""

    RULES = dict.fromkeys(("predicted", "measured", "error_fraction"), SIGNED)

    quantity: str
    rank: int | None
    predicted: float | None
    measured: float | None
    dry_run: float | None
    error_fraction: float | None


class Cause(Document, frozen=True, kw_only=True):
    """One predicted constant beside its measurement, in mean seconds of one such action."""

    RULES = {"effect_seconds": SIGNED}

    constant: str
    predicted_seconds: float
    measured_seconds: float
    ratio: float | None
    """Measured over predicted."""
    effect_seconds: float
    """How much longer the predicted step becomes when the schedule is walked with the measured constant in place of its own."""
    words: str


class Comparison(Document, frozen=True, kw_only=True):
    schema: str = SCHEMA
    plan_hash: str
    rehearsed: bool
    """Whether the measured run replaced computation by its predicted time."""
    rows: tuple[Row, ...]
    tolerance: float | None = None
    within_tolerance: bool | None = None
    causes: tuple[Cause, ...] = ()
    """The constants by how much they move the predicted step, largest first; empty without a measured timeline."""


def compare(plan: AnyPlan, run: Run, dry_run: DryRun | None = None, tolerance: float | None = None, actions: Timeline | None = None) -> Comparison:
    """The comparison of a plan's predictions with a run of it, and with a dry run where there is one.

    `actions` is the run's timeline (`planner.run.load_actions`); with it the comparison names the constants that are off.
    Raises InputError when the run or the dry run is not of this plan.
    """
    check_same_plan(plan, run, dry_run)
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise InputError("--tolerance", tolerance, "a fraction of 0 or more is expected")
    timeline = predict_timeline(plan.inputs, plan.decisions)
    rows = (*_whole_rows(plan, run, dry_run), *(row for rank in run.ranks for row in _rank_rows(plan, run, rank, dry_run, timeline)))
    return Comparison(
        plan_hash=run.plan_hash,
        rehearsed=run.rehearsed,
        rows=rows,
        tolerance=tolerance,
        within_tolerance=None if tolerance is None else not outside(rows, tolerance),
        causes=causes(plan, run, actions, timeline),
    )


def check_same_plan(plan: AnyPlan, run: Run | None, dry_run: DryRun | None = None) -> None:
    """Raises InputError when a run or a dry run was made from another plan, or its ranks are not this plan's."""
    expected = plan_hash(plan)
    for name, document in (("run", run), ("dry run", dry_run)):
        if document is not None and document.plan_hash != expected:
            raise InputError(f"{name}: plan_hash", document.plan_hash, f"{expected} is expected: it was made from another plan")
    for traced in dry_run.pipeline_ranks if dry_run is not None else ():
        if not 0 <= traced.pipeline_rank < plan.decisions.pipeline_parallel:
            raise InputError("dry run: pipeline_ranks", traced.pipeline_rank, f"the plan has {plan.decisions.pipeline_parallel} pipeline ranks")
    for rank in run.ranks if run is not None else ():
        if not 0 <= rank.coordinates.pp < plan.decisions.pipeline_parallel:
            raise InputError(
                f"run: ranks[{rank.rank}].coordinates.pp", rank.coordinates.pp, f"the plan has {plan.decisions.pipeline_parallel} pipeline ranks"
            )


def error_fraction(predicted: float | None, measured: float | None) -> float | None:
    """(predicted - measured) / measured, or None where that is not known."""
    if predicted is None or measured is None:
        return None
    if measured == 0:
        return 0.0 if predicted == 0 else None
    return (predicted - measured) / measured


def _row(quantity: str, rank: int | None, predicted: float | None, measured: float | None, dry_run: float | None = None) -> Row:
    return Row(
        quantity=quantity, rank=rank, predicted=predicted, measured=measured, dry_run=dry_run, error_fraction=error_fraction(predicted, measured)
    )


def _has_times(run: Run) -> bool:
    """Whether the run's times can be compared: all but those of a rehearsal that stretched them."""
    return not run.rehearsed or run.environment.get("rehearsal_scale", 1.0) == 1.0


def _whole_rows(plan: AnyPlan, run: Run, dry_run: DryRun | None) -> Iterable[Row]:
    time, traced = plan.predictions.time, max((rank.memory.total_bytes for rank in dry_run.pipeline_ranks), default=None) if dry_run else None
    timed = _has_times(run)
    yield _row("step_seconds", None, time.step_seconds, run.summary.step_seconds if timed else None)
    if time.tokens_per_second is not None:  # images have none
        yield _row("tokens_per_second", None, time.tokens_per_second, run.summary.tokens_per_second if timed else None)
    yield _row("bubble_fraction", None, time.bubble_fraction, run.summary.bubble_fraction)
    yield _row("peak_bytes", None, plan.predictions.memory.total_bytes, None if run.rehearsed else run.summary.peak_bytes, traced)


def _rank_rows(plan: AnyPlan, run: Run, rank: RunRank, dry_run: DryRun | None, timeline: Timeline) -> Iterable[Row]:
    place = rank.coordinates.pp
    prediction = _prediction(plan, place)
    predicted = prediction.memory if prediction else None
    measured = None if run.rehearsed else rank.memory
    traced = next((item.memory for item in dry_run.pipeline_ranks if item.pipeline_rank == place), None) if dry_run else None
    for category in CATEGORIES:
        yield _row(category, rank.rank, _bytes(predicted, category), _bytes(measured, category), _bytes(traced, category))
    yield _row("bubble_fraction", rank.rank, bubble_fractions(timeline).get(place), rank.bubble_fraction)
    busy = None
    if prediction and prediction.forward_seconds is not None and prediction.backward_seconds is not None:
        busy = plan.decisions.num_microbatches * (prediction.forward_seconds + prediction.backward_seconds)
    yield _row("busy_seconds", rank.rank, busy, rank.busy_seconds if _has_times(run) else None)


def _prediction(plan: AnyPlan, pipeline_rank: int) -> PipelineRankPrediction | None:
    return next((rank for rank in plan.predictions.pipeline_ranks if rank.pipeline_rank == pipeline_rank), None)


def _bytes(memory: Memory | None, category: str) -> float | None:
    return None if memory is None else getattr(memory, category)


def outside(rows: Iterable[Row], tolerance: float) -> tuple[Row, ...]:
    """The rows whose prediction and measurement differ by more than the tolerance, as the module's text defines it."""
    rows = tuple(rows)
    totals = {row.rank: row.measured for row in rows if row.quantity == "total_bytes"}
    return tuple(row for row in rows if not _within(row, tolerance, totals.get(row.rank)))


def _within(row: Row, tolerance: float, rank_total: float | None) -> bool:
    if row.predicted is None or row.measured is None:
        return True
    difference = abs(row.predicted - row.measured)
    if row.quantity == "bubble_fraction":
        return difference <= tolerance
    if row.quantity in CATEGORIES and rank_total is not None:
        return difference <= tolerance * rank_total
    return difference <= tolerance * abs(row.measured)


def blame(plan: AnyPlan, run: Run, actions: Timeline | None) -> tuple[str, ...]:
    """`causes` in words, one sentence for each constant; none without a measured timeline."""
    return tuple(cause.words for cause in causes(plan, run, actions))


def causes(plan: AnyPlan, run: Run, actions: Timeline | None, predicted: Timeline | None = None) -> tuple[Cause, ...]:
    """Each predicted constant beside its measurement, by how much it moves the predicted step, largest first.

    The schedule is walked once with the predicted times, and once for each constant with the measured mean times of its
    actions, stage by stage: the change of the step's end is that constant's effect. `actions` holds global ranks,
    `predicted` pipeline ranks. A message's time is from the start of its send to the end of its receive, over the messages
    whose receiver was already waiting; a measured reduction includes waiting for the other ranks. Of a rehearsal there is the
    message only: its passes and its optimizer are the prediction, and its reduction waits for them.
    """
    if actions is None:
        return ()
    timeline = predicted if predicted is not None else predict_timeline(plan.inputs, plan.decisions)
    ranks = {rank.rank: (rank.coordinates.dp, rank.coordinates.tp) for rank in run.ranks}
    guess = _durations(timeline.events, lambda rank: (0, 0))
    truth = _durations(actions.events, lambda rank: ranks.get(rank, (0, 0)))
    start = _walk(plan, guess)
    found = []
    for constant, kinds in CONSTANTS.items():
        if run.rehearsed and constant != "message":
            continue
        keys = [key for key in guess if key[0] in kinds and key in truth]
        if not keys:
            continue
        before = sum(guess[key] for key in keys) / len(keys)
        after = sum(truth[key] for key in keys) / len(keys)
        effect = _walk(plan, guess | {key: truth[key] for key in keys}) - start
        found.append(_cause(constant, before, after, effect))
    return tuple(sorted(found, key=lambda cause: -abs(cause.effect_seconds)))


Durations = dict[tuple[str, int], float]
"""Mean seconds by kind of action and stage."""


def _durations(events: Iterable[Event], replica: Callable[[int], tuple[int, int]]) -> Durations:
    """Mean durations; those of a SEND are a message's whole way. `replica` tells apart ranks that do the same work."""
    events = tuple(events)
    found: dict[tuple[str, int], list[float]] = {}
    sends = {(replica(event.rank), event.kind, event.stage, event.microbatch): event for event in events if event.kind.startswith("SEND")}
    for event in events:
        if event.kind in ("RECV_F", "RECV_B"):
            forward = event.kind == "RECV_F"
            sender = event.stage - 1 if forward else event.stage + 1
            sent = sends.get((replica(event.rank), "SEND_F" if forward else "SEND_B", sender, event.microbatch))
            if sent is not None and event.start <= sent.start:
                found.setdefault((sent.kind, sender), []).append(max(0.0, event.end - sent.start))
        elif not event.kind.startswith("SEND"):
            found.setdefault((event.kind, event.stage), []).append(event.end - event.start)
    means = {key: sum(values) / len(values) for key, values in found.items()}
    # A message whose receiver was always late says nothing: it takes what the others of its direction take.
    for kind in ("SEND_F", "SEND_B"):
        known = [mean for (other, _), mean in means.items() if other == kind]
        for stage in {stage for _, other, stage, _ in sends if other == kind}:
            if known:
                means.setdefault((kind, stage), sum(known) / len(known))
    return means


def _walk(plan: AnyPlan, seconds: Durations) -> float:
    """The end of the step when its actions take these times; what is missing takes none."""

    def duration(action: Action) -> float:
        return seconds.get((action.kind, action.stage), 0.0)

    return simulate(plan_actions(plan.decisions), duration, duration).end


def _cause(constant: str, predicted: float, measured: float, effect: float) -> Cause:
    ratio = measured / predicted if predicted > 0 else None
    name = _NAMES[constant]
    if ratio is None:
        verdict = f"{name} was predicted to take no time, and takes {measured * 1e3:.3g} ms"
    elif abs(ratio - 1) < 0.02:
        verdict = f"{name} takes the predicted {predicted * 1e3:.3g} ms, within 2 %"
    else:
        verdict = f"{name} takes {measured * 1e3:.3g} ms, {ratio:.2f} times the predicted {predicted * 1e3:.3g} ms"
    if abs(effect) < 0.01 * max(predicted, measured):
        change = "that does not move the predicted step"
    else:
        change = f"with the measured value the predicted step is {abs(effect) * 1e3:.3g} ms {'longer' if effect >= 0 else 'shorter'}"
    return Cause(
        constant=constant,
        predicted_seconds=predicted,
        measured_seconds=measured,
        ratio=ratio,
        effect_seconds=effect,
        words=f"{verdict}; {change}.",
    )
