"""Seconds of the parts of a step: one layer's passes, a message between stages, the gradient reduction, the optimizer.

Symbols: b micro-batch size, s sequence length, t tensor-parallel degree, h, f, a, k, d, V as in planner.model, and
n = b·s tokens of a micro-batch. All times are those of one rank, and add up: a stage takes the sum over its layers.
"""

from __future__ import annotations

from typing import NamedTuple

from planner.cluster import ClusterSpec
from planner.graph import LayerKind
from planner.kernels import ELEMENT_BYTES, core_share, elementwise_seconds, matmul_seconds, peak_flops_per_second
from planner.model import ModelSpec
from planner.network import (
    Group,
    all_gather_seconds,
    all_reduce_seconds,
    axis_group,
    axis_stride,
    group,
    message_seconds,
    reduce_scatter_seconds,
)
from planner.plan import Decisions, Inputs, Recompute
from planner.software import Software, load_software


class LayerSeconds(NamedTuple):
    """One layer and one micro-batch on one rank, tensor-parallel communication included.

    `backward` is `backward_input` + `backward_weight` and includes what is recomputed, which `backward_input` carries.
    """

    forward: float
    backward: float
    backward_input: float
    backward_weight: float


class _Parts(NamedTuple):
    """Times of a layer's parts, nothing recomputed."""

    forward: float
    backward_input: float
    backward_weight: float
    attention_core: float
    """What selective recomputation runs again."""
    communication_forward: float
    communication_backward: float


def software_of(inputs: Inputs) -> Software:
    """The program whose time is predicted, by the training profile."""
    return load_software(inputs.training.profile)


def layer_seconds(
    inputs: Inputs, decisions: Decisions, kind: LayerKind, recompute: Recompute = "none", software: Software | None = None
) -> LayerSeconds:
    """One layer's passes for one micro-batch on one rank; `decisions.stages` may be empty.

    Full recomputation adds the forward pass with its communication to the backward pass, selective the attention core
    (Korthikanti et al. 2022, arXiv 2205.05198, section 5).
    """
    program = software or software_of(inputs)
    parts = {"embedding": _embedding, "block": _block, "head": _head}[kind](inputs, decisions, program)
    scale = inputs.cluster.efficiency.time_scale * core_share(inputs.cluster, inputs.cluster.num_gpus)
    visible = 1.0 - program.overlap_tensor_parallel
    forward = parts.forward * scale + parts.communication_forward * visible
    weight = parts.backward_weight * scale
    backward = parts.backward_input * scale + parts.communication_backward * visible
    if recompute == "full" and kind == "block":
        backward += forward
    elif recompute == "selective" and kind == "block":
        backward += parts.attention_core * scale
    return LayerSeconds(forward, backward + weight, backward, weight)


def _block(inputs: Inputs, decisions: Decisions, program: Software) -> _Parts:
    """A transformer block: four projections (five when gated), the attention core, and the element-wise rest."""
    model, cluster, precision = inputs.model, inputs.cluster, inputs.training.precision
    t, h = decisions.tensor_parallel, model.hidden_size
    n = decisions.micro_batch_size * inputs.training.sequence_length
    heads = model.query_size / t
    key_values = model.head_dim * max(model.num_key_value_heads / t, 1.0)
    ups = 2 if model.gated_ffn else 1
    f = model.ffn_hidden_size / t
    forward = backward = weight = 0.0
    for columns, depth in ((heads + 2 * key_values, h), (h, heads), (ups * f, h), (h, f)):
        forward += matmul_seconds(cluster, precision, n, columns, depth)
        backward += matmul_seconds(cluster, precision, n, depth, columns)
        weight += matmul_seconds(cluster, precision, columns, depth, n)
    core_forward, core_backward = _attention_core(inputs, decisions, program)
    size = ELEMENT_BYTES[precision] * program.elementwise_passes
    whole = n * h / (t if decisions.sequence_parallel else 1)
    rotary = 2 * (heads + key_values) if model.position_embedding == "rope" else 0.0
    activation = (3 if model.gated_ffn else 2) * f
    # Norms read and write; dropout and residual read two and write one; the backward passes read one more each.
    light = size * (whole * (2 * model.num_norms_per_layer + 6) + n * (rotary + activation))
    heavy = size * (whole * (5 * model.num_norms_per_layer + 4) + n * (rotary + activation + ups * f))
    forward += elementwise_seconds(cluster, light) + core_forward
    backward += elementwise_seconds(cluster, heavy) + core_backward
    communication = 0.0
    gather_again = 0.0
    if t > 1:
        ranks = axis_group(cluster, decisions, "tp")
        volume = float(n * h * ELEMENT_BYTES[precision])
        communication = (1 if model.parallel_block else 2) * all_reduce_seconds(ranks, volume)
        gather_again = 0.0
    return _Parts(forward, backward, weight, core_forward, communication, communication + gather_again)


