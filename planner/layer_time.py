"""Seconds of the parts of a step: one layer's passes, a message between stages, the gradient reduction, the optimizer.

Symbols: b micro-batch size, s sequence length, t tensor-parallel degree, h, f, a, k, d, V as in planner.model, and
n = b·s tokens of a micro-batch. All times are those of one rank, and add up: a stage takes the sum over its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from msgspec import UNSET

from planner.cluster import ClusterSpec, in_precision
from planner.graph import LayerKind
from planner.kernels import (
    ELEMENT_BYTES,
    core_share,
    elementwise_seconds,
    matmul_seconds,
    peak_flops_per_second,
    pipeline_factor,
    slowest_node_factor,
)
from planner.model import ModelSpec
from planner.network import (
    Group,
    all_gather_seconds,
    all_reduce_seconds,
    axis_group,
    axis_stride,
    group,
    message_seconds,
    pipeline_senders,
    reduce_scatter_seconds,
)
from planner.plan import Decisions, Inputs, Recompute, replace
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
    """Times of a layer's parts, nothing recomputed, computation and communication apart."""

    matmul: float
    """Matrix products of the forward pass."""
    elementwise: float
    core: float
    """Attention between its projections, forward."""
    pointwise: float
    """Of the element-wise part, the norms and the activation function."""
    backward_input: float
    backward_weight: float
    communication_forward: float
    communication_backward: float


def software_of(inputs: Inputs) -> Software:
    """The program whose time is predicted: the one that the training inputs name, or their profile's."""
    program = load_software(inputs.training.program or inputs.training.profile, "training.program")
    fixed = inputs.cluster.efficiency.step_seconds
    return replace(program, step_seconds=program.step_seconds + fixed) if fixed else program


def layer_seconds(
    inputs: Inputs, decisions: Decisions, kind: LayerKind, recompute: Recompute = "none", software: Software | None = None
) -> LayerSeconds:
    """One layer's passes for one micro-batch on one rank; `decisions.stages` may be empty.

    Full recomputation adds the forward pass with its communication to the backward pass, selective what the program runs
    again: in Megatron the attention core (Korthikanti et al. 2022, arXiv 2205.05198, section 5).
    """
    return timed_layer(inputs, decisions, kind, recompute, software or software_of(inputs))[0]


def timed_layer(
    inputs: Inputs, decisions: Decisions, kind: LayerKind, recompute: Recompute, program: Software
) -> tuple[LayerSeconds, float]:
    """The layer's seconds, and of forward and backward together the visible tensor-parallel communication."""
    inputs = _computing(inputs)
    parts = {"embedding": _embedding, "block": _block, "head": _head}[kind](inputs, decisions, program)
    efficiency = inputs.cluster.efficiency
    scale = efficiency.time_scale * program.compute_scale * core_share(inputs.cluster, inputs.cluster.num_gpus)
    scale *= slowest_node_factor(inputs.cluster) * pipeline_factor(inputs.cluster, decisions.pipeline_parallel)
    forward_scale = scale * efficiency.layer_scale.get(f"{kind}.forward", 1.0)
    backward_scale = scale * efficiency.layer_scale.get(f"{kind}.backward", 1.0)
    sent = parts.communication_forward * (1.0 - program.overlap_tensor_forward)
    returned = _backward_communication(parts.communication_backward, decisions.sequence_parallel, program.overlap_tensor_backward)
    forward = (parts.matmul + parts.elementwise + parts.core) * forward_scale + sent
    weight = parts.backward_weight * backward_scale
    backward = parts.backward_input * backward_scale + returned
    communication = sent + returned
    if kind == "block" and recompute == "full":
        backward += forward
        communication += sent
    elif kind == "block" and recompute == "selective":
        backward += _selective(parts, inputs, program) * forward_scale
    return LayerSeconds(forward, backward + weight, backward, weight), communication


def _computing(inputs: Inputs) -> Inputs:
    """With the efficiencies of the training's precision."""
    cluster = in_precision(inputs.cluster, inputs.training.precision)
    return inputs if cluster is inputs.cluster else replace(inputs, cluster=cluster)


