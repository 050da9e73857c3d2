"""What a training program does beyond the plan: its kernels and what it overlaps. Facts about programs, as data."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Literal

from planner.documents import Document, convert
from planner.errors import InputError


class Software(Document, frozen=True, kw_only=True):
    """One training program, as far as its step time depends on it."""

    name: str
    compute_scale: float = 1.0
    """Fitted: time of its compute over what its kernels account for; 1 where nothing was fitted."""
    matmul_speed: float = 1.0
    """Speed of its matrix products over what the cluster's efficiency says; below 1 with libraries new to the GPU."""
    native_kernels: bool = False
    """Whether it uses kernels tuned for the GPU at hand, as Transformer Engine does: `native_matmul` and `native_attention`."""
    cast_bytes: float = 0.0
    """Bytes read and written per element of a linear layer's operands to cast them to fp8; 0 without fp8."""
    attention: Literal["fused", "unfused"] = "fused"
    """Fused attention (flash) never writes the s x s scores; unfused writes and reads them several times."""
    causal_skip: bool = True
    """Whether fused attention skips the half of the scores that the causal mask removes."""
    attention_speed: float = 1.0
    """Speed of its fused attention over that of FlashAttention-2, whose share of the peak the cluster gives."""
    softmax_passes: float = 4.5
    """Times that unfused attention reads or writes the scores in the forward pass; one more in the backward pass."""
    elementwise_passes: float = 1.0
    """Memory traffic of norms, activations and residuals over that of kernels as fused as Megatron's."""
    loss_bytes: float = 60.0
    """Bytes read and written per logit by the cross-entropy, forward and backward together."""
    accumulation_bytes: float = 6.0
    """Bytes read and written per parameter to add one micro-batch's weight gradients to the sum."""
    selective_recompute: Literal["core", "op", "pointwise"] = "core"
    """What selective recomputation runs again: the attention core; every second matrix product and the element-wise rest; or norms,
    activation functions and unfused scores."""
    gradient_bytes: int = 2
    """Bytes of a gradient element in the data-parallel reduction, for 16-bit weights."""
    optimizer_bytes: float = 34.0
    """Bytes that the optimizer step reads and writes per parameter that it owns: gradients, norm, moments, master weights."""
    zero1_all_reduce: bool = False
    """Whether ZeRO-1 and 2 all-reduce the gradients where a reduce-scatter would do."""
    collective_per_layer: bool = False
    """Whether gradients are reduced and weights gathered layer by layer, so that each layer pays the latency."""
    reduce_each_microbatch: bool = False
    """Whether ZeRO-2 and 3 reduce the gradients of every micro-batch, and not those of the step."""
    overlap_reduction: bool = False
    """Whether the gradient reduction runs while the last micro-batch's backward pass does."""
    overlap_gathers: bool = True
    """Whether weights are gathered while other layers compute: ZeRO-3's before each use, ZeRO-1's and 2's in the next forward pass."""
    data_parallel_bandwidth: float = 1.0
    """Share of the group's bandwidth that its data-parallel collectives reach."""
    overlap_tensor_forward: float = 0.0
    """Share of the forward pass's tensor-parallel communication that hides behind matrix products."""
    overlap_tensor_backward: float = 0.0
    """The same of the backward pass, where the products for the weights can run beside it."""
    blocking_transfers: bool = False
    """Whether a rank waits for its sends and receives between stages, or computes meanwhile."""
    scatter_transfers: bool = False
    """Whether each tensor-parallel rank sends 1/t of a stage's output and the receivers gather it (SC21, section 4.1)."""
    collective_seconds: float = 0.0
    """Fitted: time of each tensor-parallel collective beyond what its bytes and latency take, such as waiting for its last rank."""
    loss_collectives: int = 0
    """Small sums over the tensor-parallel group in the loss, of one number a token: largest logit, sum of exponentials, the target's logit."""
    final_sums: bool = False
    """Whether what all ranks add up before the optimizer's step is counted: loss and norm, and a tied table's gradients on first and last stage."""
    step_seconds: float = 0.0
    """Fixed cost of a step: data loading, synchronisation, logging."""
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
