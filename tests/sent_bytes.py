"""What ranks run in tests/test_executor_bytes.py: one step of each of some plans, the bytes sent counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from executor.data import Data, open_tokens
from executor.mesh import make_mesh
from executor.train import RunOptions, Trainer
from planner.documents import convert
from planner.plan import SCHEMA, Plan


def work(rank: int, world: int, store: str, documents: list[Any], output: str) -> None:
    """Rank r writes the bytes that it sent, by axis, for each plan, to `output` with its number behind."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    found = []
    for document in documents:
        plan = convert(document, Plan, "a test's plan", SCHEMA)
        copies = max(1, plan.decisions.tensor_parallel // plan.inputs.model.num_key_value_heads)
        mesh = make_mesh(plan.decisions, rank, key_value_copies=copies, timeout_seconds=60)
        trainer = Trainer(plan, mesh, RunOptions(), torch.device("cpu"))
        model, training = plan.inputs.model, plan.inputs.training
        trainer.load(Data(open_tokens(None, model.vocab_size), model.vocab_size, training.sequence_length, training.global_batch_size, 0))
        mesh.sent_bytes.clear()
        trainer.step()
        found.append({"pp": mesh.coordinates["pp"], **{axis: mesh.sent_bytes[axis] for axis in ("tp", "dp")}})
    Path(f"{output}{rank}").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()
