"""What a model needs: the memory wall of the whole of it, and a plan's memory and time rank by rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from planner import graph
from planner.chain_plan import ChainInputs
from planner.cluster import ClusterSpec
from planner.documents import Document, builtins
from planner.economics import MFU_IMPLAUSIBLE, run_cost
from planner.memory import in_flight, layer_needs, predict_memory
from planner.model import ModelSpec
from planner.plan import (
    Decisions,
    Inputs,
    Memory,
    PipelineRankPrediction,
    Predictions,
    Time,
    Training,
    replace,
)
from planner.states import state_bytes
from planner.timing import predict_time

SCHEMA = "meshwright.estimate/1"
SECONDS_PER_YEAR = 365.25 * 24 * 3600
V100_FLOPS_PER_SECOND = 28e12
"""The sustained rate assumed by the well-known 355 GPU-years of GPT-3 (Lambda Labs, 2020, "OpenAI's GPT-3 Language Model")."""


class OffloadRow(Document, frozen=True, kw_only=True):
    """One row of DeepSpeed's own memory estimators, for one GPU and for its node's host memory."""

    offload_param: str
    offload_optimizer: str
    zero_init: bool
    gpu_bytes: int
    cpu_bytes: int


class MemoryWall(Document, frozen=True, kw_only=True):
    """The whole model against one kind of GPU."""

    gpu: str
    gpu_memory_bytes: int
    num_gpus_for_states: int
    """GPUs that the weights, gradients and optimizer state alone would fill."""
    bytes_per_parameter: tuple[int, int, int]
    forward_flops_per_token: float
    training_flops_per_token: float
    activations_bytes_per_sample: dict[str, int]
    """Saved by one sample at each level of recomputation, on one GPU without parallelism."""
    num_tokens: float | None
    training_flops: float | None
    """6 FLOPs per parameter and token (Kaplan et al. 2020, section 2.1)."""
    v100_years: float | None


class Estimate(Document, frozen=True, kw_only=True):
    schema: str = SCHEMA
    model: dict[str, object]
    parallel: Decisions | None
    memory: Memory
    pipeline_ranks: tuple[PipelineRankPrediction, ...] | None
    fits: bool | None
    time: Time
    wall: MemoryWall | None = None
    zero_offload_rows: tuple[OffloadRow, ...] = ()
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    explanation: tuple[dict[str, Any], ...] | msgspec.UnsetType = msgspec.UNSET
    """With `--explain`: the terms of the memory of the fullest GPU."""


def model_summary(model: ModelSpec) -> dict[str, object]:
    """The model's shape and its exact parameter count, as plain data."""
    shape: dict[str, object] = builtins(model)
    return {"name": shape.pop("name"), "num_parameters": model.num_parameters, **shape}


def capacity_bytes(inputs: Inputs | ChainInputs) -> int:
    """Bytes that a plan may use on each GPU."""
    gpu = inputs.cluster.gpu
    return int(gpu.memory_bytes * inputs.training.memory_fraction) - gpu.reserved_bytes


def capacity_words(inputs: Inputs | ChainInputs, show: Callable[[float], str]) -> str:
    """`capacity_bytes` in a sentence, and what of the GPU's memory is not in it, in figures that add up; `show` writes bytes."""
    gpu, fraction = inputs.cluster.gpu, inputs.training.memory_fraction
    kept = gpu.memory_bytes - gpu.reserved_bytes - capacity_bytes(inputs)
    less = [f"{show(gpu.reserved_bytes)} reserved"] if gpu.reserved_bytes else []
    less += [f"{show(kept)} kept free by a memory fraction of {fraction:g}"] if kept else []
    return f"{show(capacity_bytes(inputs))} that can be used" + (f" ({show(gpu.memory_bytes)} less {' and '.join(less)})" if less else "")


