"""picotron's way: plain column- and row-parallel linears with autograd functions over collectives, data parallelism by all-reduce of gradient
buckets that starts while the backward pass runs, and 1F1B with paired messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from reference_model import CLIP, Stage, make_optimizer, make_stage
from torch import nn

from executor.data import Data
from planner.plan import Plan

BUCKET_BYTES = 25 * 2**20


class SumGradient(torch.autograd.Function):
    """Passes on; sums the gradient over the tensor-parallel ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None]:
        dx = dx.contiguous()
        dist.all_reduce(dx, group=ctx.group)
        return dx, None


class Sum(torch.autograd.Function):
    """Sums over the tensor-parallel ranks; passes the gradient on."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        x = x.contiguous()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dx, None


class GatherColumns(torch.autograd.Function):
    """The ranks' columns side by side; each takes its own of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group, ctx.size = group, x.shape[-1]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dx.narrow(-1, dist.get_rank(ctx.group) * ctx.size, ctx.size).contiguous(), None


class ColumnLinearFunction(torch.autograd.Function):
    """x W^T; in the backward pass the input's gradient is summed while the weight's is computed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight
        work = dist.all_reduce(dx, group=ctx.group, async_op=True)
        dweight = dy.flatten(0, 1).t() @ x.flatten(0, 1)
        assert work is not None
        work.wait()
        return dx, dweight, None


class ColumnLinear(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, size: int, group: Any, *, gather: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().chunk(size, 0)[rank].clone())
        self.group, self.gather = group, gather

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = ColumnLinearFunction.apply(x, self.weight, self.group)
        return GatherColumns.apply(y, self.group) if self.gather else y  # type: ignore[no-any-return]


class RowLinear(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, size: int, group: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().chunk(size, 1)[rank].clone())
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Sum.apply(F.linear(x, self.weight), self.group)  # type: ignore[no-any-return]


class Embedding(nn.Module):
    """A vocabulary-parallel table."""

    def __init__(self, table: nn.Embedding, rank: int, size: int, group: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(table.weight.detach().chunk(size, 0)[rank].clone())
        self.start, self.group = rank * self.weight.shape[0], group

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        outside = (tokens < self.start) | (tokens >= self.start + self.weight.shape[0])
        rows = F.embedding((tokens - self.start).masked_fill(outside, 0), self.weight).masked_fill(outside.unsqueeze(-1), 0)
        return Sum.apply(rows, self.group)  # type: ignore[no-any-return]


def split_tensors(stage: Stage, rank: int, size: int, group: Any) -> None:
    for block in stage.layers.values():
        for part, names in ((block.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj")), (block.mlp, ("gate_proj", "up_proj", "down_proj"))):
            for name in names:
                kind = RowLinear if name in ("o_proj", "down_proj") else ColumnLinear
                setattr(part, name, kind(getattr(part, name), rank, size, group))
    if stage.embed_tokens is not None:
        stage.embed_tokens = Embedding(stage.embed_tokens, rank, size, group)  # type: ignore[assignment]
    if stage.lm_head is not None:
        stage.lm_head = ColumnLinear(stage.lm_head, rank, size, group, gather=True)  # type: ignore[assignment]


class Buckets:
    """Gradients as views of flat buckets, each all-reduced as soon as the last micro-batch's backward pass has filled it."""

    def __init__(self, parameters: list[nn.Parameter], group: Any, size: int) -> None:
        self.group, self.size, self.enabled = group, size, False
        self.works: list[Any] = []
        self.flats: list[torch.Tensor] = []
        self.missing: list[set[nn.Parameter]] = []
        self.members: list[list[nn.Parameter]] = [[]]
        held = 0
        for parameter in reversed(parameters):
            if held and held + parameter.numel() * 4 > BUCKET_BYTES:
                self.members.append([])
                held = 0
            self.members[-1].append(parameter)
            held += parameter.numel() * 4
        for index, members in enumerate(self.members):
            flat = torch.zeros(sum(parameter.numel() for parameter in members))
            offset = 0
            for parameter in members:
                parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
                offset += parameter.numel()
                parameter.register_post_accumulate_grad_hook(self.hook(index))
            self.flats.append(flat)

    def hook(self, index: int) -> Callable[[torch.Tensor], None]:
        def ready(parameter: torch.Tensor) -> None:
            if not self.enabled or self.size == 1:
                return
            self.missing[index].discard(parameter)  # type: ignore[arg-type]
            if not self.missing[index]:
                self.flats[index].div_(self.size)
                self.works.append(dist.all_reduce(self.flats[index], group=self.group, async_op=True))

        return ready

    def last_microbatch(self) -> None:
        self.enabled = True
        self.missing = [set(members) for members in self.members]

    def finish(self) -> None:
        for work in self.works:
            work.wait()
        self.works, self.enabled = [], False

    def clear(self) -> None:
        for flat in self.flats:
            flat.zero_()


