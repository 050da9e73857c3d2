"""What a traced module needs as a whole: parameters, the states of training, activations and FLOPs of a sample."""

from __future__ import annotations

import math

from planner.cluster import ClusterSpec
from planner.documents import Document
from planner.estimate import SCHEMA
from planner.plan import Decisions, Memory, PipelineRankPrediction, Time, Training
from planner.states import state_bytes
from planner.traced import TracedModel, at


class ChainEstimate(Document, frozen=True, kw_only=True):
    """An estimate document of a traced module; `traced` holds its chain."""

    schema: str = SCHEMA
    model: dict[str, object]
    parallel: Decisions | None = None
    memory: Memory
    pipeline_ranks: tuple[PipelineRankPrediction, ...] | None = None
    fits: bool | None = None
    time: Time = Time()
    bytes_per_parameter: tuple[int, int, int]
    gpu: str
    gpu_memory_bytes: int
    num_gpus_for_states: int
    """GPUs that the weights, gradients and optimizer state alone would fill."""
    activations_bytes_per_sample: float
    forward_flops_per_sample: float
    training_flops_per_sample: float
    traced: TracedModel
    assumptions: tuple[str, ...] = ()


def estimate_chain(model: TracedModel, cluster: ClusterSpec, training: Training) -> ChainEstimate:
    """The whole module on one GPU."""
    per = state_bytes(training.precision, training.optimizer)
    costs = [model.cost(index) for index in range(model.num_layers)]
    count = sum(cost.num_parameters for cost in costs)
    frozen = sum(cost.frozen_bytes for cost in costs)
    memory = Memory.of(count * per.weights, count * per.gradients, count * per.optimizer, buffers=frozen)
    forward = sum(item.num_calls * at(item.flops, 1) for cost in costs for item in cost.forward)
    backward = sum(item.num_calls * at(item.flops, 1) for cost in costs for item in cost.backward)
    return ChainEstimate(
        model={"name": model.name, "num_parameters": model.num_parameters, "num_layers": model.num_layers},
        memory=memory,
        bytes_per_parameter=(per.weights, per.gradients, per.optimizer),
        gpu=cluster.gpu.name,
        gpu_memory_bytes=cluster.gpu.memory_bytes,
        num_gpus_for_states=math.ceil(memory.total_bytes / cluster.gpu.memory_bytes),
        activations_bytes_per_sample=sum(at(cost.saved_bytes, 1) for cost in costs),
        forward_flops_per_sample=forward,
        training_flops_per_sample=forward + backward,
        traced=model,
        assumptions=(
            f"{per.total} bytes a parameter: {per.weights} weights + {per.gradients} gradients + {per.optimizer} {training.optimizer} state "
            f"({training.precision}); activations come on top",
            "traced on fake tensors as PyTorch runs it on a CPU; on GPUs some kernels save other bytes",
        ),
    )
