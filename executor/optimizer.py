"""AdamW and SGD on flat buffers, each data-parallel rank on its own shard.

| precision | weights | gradients | optimizer (Adam) | bytes a parameter |
| --- | --- | --- | --- | --- |
| mixed-bf16 | bf16 | bf16 | fp32 weights, first and second moments | 2 + 2 + 12 |
| fp32 | fp32 | fp32 | first and second moments, fp32 | 4 + 4 + 8 |
| bf16 | bf16 | bf16 | first and second moments, bf16 | 2 + 2 + 4 |

SGD (without momentum) keeps only the fp32 weights of mixed-bf16. Temporaries are CHUNK elements at a time, in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from executor.units import Unit

CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class OptimizerOptions:
    """AdamW as in Loshchilov and Hutter 2019 (arXiv 1711.05101). Only parameters with more than one dim decay."""

    kind: str = "adam"
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1


class UnitOptimizer:
    """The optimizer state of one unit's shard."""

    def __init__(self, unit: Unit, options: OptimizerOptions, mixed: bool) -> None:
        self.unit = unit
        self.options = options
        shard = unit.weight_shard
        self.master = torch.zeros_like(shard, dtype=torch.float32) if mixed else None
        state_type = torch.float32 if mixed else shard.dtype
        adam = options.kind == "adam"
        self.first = torch.zeros_like(shard, dtype=state_type) if adam else None
        self.second = torch.zeros_like(shard, dtype=state_type) if adam else None
        self.num_steps = torch.zeros((), dtype=torch.float32, device=shard.device)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The state by name, without what the options leave out."""
        named = {"master": self.master, "first": self.first, "second": self.second}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def adopt(self, weights: torch.Tensor) -> None:
        """Takes the shard's weights in fp32 as the masters."""
        if self.master is not None:
            self.master.copy_(weights)

    def step(self, learning_rate: float, scale: torch.Tensor | None) -> None:
        """One update from the unit's gradient shard times `scale`; a mixed unit's weights follow its masters."""
        unit, boundary = self.unit, self.unit.layout.num_decayed - self.unit.shard_start
        boundary = min(max(boundary, 0), unit.shard_numel)
        if unit.shard_numel:
            self.num_steps.add_(1)
        for first, last, decay in ((0, boundary, self.options.weight_decay), (boundary, unit.shard_numel, 0.0)):
            for start in range(first, last, CHUNK):
                self._step_chunk(slice(start, min(start + CHUNK, last)), learning_rate, decay, scale)

    def _step_chunk(self, part: slice, learning_rate: float, decay: float, scale: torch.Tensor | None) -> None:
        options, weights = self.options, self.unit.weight_shard[part]
        gradient = self.unit.grad_shard[part]
        target = weights if self.master is None else self.master[part]
        gradient = gradient.to(target.dtype)
        if self.first is None or self.second is None:
            if scale is not None:
                gradient.mul_(scale)
            if decay:
                target.mul_(1.0 - learning_rate * decay)
            target.add_(gradient, alpha=-learning_rate)
        else:
            torch._fused_adamw_(
                [target],
                [gradient],
                [self.first[part]],
                [self.second[part]],
                [],
                [self.num_steps],
                lr=learning_rate,
                beta1=options.beta1,
                beta2=options.beta2,
                weight_decay=decay,
                eps=options.epsilon,
                amsgrad=False,
                maximize=False,
                grad_scale=None if scale is None else scale.reciprocal(),
            )
        if self.master is not None:
            weights.copy_(target)


def squared_norm(units: list[Unit], device: torch.device) -> torch.Tensor:
    """Sum of squares of the gradients that this rank counts, in fp32."""
    parts = [
        torch.linalg.vector_norm(unit.grad_shard[first:last], dtype=torch.float32).square_()
        for unit in units
        for first, last in unit.counted_ranges()
    ]
    return torch.stack(parts).sum() if parts else torch.zeros((), device=device)