class PlainTrainer:
    """A rank of the reference."""

    def __init__(self, plan: Plan, seed: int) -> None:
        decisions, training = plan.decisions, plan.inputs.training
        self.decisions, self.length, self.hidden = decisions, training.sequence_length, plan.inputs.model.hidden_size
        p, d, t = decisions.pipeline_parallel, decisions.data_parallel, decisions.tensor_parallel
        grid, rank = torch.arange(p * d * t).view(p, d, t), dist.get_rank()
        self.pp, self.dp, self.tp = ((grid == rank).nonzero()[0]).tolist()
        self.pp_ranks = grid[:, self.dp, self.tp].tolist()

        def group(lists: list[list[int]]) -> Any:
            return dist.new_subgroups_by_enumeration(lists)[0]

        self.tp_group = group(grid.reshape(-1, t).tolist())
        self.dp_group = group(grid.transpose(1, 2).reshape(-1, d).tolist())
        self.pp_group = group(grid.permute(1, 2, 0).reshape(-1, p).tolist())
        stage = make_stage(plan.inputs.model, self.pp, p, self.length, seed)
        if t > 1:
            split_tensors(stage, self.tp, t, self.tp_group)
        self.stage = stage
        self.buckets = Buckets(list(stage.parameters()), self.dp_group, d)
        self.optimizer = make_optimizer(stage)
        self.first, self.last = self.pp == 0, self.pp == p - 1
        self.tokens_of_rank = decisions.num_microbatches * decisions.micro_batch_size * self.length
        self.step_index = 0

    def step(self, data: Data) -> float:
        """One optimizer step; the mean loss over the global batch on every rank."""
        m, size = self.decisions.num_microbatches, self.decisions.micro_batch_size
        first = self.dp * m * size
        batch = data.batch(self.step_index, range(first, first + m * size), m)
        self.tokens, self.targets = (part.view(m, size, self.length) for part in batch)
        self.total = torch.zeros(())
        self.run_1f1b(m)
        self.buckets.finish()
        self.clip()
        self.optimizer.step()
        self.buckets.clear()
        dist.all_reduce(self.total)
        self.step_index += 1
        return float(self.total) / (self.decisions.data_parallel * self.decisions.tensor_parallel)

    def run_1f1b(self, m: int) -> None:
        """Micro-batches of warm-up forwards, then one forward and one backward in turn, then the backwards left."""
        waiting: list[tuple[torch.Tensor | None, torch.Tensor]] = []
        warmup = min(self.decisions.pipeline_parallel - self.pp - 1, m)
        for index in range(warmup):
            waiting.append(self.forward(index, self.receive(-1)))
            self.send(waiting[-1][1], 1)
        arrived = self.receive(-1) if warmup < m else None
        for index in range(warmup, m):
            waiting.append(self.forward(index, arrived))
            gradient = self.exchange(waiting[-1][1], 1)
            done = self.backward(*waiting.pop(0), gradient, last=index - warmup == m - 1)
            if index < m - 1:
                arrived = self.exchange(done, -1)
            else:
                self.send(done, -1)
        for left in range(warmup, 0, -1):
            self.send(self.backward(*waiting.pop(0), self.receive(1), last=left == 1), -1)

    def forward(self, index: int, x: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor]:
        out = self.stage(self.tokens[index] if x is None else x.requires_grad_())
        if self.last:
            out = F.cross_entropy(out.flatten(0, 1), self.targets[index].flatten(), reduction="sum") / self.tokens_of_rank
            self.total += out.detach()
        return x, out

    def backward(self, x: torch.Tensor | None, out: torch.Tensor, gradient: torch.Tensor | None, *, last: bool) -> torch.Tensor | None:
        if last:
            self.buckets.last_microbatch()
        torch.autograd.backward(out, gradient)
        return None if x is None else x.grad

    def clip(self) -> None:
        """By the norm over all ranks: parameters that are not split count on the first tensor-parallel rank."""
        split = [weight.grad for weight in self.stage.parameters() if weight.dim() > 1 and weight.grad is not None]
        whole = [weight.grad for weight in self.stage.parameters() if weight.dim() == 1 and weight.grad is not None]
        norm = nn.utils.get_total_norm(split if self.tp else split + whole).square()
        if self.decisions.tensor_parallel > 1:
            dist.all_reduce(norm, group=self.tp_group)
        if self.decisions.pipeline_parallel > 1:
            dist.all_reduce(norm, group=self.pp_group)
        nn.utils.clip_grads_with_norm_(self.stage.parameters(), CLIP, norm.sqrt())

    # messages

    def neighbour(self, step: int) -> int | None:
        place = self.pp + step
        return self.pp_ranks[place] if 0 <= place < len(self.pp_ranks) else None

    def talk(self, sent: torch.Tensor | None, to: int | None, source: int | None) -> torch.Tensor | None:
        arrived = None
        messages = []
        if sent is not None and to is not None:
            messages.append(dist.P2POp(dist.isend, sent.detach().contiguous(), to, self.pp_group))
        if source is not None:
            arrived = torch.empty(self.decisions.micro_batch_size, self.length, self.hidden)
            messages.append(dist.P2POp(dist.irecv, arrived, source, self.pp_group))
        if messages:
            for work in dist.batch_isend_irecv(messages):
                work.wait()
        return arrived

    def send(self, tensor: torch.Tensor | None, step: int) -> None:
        self.talk(tensor, self.neighbour(step), None)

    def receive(self, step: int) -> torch.Tensor | None:
        return self.talk(None, None, self.neighbour(step))

    def exchange(self, tensor: torch.Tensor | None, step: int) -> torch.Tensor | None:
        """Sends to a neighbour and receives from it."""
        return self.talk(tensor, self.neighbour(step), self.neighbour(step))