def _selective(parts: _Parts, inputs: Inputs, program: Software) -> float:
    """What selective recomputation runs again: the attention core (Megatron), every second operation (torchtitan), or the norms
    and the activation function, and the scores where they are kept at all (our executor).
    """
    if program.selective_recompute == "core":
        return parts.core
    if program.selective_recompute == "op":
        return 0.5 * parts.matmul + parts.elementwise
    unfused = (inputs.training.attention or program.attention) == "unfused"
    return parts.pointwise + (parts.core if unfused else 0.0)


def _backward_communication(seconds: float, sequence_parallel: bool, overlap: float) -> float:
    """What is visible of it. With sequence parallelism (Korthikanti et al. 2022, section 4.2.2) half of it gathers the
    gradient before a product needs it and hides behind nothing, and the saved input is gathered once more.
    """
    if not sequence_parallel:
        return seconds * (1.0 - overlap)
    return 0.5 * seconds + seconds * (1.0 - overlap)


def matmul_speed(cluster: ClusterSpec, program: Software) -> float:
    """Of the program's matrix products over what the cluster's efficiency says."""
    return program.matmul_speed * (cluster.efficiency.native_matmul if program.native_kernels else 1.0)


def _block(inputs: Inputs, decisions: Decisions, program: Software) -> _Parts:
    """A transformer block: four projections (five when gated), the attention core, and the element-wise rest.

    Element-wise traffic in elements per token, from the kernels of Megatron-LM: a norm reads and writes; bias, dropout
    and residual read two, write one and half a mask; each norm's backward pass moves eight with its residual, each
    dropout's two and a half, each bias's one. Activation and rotary embedding move what they read and write.
    """
    model, cluster, precision = inputs.model, inputs.cluster, inputs.training.precision
    t, h = decisions.tensor_parallel, model.hidden_size
    n = decisions.micro_batch_size * inputs.training.sequence_length
    heads = model.query_size / t
    key_values = model.head_dim * max(model.num_key_value_heads / t, 1.0)
    ups = 2 if model.gated_ffn else 1
    f = model.ffn_hidden_size / t
    forward = backward = weight = parameters = 0.0
    slow = 1.0 / matmul_speed(cluster, program)
    inward = outward = 0.0
    for columns, depth in ((heads + 2 * key_values, h), (h, heads), (ups * f, h), (h, f)):
        forward += slow * matmul_seconds(cluster, precision, n, columns, depth)
        backward += slow * matmul_seconds(cluster, precision, n, depth, columns)
        weight += slow * matmul_seconds(cluster, precision, columns, depth, n)
        parameters += columns * depth
        inward += n * depth
        outward += n * columns
    core, core_backward = _attention_core(inputs, decisions, program)
    size = ELEMENT_BYTES[precision]
    whole = n * h / (t if decisions.sequence_parallel else 1)
    rotary = 2 * (heads + key_values) if model.position_embedding == "rope" else 0.0
    residuals = 1 if model.parallel_block else 2
    light = whole * (2 * model.num_norms_per_layer + 3.5 * residuals) + n * (rotary + 2 * heads + (ups + 1) * f)
    heavy = whole * (8 * model.num_norms_per_layer + 2.5 * residuals + 2) + n * (rotary + 3 * heads + (2 * ups + 2) * f)
    passes = size * program.elementwise_passes
    elementwise = elementwise_seconds(cluster, light * passes, 8)
    pointwise = elementwise_seconds(cluster, (whole * 2 * model.num_norms_per_layer + n * (ups + 1) * f) * passes, 3)
    backward += elementwise_seconds(cluster, heavy * passes, 14) + core_backward
    if program.cast_bytes:
        elementwise += elementwise_seconds(cluster, program.cast_bytes * (inward + parameters), 8)
        backward += elementwise_seconds(cluster, program.cast_bytes * outward, 8)
    weight += elementwise_seconds(cluster, parameters * program.accumulation_bytes * (size / 2), 4)
    one_sum = _sum_seconds(cluster, decisions, program, float(n * h * size))
    sums_forward, sums_backward = _num_sums(model, decisions, program)
    return _Parts(forward, elementwise, core, pointwise, backward, weight, sums_forward * one_sum, sums_backward * one_sum)


