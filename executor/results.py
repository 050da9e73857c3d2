"""What a run measured, gathered from every rank into the run document and the timeline of its last step."""

from __future__ import annotations

import socket
import statistics
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from executor.clock import clock_offsets
from executor.measure import Record, StorageTracker, environment, peak_rss_bytes
from executor.mesh import Mesh, coordinates_of
from executor.train import StepFigures
from planner.chain_plan import ChainPlan
from planner.documents import dumps, write_text
from planner.plan import Plan, plan_hash
from planner.run import Coordinates, Run, RunRank, Step, Summary, actions_path
from planner.timeline import Event, Timeline, bubble_fraction, bubble_fractions, busy_seconds


def write_run(output: str, run: Run, timeline: Timeline) -> None:
    """Writes the run document to `output`, and its timeline, on one line, beside it."""
    write_text(actions_path(output), msgspec.json.encode(timeline).decode() + "\n")
    write_text(output, dumps(run))


def collect(
    plan: Plan | ChainPlan,
    mesh: Mesh,
    records: list[Record],
    tracker: StorageTracker,
    sent: dict[str, int],
    figures: list[StepFigures],
    device: torch.device,
    output: str | None,
    *,
    rehearsed: bool,
) -> tuple[Run, Timeline] | None:
    """The run document and the last step's timeline on rank 0, from what every rank measured; None on the others."""
    own = {
        "records": [tuple(record) for record in records],
        "memory": tracker.memory(),
        "rss": peak_rss_bytes(),
        "sent": sent,
        **_cuda_figures(device),
    }
    offsets = clock_offsets(socket.gethostname(), device)
    gathered: list[Any] = [None] * mesh.world_size
    if mesh.world_size > 1:
        dist.gather_object(own, gathered if mesh.rank == 0 else None)
    else:
        gathered = [own]
    if offsets is None:
        return None
    timeline = _timeline(gathered, [offset.nanoseconds for offset in offsets], "rehearsed" if rehearsed else "measured")
    places = [coordinates_of(rank, plan.decisions) for rank in range(mesh.world_size)]
    pipelines = {rank: (place["dp"], place["tp"]) for rank, place in enumerate(places)}
    bubbles, busy = bubble_fractions(timeline, pipelines), busy_seconds(timeline)
    actions_file = actions_path(output).name if output else None
    ranks = tuple(
        RunRank(
            rank=rank,
            coordinates=Coordinates(**places[rank]),
            memory=item["memory"],
            bubble_fraction=bubbles[rank],
            busy_seconds=busy[rank],
            actions_file=actions_file,
            rss_bytes=item["rss"],
            allocated_bytes=item.get("allocated"),
            reserved_bytes=item.get("reserved"),
            device_used_bytes=item.get("device_used"),
            communication_bytes=dict(item["sent"]),
        )
        for rank, item in enumerate(gathered)
    )
    num_tokens = plan.inputs.training.global_batch_size * plan.inputs.training.sequence_length
    steps = tuple(
        Step(
            step=item.step,
            loss=item.loss,
            seconds=item.seconds,
            num_tokens=num_tokens,
            gradient_norm=item.gradient_norm,
            learning_rate=item.learning_rate,
        )
        for item in figures
    )
    timed = [item.seconds for item in figures[1:]] or [figures[0].seconds]
    seconds = statistics.median(timed)
    summary = Summary(
        step_seconds=seconds,
        bubble_fraction=bubble_fraction(timeline, pipelines),
        peak_bytes=max(item.memory.total_bytes for item in ranks),
        tokens_per_second=num_tokens / seconds,
    )
    where = environment(device, mesh.world_size)
    return Run(plan_hash=plan_hash(plan), rehearsed=rehearsed, environment=where, steps=steps, ranks=ranks, summary=summary), timeline


def _cuda_figures(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
        "device_used": total - free,
    }


def _timeline(gathered: list[dict[str, Any]], shifts: list[int], source: str) -> Timeline:
    """All ranks' records on one clock, in seconds from the first action. `shifts` take each rank's clock to the first's."""
    rows = [
        (rank, kind, stage, microbatch, start + shift, end + shift)
        for rank, (item, shift) in enumerate(zip(gathered, shifts, strict=True))
        for kind, stage, microbatch, start, end in item["records"]
    ]
    first = min(row[4] for row in rows)
    events = tuple(
        Event(rank, kind, stage, microbatch, (start - first) / 1e9, (end - first) / 1e9) for rank, kind, stage, microbatch, start, end in rows
    )
    return Timeline(source=source, events=events)
