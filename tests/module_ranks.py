"""What ranks do in the tests of running modules: train by one plan after the other; and one process that trains the plain module."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from executor.mesh import make_mesh
from executor.optimizer import OptimizerOptions
from executor.rank import RunOptions
from executor.traced_build import prepare
from executor.traced_stage import mean_loss, pipeline_sets
from executor.traced_train import ModuleTrainer
from executor.train import train
from planner.chain_plan import load_any_plan

SEED, STEPS, RATE = 5, 5, 1e-3


def work(rank: int, world_size: int, store: str, paths: list[str], clip: float, output: str) -> None:
    """Trains by each plan with the module that it names; rank 0 writes losses, gradient norms and every rank's memory."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    results = []
    for path in paths:
        plan = load_any_plan(path)
        prepared = prepare(plan, plan.inputs.model.name, SEED)
        mesh = make_mesh(plan.decisions, rank, pipeline_sets=pipeline_sets(prepared.cut, plan.decisions.stages), timeout_seconds=60)
        optimizer = OptimizerOptions(kind=plan.inputs.training.optimizer, weight_decay=0.0)
        options = RunOptions(seed=SEED, learning_rate=RATE, clip_norm=clip, optimizer=optimizer)
        trainer = ModuleTrainer(plan, prepared.cut, prepared.state, mesh, options, torch.device("cpu"))
        figures, tracker, sent = train(trainer, prepared.data, STEPS, lambda figures: None)
        memory = tracker.memory()
        own = {"place": mesh.coordinates, "sent": sent, "memory": {name: getattr(memory, name) for name in memory.__struct_fields__}}
        own["fixed"] = {name: value.double().sum().item() for name, value in trainer.fixed.items()}
        gathered = [None] * world_size
        dist.all_gather_object(gathered, own)
        results.append({"losses": [item.loss for item in figures], "norms": [item.gradient_norm for item in figures], "ranks": gathered})
    if rank == 0:
        Path(output).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def plain(plan, clip: float = 0.0):
    """Losses and gradient norms of one process with the module itself, autograd and torch's Adam, on the same micro-batches; and the module."""
    from planner.trace import build_module, example_arguments, find_callable

    reference, training, decisions = plan.inputs.model.name, plan.inputs.training, plan.decisions
    data = prepare(plan, reference, SEED).data
    torch.manual_seed(SEED)
    module, example = build_module(find_callable(reference), reference, training.precision, training.sequence_length)
    made = find_callable(reference)()
    for part, own in zip(module.modules(), (made[0] if isinstance(made, tuple) else made).modules(), strict=True):
        part.training = own.training
    positional, named, _ = example_arguments(example)
    parameters = list(module.parameters())
    optimizer = torch.optim.Adam(parameters, lr=RATE, betas=(0.9, 0.95))
    size, count = decisions.micro_batch_size, training.global_batch_size
    losses, norms = [], []
    for step in range(STEPS):
        total = 0.0
        for first in range(0, count, size):
            rows = [
                data.batch(leaf, step, range(first, first + size)) if data.is_batched(leaf) else data.fixed(leaf)
                for leaf in range(len(positional) + len(named))
            ]
            out = module(*rows[: len(positional)], **dict(zip(named, rows[len(positional) :], strict=True)))
            result = [out["loss"]] if isinstance(out, dict) else [value for value in tree_leaves(out) if isinstance(value, torch.Tensor)]
            loss = mean_loss(tuple(result)) * size / count
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, clip or float("inf")).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, module
