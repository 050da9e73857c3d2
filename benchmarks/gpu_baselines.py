"""What `benchmarks/gpu.py` sets Meshwright's throughput beside: a Llama in plain PyTorch, and torchtitan's, trained by one and the same loop.

Both as torchtitan trains on one GPU: weights and Adam state in fp32, the forward pass in bf16 by autocast, AdamW fused, gradients clipped.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from planner.model import ModelSpec

TORCHTITAN = "torchtitan 0.2"
"""Whose Llama `torchtitan_llama` knows how to make."""


class PlainBlock(nn.Module):
    """RMSNorm, attention with rotary positions, RMSNorm, gated SiLU; out [batch, sequence, h] as in."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        h, self.heads, self.keys, self.head_dim = model.hidden_size, model.num_attention_heads, model.num_key_value_heads, model.head_dim
        self.norm1, self.norm2 = nn.RMSNorm(h, model.norm_epsilon), nn.RMSNorm(h, model.norm_epsilon)
        self.qkv = nn.Linear(h, (self.heads + 2 * self.keys) * self.head_dim, bias=False)
        self.out = nn.Linear(self.heads * self.head_dim, h, bias=False)
        self.up = nn.Linear(h, 2 * model.ffn_hidden_size, bias=False)
        self.down = nn.Linear(model.ffn_hidden_size, h, bias=False)

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, s, -1, self.head_dim).split([self.heads, self.keys, self.keys], 2)
        q, k = (part * cosine + torch.cat([-part[..., self.head_dim // 2 :], part[..., : self.head_dim // 2]], -1) * sine for part in (q, k))
        grouped = self.heads != self.keys
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=grouped)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, s, -1))
        gate, up = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class PlainLlama(nn.Module):
    """Logits [batch, sequence, vocabulary] of tokens [batch, sequence]."""

    cosine: torch.Tensor
    sine: torch.Tensor

    def __init__(self, model: ModelSpec, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(model) for _ in range(model.num_layers))
        self.norm, self.head = nn.RMSNorm(model.hidden_size, model.norm_epsilon), nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        frequencies = 1.0 / model.rope_theta ** (torch.arange(0, model.head_dim, 2) / model.head_dim)
        angles = torch.outer(torch.arange(length), frequencies).repeat(1, 2)[:, None]
        self.register_buffer("cosine", angles.cos().to(torch.bfloat16))
        self.register_buffer("sine", angles.sin().to(torch.bfloat16))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cosine, self.sine)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def plain_llama(model: ModelSpec, length: int) -> nn.Module:
    """A Llama as one would write it down, nothing of this package in it."""
    return PlainLlama(model, length)


def torchtitan_llama(model: ModelSpec, length: int) -> nn.Module:
    """torchtitan's Llama at the shape of `model`. Raises ImportError where torchtitan 0.2 is not installed, ValueError where it has no such shape."""
    from torchtitan.models.llama3.model.args import RoPEScalingArgs, TransformerModelArgs  # type: ignore[import-not-found,unused-ignore]
    from torchtitan.models.llama3.model.model import Transformer  # type: ignore[import-not-found,unused-ignore]

    # its feed-forward width is a multiple of `multiple_of`, here the first one
    found: nn.Module = Transformer(TransformerModelArgs(
        dim=model.hidden_size, n_layers=model.num_layers, n_heads=model.num_attention_heads, n_kv_heads=model.num_key_value_heads,
        vocab_size=model.vocab_size, multiple_of=model.ffn_hidden_size, ffn_dim_multiplier=0.1, norm_eps=model.norm_epsilon,
        rope_theta=model.rope_theta, rope_scaling_args=RoPEScalingArgs(scaling_factor=1.0), max_seq_len=length,
    ))  # fmt: skip
    count = sum(parameter.numel() for parameter in found.parameters())
    if count != model.num_parameters:
        raise ValueError(f"torchtitan's Llama has {count:,} parameters at this shape, {model.name} {model.num_parameters:,}")
    return found


PROGRAMS: dict[str, Callable[[ModelSpec, int], nn.Module]] = {"plain PyTorch loop": plain_llama, f"{TORCHTITAN}'s Llama": torchtitan_llama}


def seconds_of_step(module: nn.Module, tokens: torch.Tensor, num_microbatches: int, steps: int) -> float:
    """The median time of a training step, two warm-up steps not counted; `tokens` [batch, sequence + 1] are every micro-batch's."""
    device = tokens.device
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    seconds = []
    for _ in range(steps + 2):
        synchronize()
        start = time.perf_counter()
        for _ in range(num_microbatches):
            with torch.autocast(device.type, torch.bfloat16):
                logits = module(tokens[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            (loss / num_microbatches).backward()
            del logits, loss
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def throughput(name: str, model: ModelSpec, length: int, micro_batch_size: int, num_microbatches: int, steps: int, device: str) -> float:
    """Seconds of a step of the program `name`. Raises what its maker raises."""
    torch.manual_seed(0)
    with torch.device(device):
        module = PROGRAMS[name](model, length)
        tokens = torch.randint(0, model.vocab_size, (micro_batch_size, length + 1))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return seconds_of_step(module, tokens, num_microbatches, steps)
