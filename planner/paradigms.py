"""The ways of splitting training side by side: for one model and world size, a plan for each, and what it needs.

What is split, what is sent, and what that costs is the lesson of the field in one table.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from planner.cluster import ClusterSpec, with_num_gpus
from planner.communication import communication_bytes
from planner.documents import Document
from planner.errors import DoesNotFitError, InputError
from planner.estimate import fits, predict
from planner.model import ModelSpec
from planner.plan import Decisions, Inputs, Plan, Predictions, SolverReport, Training, check, digest, even_stages, replace
from planner.run import Run
from planner.words import gib

SCHEMA = "meshwright.paradigms/1"


class Paradigm(Document, frozen=True, kw_only=True):
    """One way of splitting. The measured fields are null until it has been run."""

    name: str
    what_is_split: str
    what_is_sent: str
    decisions: Decisions | None
    why_not: str | None = None
    fits: bool | None = None
    peak_bytes: int | None = None
    bubble_fraction: float | None = None
    step_seconds: float | None = None
    communication_bytes: dict[str, float] = {}
    """Per step, the most that any rank sends along each axis."""
    measured_peak_bytes: int | None = None
    measured_bubble_fraction: float | None = None
    measured_step_seconds: float | None = None
    measured_communication_bytes: dict[str, int] = {}
    measured_losses: tuple[float, ...] = ()


class Paradigms(Document, frozen=True, kw_only=True):
    schema: str = SCHEMA
    model: str
    world_size: int
    global_batch_size: int
    sequence_length: int
    paradigms: tuple[Paradigm, ...]


class _Way(NamedTuple):
    """A way of splitting, by the degrees that it takes; data parallel is what is left of the ranks."""

    name: str
    split: str
    sent: str
    tp: int
    pp: int
    schedule: str
    zero: int
    virtual: int = 1
    needs: str = ""
    """What it needs of the number of ranks, where that is not so."""


def _ways(n: int) -> list[_Way]:
    gradients = "gradients, once a step"
    activations = "activations between neighbours, every micro-batch"
    partial = "partial sums in every layer, every micro-batch"
    half = next((divisor for divisor in range(2, math.isqrt(n) + 1) if n % divisor == 0), n)
    two = "" if half < n else "it needs at least 4 ranks, and no prime number of them"
    three = "" if n >= 8 and n % 4 == 0 else "it needs at least 8 ranks, a multiple of 4"
    ways = [
        _Way("naive model parallel", "layers; one rank works at a time", activations, 1, n, "Naive", 0),
        _Way("data parallel", "samples; every rank holds everything", gradients, 1, 1, "1F1B", 0),
        _Way("ZeRO-1", "samples and optimizer state", "gradients and updated weights, once a step", 1, 1, "1F1B", 1),
        _Way("FSDP / ZeRO-3", "samples and all states", "weights twice and gradients once, every micro-batch", 1, 1, "1F1B", 3),
        _Way("pipeline, GPipe", "layers; micro-batches fill the ranks", activations, 1, n, "GPipe", 0),
        _Way("pipeline, 1F1B", "layers; fewer micro-batches in flight", activations, 1, n, "1F1B", 0),
        _Way("pipeline, interleaved", "layers; several stages a rank", activations, 1, n, "Interleaved1F1B", 0, 2),
        _Way("pipeline, zero bubble", "layers; weight gradients fill the drain", activations, 1, n, "ZBVZeroBubble", 0, 2),
        _Way("tensor parallel", "each layer's matrices", partial, n, 1, "1F1B", 0),
        _Way("2D: data x tensor", "samples and matrices", f"{gradients}; {partial}", half, 1, "1F1B", 0, needs=two),
        _Way("2D: data x pipeline", "samples and layers", f"{gradients}; {activations}", 1, half, "1F1B", 0, needs=two),
    ]
    ways.append(_Way("2D: pipeline x tensor", "layers and matrices", f"{activations}; {partial}", half, n // half, "1F1B", 0, needs=two))
    ways.append(_Way("3D: data x pipeline x tensor", "samples, layers and matrices", "all three", 2, 2, "1F1B", 1, needs=three))
    return ways if n > 1 else [way._replace(needs=way.needs or "it needs at least 2 ranks") for way in ways]


def paradigms(model: ModelSpec, cluster: ClusterSpec, training: Training, world_size: int, micro_batch_size: int = 1) -> Paradigms:
    """Every way on `world_size` ranks, predicted; a way that can't be has its reason in `why_not`."""
    cluster = with_num_gpus(cluster, world_size)
    inputs = Inputs(model=model, cluster=cluster, training=training)
    found = []
    for way in _ways(world_size):
        if way.needs:
            found.append(Paradigm(name=way.name, what_is_split=way.split, what_is_sent=way.sent, decisions=None, why_not=way.needs))
            continue
        try:
            decisions = _decide(inputs, way, world_size, micro_batch_size)
            check(inputs, decisions, way.name)
        except InputError as error:
            reason = str(error).removeprefix(f"{way.name}: ").removeprefix("decisions.")
            found.append(Paradigm(name=way.name, what_is_split=way.split, what_is_sent=way.sent, decisions=None, why_not=reason))
            continue
        predictions = predict(inputs, decisions)
        sent = [communication_bytes(inputs, decisions, rank) for rank in range(decisions.pipeline_parallel)]
        found.append(
            Paradigm(
                name=way.name,
                what_is_split=way.split,
                what_is_sent=way.sent,
                decisions=decisions,
                fits=fits(predictions),
                peak_bytes=predictions.memory.total_bytes,
                bubble_fraction=predictions.time.bubble_fraction,
                step_seconds=predictions.time.step_seconds,
                communication_bytes={axis: max(rank[axis] for rank in sent) for axis in ("tp", "dp", "pp")},
            )
        )
    return Paradigms(
        model=model.name,
        world_size=world_size,
        global_batch_size=training.global_batch_size,
        sequence_length=training.sequence_length,
        paradigms=tuple(found),
    )


