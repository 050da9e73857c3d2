"""What ranks run in tests/test_executor_channels.py: some steps of each of some plans, with messages that carry tags and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from executor.data import Data, open_tokens
from executor.mesh import make_mesh
from executor.train import RunOptions, Trainer, train
from planner.documents import convert
from planner.plan import SCHEMA, Plan


def work(rank: int, world: int, store: str, documents: list[Any], num_steps: int, output: str) -> None:
    """Rank 0 writes the losses of each plan to `output`: first those with tags, then those without; and how many channels it has of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    found = []
    for document in documents:
        plan = convert(document, Plan, "a test's plan", SCHEMA)
        model, training = plan.inputs.model, plan.inputs.training
        losses, groups = [], 0
        for tagged in (True, False):
            mesh = make_mesh(plan.decisions, rank, timeout_seconds=60, tagged=tagged)
            trainer = Trainer(plan, mesh, RunOptions(), torch.device("cpu"))
            data = Data(open_tokens(None, model.vocab_size), model.vocab_size, training.sequence_length, training.global_batch_size, 0)
            losses.append([step.loss for step in train(trainer, data, num_steps, lambda step: None)[0]])
            groups = len({id(group) for group in mesh.channels.values()})
            del trainer
            mesh.close()
        found.append({"losses": losses, "groups": groups})
    if rank == 0:
        Path(output).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()
