"""Bytes that a rank sends in one optimizer step along each axis of the mesh, in closed form.

With ring algorithms a rank sends 2·(n-1)/n·N bytes for an all-reduce of N bytes over n ranks, (n-1)/n·N for an all-gather
or a reduce-scatter of N bytes in all, and N for a message (Patarasuk and Yuan 2009). Scalars (the loss, the gradient's norm)
are left out. Symbols as in `planner.model`; e is the bytes of an activation element, m the number of micro-batches.
"""

from __future__ import annotations

from planner.memory import boundary_bytes
from planner.plan import Decisions, Inputs, Stage, block_levels, has_embedding, has_head
from planner.states import element_bytes, local_parameters, state_bytes


def communication_bytes(inputs: Inputs, decisions: Decisions, pipeline_rank: int) -> dict[str, float]:
    """Bytes that each rank of `pipeline_rank` sends per step, by axis "tp", "dp" and "pp"."""
    stages = [(index, stage) for index, stage in enumerate(decisions.stages) if stage.pipeline_rank == pipeline_rank]
    return {
        "tp": sum(_tensor_parallel(inputs, decisions, stage) for _, stage in stages),
        "dp": sum(_data_parallel(inputs, decisions, stage) for _, stage in stages),
        "pp": _pipeline(inputs, decisions, [index for index, _ in stages]) + _tied(inputs, decisions, pipeline_rank),
    }


def _tensor_parallel(inputs: Inputs, decisions: Decisions, stage: Stage) -> float:
    """Per block and micro-batch two sums of b·s·h partial results forward and two backward (Shoeybi et al. 2019, section 3); where the MLP is beside
    attention one forward, and one backward if both read the same norm.

    Under sequence parallelism each sum is a reduce-scatter, and what a norm or a gradient gives is gathered, half the bytes of a sum each; the
    backward pass gathers the norms' outputs once more (Korthikanti et al. 2022, section 4.2.2).
    Full recomputation repeats the forward pass. Once a step (every micro-batch with ZeRO-2 and 3) the gradients are summed of what
    several ranks hold: norms and biases under sequence parallelism, and key-value heads that are fewer than the ranks.
    """
    t = decisions.tensor_parallel
    if t == 1:
        return 0.0
    model, m = inputs.model, decisions.num_microbatches
    tokens = decisions.micro_batch_size * inputs.training.sequence_length
    share = (t - 1) / t
    activations = share * tokens * model.hidden_size * element_bytes(inputs.training.precision)
    total = 0.0
    outputs = 1 if model.parallel_block else 2
    norms = 1 if model.num_norms_per_layer == 1 else 2  # whose outputs linears read
    for level in block_levels(stage, model):
        if decisions.sequence_parallel:
            forward, backward = (norms + outputs) * activations, (outputs + 2 * norms) * activations
        else:
            forward, backward = 2 * outputs * activations, 2 * norms * activations
        total += forward * (2 if level == "full" else 1) + backward
    if has_embedding(stage):
        total += 2 * activations
    if has_head(stage, model):
        # the logits' maxima, sums and own targets are fp32, one a token
        total += 3 * 2 * share * tokens * 4
        total += (3 if decisions.sequence_parallel else 2) * activations
    total *= m
    reductions = m if decisions.zero_stage >= 2 and decisions.data_parallel > 1 else 1
    width = state_bytes(inputs.training.precision, inputs.training.optimizer).gradients
    summed = _replicated_parameters(inputs, stage) if decisions.sequence_parallel else 0
    summed += len(block_levels(stage, model)) * 2 * model.head_dim if model.qk_norm else 0  # each rank has its own heads' part
    total += reductions * 2 * share * summed * width
    copies = t // model.num_key_value_heads
    if copies > 1:
        heads = 2 * model.head_dim * (model.hidden_size + (1 if model.qkv_bias else 0))
        total += reductions * len(block_levels(stage, model)) * 2 * (copies - 1) / copies * heads * width
    return total


