"""What a training run needs in all: days, GPU-hours, money, energy; and how well it uses the hardware.

Conventions. *Model FLOPs* count 2 per multiply-add of matrix products, attention at its full s x s, three times the
forward pass, nothing recomputed (the MFU of Chowdhery et al. 2022, arXiv 2204.02311, appendix B, with attention).
*Hardware FLOPs* add what is recomputed (the HFU of Korthikanti et al. 2022, arXiv 2205.05198, section 6.3).
"""

from __future__ import annotations

from planner.documents import Document
from planner.graph import attention_flops, forward_flops_per_token, mlp_flops, training_flops_per_token
from planner.plan import Decisions, Inputs, recompute_counts, stage_blocks

MFU_IMPLAUSIBLE = 0.65
"""No published run of a dense transformer on GPUs reaches this model FLOPs utilization."""


class RunCost(Document, frozen=True, kw_only=True):
    """A whole run. Null where the GPU's power or price is not known."""

    num_tokens: float
    num_steps: float
    training_days: float
    gpu_hours: float
    gpu_years: float
    cost: float | None
    """In the currency of the price."""
    energy_kilowatt_hours: float | None
    """Of the GPUs at their rated power; hosts, network and cooling left out."""


def run_cost(inputs: Inputs, decisions: Decisions, step_seconds: float, num_tokens: float) -> RunCost:
    """What `num_tokens` tokens take at `step_seconds` a step. Restarts and evaluations are left out."""
    steps = num_tokens / step_tokens(inputs)
    hours = steps * step_seconds / 3600
    gpu_hours = hours * decisions.world_size
    price, power = inputs.cluster.price_per_gpu_hour, inputs.cluster.gpu.power_watts
    return RunCost(
        num_tokens=num_tokens,
        num_steps=steps,
        training_days=hours / 24,
        gpu_hours=gpu_hours,
        gpu_years=gpu_hours / 24 / 365.25,
        cost=None if price is None else gpu_hours * price,
        energy_kilowatt_hours=None if power is None else gpu_hours * power / 1000,
    )


def step_tokens(inputs: Inputs) -> int:
    """Tokens of one optimizer step."""
    return inputs.training.global_batch_size * inputs.training.sequence_length


def model_flops(inputs: Inputs) -> float:
    """Model FLOPs of one step."""
    return step_tokens(inputs) * training_flops_per_token(inputs.model, inputs.training.sequence_length)


def hardware_flops(inputs: Inputs, decisions: Decisions) -> float:
    """Hardware FLOPs of one step: full recomputation adds a block's forward pass, selective its scores and values."""
    model, sequence = inputs.model, inputs.training.sequence_length
    core, block = 4.0 * sequence * model.query_size, attention_flops(model, sequence) + mlp_flops(model)
    counts = [recompute_counts(stage, len(stage_blocks(stage, model))) for stage in decisions.stages]
    again = sum(core * count.selective + block * count.full for count in counts)
    return step_tokens(inputs) * (3 * forward_flops_per_token(model, sequence) + again)
