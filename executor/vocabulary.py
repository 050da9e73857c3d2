"""The ends of the model: the vocabulary-parallel embedding, and the head with its loss.

The vocabulary's rows are split over the tensor-parallel ranks, ceil(V / t) to each (fewer to the last), without padding, since every
collective here is over tokens and not over rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from executor.functions import HEAD_CHUNK_ELEMENTS, State, norm_again, norm_backward, norm_forward, norm_weight_gradient, sum_partials
from executor.functions import gather_tokens as gather
from executor.units import Unit


def vocabulary_range(vocab_size: int, index: int, count: int) -> tuple[int, int]:
    """First and last + 1 row of rank `index` of `count`."""
    rows = -(-vocab_size // count)
    return min(index * rows, vocab_size), min((index + 1) * rows, vocab_size)


class Embed(torch.autograd.Function):
    """Token rows times `scale` and position rows added up: [tokens] to [tokens, h], or this rank's rows of it. Saves the tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        tokens: torch.Tensor,
        state: State,
        table: Unit,
        unit: Unit | None,
        start: int,
        length: int,
        scale: float,
    ) -> torch.Tensor:
        rows = table.w["weight"]
        ctx.state, ctx.table, ctx.unit, ctx.length, ctx.scale = state, table, unit, length, scale
        if state.tp.size > 1:
            outside = (tokens < start) | (tokens >= start + rows.shape[0])
            tokens = (tokens - start).masked_fill_(outside, 0)
            x = rows.index_select(0, tokens).masked_fill_(outside.unsqueeze(1), 0)
            ctx.save_for_backward(tokens, outside)
            x = sum_partials(state, x)
        else:
            ctx.save_for_backward(tokens)
            x = rows.index_select(0, tokens)
        if scale != 1.0:
            x.mul_(scale)
        if unit is not None and "positions" in unit.w:
            x.add_(unit.w["positions"].index_select(0, positions(state, x.shape[0], length, x.device)))
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        state, table, unit, length, scale = ctx.state, ctx.table, ctx.unit, ctx.length, ctx.scale
        tokens, *outside = ctx.saved_tensors

        def add() -> None:
            if unit is not None and "positions" in unit.keys:
                unit.gradient("positions").index_add_(0, positions(state, dy.shape[0], length, dy.device), dy)
            whole = gather(state, dy)
            if outside:
                whole = whole.masked_fill(outside[0].unsqueeze(1), 0)
            table.gradient("weight").index_add_(0, tokens, whole, alpha=scale)

        state.weight_gradient(add)
        return None, None, None, None, None, None, None, None


def positions(state: State, rows: int, length: int, device: torch.device) -> torch.Tensor:
    """The position in its sequence of each of this rank's `rows` tokens."""
    first = rows * state.tp.index if state.sequence_parallel else 0
    return torch.arange(first, first + rows, device=device).remainder_(length)


@dataclass(frozen=True, slots=True)
class Head:
    """The head's parameters on this rank."""

    table: Unit
    unit: Unit
    start: int
    """First vocabulary row of this rank."""
    softcap: float | None = None
    """c of c·tanh(logit / c), which the logits go through."""


