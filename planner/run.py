"""What the executor reports: run documents, and the dry run's."""

from __future__ import annotations

import math
import os
from pathlib import Path

from planner.documents import Document, load
from planner.errors import InputError
from planner.plan import Memory
from planner.timeline import SCHEMA as TIMELINE_SCHEMA
from planner.timeline import Event, Timeline, busy_seconds
from planner.values import POSITIVE, SIGNED

SCHEMA = "meshwright.run/1"
DRY_RUN_SCHEMA = "meshwright.dry_run/1"


class Step(Document, frozen=True, kw_only=True):
    """One optimizer step. `loss` is the mean over all tokens of the global batch, before the update."""

    RULES = {"loss": SIGNED}

    step: int
    loss: float
    seconds: float
    num_tokens: int
    gradient_norm: float | None = None
    learning_rate: float | None = None


class Coordinates(Document, frozen=True, kw_only=True):
    """A rank's place on the mesh."""

    pp: int
    dp: int
    tp: int


class RunRank(Document, frozen=True, kw_only=True):
    """What one rank measured. `memory` is its peak in the tracked step, by category; the others are what the system says."""

    RULES = {"bubble_fraction": SIGNED}

    rank: int
    coordinates: Coordinates
    memory: Memory
    bubble_fraction: float
    busy_seconds: float
    actions_file: str | None
    """A timeline document beside the run document; its events name this rank."""
    rss_bytes: int | None = None
    """Peak resident set size of the process."""
    allocated_bytes: int | None = None
    """CUDA: peak of the allocator."""
    reserved_bytes: int | None = None
    """CUDA: peak held by the allocator."""
    device_used_bytes: int | None = None
    """CUDA: used on the device at the end, all processes."""
    communication_bytes: dict[str, int] = {}
    """Bytes that this rank sends per step along each axis, ring algorithms for collectives."""


class Summary(Document, frozen=True, kw_only=True):
    """Over the timed steps: the median step, the mean bubble of the ranks, the heaviest rank's peak."""

    RULES = {"step_seconds": POSITIVE, "bubble_fraction": SIGNED}

    step_seconds: float
    bubble_fraction: float
    peak_bytes: int
    tokens_per_second: float


class Run(Document, frozen=True, kw_only=True):
    RULES = {"environment": SIGNED}

    schema: str = SCHEMA
    plan_hash: str
    rehearsed: bool
    environment: dict[str, str | int | float | bool]
    steps: tuple[Step, ...]
    ranks: tuple[RunRank, ...]
    summary: Summary


class DryRunRank(Document, frozen=True, kw_only=True):
    """The traced peak of one rank of a pipeline rank."""

    pipeline_rank: int
    rank: int
    memory: Memory
    wall_seconds: float


class DryRun(Document, frozen=True, kw_only=True):
    schema: str = DRY_RUN_SCHEMA
    plan_hash: str
    pipeline_ranks: tuple[DryRunRank, ...]


def load_run(path: str | os.PathLike[str], field: str = "run") -> Run:
    """The run document at `path`."""
    found = load(path, Run, SCHEMA, field)
    if not found.ranks:
        raise InputError(f"{path}: ranks", [], "at least one rank is expected")
    return found


def load_dry_run(path: str | os.PathLike[str], field: str = "--dry-run") -> DryRun:
    """The dry-run document at `path`."""
    return load(path, DryRun, DRY_RUN_SCHEMA, field)


def actions_path(output: str | os.PathLike[str]) -> Path:
    """Where the timeline of the run document `output` goes."""
    path = Path(output)
    return path.with_name(f"{path.name.removesuffix('.json')}.actions.json")


def load_actions(run_path: str | os.PathLike[str], run: Run) -> Timeline | None:
    """The measured timeline of a run, or None when it has none. Events are of the last step; ranks are global.

    Raises InputError where the file is another run's, which wrote it in its place: ranks are not as busy in it as the run says.
    """
    files = {rank.actions_file for rank in run.ranks if rank.actions_file}
    events: list[Event] = []
    source = "rehearsed" if run.rehearsed else "measured"
    for name in sorted(files):
        events.extend(load(Path(run_path).parent / Path(name).name, Timeline, TIMELINE_SCHEMA, "actions_file").events)
    if not events:
        return None
    timeline = Timeline(source=source, events=tuple(events))
    busy = busy_seconds(timeline)
    if any(not math.isclose(busy.get(rank.rank, 0.0), rank.busy_seconds, rel_tol=1e-6, abs_tol=1e-9) for rank in run.ranks):
        allowed = "this run's own timeline is expected: in this file the ranks are not as busy"
        raise InputError(f"{run_path}: actions_file", ", ".join(sorted(files)), allowed)
    return timeline