def _decide(inputs: Inputs, way: _Way, world_size: int, micro_batch_size: int) -> Decisions:
    dp = world_size // (way.tp * way.pp)
    samples = dp * micro_batch_size
    if inputs.training.global_batch_size % samples:
        raise InputError("global_batch_size", inputs.training.global_batch_size, f"a multiple of {samples} is expected for {way.name}")
    return Decisions(
        data_parallel=dp,
        tensor_parallel=way.tp,
        pipeline_parallel=way.pp,
        zero_stage=way.zero if dp > 1 else 0,
        micro_batch_size=micro_batch_size,
        num_microbatches=inputs.training.global_batch_size // samples,
        schedule=way.schedule,  # type: ignore[arg-type]
        num_virtual_stages=way.virtual,
        stages=even_stages(inputs.model, way.schedule, way.pp, way.virtual, "none"),
    )


def require_one(document: Paradigms, *, run: bool) -> None:
    """Raises InputError where no way of splitting is possible, DoesNotFitError where none fits or, with `run`, none could be run."""
    possible = [paradigm for paradigm in document.paradigms if paradigm.decisions is not None]
    if not possible:
        raise InputError("--world-size", document.world_size, f"no way of splitting is possible: {document.paradigms[0].why_not}")
    least = min(possible, key=lambda paradigm: paradigm.peak_bytes or 0)
    needs = f"{least.name}, which needs least, takes {gib(least.peak_bytes or 0)} on its fullest rank"
    if run and all(paradigm.measured_step_seconds is None for paradigm in possible):
        raise DoesNotFitError(f"none of the {len(possible)} ways could be run on this machine; {needs}")
    if not run and not any(paradigm.fits for paradigm in possible):
        raise DoesNotFitError(f"none of the {len(possible)} ways fits; {needs}")


def total_bytes(predictions: Predictions, world_size: int) -> int:
    """What all ranks need together."""
    ranks = predictions.pipeline_ranks
    return sum(rank.memory.total_bytes for rank in ranks) * world_size // len(ranks)


def as_plan(inputs: Inputs, decisions: Decisions, predictions: Predictions) -> Plan:
    """A plan that nobody searched for, so that it can be run."""
    step = predictions.time.step_seconds
    solver = SolverReport(
        name="none",
        status="given",
        objective_seconds=step,
        bound_seconds=None,
        gap_fraction=None,
        num_candidates=1,
        num_pruned=0,
        wall_seconds=0.0,
    )
    return Plan(inputs=inputs, inputs_hash=digest(inputs), decisions=decisions, predictions=predictions, solver=solver)


def with_measurement(paradigm: Paradigm, run: Run) -> Paradigm:
    """A paradigm with what its run measured."""
    return replace(
        paradigm,
        measured_peak_bytes=run.summary.peak_bytes,
        measured_bubble_fraction=run.summary.bubble_fraction,
        measured_step_seconds=run.summary.step_seconds,
        measured_communication_bytes={axis: max(rank.communication_bytes.get(axis, 0) for rank in run.ranks) for axis in ("tp", "dp", "pp")},
        measured_losses=tuple(step.loss for step in run.steps),
    )