def _num_sums(model: ModelSpec, decisions: Decisions, program: Software) -> tuple[float, float]:
    """A block's sums over the tensor-parallel ranks, forward and backward: two each, one each where the MLP is beside attention. Our executor sums
    the gradients of two norms' outputs apart, and under sequence parallelism gathers these apart: forward three halves of a sum, backward five, of
    which `_backward_communication` makes three of each sum given here."""
    if not model.parallel_block:
        return 2.0, 2.0
    if model.num_norms_per_layer == 1 or not program.collective_per_layer:
        return 1.0, 1.0
    return (1.5, 5 / 3) if decisions.sequence_parallel else (1.0, 2.0)


def _sum_seconds(cluster: ClusterSpec, decisions: Decisions, program: Software, num_bytes: float) -> float:
    """One sum of `num_bytes` over the tensor-parallel group; under sequence parallelism a reduce-scatter and an all-gather."""
    if decisions.tensor_parallel == 1:
        return 0.0
    ranks = axis_group(cluster, decisions, "tp")
    if decisions.sequence_parallel:
        pair = reduce_scatter_seconds(ranks, num_bytes) + all_gather_seconds(ranks, num_bytes)
        # two each, but in the backward pass a weight gradient's gather runs beside a reduce-scatter: eight of ten in a block
        return pair + 1.6 * cluster.efficiency.wait_seconds + program.collective_seconds
    return all_reduce_seconds(ranks, num_bytes) + cluster.efficiency.wait_seconds + program.collective_seconds


