"""torchtitan's way: DTensor tensor parallelism with sequence parallelism and a vocabulary-parallel loss, FSDP2, and torch's pipeline schedules."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from reference_model import CLIP, Stage, make_optimizer, make_stage
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from executor.data import Data
from planner.plan import Plan, stage_ranks

SCHEDULES = {
    "1F1B": Schedule1F1B,
    "Interleaved1F1B": ScheduleInterleaved1F1B,
    "InterleavedZeroBubble": ScheduleInterleavedZeroBubble,
    "ZBVZeroBubble": ScheduleZBVZeroBubble,
}


def split_tensors(stage: Stage, mesh: DeviceMesh) -> None:
    """Megatron's cut of every block by DTensor, with the rows between split along the sequence."""
    ends: dict[str, object] = {}
    if stage.embed_tokens is not None:
        ends["embed_tokens"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    if stage.lm_head is not None:
        ends["norm"] = SequenceParallel()
        ends["lm_head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(stage, mesh, ends)  # type: ignore[arg-type]
    for block in stage.layers.values():
        parallelize_module(
            block,
            mesh,
            {
                "input_layernorm": SequenceParallel(),
                "self_attn": PrepareModuleInput(input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)),
                "self_attn.q_proj": ColwiseParallel(),
                "self_attn.k_proj": ColwiseParallel(),
                "self_attn.v_proj": ColwiseParallel(),
                "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
                "post_attention_layernorm": SequenceParallel(),
                "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
                "mlp.gate_proj": ColwiseParallel(),
                "mlp.up_proj": ColwiseParallel(),
                "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
            },
        )


class DTensorTrainer:
    """A rank of the reference. Data-parallel ranks shard by `fully_shard`: with resharding after the forward pass where the plan says
    ZeRO-3, without where it says less."""

    def __init__(self, plan: Plan, seed: int) -> None:
        decisions, training = plan.decisions, plan.inputs.training
        self.decisions, self.length = decisions, training.sequence_length
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # advises two axes' norms in one message
        p, d, t = decisions.pipeline_parallel, decisions.data_parallel, decisions.tensor_parallel
        mesh = init_device_mesh("cpu", (p, d, t), mesh_dim_names=("pp", "dp", "tp"))
        self.place = dict(zip(("pp", "dp", "tp"), mesh.get_coordinate() or (), strict=True))
        self.pp_group = mesh["pp"].get_group()
        self.tokens_of_rank = decisions.num_microbatches * decisions.micro_batch_size * self.length
        ranks = stage_ranks(decisions.schedule, p, decisions.num_virtual_stages)
        own = [index for index, rank in enumerate(ranks) if rank == self.place["pp"]]
        self.has_first, self.has_last = own[0] == 0, own[-1] == len(ranks) - 1
        self.stages = [make_stage(plan.inputs.model, index, len(ranks), self.length, seed) for index in own]
        for stage in self.stages:
            if t > 1:
                split_tensors(stage, mesh["tp"])
            if d > 1:
                again = decisions.zero_stage == 3
                for block in stage.layers.values():
                    fully_shard(block, mesh=mesh["dp"], reshard_after_forward=again)
                fully_shard(stage, mesh=mesh["dp"], reshard_after_forward=again)
        self.optimizer = make_optimizer(nn.ModuleList(self.stages))
        self.schedule: Any = None
        if p > 1:
            device = torch.device("cpu")
            parts = [PipelineStage(stage, i, len(ranks), device, group=self.pp_group) for i, stage in zip(own, self.stages, strict=True)]
            wanted: Any = SCHEDULES[decisions.schedule]
            one = decisions.schedule == "1F1B"
            self.schedule = wanted(parts[0] if one else parts, decisions.num_microbatches, loss_fn=self.loss, scale_grads=False)
        self.parallel_loss = t > 1
        self.step_index = 0

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / self.tokens_of_rank

    def context(self) -> AbstractContextManager[None]:
        return loss_parallel() if self.parallel_loss else nullcontext()

    def step(self, data: Data) -> float:
        """One optimizer step; the mean loss over the global batch on every rank."""
        count = self.decisions.num_microbatches * self.decisions.micro_batch_size
        first = self.place["dp"] * count
        tokens, targets = (part.view(count, self.length) for part in data.batch(self.step_index, range(first, first + count), 1))
        total = torch.zeros(())
        with self.context():
            if self.schedule is None:
                for part, target in zip(tokens.split(self.decisions.micro_batch_size), targets.split(self.decisions.micro_batch_size), strict=True):
                    loss = self.loss(self.stages[0](part), target)
                    loss.backward()
                    total += plain(loss)
            else:
                losses: list[torch.Tensor] = []
                ends = {"target": targets, "losses": losses} if self.has_last else {}
                self.schedule.step(*([tokens] if self.has_first else []), **ends, return_outputs=False)
                total += sum(plain(loss) for loss in losses)
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        dist.all_reduce(total)
        self.step_index += 1
        return float(total) / (self.decisions.data_parallel * self.decisions.tensor_parallel)

    def clip(self) -> None:
        """By the norm over all ranks: DTensor sums over its own mesh, a message over the pipeline's."""
        parameters = [parameter for stage in self.stages for parameter in stage.parameters() if parameter.grad is not None]
        norm = plain(nn.utils.get_total_norm([parameter.grad for parameter in parameters]))
        if self.decisions.pipeline_parallel > 1:
            norm = norm.square()
            dist.all_reduce(norm, group=self.pp_group)
            norm = norm.sqrt()
        nn.utils.clip_grads_with_norm_(parameters, CLIP, norm)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
