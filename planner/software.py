"""What a training program does beyond the plan: its kernels and what it overlaps. Facts about programs, as data."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Literal

from planner.documents import Document, convert
from planner.errors import InputError


class Software(Document, kw_only=True):
    """One training program, as far as its step time depends on it."""

    name: str
    attention: Literal["fused", "unfused"] = "fused"
    """Fused attention (flash) never writes the s x s scores; unfused writes and reads them several times."""
    causal_skip: bool = True
    """Whether fused attention skips the half of the scores that the causal mask removes."""
    attention_speed: float = 1.0
    """Speed of its fused attention over that of FlashAttention-2, whose share of the peak the cluster gives."""
    softmax_passes: float = 4.5
    """Times that unfused attention reads or writes the scores in the forward pass."""
    elementwise_passes: float = 1.0
    """Memory traffic of norms, activations and residuals over that of perfectly fused kernels."""
    gradient_bytes: int = 2
    """Bytes of a gradient element in the data-parallel reduction, for 16-bit weights."""
    optimizer_traffic_bytes: float = 34.0
    """Bytes that the optimizer step reads and writes per parameter that it owns: gradients, moments, master weights, norm."""
    overlap_reduction: bool = False
    """Whether the gradient reduction runs while the last micro-batch's backward pass does."""
    overlap_gathers: bool = True
    """Whether ZeRO-3 gathers the next layer's weights while this one computes."""
    overlap_tensor_parallel: float = 0.0
    """Share of the tensor-parallel communication that hides behind matrix products."""
    selective_recompute: Literal["core", "op"] = "core"
    """What selective recomputation runs again: the attention core, or every second matrix product and the element-wise rest."""
    scatter_transfers: bool = False
    """Whether each tensor-parallel rank sends 1/t of a stage's output and the receivers gather it (SC21, section 4.1)."""
    step_seconds: float = 0.0
    """Fixed cost of a step: data loading, launches, logging."""
    source: str = ""


@functools.cache
def presets() -> dict[str, Software]:
    """All known programs by name."""
    text = (resources.files("planner") / "data" / "software.json").read_text(encoding="utf-8")
    found = [convert(item, Software, "software.json") for item in json.loads(text)]
    return {item.name: item for item in found}


def load_software(name: str, where: str = "software") -> Software:
    """The program called `name`. Raises InputError when it isn't known."""
    if name not in presets():
        raise InputError(where, name, f"one of {', '.join(sorted(presets()))} is expected")
    return presets()[name]