class HeadLoss(torch.autograd.Function):
    """Final norm, vocabulary-parallel projection and cross entropy: the sum of all tokens' losses times `loss_scale`.

    Saves x (h), norm statistics and the logits in the compute type (V / t), whose memory the backward pass turns into their
    gradient in place; the fp32 work is done on HEAD_CHUNK_ELEMENTS logits at a time.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, targets: torch.Tensor, state: State, head: Head) -> torch.Tensor:
        normed, *statistics = _final_norm(state, head.unit, x)
        logits = gather(state, normed) @ head.table.w["weight"].t()
        del normed
        _finish_(logits, head)
        losses, maxima, sums = _losses(state, logits, targets, head.start)
        ctx.state, ctx.head = state, head
        ctx.save_for_backward(x, *statistics, logits, targets, maxima, sums)
        total = losses.sum()
        state.loss_sum = total if state.loss_sum is None else state.loss_sum + total
        return total * state.loss_scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        state, head = ctx.state, ctx.head
        table, unit = head.table, head.unit
        x, *statistics, logits, targets, maxima, sums = ctx.saved_tensors
        statistics = tuple(statistics)
        dlogits = _logits_gradient_(logits, targets, maxima, sums, head, dloss * state.loss_scale)
        dwhole = dlogits @ table.w["weight"]
        dnormed = sum_partials(state, dwhole)
        del dwhole

        gain, bias = unit.w.get("norm.gain"), unit.w.get("norm.bias")
        late = (state.kept(unit, gain), state.kept(unit, bias))

        def add() -> None:
            again = norm_again(state, x, statistics, *late) if statistics else x
            table.gradient("weight").addmm_(dlogits.t(), gather(state, again))
            if "bias" in unit.keys:
                unit.gradient("bias").add_(dlogits.sum(0))

        state.weight_gradient(add)
        if gain is not None:
            dnormed, dgain, dbias = norm_backward(state, dnormed, x, statistics, gain, bias)
            norm_weight_gradient(state, unit, "norm", dgain, dbias)
        return dnormed, None, None, None


def head_logits(x: torch.Tensor, state: State, head: Head) -> torch.Tensor:
    """This rank's columns of the logits, [tokens, V / t], without a loss."""
    logits = gather(state, _final_norm(state, head.unit, x)[0]) @ head.table.w["weight"].t()
    _finish_(logits, head)
    return logits


def _finish_(logits: torch.Tensor, head: Head) -> None:
    """The logits' bias and soft-capping, in place."""
    if "bias" in head.unit.keys:
        logits.add_(head.unit.w["bias"])
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)


def _final_norm(state: State, unit: Unit, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if "norm.gain" not in unit.keys:
        return (x,)
    return norm_forward(state, x, unit.w["norm.gain"], unit.w.get("norm.bias"))


def _chunks(rows: int, columns: int) -> list[slice]:
    size = max(1, HEAD_CHUNK_ELEMENTS // columns)
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def _own_targets(targets: torch.Tensor, start: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets as columns of this rank (0 where another rank has them), and which are elsewhere."""
    outside = (targets < start) | (targets >= start + columns)
    return (targets - start).masked_fill_(outside, 0), outside


def _losses(state: State, logits: torch.Tensor, targets: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
    """Loss of each token, and the row maxima and sums of exponentials that its gradient needs; all fp32 [tokens]."""
    rows, columns = logits.shape
    maxima = logits.amax(1).float()
    state.tp.all_reduce(maxima, dist.ReduceOp.MAX)
    sums, found = torch.empty_like(maxima), torch.empty_like(maxima)
    columns_of, outside = _own_targets(targets, start, columns)
    for part in _chunks(rows, columns):
        shifted = logits[part] - maxima[part].unsqueeze(1)
        found[part] = shifted.gather(1, columns_of[part].unsqueeze(1)).squeeze(1)
        sums[part] = shifted.exp_().sum(1)
        del shifted
    found.masked_fill_(outside, 0)
    state.tp.all_reduce(sums)
    state.tp.all_reduce(found)
    return sums.log() - found, maxima, sums


def _logits_gradient_(
    logits: torch.Tensor, targets: torch.Tensor, maxima: torch.Tensor, sums: torch.Tensor, head: Head, scale: torch.Tensor
) -> torch.Tensor:
    """(softmax - one-hot of the target) · scale, times the slope of soft-capping, written over the logits."""
    rows, columns = logits.shape
    columns_of, outside = _own_targets(targets, head.start, columns)
    minus = torch.where(outside, 0.0, -1.0).unsqueeze(1)
    factor = scale / sums
    for part in _chunks(rows, columns):
        soft = (logits[part] - maxima[part].unsqueeze(1)).exp_()
        soft.mul_(factor[part].unsqueeze(1))
        soft.scatter_add_(1, columns_of[part].unsqueeze(1), minus[part] * scale)
        if head.softcap is not None:
            soft.mul_(logits[part].to(torch.float32, copy=True).div_(head.softcap).square_().neg_().add_(1.0))
        logits[part] = soft
        del soft
    return logits
