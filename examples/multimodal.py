"""A vision tower in front of language blocks: two kinds of layers in one chain, and a branch that joins halfway.

    plan solve --model examples.multimodal:build --cluster a100-80gb:8 --global-batch-size 64

    plan solve --model examples.multimodal:small --cluster cpu:2 --global-batch-size 16 --pp 2 --precision fp32 -o plan.json
    plan run plan.json --model examples.multimodal:small --steps 5 -o run.json

The text's embedding is a branch of its own; it lies on the stage where image and text tokens are joined.
"""

import torch
from torch import nn


class Block(nn.Module):
    """Attention and MLP, each beside its residual connection."""

    def __init__(self, hidden: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x.shape
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))
        return x + self.mlp(self.norm2(x))


class VisionLanguage(nn.Module):
    def __init__(
        self, image: int, patch: int, vision: tuple[int, int, int], language: tuple[int, int, int], vocabulary: int, text: int
    ) -> None:  # fmt: skip
        super().__init__()
        (depth, width, heads), (layers, hidden, language_heads) = vision, language
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.tower = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.project = nn.Linear(width, hidden)
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.Sequential(*(Block(hidden, language_heads, causal=True) for _ in range(layers)))
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        self.example_inputs = (torch.zeros(1, 3, image, image), torch.zeros(1, text, dtype=torch.long))

    def forward(self, image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        seen = self.project(self.tower(self.patches(image).flatten(2).transpose(1, 2)))
        joined = torch.cat([seen, self.embedding(ids)], dim=1)
        logits = self.head(self.blocks(joined)[:, seen.shape[1] : -1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def build() -> nn.Module:
    """A tower of the size of ViT-L/14 at 336 pixels and 16 language blocks of 2,048."""
    return VisionLanguage(336, 14, (24, 1024, 16), (16, 2048, 16), vocabulary=32_000, text=512)


def small() -> nn.Module:
    """The same in small, for CPUs."""
    return VisionLanguage(16, 4, (2, 32, 2), (3, 64, 4), vocabulary=128, text=8)