def _replicated_parameters(inputs: Inputs, stage: Stage) -> int:
    """Parameters of a stage that every tensor-parallel rank holds whole: norms, positions, biases of row-parallel linears."""
    model = inputs.model
    h = model.hidden_size
    biases = (h if model.attention_output_bias else 0) + (h if model.mlp_bias else 0)
    count = len(block_levels(stage, model)) * (model.num_norms_per_layer * model.norm_parameters + biases)
    if has_embedding(stage):
        count += model.num_position_embeddings * h + (model.norm_parameters if model.embedding_norm else 0)
    if has_head(stage, model) and model.final_norm:
        count += model.norm_parameters
    return count


def stage_parameters(inputs: Inputs, decisions: Decisions, stage: Stage) -> int:
    """Parameters of a stage on one rank, a tied table on another rank's copy included."""
    model, t = inputs.model, decisions.tensor_parallel
    count = len(block_levels(stage, model)) * local_parameters(model, "block", t)
    if has_embedding(stage):
        count += local_parameters(model, "embedding", t)
    if has_head(stage, model):
        copy = decisions.stages[0].pipeline_rank != stage.pipeline_rank
        count += local_parameters(model, "head", t, tied_copy=copy)
    return count


def _data_parallel(inputs: Inputs, decisions: Decisions, stage: Stage) -> float:
    """ZeRO-0: gradients all-reduced once. ZeRO-1: reduce-scattered once, weights gathered once. ZeRO-2: reduce-scattered every
    micro-batch. ZeRO-3: also the weights gathered for every forward and every backward, and not after the step
    (Rajbhandari et al. 2020, section 7). A tied table on one rank is so for the embedding and for the head.
    """
    d, replicas = decisions.data_parallel, decisions.data_parallel_replicate
    if d == 1:
        return 0.0
    per_parameter = state_bytes(inputs.training.precision, inputs.training.optimizer)
    count = stage_parameters(inputs, decisions, stage)
    gradients, weights = count * per_parameter.gradients, count * per_parameter.weights
    if decisions.zero_stage == 0:
        return 2 * (d - 1) / d * gradients
    shards, m = d // replicas, decisions.num_microbatches
    share = (shards - 1) / shards
    total = 2 * (replicas - 1) / replicas * gradients / shards
    total += share * gradients * (m if decisions.zero_stage >= 2 else 1)
    total += share * weights * (2 * m if decisions.zero_stage == 3 else 1)
    if decisions.zero_stage >= 2 and _holds_tied_table_twice(inputs, decisions, stage):
        table = -(-inputs.model.vocab_size // decisions.tensor_parallel) * inputs.model.hidden_size
        total += share * m * table * (per_parameter.gradients + (2 * per_parameter.weights if decisions.zero_stage == 3 else 0))
    return total


def _holds_tied_table_twice(inputs: Inputs, decisions: Decisions, stage: Stage) -> bool:
    """Whether the stage's head uses the table of an embedding on the same rank: one table, reduced and gathered for each of the two layers."""
    first = decisions.stages[0].pipeline_rank
    return inputs.model.tied_embeddings and has_head(stage, inputs.model) and stage.pipeline_rank == first


def _pipeline(inputs: Inputs, decisions: Decisions, stages: list[int]) -> float:
    """One message of b·s·h (an s/t-th of it under sequence parallelism) per micro-batch and direction to each neighbour on
    another rank."""
    last = decisions.num_stages - 1
    owners = [stage.pipeline_rank for stage in decisions.stages]
    messages = 0
    for index in stages:
        messages += index < last and owners[index + 1] != owners[index]
        messages += index > 0 and owners[index - 1] != owners[index]
    return float(messages * decisions.num_microbatches * boundary_bytes(inputs, decisions))


def _tied(inputs: Inputs, decisions: Decisions, pipeline_rank: int) -> float:
    """The gradients of a tied table, all-reduced between the two ranks that hold it (once per step; a shard of them with ZeRO)."""
    first, last = decisions.stages[0].pipeline_rank, decisions.stages[-1].pipeline_rank
    if not inputs.model.tied_embeddings or first == last or pipeline_rank not in (first, last):
        return 0.0
    table = -(-inputs.model.vocab_size // decisions.tensor_parallel) * inputs.model.hidden_size
    shards = decisions.data_parallel // decisions.data_parallel_replicate if decisions.zero_stage else 1
    return table * state_bytes(inputs.training.precision, inputs.training.optimizer).gradients / shards
