"""Rehearsed bubbles against predicted ones: `python benchmarks/rehearsal.py [-o NAME]`.

For every schedule, p in {2, 4, 8} ranks and m in {4, 8, 16} micro-batches, even and uneven stages: the plan is rehearsed by
`executor.rehearse` (what `plan run --rehearse` runs), its bubble is measured with the function that measures simulated
timelines, and compared with the simulator's, which is given the machine's fixed costs: how late a sleeping process wakes,
how long a send holds its rank, how long a message takes, and a receive whose message was sent before. These are measured at each p on
two cases of their own (Naive and 1F1B of another model) that are not among the compared ones. The prediction without them stands beside.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch.distributed as dist

from benchmarks.common import make_plan, processor, table, write_results
from executor.mesh import make_mesh
from executor.processes import run_ranks
from executor.rehearse import Rehearsal, Script, script
from planner.cluster import RENDEZVOUS_SECONDS, load_cluster
from planner.errors import InputError
from planner.model import load_model
from planner.plan import Plan, make_stages, replace, stage_ranks
from planner.schedule import COMPUTE_KINDS, Action, plan_actions
from planner.timeline import Event, Timeline, bubble_fraction, simulate

SCHEDULES = (("Naive", 1), ("GPipe", 1), ("1F1B", 1), ("Interleaved1F1B", 2), ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 2))
MODEL = replace(load_model("tiny-gpt"), name="tiny-gpt-38", num_layers=38)
REFERENCE = replace(load_model("tiny-llama"), name="tiny-llama-22", num_layers=22)


class Costs(NamedTuple):
    """What the machine adds to every action, in seconds."""

    late: float
    send: float
    message: float
    receive: float


NO_COSTS = Costs(0.0, 0.0, 0.0, 0.0)


class Case(NamedTuple):
    schedule: str
    num_ranks: int
    num_microbatches: int
    stages: str
    plan: Plan


def cases(num_ranks: int, microbatches: list[int]) -> list[Case]:
    found = []
    for schedule, virtual in SCHEDULES:
        for m in microbatches:
            for stages in ("even", "uneven"):
                cuts = None if stages == "even" else _uneven(schedule, num_ranks, virtual)
                try:
                    plan = make_plan(MODEL, load_cluster("cpu"), pp=num_ranks, num_microbatches=m, schedule=schedule, virtual=virtual, stages=cuts)
                except InputError as error:
                    sys.stderr.write(f"left out: {error}\n")
                    continue
                found.append(Case(schedule, num_ranks, m, stages, plan))
    return found


def _uneven(schedule: str, num_ranks: int, virtual: int) -> Any:
    """Every other stage has half the mean number of layers, at least 2 so that none is the embedding alone; the rest share what is left."""
    count, total = num_ranks * virtual, MODEL.num_layers + 2
    small = max(2, total // (2 * count))
    sizes = [small if index % 2 == 0 else 0 for index in range(count)]
    large = [index for index in range(count) if index % 2]
    for place, index in enumerate(large):
        left = total - small * (count - len(large))
        sizes[index] = left // len(large) + (place < left % len(large))
    return make_stages(sizes, ["none"] * count, stage_ranks(schedule, num_ranks, virtual))


def predicted(plan: Plan, lines: Script, costs: Costs) -> float:
    """The simulator's bubble for the rehearsed times."""

    def seconds(action: Action) -> float:
        return costs.late + lines.seconds[action.kind, action.stage] if action.kind in COMPUTE_KINDS else 0.0

    message = max(costs.message, costs.send)
    timeline = simulate(
        plan_actions(plan.decisions), seconds, lambda action: message, blocking_send_seconds=lambda action: costs.send,
        receive_seconds=max(RENDEZVOUS_SECONDS, costs.receive - message),
    )
    return bubble_fraction(timeline)


def rehearse(plan: Plan, steps: int) -> list[Timeline]:
    """On every rank; the timelines of the steps on rank 0."""
    mesh = make_mesh(plan.decisions, dist.get_rank(), timeout_seconds=120)
    rehearsal = Rehearsal(plan, mesh, script(plan))
    found = []
    for _ in range(steps):
        rehearsal.step()
        own = [tuple(record) for record in rehearsal.recorder.records()]
        gathered: list[Any] = [None] * mesh.world_size
        dist.gather_object(own, gathered if mesh.rank == 0 else None)
        if mesh.rank == 0:
            origin = min(record[3] for records in gathered for record in records)
            events = [
                Event(rank, kind, stage, microbatch, (start - origin) / 1e9, (end - origin) / 1e9)
                for rank, records in enumerate(gathered)
                for kind, stage, microbatch, start, end in records
            ]
            found.append(Timeline(source="rehearsed", events=tuple(events)))
    return found