def _attention_core(inputs: Inputs, decisions: Decisions, program: Software) -> tuple[float, float]:
    """Forward and backward seconds of scores, softmax and values."""
    model, cluster, precision = inputs.model, inputs.cluster, inputs.training.precision
    s, d = inputs.training.sequence_length, model.head_dim
    batch = decisions.micro_batch_size * model.num_attention_heads / decisions.tensor_parallel
    if program.attention == "fused":
        causal = 0.5 if program.causal_skip else 1.0
        flops = 4.0 * batch * s * s * d * causal
        rate = peak_flops_per_second(cluster, precision) * cluster.efficiency.attention
        kernel = cluster.efficiency.kernel_seconds
        return flops / rate + kernel, 2.5 * flops / (rate * 0.85) + kernel
    products = matmul_seconds(cluster, precision, s, s, d, batch) + matmul_seconds(cluster, precision, s, d, s, batch)
    scores = batch * s * s * ELEMENT_BYTES[precision]
    forward = products + elementwise_seconds(cluster, 4.5 * scores)
    return forward, 2 * products + elementwise_seconds(cluster, 5.5 * scores)


def _embedding(inputs: Inputs, decisions: Decisions, program: Software) -> _Parts:
    """Looking up n rows of h; with tensor parallelism the vocabulary is cut, and the rows are summed over the ranks."""
    model, cluster = inputs.model, inputs.cluster
    n = decisions.micro_batch_size * inputs.training.sequence_length
    volume = float(n * model.hidden_size * ELEMENT_BYTES[inputs.training.precision])
    light = elementwise_seconds(cluster, 4 * volume * program.elementwise_passes)
    communication = all_reduce_seconds(axis_group(cluster, decisions, "tp"), volume) if decisions.tensor_parallel > 1 else 0.0
    return _Parts(light, 0.0, light, 0.0, communication, 0.0)


def _head(inputs: Inputs, decisions: Decisions, program: Software) -> _Parts:
    """Final norm, the product with the vocabulary, and the cross-entropy in fp32 over V/t columns."""
    model, cluster, precision = inputs.model, inputs.cluster, inputs.training.precision
    t, h = decisions.tensor_parallel, model.hidden_size
    n = decisions.micro_batch_size * inputs.training.sequence_length
    columns = model.vocab_size / t
    size = ELEMENT_BYTES[precision]
    norm = size * n * h / (t if decisions.sequence_parallel else 1)
    loss = n * columns * program.elementwise_passes
    forward = matmul_seconds(cluster, precision, n, columns, h) + elementwise_seconds(cluster, 2 * norm + (size + 12) * loss)
    backward = matmul_seconds(cluster, precision, n, h, columns) + elementwise_seconds(cluster, 5 * norm + (size + 8) * loss)
    weight = matmul_seconds(cluster, precision, columns, h, n)
    communication = 0.0
    if t > 1:
        communication = all_reduce_seconds(axis_group(cluster, decisions, "tp"), float(n * h * size))
    return _Parts(forward, backward, weight, 0.0, communication if decisions.sequence_parallel else 0.0, communication)


def transfer_seconds(inputs: Inputs, decisions: Decisions, from_rank: int = 0, software: Software | None = None) -> float:
    """Time of one micro-batch's activations from pipeline rank `from_rank` to the next one (b·s·h elements).

    With sequence parallelism, or where the program scatters, each tensor-parallel rank sends 1/t; a program that
    scatters without sequence parallelism gathers them inside the node.
    """
    cluster = inputs.cluster
    program = software or software_of(inputs)
    if decisions.pipeline_parallel == 1:
        return 0.0
    stride = axis_stride(decisions, "pp")
    position = from_rank % decisions.pipeline_parallel * stride
    same_node = position // cluster.gpus_per_node == (position + stride) // cluster.gpus_per_node
    n = decisions.micro_batch_size * inputs.training.sequence_length
    volume = float(n * inputs.model.hidden_size * ELEMENT_BYTES[inputs.training.precision])
    t = decisions.tensor_parallel
    if decisions.sequence_parallel:
        return message_seconds(cluster, volume / t, same_node)
    if program.scatter_transfers and t > 1:
        return message_seconds(cluster, volume / t, same_node) + all_gather_seconds(axis_group(cluster, decisions, "tp"), volume)
    return message_seconds(cluster, volume, same_node)


