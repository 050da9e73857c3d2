"""Positions and attention: fused (one operation that never stores the scores), or unfused (scores, softmax, product, one after the other).

Both go from [tokens, (a + 2k)·d], the query, key and value heads of each token side by side, to [tokens, a·d], and are causal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from msgspec import UNSET
from torch.autograd.function import once_differentiable

from planner.model import ModelSpec, RopeScaling

Heads = tuple[int, int, int]
"""Query, key and value heads of this rank."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) on the first elements of each head, all of them or a part."""

    cosine: torch.Tensor
    """[sequence, 1, turned elements / 2] in fp32 (as `sine`)."""
    sine: torch.Tensor
    num_heads: int
    """Query and key heads of this rank, which come first in a row."""
    head_dim: int
    neighbours: bool = False
    """Whether neighbours are turned against each other (GPT-J), not the halves of the turned part (Llama, GPT-NeoX)."""

    def rotate_(self, rows: torch.Tensor, direction: float) -> None:
        """Rotates the query and key heads of `rows` [tokens, ...] in place."""
        length = self.cosine.shape[0]
        heads = rows[:, : self.num_heads * self.head_dim].unflatten(1, (self.num_heads, self.head_dim)).unflatten(0, (-1, length))
        turned = heads[..., : 2 * self.cosine.shape[-1]]
        first, second = (turned[..., 0::2], turned[..., 1::2]) if self.neighbours else turned.chunk(2, -1)
        cosine, sine = self.cosine.to(rows.dtype), (self.sine * direction).to(rows.dtype)
        kept = first.clone()
        first.mul_(cosine).addcmul_(second, sine, value=-1.0)
        second.mul_(cosine).addcmul_(kept, sine)


def scaled_frequencies(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """What each element turns in a step from one position to the next, scaled. Linear: divided by the factor (Chen et al. 2023, arXiv 2306.15595).
    Llama 3.1: left where the element turns `high_freq_factor` times or more in the original length, divided where it turns `low_freq_factor` times or
    fewer, and in between a mean of both by the number of turns (its reference code)."""
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    assert scaling.rope_type == "llama3" and low is not UNSET and high is not UNSET and length is not UNSET
    turns = frequencies * (length / (2 * math.pi))
    kept = ((turns - low) / (high - low)).clamp_(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def make_rope(length: int, num_heads: int, model: ModelSpec, device: torch.device) -> Rope:
    """The tables for positions 0..length-1."""
    size = model.rotary_size
    frequencies = 1.0 / model.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    if model.rope_scaling is not UNSET:
        frequencies = scaled_frequencies(frequencies, model.rope_scaling)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies).unsqueeze(1)
    return Rope(angles.cos(), angles.sin(), num_heads, model.head_dim, model.rotary_neighbours is True)


def alibi_slopes(num_heads: int) -> list[float]:
    """Press et al. 2022 (arXiv 2108.12409, section 3): the powers of 2^(-8/n) for n heads; where n is no power of two, those of the next lower
    one and every other of the next higher one's (their code and BLOOM's)."""
    base = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (index + 1) / base) for index in range(base)]
    return slopes + [2.0 ** (-4 * (2 * index + 1) / base) for index in range(num_heads - base)]