def costs_of(runs: list[tuple[Script, list[Timeline]]]) -> Costs:
    """The medians over all actions of the steps but the first."""
    late: list[float] = []
    sends: list[float] = []
    messages: list[float] = []
    receives: list[float] = []
    for lines, timeline in ((lines, timeline) for lines, timelines in runs for timeline in timelines[1:]):
        starts = {(event.kind[-1], event.stage + (1 if event.kind == "SEND_F" else -1), event.microbatch): event.start
                  for event in timeline.events if event.kind.startswith("SEND")}  # fmt: skip
        for event in timeline.events:
            if event.kind in COMPUTE_KINDS:
                late.append(event.end - event.start - lines.seconds[event.kind, event.stage])
            elif event.kind.startswith("SEND"):
                sends.append(event.end - event.start)
            elif event.kind.startswith("RECV"):
                sent = starts[event.kind[-1], event.stage, event.microbatch]
                if event.start <= sent:
                    messages.append(event.end - sent)
                else:
                    receives.append(event.end - event.start)
    return Costs(*(statistics.median(values or [0.0]) for values in (late, sends, messages, receives)))


def work(rank: int, world: int, store: str, microbatches: list[int], steps: int, output: str) -> None:
    """What each rank runs; rank 0 writes the rows."""
    import json

    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    references = [
        make_plan(REFERENCE, load_cluster("cpu"), pp=world, num_microbatches=count, schedule=name) for name, count in (("Naive", 4), ("1F1B", 12))
    ]
    runs = [(script(plan), rehearse(plan, steps)) for plan in references]
    costs = costs_of(runs) if rank == 0 else NO_COSTS
    rows = []
    for case in cases(world, microbatches):
        timelines = rehearse(case.plan, steps)
        if rank:
            continue
        lines = script(case.plan)
        measured = statistics.median(bubble_fraction(timeline) for timeline in timelines[1:])
        row = {
            "schedule": case.schedule, "num_ranks": world, "num_microbatches": case.num_microbatches, "stages": case.stages, "measured": measured,
            "predicted": predicted(case.plan, lines, costs), "predicted_without_costs": predicted(case.plan, lines, NO_COSTS),
        }  # fmt: skip
        rows.append(row)
        sys.stderr.write(f"{case.schedule} p {world} m {case.num_microbatches} {case.stages}: measured {100 * measured:.1f} %, "
                         f"predicted {100 * row['predicted']:.1f} %\n")  # fmt: skip
    if rank == 0:
        Path(output).write_text(json.dumps({"costs_seconds": costs._asdict(), "rows": rows}), encoding="utf-8")
    dist.destroy_process_group()


def main() -> int:
    import json
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4,8")
    parser.add_argument("--microbatches", default="4,8,16")
    parser.add_argument("--steps", type=int, default=4, help="the first is not counted")
    parser.add_argument("-o", "--output", help="name of the result files under benchmarks/results (default: DATE-rehearsal)")
    options = parser.parse_args()
    microbatches = [int(value) for value in options.microbatches.split(",")]
    rows, costs = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for num_ranks in (int(value) for value in options.ranks.split(",")):
            path = str(Path(folder) / f"{num_ranks}.json")
            run_ranks(num_ranks, work, (microbatches, options.steps, path), "the rehearsals")
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            rows += found["rows"]
            costs[num_ranks] = found["costs_seconds"]
    errors = [abs(row["measured"] - row["predicted"]) for row in rows]
    header = ("schedule", "p", "m", "stages", "measured %", "predicted %", "error, points", "without machine costs %")
    cells = [
        (row["schedule"], row["num_ranks"], row["num_microbatches"], row["stages"], f"{100 * row['measured']:.2f}", f"{100 * row['predicted']:.2f}",
         f"{100 * error:.2f}", f"{100 * row['predicted_without_costs']:.2f}")
        for row, error in zip(rows, errors, strict=True)
    ]  # fmt: skip
    within = sum(error <= 0.02 for error in errors)
    text = f"Rehearsed bubbles, {datetime.date.today()}, {processor()}\n\n" + table(header, cells)
    text += f"\nmean error {100 * statistics.fmean(errors):.2f} points, worst {100 * max(errors):.2f}; {within} of {len(errors)} within 2 points\n"
    for num_ranks, cost in costs.items():
        late, send, message, receive = (1e3 * cost[name] for name in Costs._fields)
        text += f"machine costs at p {num_ranks}: wake-up {late:.3f} ms, send {send:.3f} ms, message {message:.3f} ms, receive {receive:.3f} ms\n"
    sys.stdout.write(text)
    write_results(options.output or f"{datetime.date.today()}-rehearsal", text, {"costs_seconds": costs, "rows": rows})
    return 0 if within == len(errors) else 4


if __name__ == "__main__":
    sys.exit(main())
