"""A Llama as one writes it with torch.nn, cut by stage, and two ways of training it in parallel that others take, to compare the executor with:
`reference_dtensor.py` (torchtitan's) and `reference_plain.py` (picotron's). Modules are named as Hugging Face names them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from executor.huggingface import global_names, to_huggingface
from executor.units import initial_value
from planner.model import ModelSpec

LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0


class Attention(nn.Module):
    """Causal attention with rotary positions; the number of heads follows from the projections' sizes."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, spec.query_size, bias=False)
        self.k_proj = nn.Linear(spec.hidden_size, spec.key_value_size, bias=False)
        self.v_proj = nn.Linear(spec.hidden_size, spec.key_value_size, bias=False)
        self.o_proj = nn.Linear(spec.query_size, spec.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


class FeedForward(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(spec.ffn_hidden_size, spec.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_epsilon)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_epsilon)
        self.mlp = FeedForward(spec)

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cosine, sine)
        return x + self.mlp(self.post_attention_layernorm(x))


class Stage(nn.Module):
    """Some consecutive layers: [batch, length] tokens or [batch, length, h] to the latter, or to logits on the last stage."""

    def __init__(self, spec: ModelSpec, blocks: Iterable[int], length: int, *, first: bool, last: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size) if first else None
        self.layers = nn.ModuleDict({str(index): Block(spec) for index in blocks})
        self.norm = nn.RMSNorm(spec.hidden_size, eps=spec.norm_epsilon) if last else None
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False) if last else None
        frequencies = 1.0 / spec.rope_theta ** (torch.arange(0, spec.head_dim, 2) / spec.head_dim)
        angles = torch.outer(torch.arange(length), frequencies)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        for layer in self.layers.values():
            x = layer(x, self.cosine, self.sine)
        if self.norm is not None and self.lm_head is not None:
            x = self.lm_head(self.norm(x))
        return x


def make_stage(spec: ModelSpec, index: int, count: int, length: int, seed: int) -> Stage:
    """Stage `index` of `count`, blocks split evenly, with the executor's initial weights."""
    size, rest = divmod(spec.num_layers, count)
    if rest:
        raise ValueError(f"{spec.num_layers} blocks do not split evenly over {count} stages")
    stage = Stage(spec, range(index * size, (index + 1) * size), length, first=index == 0, last=index == count - 1)
    names = to_huggingface(spec, lambda piece: initial_value(piece, seed))
    assert sum(1 for _ in global_names(spec)) == len(names)
    own = stage.state_dict()
    stage.load_state_dict({name: names[f"model.{name}" if name != "lm_head.weight" else name] for name in own})
    return stage


def make_optimizer(stage: nn.Module) -> torch.optim.Optimizer:
    """torch's fused AdamW; norms' gains do not decay, as in the executor."""
    weights = [weight for weight in stage.parameters() if weight.dim() > 1]
    gains = [weight for weight in stage.parameters() if weight.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=LEARNING_RATE, betas=BETAS, fused=True)