def make_alibi(length: int, num_heads: int, first: int, last: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What is added to the scores of heads `first:last` of `num_heads`: [1, heads, sequence, sequence], minus the slope times the distance; later
    positions are minus infinity."""
    slopes = torch.tensor(alibi_slopes(num_heads)[first:last], dtype=torch.float32, device=device)
    places = torch.arange(length, dtype=torch.float32, device=device)
    distance = places.unsqueeze(0) - places.unsqueeze(1)
    later = torch.ones((length, length), dtype=torch.bool, device=device).triu_(1)
    return (slopes.view(-1, 1, 1) * distance).masked_fill_(later, -math.inf).to(dtype).unsqueeze(0)


def make_window(length: int, window: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What is added to the scores of all heads: [1, 1, sequence, sequence], minus infinity for later positions and those `window` or more before."""
    places = torch.arange(length, device=device)
    distance = places.unsqueeze(1) - places.unsqueeze(0)
    return torch.zeros((length, length), dtype=dtype, device=device).masked_fill_((distance < 0) | (distance >= window), -math.inf)[None, None]


@dataclass(frozen=True, slots=True)
class Scores:
    """What happens to the scores before their softmax."""

    scale: float
    softcap: float | None = None
    """c of c·tanh(score / c); unfused attention only."""
    bias: torch.Tensor | None = None
    """[1, heads of this rank or 1, sequence, sequence], added to the scores; minus infinity for what is later."""


class SplitHeads(torch.autograd.Function):
    """Query, key and value as views [batch, sequence, heads, head_dim] of one [tokens, ...] tensor. Saves nothing; the backward pass writes the
    three gradients into one tensor."""

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, batch: int, heads: Heads, head_dim: int) -> tuple[torch.Tensor, ...]:
        ctx.shape = qkv.shape
        ctx.set_materialize_grads(False)
        length = qkv.shape[0] // batch
        parts = qkv.split([count * head_dim for count in heads], 1)
        return tuple(part.view(batch, length, count, head_dim) for part, count in zip(parts, heads, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens = ctx.shape[0]
        return torch.cat([gradient.reshape(tokens, -1) for gradient in gradients], 1), None, None, None


def attention(qkv: torch.Tensor, batch: int, heads: Heads, head_dim: int, scores: Scores) -> torch.Tensor:
    """Fused. Saves qkv, the output, and one fp32 per token and head."""
    q, k, v = (part.transpose(1, 2) for part in SplitHeads.apply(qkv, batch, heads, head_dim))
    causal = scores.bias is None
    out = F.scaled_dot_product_attention(q, k, v, scores.bias, is_causal=causal, scale=scores.scale, enable_gqa=heads[0] != heads[1])
    return out.transpose(1, 2).reshape(qkv.shape[0], heads[0] * head_dim)


class UnfusedAttention(torch.autograd.Function):
    """Unfused: softmax(scale · q k^T) v with every step in memory.

    Saves qkv and, unless `lean`, the probabilities (tokens · a · sequence), which `lean` makes again; with dropout also its mask, a byte each.
    Query heads that share a key-value head are rows of one product, so nothing is repeated for them.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, batch: int, heads: Heads, head_dim: int, dropout: float, lean: bool, scores: Scores
    ) -> torch.Tensor:
        ctx.batch, ctx.heads, ctx.head_dim, ctx.dropout, ctx.scores = batch, heads, head_dim, dropout, scores
        query, key = _by_head(qkv, batch, heads, head_dim, 0).mul_(scores.scale), _by_head(qkv, batch, heads, head_dim, 1)
        probabilities = _probabilities(query, key, scores)
        del query, key
        mask = torch.empty_like(probabilities, dtype=torch.bool).bernoulli_(1.0 - dropout) if dropout else None
        ctx.save_for_backward(qkv, None if lean else probabilities, mask)
        if mask is not None:
            probabilities = _dropped(probabilities, mask, dropout)
        out = torch.bmm(probabilities, _by_head(qkv, batch, heads, head_dim, 2))
        del probabilities
        result = qkv.new_empty((qkv.shape[0], heads[0] * head_dim))
        _as_heads(result, batch, heads[0], head_dim).copy_(out.view(batch, heads[0], -1, head_dim))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        batch, heads, head_dim, dropout = ctx.batch, ctx.heads, ctx.head_dim, ctx.dropout
        qkv, probabilities, mask = ctx.saved_tensors
        query, key = _by_head(qkv, batch, heads, head_dim, 0).mul_(ctx.scores.scale), _by_head(qkv, batch, heads, head_dim, 1)
        if probabilities is None:
            probabilities = _probabilities(query, key, ctx.scores)
        dqkv = torch.empty_like(qkv)
        parts = dqkv.split([count * head_dim for count in heads], 1)

        def put(index: int, gradient: torch.Tensor) -> None:
            _as_heads(parts[index], batch, heads[index], head_dim).copy_(gradient.view(batch, heads[index], -1, head_dim))

        grouped = _grouped(dout, batch, heads, head_dim)
        used = probabilities if mask is None else _dropped(probabilities, mask, dropout)
        put(2, torch.bmm(used.transpose(1, 2), grouped))
        del used
        gradient = torch.bmm(grouped, _by_head(qkv, batch, heads, head_dim, 2).transpose(1, 2))
        del grouped
        if mask is not None:
            gradient = _dropped(gradient, mask, dropout)
        # zero where the causal mask made the probability zero
        gradient = torch._softmax_backward_data(gradient, probabilities, -1, probabilities.dtype)
        if ctx.scores.softcap is not None:
            gradient.mul_(torch.bmm(query, key.transpose(1, 2)).div_(ctx.scores.softcap).tanh_().square_().neg_().add_(1.0))
        put(1, torch.bmm(gradient.transpose(1, 2), query))
        put(0, torch.bmm(gradient, key).mul_(ctx.scores.scale))
        return dqkv, None, None, None, None, None, None


def _as_heads(rows: torch.Tensor, batch: int, count: int, head_dim: int) -> torch.Tensor:
    """A view [batch, heads, sequence, head_dim] of rows [tokens, heads·head_dim]."""
    return rows.view(batch, -1, count, head_dim).transpose(1, 2)


def _grouped(rows: torch.Tensor, batch: int, heads: Heads, head_dim: int) -> torch.Tensor:
    """A copy [batch · k, (heads / k) · sequence, head_dim] of rows [tokens, heads·head_dim]."""
    count = rows.shape[1] // head_dim
    copy = _as_heads(rows, batch, count, head_dim).clone(memory_format=torch.contiguous_format)
    return copy.view(batch * heads[1], -1, head_dim)


def _by_head(qkv: torch.Tensor, batch: int, heads: Heads, head_dim: int, index: int) -> torch.Tensor:
    """A copy of the query (0), key (1) or value (2) heads as `_grouped` has them."""
    start = sum(heads[:index]) * head_dim
    return _grouped(qkv[:, start : start + heads[index] * head_dim], batch, heads, head_dim)


def _probabilities(query: torch.Tensor, key: torch.Tensor, how: Scores) -> torch.Tensor:
    """softmax(query key^T) over what is not later, [batch · k, (a / k) · sequence, sequence]; the query is scaled already."""
    length = key.shape[1]
    scores = torch.bmm(query, key.transpose(1, 2))
    if how.softcap is not None:
        scores.div_(how.softcap).tanh_().mul_(how.softcap)
    if how.bias is not None:
        scores.view(-1, *how.bias.shape[1:]).add_(how.bias)
        return torch.softmax(scores, -1)
    later = torch.ones((length, length), dtype=torch.bool, device=query.device).triu_(1)
    scores.view(-1, length, length).masked_fill_(later, -math.inf)
    del later
    return torch.softmax(scores, -1)


def _dropped(values: torch.Tensor, mask: torch.Tensor, dropout: float) -> torch.Tensor:
    return (values * mask).mul_(1.0 / (1.0 - dropout))
