"""A decoder whose layers alternate between local and global attention, as Gemma's do: blocks that are not alike.

    plan solve --model examples.alternating:build --cluster a100-80gb:8 --global-batch-size 64 --sequence-length 8192

Five layers in six attend to the last `window` tokens only. They keep and compute far less than the sixth, so stages
with equal numbers of layers take unequal times. The module is a bare `nn.Module` that starts with an embedding: its
inputs are token ids, and --sequence-length says how many. It returns its loss, so that the loss is planned too.
"""

import torch
from torch import nn


class Attention(nn.Module):
    """Causal attention over everything before a token, or over a window by blocks of queries."""

    def __init__(self, hidden: int, heads: int, window: int | None) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x.shape
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if self.window is None or self.window >= length:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            parts = []
            for start in range(0, length, self.window):
                end, first = min(start + self.window, length), max(start - self.window, 0)
                ahead = torch.arange(first, end) - torch.arange(start, end)[:, None]
                seen = (ahead <= 0) & (ahead > -self.window)
                parts.append(nn.functional.scaled_dot_product_attention(q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], seen))
            mixed = torch.cat(parts, dim=2)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, ffn: int, window: int | None) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.attention = Attention(hidden, heads, window)
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((hidden, ffn), (hidden, ffn), (ffn, hidden)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        h = self.mlp_norm(x)
        return x + self.down(nn.functional.gelu(self.gate(h), approximate="tanh") * self.up(h))


class Decoder(nn.Module):
    def __init__(self, layers: int, hidden: int, heads: int, ffn: int, vocabulary: int, window: int, every: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads, ffn, None if index % every == every - 1 else window) for index in range(layers))
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def build() -> nn.Module:
    """About a billion parameters: 26 layers with a large vocabulary, as in Gemma 3 1B (arXiv 2503.19786)."""
    return Decoder(layers=26, hidden=1152, heads=4, ffn=6912, vocabulary=262_144, window=512)


def small() -> nn.Module:
    """The same in small, for CPUs."""
    return Decoder(layers=6, hidden=64, heads=4, ffn=128, vocabulary=512, window=16, every=3)