def predict(inputs: Inputs, decisions: Decisions) -> Predictions:
    """Memory and time of a plan, per pipeline rank and for the heaviest GPU."""
    memory = predict_memory(inputs, decisions)
    time = predict_time(inputs, decisions)
    capacity = capacity_bytes(inputs)
    held = in_flight(decisions)
    ranks = []
    for rank, need in enumerate(memory):
        stages = tuple(index for index, stage in enumerate(decisions.stages) if stage.pipeline_rank == rank)
        ranks.append(
            PipelineRankPrediction(
                pipeline_rank=rank,
                stages=stages,
                num_in_flight=sum(held[index] for index in stages),
                memory=need,
                headroom_bytes=capacity - need.total_bytes,
                forward_seconds=time.forward_seconds[rank],
                backward_seconds=time.backward_seconds[rank],
            )
        )
    heaviest = max(memory, key=lambda need: need.total_bytes)
    return Predictions(memory=heaviest, pipeline_ranks=tuple(ranks), time=time.time)


def with_training_run(time: Time, inputs: Inputs, decisions: Decisions, num_tokens: float | None) -> Time:
    """`time` with days, GPU-hours, cost and energy of training on `num_tokens`, where that and the step time are known."""
    if num_tokens is None or time.step_seconds is None:
        return time
    cost = run_cost(inputs, decisions, time.step_seconds, num_tokens)
    return replace(
        time,
        training_days=cost.training_days,
        gpu_hours=cost.gpu_hours,
        gpu_years=cost.gpu_years,
        cost=cost.cost,
        energy_kwh=cost.energy_kilowatt_hours,
    )


def fits(predictions: Predictions) -> bool:
    """Whether every pipeline rank stays within its GPU's memory."""
    return all(rank.headroom_bytes is None or rank.headroom_bytes >= 0 for rank in predictions.pipeline_ranks)


def training_flops(model: ModelSpec, num_tokens: float) -> float:
    """6·N·D (Kaplan et al. 2020, arXiv 2001.08361, section 2.1), N with embeddings."""
    return 6.0 * model.num_parameters * num_tokens


def memory_wall(model: ModelSpec, cluster: ClusterSpec, training: Training, num_tokens: float | None) -> Estimate:
    """The whole model on one GPU: its states, and how many GPUs those alone would fill."""
    per_parameter = state_bytes(training.precision, training.optimizer)
    count = model.num_parameters
    memory = Memory.of(*(count * size for size in per_parameter))
    gpu = cluster.gpu
    flops = training_flops(model, num_tokens) if num_tokens else None
    single = Inputs(model=model, cluster=cluster, training=training)
    alone = Decisions(data_parallel=1, tensor_parallel=1, pipeline_parallel=1, micro_batch_size=1, num_microbatches=1, stages=())
    sample = {
        level: round(
            layer_needs(single, alone, "embedding").kept
            + model.num_layers * layer_needs(single, alone, "block", level).kept
            + layer_needs(single, alone, "head").kept
        )
        for level in ("none", "selective", "full")
    }
    wall = MemoryWall(
        gpu=gpu.name,
        gpu_memory_bytes=gpu.memory_bytes,
        num_gpus_for_states=math.ceil(memory.total_bytes / gpu.memory_bytes),
        bytes_per_parameter=(per_parameter.weights, per_parameter.gradients, per_parameter.optimizer),
        forward_flops_per_token=graph.forward_flops_per_token(model, training.sequence_length),
        training_flops_per_token=graph.training_flops_per_token(model, training.sequence_length),
        activations_bytes_per_sample=sample,
        num_tokens=num_tokens,
        training_flops=flops,
        v100_years=flops / V100_FLOPS_PER_SECOND / SECONDS_PER_YEAR if flops else None,
    )
    assumptions = [
        f"{per_parameter.total} bytes a parameter: {per_parameter.weights} weights + {per_parameter.gradients} gradients + "
        f"{per_parameter.optimizer} {training.optimizer} state ({training.precision}); activations come on top",
    ]
    if flops:
        assumptions.append(
            f"{flops:.3g} training FLOPs = 6 x {count / 1e9:.1f}B parameters x {(num_tokens or 0) / 1e9:.0f}B tokens; one V100 sustaining 28 TFLOP/s"
        )
    return Estimate(
        model=model_summary(model),
        parallel=None,
        memory=memory,
        pipeline_ranks=None,
        fits=None,
        time=Time(step_flops=None, gpu_years=wall.v100_years),
        wall=wall,
        assumptions=tuple(assumptions),
    )


