"""Runs many plans in one start of the ranks: `torchrun ... benchmarks/worker.py PLANS.json RESULT.json --steps N --rounds K`.

Each plan is trained by the executor's own code; starting processes for each would take longer than the steps. The plans are gone through
`rounds` times, forwards and backwards in turn, so that a machine whose speed drifts treats all alike. Each has process groups of its own, which
are taken down behind it: gloo's threads wake up a hundred times a second for as long as their group is there. Rank 0 writes, for each plan, the
seconds of every step but the first of a round, and the pipeline phase's bubble and utilisation from the timeline.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from executor.data import Data, open_tokens
from executor.mesh import make_mesh
from executor.train import RunOptions, Trainer
from planner.documents import convert
from planner.plan import SCHEMA, Plan
from planner.timeline import Event, Timeline, bubble_fraction, busy_seconds, window

WARM_STEPS = 1
BUDGET_SECONDS = 2.0
"""A plan gets fewer steps where the predicted ones take longer than this in all, but three at least, or one where that takes longer still."""


def run(plan: Plan, steps: int) -> dict[str, Any] | None:
    """On every rank; the result on rank 0."""
    copies = max(1, plan.decisions.tensor_parallel // plan.inputs.model.num_key_value_heads)
    mesh = make_mesh(plan.decisions, dist.get_rank(), key_value_copies=copies, timeout_seconds=120)
    trainer = Trainer(plan, mesh, RunOptions(), torch.device("cpu"))
    training = plan.inputs.training
    vocabulary = plan.inputs.model.vocab_size
    data = Data(open_tokens(None, vocabulary), vocabulary, training.sequence_length, training.global_batch_size, 0)
    most = BUDGET_SECONDS / (plan.predictions.time.step_seconds or 1.0)
    steps = max(min(3, 1 + int(most)), min(steps, int(most)))
    seconds, records = [], []
    for _ in range(steps + WARM_STEPS):
        trainer.load(data)
        started = time.perf_counter()
        float(trainer.step().loss)
        seconds.append(time.perf_counter() - started)
        records.append([tuple(record) for record in trainer.recorder.records()])
    gathered: list[Any] = [None] * mesh.world_size
    dist.gather_object(records[WARM_STEPS:], gathered if mesh.rank == 0 else None)
    if mesh.rank:
        return None
    timelines = [_timeline(step) for step in zip(*gathered, strict=True)]
    busy = [busy_seconds(timeline) for timeline in timelines]
    return {
        "seconds": seconds[WARM_STEPS:],
        "bubbles": [bubble_fraction(timeline) for timeline in timelines],
        "utilisations": [sum(each.values()) / len(each) / (last - first) for each, (first, last) in zip(busy, map(window, timelines), strict=True)],
    }


def _timeline(gathered: Sequence[Any]) -> Timeline:
    origin = min(record[3] for records in gathered for record in records)
    events = tuple(
        Event(rank, kind, stage, microbatch, (start - origin) / 1e9, (end - origin) / 1e9)
        for rank, records in enumerate(gathered)
        for kind, stage, microbatch, start, end in records
    )
    return Timeline(source="measured", events=events)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("plans")
    parser.add_argument("output")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    documents = json.loads(Path(options.plans).read_text(encoding="utf-8"))
    plans = [convert(document, Plan, options.plans, SCHEMA) for document in documents]
    store, rank, world_size = next(dist.rendezvous("env://"))
    results: list[dict[str, list[float]]] = [{} for _ in plans]
    for turn in range(options.rounds):
        for index, plan in list(enumerate(plans))[:: -1 if turn % 2 else 1]:
            dist.init_process_group("gloo", store=dist.PrefixStore(f"{turn}-{index}", store), rank=rank, world_size=world_size)
            found = run(plan, options.steps)
            gc.collect()
            dist.barrier()
            dist.destroy_process_group()
            if rank == 0 and found:
                for key, values in found.items():
                    results[index].setdefault(key, []).extend(values)
                sys.stderr.write(f"{index + 1}/{len(plans)}: {1e3 * min(found['seconds']):.0f} ms\n")
    if rank == 0:
        Path(options.output).write_text(json.dumps(results), encoding="utf-8")
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(world_size)])


if __name__ == "__main__":
    main()
