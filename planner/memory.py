"""Bytes on each GPU, in closed form: what every option of the executor keeps, and what it needs for a moment.

A rank's peak is the largest over the actions of its schedule of

    weights + gradients + optimizer + Σ saved activations of the micro-batches in flight + what the action needs itself

Two implementation profiles exist. `meshwright` describes this package's executor, and is checked against its traced
runs. `megatron` is the published formula of Megatron-LM: s·b·h·(34 + 5·a·s/h) per block and its variants (Korthikanti et
al. 2022, arXiv 2205.05198, equations 1 to 6). Symbols as in `planner.model`; e is the bytes per activation element.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from planner.graph import LayerKind
from planner.model import ModelSpec
from planner.plan import (
    SPLIT_BACKWARD_SCHEDULES,
    Decisions,
    Inputs,
    Memory,
    Recompute,
    Stage,
    block_levels,
    has_embedding,
    has_head,
)
from planner.schedule import compute_actions


class StateBytes(NamedTuple):
    """Bytes per parameter before any sharding."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return sum(self)


def state_bytes(precision: str, optimizer: str) -> StateBytes:
    """Bytes per parameter of weights, gradients and optimizer state.

    mixed-bf16 with Adam is the 2 + 2 + 12 of Rajbhandari et al. 2020 (ZeRO, section 3.1): fp32 master weights, first and
    second moment. fp32 and bf16 keep two moments in their own type. SGD keeps the master weights only.
    """
    adam = optimizer == "adam"
    if precision == "mixed-bf16":
        return StateBytes(2, 2, 12 if adam else 4)
    width = 4 if precision == "fp32" else 2
    return StateBytes(width, width, 2 * width if adam else 0)


def element_bytes(precision: str) -> int:
    """Bytes of one activation element."""
    return 4 if precision == "fp32" else 2


class LayerBytes(NamedTuple):
    """One layer on one rank. `saved` is per micro-batch in flight; the transients come on top while it runs."""

    weights: float
    gradients: float
    optimizer: float
    saved: float
    forward_transient: float = 0.0
    backward_transient: float = 0.0

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def transient(self) -> float:
        return max(self.forward_transient, self.backward_transient)


