"""RMSNorm as plain functions of tensors, and the query/key norms: an RMSNorm on each query and key head before its rotary positions (Qwen3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from executor.attention import Rope
from executor.units import Unit


def rms_forward(x: torch.Tensor, gain: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, reciprocal root mean square in fp32 [rows, 1]) of x [rows, columns]."""
    if x.is_cuda:
        y, rstd = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], gain, epsilon)
        return y, rstd
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    rstd = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return (x * rstd).to(x.dtype).mul_(gain), rstd


def rms_backward(dy: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and of the gain."""
    if x.is_cuda:
        dx, dgain = torch.ops.aten._fused_rms_norm_backward(dy, x, [x.shape[-1]], rstd, gain, [True, True])
        return dx, dgain
    normed = x * rstd
    dgain = (dy * normed).sum(0)
    scaled = dy * gain
    projection = (normed * scaled).mean(-1, keepdim=True)
    dx = normed.mul_(projection).neg_().add_(scaled).mul_(rstd)
    return dx.to(x.dtype), dgain


@dataclass(frozen=True, slots=True)
class QueryKey:
    """What happens to the query and key heads of [tokens, (a + 2k)·d] between their projection and attention: norms, then rotary positions."""

    heads: tuple[int, int]
    """Query and key heads of this rank, which come first in a row."""
    head_dim: int
    rope: Rope | None
    epsilon: float
    """Of the norms."""
    normed: bool = False

    def forward_(self, rows: torch.Tensor, unit: Unit) -> tuple[torch.Tensor, ...]:
        """Works on `rows` in place. Returns what the backward pass needs: with norms, the heads before them and their statistics."""
        saved: list[torch.Tensor] = []
        if self.normed:
            for part, key in self._parts(rows):
                x = part.clone(memory_format=torch.contiguous_format).view(-1, self.head_dim)
                y, rstd = rms_forward(x, unit.w[key], self.epsilon)
                part.copy_(y.view(part.shape))
                del y
                saved += [x, rstd]
        if self.rope is not None:
            self.rope.rotate_(rows, 1.0)
        return tuple(saved)

    def backward_(
        self, gradients: torch.Tensor, unit: Unit, saved: tuple[torch.Tensor, ...], put: Callable[[str, torch.Tensor], None]
    ) -> None:
        """Turns the gradients of what `forward_` left into those of what it got, in place. `put(key, gradient)` takes the gains' gradients."""
        if self.rope is not None:
            self.rope.rotate_(gradients, -1.0)
        if not self.normed:
            return
        for (part, key), x, rstd in zip(self._parts(gradients), saved[0::2], saved[1::2], strict=True):
            dy = part.clone(memory_format=torch.contiguous_format).view(-1, self.head_dim)
            dx, dgain = rms_backward(dy, x, rstd, unit.w[key])
            part.copy_(dx.view(part.shape))
            del dy, dx
            put(key, dgain)

    def _parts(self, rows: torch.Tensor) -> list[tuple[torch.Tensor, str]]:
        """The query and the key heads of `rows`, as views, each with its gain's key."""
        query, key = (count * self.head_dim for count in self.heads)
        return [(rows[:, :query], "query_norm.gain"), (rows[:, query : query + key], "key_norm.gain")]
