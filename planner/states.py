"""Bytes of weights, gradients and optimizer state: by parameter, by layer and rank, and what ZeRO leaves of them on each."""

from __future__ import annotations

from typing import NamedTuple

from planner.graph import LayerKind
from planner.model import ModelSpec
from planner.plan import Decisions, Inputs


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


def layer_units(model: ModelSpec, kind: LayerKind, tensor_parallel: int, *, tied_copy: bool = False) -> tuple[int, ...]:
    """Parameters of one layer on one tensor-parallel rank, by unit: what is sharded, gathered and updated as one.

    Projections and the vocabulary are split (rounded up), norms, position table and the biases of row-parallel linears
    are on every rank. Key-value heads that are fewer than the ranks are replicated. With `tied_copy` a tied head counts
    its own copy of the token table, which it has when it lies on another pipeline rank than the embedding.
    """
    t = tensor_parallel
    norm = model.norm_parameters
    table = -(-model.vocab_size // t) * model.hidden_size
    if kind == "embedding":
        rest = model.num_position_embeddings * model.hidden_size + (norm if model.embedding_norm else 0)
        return (table, rest) if rest else (table,)
    if kind == "head":
        own_table = not model.tied_embeddings or tied_copy
        rest = (norm if model.final_norm else 0) + (-(-model.vocab_size // t) if model.head_bias else 0)
        return (table, rest) if own_table else (rest,)
    query = model.query_size // t
    key_value = max(model.num_key_value_heads // t, 1) * model.head_dim
    count = model.hidden_size * (query + 2 * key_value) + query * model.hidden_size
    count += (query + 2 * key_value if model.qkv_bias else 0) + (model.hidden_size if model.attention_output_bias else 0)
    count += 2 * model.head_dim if model.qk_norm else 0
    ups = 2 if model.gated_ffn else 1
    ffn = model.ffn_hidden_size // t
    count += (ups + 1) * model.hidden_size * ffn + (ups * ffn + model.hidden_size if model.mlp_bias else 0)
    return (count + model.num_norms_per_layer * norm,)


def vector_parameters(model: ModelSpec, tensor_parallel: int) -> int:
    """Parameters of a block on one rank that are vectors: norms and biases, which weight decay leaves alone."""
    t = tensor_parallel
    key_value = max(model.num_key_value_heads // t, 1) * model.head_dim
    count = model.num_norms_per_layer * model.norm_parameters + (2 * model.head_dim if model.qk_norm else 0)
    count += (model.query_size // t + 2 * key_value if model.qkv_bias else 0) + (model.hidden_size if model.attention_output_bias else 0)
    ups = 2 if model.gated_ffn else 1
    return count + (ups * (model.ffn_hidden_size // t) + model.hidden_size if model.mlp_bias else 0)


def local_parameters(model: ModelSpec, kind: LayerKind, tensor_parallel: int, *, tied_copy: bool = False) -> int:
    """Parameters of one layer on one tensor-parallel rank, by the rules of `layer_units`."""
    return sum(layer_units(model, kind, tensor_parallel, tied_copy=tied_copy))


def layer_states(inputs: Inputs, decisions: Decisions, kind: LayerKind, *, tied_copy: bool = False) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state of one layer on one rank.

    ZeRO shards a unit in equal parts, the last one padded (Rajbhandari et al. 2020, sections 5 and 6, for what each stage shards).
    The executor keeps a step count of 4 bytes for each unit.
    """
    training, zero = inputs.training, decisions.zero_stage
    per_parameter = state_bytes(training.precision, training.optimizer)
    shards = decisions.data_parallel // decisions.data_parallel_replicate if zero else 1
    weights = gradients = optimizer = 0
    for count in layer_units(inputs.model, kind, decisions.tensor_parallel, tied_copy=tied_copy):
        shard = -(-count // shards)
        weights += (shard if zero >= 3 else shard * shards) * per_parameter.weights
        gradients += (shard if zero >= 2 else shard * shards) * per_parameter.gradients
        optimizer += shard * per_parameter.optimizer + (4 if training.profile == "meshwright" else 0)
    return weights, gradients, optimizer


def layer_buffers(inputs: Inputs, decisions: Decisions, kind: LayerKind) -> tuple[int, int, int]:
    """Bytes of a layer's gathered weights (ZeRO-3), of its unreduced gradients (ZeRO-2 and 3) and of its table's, while it runs."""
    if decisions.zero_stage < 2:
        return 0, 0, 0
    per_parameter = state_bytes(inputs.training.precision, inputs.training.optimizer)
    shards = decisions.data_parallel // decisions.data_parallel_replicate
    units = layer_units(inputs.model, kind, decisions.tensor_parallel, tied_copy=True)
    padded = [-(-unit // shards) * shards for unit in units]
    table = 0 if kind == "block" else padded[0]
    weights = sum(padded) * per_parameter.weights if decisions.zero_stage == 3 else 0
    return weights, (sum(padded) - table) * per_parameter.gradients, table * per_parameter.gradients


def ends_apart(decisions: Decisions) -> bool:
    """Whether embedding and head lie on different pipeline ranks, so that a tied head has a copy of the table."""
    return decisions.pipeline_parallel > 1 and decisions.schedule != "ZBVZeroBubble"