def _attention_core(inputs: Inputs, decisions: Decisions, program: Software) -> tuple[float, float]:
    """Forward and backward seconds of scores, softmax and values; fused attention's backward pass does 2.5 times the work."""
    model, cluster, precision = inputs.model, inputs.cluster, inputs.training.precision
    s, d = inputs.training.sequence_length, model.head_dim
    batch = decisions.micro_batch_size * model.num_attention_heads / decisions.tensor_parallel
    efficiency = cluster.efficiency
    if (inputs.training.attention or program.attention) == "fused":
        width = d + 16 if cluster.device == "cpu" else max(d, 64)
        flops = 4.0 * batch * s * (min(s, s * 0.5 + 128) if program.causal_skip else s) * width
        rate = peak_flops_per_second(cluster, precision) * program.attention_speed
        rate *= efficiency.native_attention if program.native_kernels else 1.0
        forward = flops / (rate * efficiency.attention) + efficiency.kernel_seconds
        blocks = 0.0
        if efficiency.attention_block_seconds is not UNSET:
            blocks = batch * -(-s // _queries_in_block(s)) * efficiency.attention_block_seconds
        return forward, 2.5 * flops / (rate * efficiency.attention_backward) + blocks + 2 * efficiency.kernel_seconds
    products = matmul_seconds(cluster, precision, s, s, d, batch) + matmul_seconds(cluster, precision, s, d, s, batch)
    products /= matmul_speed(cluster, program)
    scores = batch * s * s * ELEMENT_BYTES[precision]
    forward = products + elementwise_seconds(cluster, program.softmax_passes * scores, 2)
    return forward, 2 * products + elementwise_seconds(cluster, (program.softmax_passes + 1) * scores, 2)


def _queries_in_block(sequence_length: int) -> int:
    """Of PyTorch's fused attention on CPUs (FlashAttentionKernel.cpp in PyTorch 2.13)."""
    return 32 if sequence_length < 192 else 64 if sequence_length < 768 else 256


def _embedding(inputs: Inputs, decisions: Decisions, program: Software) -> _Parts:
    """Looking up n rows of h; with tensor parallelism the vocabulary is cut, and the rows are summed over the ranks."""
    model, cluster = inputs.model, inputs.cluster
    n = decisions.micro_batch_size * inputs.training.sequence_length
    size = ELEMENT_BYTES[inputs.training.precision]
    volume = float(n * model.hidden_size * size)
    light = elementwise_seconds(cluster, 4 * volume * program.elementwise_passes, 4)
    table = model.token_embedding_parameters / decisions.tensor_parallel * program.accumulation_bytes * (size / 2)
    communication = _sum_seconds(cluster, decisions, program, volume)
    return _Parts(0.0, light, 0.0, 0.0, 0.0, light + elementwise_seconds(cluster, table), communication, 0.0)


def _head(inputs: Inputs, decisions: Decisions, program: Software) -> _Parts:
    """Final norm, the product with the vocabulary, and the cross-entropy over V/t columns, two thirds of it forward."""
    model, cluster, precision = inputs.model, inputs.cluster, inputs.training.precision
    t, h = decisions.tensor_parallel, model.hidden_size
    n = decisions.micro_batch_size * inputs.training.sequence_length
    columns = model.vocab_size / t
    size = ELEMENT_BYTES[precision]
    norm = size * n * h * program.elementwise_passes / (t if decisions.sequence_parallel else 1)
    loss = n * columns * program.loss_bytes
    slow = 1.0 / matmul_speed(cluster, program)
    forward = slow * matmul_seconds(cluster, precision, n, columns, h)
    elementwise = elementwise_seconds(cluster, 2 * norm + 2 / 3 * loss, 6)
    backward = slow * matmul_seconds(cluster, precision, n, h, columns) + elementwise_seconds(cluster, 8 * norm + loss / 3, 4)
    weight = slow * matmul_seconds(cluster, precision, columns, h, n)
    weight += elementwise_seconds(cluster, columns * h * program.accumulation_bytes * (size / 2))
    communication = _sum_seconds(cluster, decisions, program, float(n * h * size))
    gathered = communication if decisions.sequence_parallel else 0.0
    if t > 1 and program.loss_collectives:
        gathered += program.loss_collectives * all_reduce_seconds(axis_group(cluster, decisions, "tp"), 4.0 * n) + cluster.efficiency.wait_seconds
    return _Parts(forward, elementwise, 0.0, 0.0, backward, weight, gathered, communication)


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
    t, senders = decisions.tensor_parallel, pipeline_senders(cluster, decisions)
    if decisions.sequence_parallel:
        return message_seconds(cluster, volume / t, same_node, senders)
    if program.scatter_transfers and t > 1:
        return message_seconds(cluster, volume / t, same_node, senders) + all_gather_seconds(axis_group(cluster, decisions, "tp"), volume)
    return message_seconds(cluster, volume, same_node, senders)


def reduce_seconds(inputs: Inputs, decisions: Decisions, num_parameters_on_rank: float, software: Software | None = None) -> float:
    """Exposed time of the data-parallel communication of a rank's parameters in one step.

    ZeRO-0 all-reduces the gradients. ZeRO-1 and 2 reduce-scatter them and gather the new weights. ZeRO-3 gathers the
    weights for every micro-batch's forward and backward pass (Rajbhandari et al. 2020, arXiv 1910.02054, section 7).
    A program that overlaps shows only what does not fit behind the compute that it runs beside. One that reduces layer by
    layer pays each layer's latency, and under sequence parallelism that of summing what every rank holds (norms, biases). Ranks wait
    for each other once, and where gathers and reductions come between layers each time (`Efficiency.wait_seconds`).
    """
    program = software or software_of(inputs)
    if num_parameters_on_rank <= 0:
        return 0.0
    replicated = _replicated_seconds(inputs, decisions, num_parameters_on_rank, program)
    if decisions.data_parallel == 1:
        return replicated
    cluster, precision = inputs.cluster, inputs.training.precision
    shard, replicas, whole = (_slowed(ranks, program) for ranks in _data_parallel_groups(cluster, decisions))
    of_gradient = 4 if precision == "fp32" else program.gradient_bytes
    moved = num_parameters_on_rank + _tied_again(inputs, decisions, program)
    weight_bytes, gradient_bytes = moved * ELEMENT_BYTES[precision], moved * of_gradient
    m = decisions.num_microbatches
    share = decisions.tensor_parallel * num_parameters_on_rank / inputs.model.block_parameters
    pieces = _num_units(inputs, decisions, num_parameters_on_rank) if program.collective_per_layer else 1.0

    def whole_of(collective: Callable[[Group, float], float], ranks: Group, num_bytes: float) -> float:
        return pieces * collective(ranks, num_bytes / pieces)

    # a layer's reduction and the next one's gather follow each other, as do those of the units at the ends
    waits = 1.0 if decisions.zero_stage < 2 else m * (pieces - 0.5 * _num_end_units(decisions)) * (decisions.zero_stage - 1)
    replicated += waits * cluster.efficiency.wait_seconds
    if cluster.efficiency.fresh_bandwidth_bytes_per_second and decisions.zero_stage >= 2 and program.reduce_each_microbatch:
        made = m * (gradient_bytes + (2.0 * weight_bytes if decisions.zero_stage == 3 else 0.0))
        replicated += made / cluster.efficiency.fresh_bandwidth_bytes_per_second
    across = whole_of(all_reduce_seconds, replicas, num_parameters_on_rank * of_gradient / shard.size) if replicas.size > 1 else 0.0
    scatter = whole_of(all_reduce_seconds if program.zero1_all_reduce else reduce_scatter_seconds, shard, gradient_bytes)
    if decisions.zero_stage >= 2 and program.reduce_each_microbatch:
        scatter *= m
    gather = whole_of(all_gather_seconds, shard, weight_bytes)
    if decisions.zero_stage == 0:
        reduction, gathers, exposed_gather = whole_of(all_reduce_seconds, whole, gradient_bytes), 0.0, 0.0
    elif decisions.zero_stage < 3:
        reduction, gathers, exposed_gather = scatter + across, 0.0, gather
    else:
        reduction, gathers, exposed_gather = scatter + across, 2.0 * gather, 0.0
    if not program.overlap_reduction and not program.overlap_gathers:
        return reduction + m * gathers + exposed_gather + replicated
    block = layer_seconds(inputs, decisions, "block", "none", program)
    if program.overlap_reduction:
        beside = block.backward * share
        if decisions.zero_stage == 3 and program.overlap_gathers:
            beside = max(0.0, beside - gather)  # the network is busy with the weights for that long
        reduction = max(0.0, reduction - beside)
        if program.overlap_gathers:
            exposed_gather = max(0.0, exposed_gather - block.forward * share)
    if decisions.zero_stage < 3:
        return reduction + exposed_gather + replicated
    if program.overlap_gathers:
        gathers = max(0.0, gathers - (block.forward + block.backward) * share)
    return reduction + m * gathers + replicated


def _tied_again(inputs: Inputs, decisions: Decisions, program: Software) -> float:
    """Parameters of a tied table on the only stage, which ZeRO-2 and 3 reduce (and 3 gathers) layer by layer: for the embedding and the head."""
    if decisions.zero_stage < 2 or decisions.pipeline_parallel > 1 or not program.collective_per_layer or not inputs.model.tied_embeddings:
        return 0.0
    return inputs.model.token_embedding_parameters / decisions.tensor_parallel


def _num_units(inputs: Inputs, decisions: Decisions, num_parameters_on_rank: float) -> float:
    """Layers that a rank reduces one by one: its blocks, and at the ends tables and the final norm by themselves."""
    return decisions.tensor_parallel * num_parameters_on_rank / inputs.model.block_parameters + _num_end_units(decisions)


def _num_end_units(decisions: Decisions) -> float:
    """Tables, positions and final norm, shared out over the pipeline ranks."""
    return 3.0 if decisions.pipeline_parallel == 1 else 4.0 / decisions.pipeline_parallel


def _replicated_seconds(inputs: Inputs, decisions: Decisions, num_parameters_on_rank: float, program: Software) -> float:
    """Sums over the tensor-parallel ranks of the gradients of what each holds whole, layer by layer: of all of it under sequence parallelism, of
    query/key norms always."""
    model = inputs.model
    if decisions.tensor_parallel == 1 or not (decisions.sequence_parallel or model.qk_norm) or not program.collective_per_layer:
        return 0.0
    count = model.num_norms_per_layer * model.norm_parameters + model.hidden_size * (model.attention_output_bias + model.mlp_bias)
    count = (count if decisions.sequence_parallel else 0) + (2 * model.head_dim if model.qk_norm else 0)
    num_bytes = ELEMENT_BYTES[inputs.training.precision] * count
    times = decisions.num_microbatches if decisions.zero_stage >= 2 and decisions.data_parallel > 1 else 1
    sums = times * _num_units(inputs, decisions, num_parameters_on_rank)
    return sums * all_reduce_seconds(axis_group(inputs.cluster, decisions, "tp"), float(num_bytes))


def _data_parallel_groups(cluster: ClusterSpec, decisions: Decisions) -> tuple[Group, Group, Group]:
    """The group that shards the states, the group of its replicas (HSDP), and both together."""
    stride = axis_stride(decisions, "dp")
    replicas = decisions.data_parallel_replicate
    shards = decisions.data_parallel // replicas
    whole = group(cluster, decisions.data_parallel, stride)
    return (whole if replicas == 1 else group(cluster, shards, stride)), group(cluster, replicas, stride * shards), whole


def _slowed(ranks: Group, program: Software) -> Group:
    return ranks._replace(bandwidth=ranks.bandwidth * program.data_parallel_bandwidth)


def optimizer_seconds(inputs: Inputs, decisions: Decisions, num_parameters_on_rank: float, software: Software | None = None) -> float:
    """Time of the optimizer's update of the parameters that a rank owns; ZeRO divides them over the shard group.

    The sums over ranks that come first are `final_sums_seconds`.
    """
    inputs = _computing(inputs)
    program = software or software_of(inputs)
    owned = num_parameters_on_rank
    if decisions.zero_stage > 0:
        owned /= decisions.data_parallel // decisions.data_parallel_replicate
    traffic = program.optimizer_bytes * (1.0 if inputs.training.optimizer == "adam" else 0.5)
    share = core_share(inputs.cluster, inputs.cluster.num_gpus)
    scale = inputs.cluster.efficiency.time_scale * inputs.cluster.efficiency.optimizer_scale
    return elementwise_seconds(inputs.cluster, owned * traffic) * share * scale + final_sums_seconds(inputs, decisions, program)


def final_sums_seconds(inputs: Inputs, decisions: Decisions, software: Software | None = None) -> float:
    """What all ranks wait for before the optimizer's step: loss and norm added up, and a tied table's gradients on first and last stage."""
    program = software or software_of(inputs)
    if not program.final_sums or decisions.world_size == 1:
        return 0.0
    cluster, model, p = inputs.cluster, inputs.model, decisions.pipeline_parallel
    seconds = all_reduce_seconds(group(cluster, decisions.world_size, 1), 8.0)
    apart = p > 1 and decisions.schedule != "ZBVZeroBubble"
    if model.tied_embeddings and apart:
        width = 4 if inputs.training.precision == "fp32" else program.gradient_bytes
        shards = decisions.data_parallel // decisions.data_parallel_replicate if decisions.zero_stage else 1
        table = model.token_embedding_parameters * width / decisions.tensor_parallel / shards
        seconds += all_reduce_seconds(group(cluster, 2, axis_stride(decisions, "pp") * (p - 1), pipeline_senders(cluster, decisions)), table)
    return seconds


def parameters_per_rank(model: ModelSpec, tensor_parallel: int, kind: LayerKind) -> float:
    """Parameters of a layer that one tensor-parallel rank holds: matrices cut, norms and output biases whole."""
    if kind == "embedding":
        return model.token_embedding_parameters / tensor_parallel + (model.embedding_parameters - model.token_embedding_parameters)
    if kind == "head":
        norm = model.norm_parameters if model.final_norm else 0
        return (model.head_parameters - norm) / tensor_parallel + norm
    norms = model.num_norms_per_layer * model.norm_parameters
    return (model.block_parameters - norms) / tensor_parallel + norms
