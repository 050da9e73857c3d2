"""Made-up data for any module, of its example inputs' shapes and types: sample i of step k depends on the seed, k and i alone, never on the plan.

Numbers with a fraction are drawn from a normal distribution. Whole numbers are drawn below the rows of the table that they look up or the classes of
the loss that they name, elsewhere below the example's largest plus one. What is not a row per sample, and truth values, are the example's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from planner.trace import example_arguments


class ExampleData:
    """Samples of one run."""

    def __init__(self, example: Any, dtype: torch.dtype, highest: dict[int, int], seed: int) -> None:
        positional, named, rows = example_arguments(example)
        self.leaves = tree_leaves((positional, named))
        self.rows, self.dtype, self.highest, self.seed = rows, dtype, highest, seed

    def is_batched(self, leaf: int) -> bool:
        """Whether an input has a row per sample."""
        value = self.leaves[leaf]
        return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == self.rows

    def fixed(self, leaf: int) -> Any:
        """An input that is the same for all samples."""
        value = self.leaves[leaf]
        return value.to(self.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def batch(self, leaf: int, step: int, samples: Iterable[int]) -> torch.Tensor:
        """[samples, ...]: a batched input's rows for these samples of the step's global batch."""
        return torch.stack([self._sample(leaf, step, index) for index in samples])

    def _sample(self, leaf: int, step: int, index: int) -> torch.Tensor:
        example = self.leaves[leaf]
        generator = np.random.default_rng((self.seed, step, index, leaf))
        shape = tuple(example.shape[1:])
        if example.is_floating_point():
            return torch.from_numpy(np.asarray(generator.standard_normal(shape, dtype=np.float32))).to(self.dtype)
        if example.dtype == torch.bool:
            row: torch.Tensor = example[0]
            return row
        high = self.highest.get(leaf) or int(example.max()) + 1
        return torch.from_numpy(np.asarray(generator.integers(0, high, shape))).to(example.dtype)