def warnings(inputs: Inputs | ChainInputs, predictions: Predictions) -> tuple[str, ...]:
    """What is implausible or risky about the predictions, in words."""
    found = []
    mfu = predictions.time.model_flops_utilization
    if mfu is not None and mfu > MFU_IMPLAUSIBLE:
        found.append(f"implausible: a model FLOPs utilization of {mfu:.0%}; no published run of this kind is above {MFU_IMPLAUSIBLE:.0%}")
    share = predictions.memory.total_bytes / inputs.cluster.gpu.memory_bytes
    if 0.95 < share <= 1:
        found.append(
            f"risky: the heaviest GPU uses {share:.1%} of its memory; fragmentation alone can take what is left "
            "(--memory-fraction 0.95 keeps clear of it)"
        )
    return tuple(found)


def plan_estimate(inputs: Inputs, decisions: Decisions, predictions: Predictions, assumptions: Iterable[str] = ()) -> Estimate:
    """A plan's predictions as an estimate document, with warnings where a figure is implausible or risky."""
    return Estimate(
        model=model_summary(inputs.model),
        parallel=decisions,
        memory=predictions.memory,
        pipeline_ranks=predictions.pipeline_ranks,
        fits=fits(predictions),
        time=predictions.time,
        zero_offload_rows=offload_rows(inputs, decisions),
        assumptions=tuple(assumptions),
        warnings=warnings(inputs, predictions),
    )


def offload_rows(inputs: Inputs, decisions: Decisions) -> tuple[OffloadRow, ...]:
    """What DeepSpeed's `estimate_zero2/3_model_states_mem_needs` would print for this model, in bytes.

    ZeRO-3 keeps 2 bytes a parameter for the weights and 16 for the rest, plus 4 bytes for each parameter of the largest
    layer; its host figures carry a factor of 1.5. Empty unless ZeRO 2 or 3 is asked for without other parallelism.
    (DeepSpeed documentation, "Memory Requirements".)
    """
    if decisions.zero_stage < 2 or decisions.tensor_parallel * decisions.pipeline_parallel > 1:
        return ()
    model, ranks = inputs.model, decisions.data_parallel
    per_node = min(ranks, inputs.cluster.gpus_per_node)
    nodes = -(-ranks // per_node)
    count, factor = model.num_parameters, 1.5
    largest = max(model.token_embedding_parameters, model.ffn_hidden_size * model.hidden_size, model.query_size * model.hidden_size)
    rows = []

    def add(param: str, optimizer: str, init: bool, gpu: float, cpu: float) -> None:
        rows.append(
            OffloadRow(offload_param=param, offload_optimizer=optimizer, zero_init=init, gpu_bytes=round(gpu), cpu_bytes=round(cpu * factor))
        )

    if decisions.zero_stage == 2:
        add("none", "cpu", False, 2 * count, count * max(4 * ranks, 16))
        add("none", "none", False, 4 * count + 16 * count / ranks, 4 * count * ranks)
        return tuple(rows)
    for param, optimizer in (("cpu", "cpu"), ("none", "cpu"), ("none", "none")):
        for init in (True, False):
            if param == "cpu":
                gpu: float = 4 * largest
                cpu = 18 * count / nodes if init else max(4 * count * per_node, 18 * count / nodes)
            elif optimizer == "cpu":
                gpu = 4 * largest + 2 * count / ranks
                cpu = 16 * count / nodes if init else max(4 * count * per_node, 16 * count / nodes)
            else:
                gpu = 4 * largest + 18 * count / ranks
                cpu = 4 * largest * per_node if init else 4 * count * per_node
            add(param, optimizer, init, gpu, cpu)
    return tuple(rows)