def reduce_seconds(inputs: Inputs, decisions: Decisions, num_parameters_on_rank: float, software: Software | None = None) -> float:
    """Exposed time of the data-parallel communication of a rank's parameters in one step.

    ZeRO-0 all-reduces the gradients. ZeRO-1 and 2 reduce-scatter them and gather the new weights. ZeRO-3 gathers the
    weights for every micro-batch's forward and backward pass (Rajbhandari et al. 2020, arXiv 1910.02054, section 7).
    A program that overlaps shows only what does not fit behind the compute that it runs beside.
    """
    if decisions.data_parallel == 1 or num_parameters_on_rank <= 0:
        return 0.0
    cluster, precision = inputs.cluster, inputs.training.precision
    program = software or software_of(inputs)
    shard, replicas = _data_parallel_groups(cluster, decisions)
    weight_bytes = num_parameters_on_rank * ELEMENT_BYTES[precision]
    gradient_bytes = num_parameters_on_rank * (4 if precision == "fp32" else program.gradient_bytes)
    m = decisions.num_microbatches
    across = all_reduce_seconds(replicas, gradient_bytes / shard.size) if replicas.size > 1 else 0.0
    if decisions.zero_stage == 0:
        whole = group(cluster, decisions.data_parallel, axis_stride(decisions, "dp"))
        reduction, gathers, exposed_gather = all_reduce_seconds(whole, gradient_bytes), 0.0, 0.0
    elif decisions.zero_stage < 3:
        reduction = reduce_scatter_seconds(shard, gradient_bytes) + across
        gathers, exposed_gather = 0.0, all_gather_seconds(shard, weight_bytes)
    else:
        reduction = reduce_scatter_seconds(shard, gradient_bytes) + across
        gathers, exposed_gather = 2.0 * all_gather_seconds(shard, weight_bytes), 0.0
    block = layer_seconds(inputs, decisions, "block", "none", program)
    share = decisions.tensor_parallel * num_parameters_on_rank / inputs.model.block_parameters
    if program.overlap_reduction:
        beside = block.backward * share * (1.0 if decisions.zero_stage < 3 else 0.5)
        reduction = max(0.0, reduction - beside)
    if decisions.zero_stage < 3:
        return reduction + exposed_gather
    if program.overlap_gathers:
        gathers = max(0.0, gathers - (block.forward + block.backward) * share)
    return reduction + m * gathers


def _data_parallel_groups(cluster: ClusterSpec, decisions: Decisions) -> tuple[Group, Group]:
    """The group that shards the states, and the group of its replicas (HSDP)."""
    stride = axis_stride(decisions, "dp")
    shards = decisions.data_parallel // decisions.data_parallel_replicate
    return group(cluster, shards, stride), group(cluster, decisions.data_parallel_replicate, stride * shards)


def optimizer_seconds(inputs: Inputs, decisions: Decisions, num_parameters_on_rank: float, software: Software | None = None) -> float:
    """Time of the optimizer's update of the parameters that a rank owns; ZeRO divides them over the shard group."""
    program = software or software_of(inputs)
    owned = num_parameters_on_rank
    if decisions.zero_stage > 0:
        owned /= decisions.data_parallel // decisions.data_parallel_replicate
    traffic = program.optimizer_traffic_bytes * (1.0 if inputs.training.optimizer == "adam" else 0.5)
    share = core_share(inputs.cluster, inputs.cluster.num_gpus)
    return elementwise_seconds(inputs.cluster, owned * traffic) * share * inputs.cluster.efficiency.time_scale


def parameters_per_rank(model: ModelSpec, tensor_parallel: int, kind: LayerKind) -> float:
    """Parameters of a layer that one tensor-parallel rank holds: matrices cut, norms and output biases whole."""
    if kind == "embedding":
        return model.token_embedding_parameters / tensor_parallel + (model.embedding_parameters - model.token_embedding_parameters)
    if kind == "head":
        norm = model.norm_parameters if model.final_norm else 0
        return (model.head_parameters - norm) / tensor_parallel + norm
    norms = model.num_norms_per_layer * model.norm_parameters
    return (model.block_parameters - norms) / tensor_parallel + norms



def tensor_parallel_seconds(
    inputs: Inputs, decisions: Decisions, kind: LayerKind, recompute: Recompute = "none", software: Software | None = None
) -> float:
    """Of a layer's forward and backward seconds, the visible tensor-parallel communication."""
    if decisions.tensor_parallel == 1:
        return 0.0
    program = software or software_of(inputs)
    parts = {"embedding": _embedding, "block": _block, "head": _head}[kind](inputs, decisions, program)
    again = parts.communication_forward if recompute == "full" and kind == "block" else 0.0
    return (1.0 - program.overlap_tensor_parallel) * (parts.communication_forward + parts.communication_backward + again)