def local_parameters(model: ModelSpec, kind: LayerKind, tensor_parallel: int, *, tied_copy: bool = False) -> int:
    """Parameters of one layer on one tensor-parallel rank.

    Projections and the vocabulary are split (rounded up), norms, position table and the biases of row-parallel linears
    are on every rank. Key-value heads that are fewer than the ranks are replicated. With `tied_copy` a tied head counts
    its own copy of the token table, which it has when it lies on another stage than the embedding.
    """
    t = tensor_parallel
    norm = model.norm_parameters
    vocabulary = -(-model.vocab_size // t) * model.hidden_size
    if kind == "embedding":
        return vocabulary + model.num_position_embeddings * model.hidden_size + (norm if model.embedding_norm else 0)
    if kind == "head":
        own_table = not model.tied_embeddings or tied_copy
        bias = -(-model.vocab_size // t) if model.head_bias else 0
        return (norm if model.final_norm else 0) + (vocabulary if own_table else 0) + bias
    query = model.query_size // t
    key_value = max(model.num_key_value_heads // t, 1) * model.head_dim
    count = model.hidden_size * (query + 2 * key_value) + query * model.hidden_size
    count += (query + 2 * key_value if model.qkv_bias else 0) + (model.hidden_size if model.attention_output_bias else 0)
    count += 2 * model.head_dim if model.qk_norm else 0
    ups = 2 if model.gated_ffn else 1
    ffn = model.ffn_hidden_size // t
    count += (ups + 1) * model.hidden_size * ffn + (ups * ffn + model.hidden_size if model.mlp_bias else 0)
    return count + model.num_norms_per_layer * norm


def layer_bytes(
    inputs: Inputs, decisions: Decisions, kind: LayerKind, recompute: Recompute = "none", *, tied_copy: bool | None = None
) -> LayerBytes:
    """Bytes of one layer on one rank; `decisions.stages` is not read and may be empty.

    `tied_copy` as in `local_parameters`; by default a tied head has its own copy when there are several pipeline ranks.
    """
    training = inputs.training
    copy = decisions.pipeline_parallel > 1 and decisions.schedule != "ZBVZeroBubble" if tied_copy is None else tied_copy
    parameters = local_parameters(inputs.model, kind, decisions.tensor_parallel, tied_copy=copy)
    per_parameter = state_bytes(training.precision, training.optimizer)
    shards = decisions.data_parallel // decisions.data_parallel_replicate
    zero = decisions.zero_stage
    weights = parameters * per_parameter.weights / (shards if zero >= 3 else 1)
    gradients = parameters * per_parameter.gradients / (shards if zero >= 2 else 1)
    optimizer = parameters * per_parameter.optimizer / (shards if zero >= 1 else 1)
    activation = _PROFILES[training.profile](inputs, decisions, kind, recompute)
    gathered = parameters * per_parameter.weights if zero >= 3 and shards > 1 else 0.0
    reduced = parameters * per_parameter.gradients if zero >= 2 and shards > 1 else 0.0
    return LayerBytes(
        weights,
        gradients,
        optimizer,
        activation.saved,
        activation.forward_transient + gathered,
        activation.backward_transient + gathered + reduced,
    )


class ActivationBytes(NamedTuple):
    saved: float
    forward_transient: float
    backward_transient: float


def _meshwright(inputs: Inputs, decisions: Decisions, kind: LayerKind, recompute: Recompute) -> ActivationBytes:
    """Activations of this package's executor."""
    model, training = inputs.model, inputs.training
    t = decisions.tensor_parallel
    e = element_bytes(training.precision)
    tokens = decisions.micro_batch_size * training.sequence_length
    kept = tokens // t if decisions.sequence_parallel else tokens
    h = model.hidden_size
    if kind == "embedding":
        return ActivationBytes(kept * h * e, tokens * h * e, tokens * h * e)
    if kind == "head":
        vocabulary = -(-model.vocab_size // t)
        return ActivationBytes(2 * kept * h * e + tokens * vocabulary * e, tokens * vocabulary * 4, tokens * vocabulary * 8)
    query, key_value = model.query_size / t, max(model.num_key_value_heads / t, 1) * model.head_dim
    ffn = model.ffn_hidden_size / t * (4 if model.gated_ffn else 2)
    none = tokens * e * (2 * query + 2 * key_value + ffn) + 4 * kept * h * e
    if recompute == "full":
        return ActivationBytes(kept * h * e, none, none + tokens * ffn * e / 2)
    if recompute == "selective":
        selective = none - tokens * e * ffn / 2
        return ActivationBytes(selective, tokens * ffn * e / 2, tokens * ffn * e)
    return ActivationBytes(none, tokens * e * ffn / 2, tokens * ffn * e)


def _megatron(inputs: Inputs, decisions: Decisions, kind: LayerKind, recompute: Recompute) -> ActivationBytes:
    """Activations of Megatron-LM by Korthikanti et al. 2022: equations 1 (serial), 2 (TP), 4 (TP and SP), 5 (first and last
    stage), 6 (selective), and 2·s·b·h for full recomputation; generalised to grouped queries and gated MLPs term by term.
    """
    model, training = inputs.model, inputs.training
    t = decisions.tensor_parallel
    shard = t if decisions.sequence_parallel else 1
    tokens = decisions.micro_batch_size * training.sequence_length
    h, q, kv, f = model.hidden_size, model.query_size, model.key_value_size, model.ffn_hidden_size
    if kind == "embedding":
        return ActivationBytes(tokens * h / shard, 0.0, 0.0)
    if kind == "head":
        # The logits in fp32 and the inputs of the final norm and of the projection live only while the head runs.
        return ActivationBytes(0.0, 0.0, tokens * (4 * h / shard + 4 * model.vocab_size / t))
    scores = 5 * model.num_attention_heads * training.sequence_length * tokens / t
    attention = tokens * ((2 * h + h) / shard + (2 * q + 4 * kv + 2 * q) / t)
    mlp = tokens * ((2 * h + (0 if model.gated_ffn else h)) / shard + (6 if model.gated_ffn else 4) * f / t)
    norms = tokens * 4 * h / shard
    block = attention + mlp + norms
    if recompute == "full":
        return ActivationBytes(2 * tokens * h / shard, 0.0, block + scores)
    if recompute == "selective":
        return ActivationBytes(block, 0.0, scores)
    return ActivationBytes(block + scores, 0.0, 0.0)


_PROFILES: dict[str, Callable[[Inputs, Decisions, LayerKind, Recompute], ActivationBytes]] = {
    "meshwright": _meshwright,
    "megatron": _megatron,
}


class StageBytes(NamedTuple):
    """One stage on one rank, in the terms of `LayerBytes`."""

    weights: float
    gradients: float
    optimizer: float
    saved: float
    forward_transient: float
    backward_transient: float


def stage_bytes(inputs: Inputs, decisions: Decisions, stage: Stage) -> StageBytes:
    """The layers of a stage added up; of the transients the largest counts, since layers run one after the other."""
    model = inputs.model
    layers: list[LayerBytes] = []
    if has_embedding(stage):
        layers.append(layer_bytes(inputs, decisions, "embedding"))
    per_level = {level: layer_bytes(inputs, decisions, "block", level) for level in set(block_levels(stage, model))}
    layers.extend(per_level[level] for level in block_levels(stage, model))
    if has_head(stage, model):
        embedding_rank = decisions.stages[0].pipeline_rank
        layers.append(layer_bytes(inputs, decisions, "head", tied_copy=embedding_rank != stage.pipeline_rank))
    return StageBytes(
        *(sum(layer[index] for layer in layers) for index in range(4)),
        max(layer.forward_transient for layer in layers),
        max(layer.backward_transient for layer in layers),
    )


def predict_memory(inputs: Inputs, decisions: Decisions) -> tuple[Memory, ...]:
    """Peak memory of one GPU of each pipeline rank, in bytes."""
    stages = [stage_bytes(inputs, decisions, stage) for stage in decisions.stages]
    lists = _short_actions(decisions)
    found = []
    for rank in range(decisions.pipeline_parallel):
        mine = {index: stages[index] for index, stage in enumerate(decisions.stages) if stage.pipeline_rank == rank}
        activations, buffers = _walk(lists[rank], mine, decisions, inputs)
        found.append(
            Memory.of(
                sum(stage.weights for stage in mine.values()),
                sum(stage.gradients for stage in mine.values()),
                sum(stage.optimizer for stage in mine.values()),
                activations,
                buffers,
            )
        )
    return tuple(found)


def boundary_bytes(inputs: Inputs, decisions: Decisions) -> int:
    """Bytes of one micro-batch's activations between two stages, on one rank."""
    tokens = decisions.micro_batch_size * inputs.training.sequence_length
    if decisions.sequence_parallel:
        tokens //= decisions.tensor_parallel
    return tokens * inputs.model.hidden_size * element_bytes(inputs.training.precision)


def in_flight(decisions: Decisions) -> tuple[int, ...]:
    """Micro-batches whose activations each stage holds, at the moment when its pipeline rank holds most in all."""
    counts = [0] * decisions.num_stages
    for actions in _short_actions(decisions):
        live: dict[int, int] = {}
        best = 0
        best_live: dict[int, int] = {}
        for kind, stage, _ in actions:
            if kind == "F":
                live[stage] = live.get(stage, 0) + 1
                if sum(live.values()) > best:
                    best, best_live = sum(live.values()), dict(live)
            elif kind in "BW":
                live[stage] -= 1
        for stage, count in best_live.items():
            counts[stage] = count
    return tuple(counts)


def _short_actions(decisions: Decisions) -> tuple[tuple[tuple[str, int, int], ...], ...]:
    """The compute actions, with no more micro-batches than it takes to reach the steady state.

    After the warm-up each further micro-batch repeats the same pattern, so the peak is reached within the first rounds.
    """
    p, v, m = decisions.pipeline_parallel, decisions.num_virtual_stages, decisions.num_microbatches
    return compute_actions(decisions.schedule, p, v, _shorter(decisions.schedule, p, m))


@functools.cache
def _shorter(schedule: str, p: int, m: int) -> int:
    if schedule == "GPipe" or m <= 4 * p:
        return m
    if schedule in ("Interleaved1F1B", "InterleavedZeroBubble"):
        # keep the micro-batches per round, which set the warm-up
        return 4 * (m // max(1, m // p))
    return 4 * p


def _walk(
    actions: tuple[tuple[str, int, int], ...], stages: dict[int, StageBytes], decisions: Decisions, inputs: Inputs
) -> tuple[float, float]:
    """The largest live activation bytes over the actions, and the communication buffers beside them."""
    live = peak = 0.0
    boundary = boundary_bytes(inputs, decisions) if decisions.pipeline_parallel > 1 else 0
    split = decisions.schedule in SPLIT_BACKWARD_SCHEDULES
    for kind, index, _ in actions:
        stage = stages[index]
        if kind == "F":
            live += stage.saved
            peak = max(peak, live + stage.forward_transient)
        else:
            peak = max(peak, live + stage.backward_transient)
            if kind == ("W" if split else "B"):
                live -= stage.saved
    return peak, float(2 * boundary)
