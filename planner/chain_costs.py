"""Seconds and bytes of a traced module's layers, and of a whole plan of them.

An operation takes as long as the slower of its arithmetic, at the share of the cluster's peak that matrix products (or
fused attention) reach, and its traffic, at the share of bandwidth that element-wise work reaches; its launch comes on top
(roofline, Williams et al. 2009). Weight gradients are added up once per micro-batch. A recomputed layer runs its forward
pass again and keeps what it received only.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from planner.chain_plan import ChainInputs, chain_stage, recomputed
from planner.cluster import ClusterSpec, in_precision
from planner.contention import Demand, placement, shared_walk, shares_cores
from planner.critical_path import RECEIVE, Key, graph
from planner.estimate import capacity_bytes
from planner.kernels import ELEMENT_BYTES, core_share, elementwise_seconds, peak_flops_per_second, pipeline_factor, slowest_node_factor
from planner.moments import memory_moments
from planner.network import (
    all_gather_seconds,
    all_reduce_seconds,
    alone_speedup,
    axis_group,
    axis_stride,
    message_seconds,
    pipeline_senders,
    reduce_scatter_seconds,
)
from planner.pipeline import Counts, Edge, Option, Piece, Pipeline, Run, moment_bytes, stage_loads, stage_seconds
from planner.plan import Decisions, Memory, PipelineRankPrediction, Predictions, Stage, Time, stage_ranks
from planner.schedule import Action, compute_actions, num_in_flight, plan_actions
from planner.software import load_software
from planner.states import StateBytes, state_bytes
from planner.timeline import Timeline, bubble_fraction, simulate
from planner.traced import LayerCost, Operation, at

LEVELS = ("none", "full")


class LayerTimes(NamedTuple):
    """Seconds of one micro-batch through one layer, nothing recomputed."""

    forward: float
    backward: float


def operation_seconds(cluster: ClusterSpec, precision: str, operation: Operation, samples: int, *, backward: bool = False) -> float:
    """Of all calls of an operation together."""
    efficiency, gpu = cluster.efficiency, cluster.gpu
    attention = efficiency.attention_backward if backward else efficiency.attention
    share = attention if operation.kind == "attention" else efficiency.matmul
    arithmetic = at(operation.flops, samples) / (peak_flops_per_second(cluster, precision) * share)  # type: ignore[arg-type]
    traffic = at(operation.moved_bytes, samples) / (gpu.memory_bandwidth_bytes_per_second * efficiency.memory)
    return operation.num_calls * (max(arithmetic, traffic) + efficiency.kernel_seconds)


@functools.lru_cache(maxsize=65536)
def layer_times(cluster: _Hashed, precision: str, cost: LayerCost, samples: int) -> LayerTimes:
    """Of one micro-batch of `samples`, with all ranks of a node computing where they share cores."""
    spec = cluster.spec
    scale = spec.efficiency.time_scale * core_share(spec, spec.num_gpus) * slowest_node_factor(spec)
    forward = sum(operation_seconds(spec, precision, item, samples) for item in cost.forward)
    backward = sum(operation_seconds(spec, precision, item, samples, backward=True) for item in cost.backward)
    added = cost.num_parameters * load_software("meshwright").accumulation_bytes * ELEMENT_BYTES[precision] / 2
    return LayerTimes(forward * scale, (backward + elementwise_seconds(spec, added)) * scale)


class _Hashed:
    """A cluster as a key of a cache, by identity: its dicts can't be hashed."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec


class ChainCosts:
    """A traced module on a cluster: what the ILP needs for any decisions, and what a plan of them is predicted to need."""

    def __init__(self, inputs: ChainInputs) -> None:
        self.inputs, self.model = inputs, inputs.model
        self.cluster = _Hashed(in_precision(inputs.cluster, inputs.training.precision))
        self.state = state_bytes(inputs.training.precision, inputs.training.optimizer)
        self.shared = shares_cores(inputs.cluster, inputs.cluster.num_gpus)
        self._links: dict[tuple[int, int], tuple[float, ...]] = {}

    @property
    def capacity(self) -> int:
        """Bytes that a plan may use on each GPU."""
        return capacity_bytes(self.inputs)

    def cost(self, layer: int) -> LayerCost:
        return self.model.cost(layer)

    def times(self, layer: int, samples: int) -> LayerTimes:
        return layer_times(self.cluster, self.inputs.training.precision, self.cost(layer), samples)

    def states(self, decisions: Decisions, cost: LayerCost) -> StateBytes:
        """Bytes of a layer's weights, gradients and optimizer state; ZeRO-1 shards the latter over the data-parallel ranks.

        A parameter that several layers share is held once where there is one stage, else on each of them.
        """
        count = cost.num_parameters + (cost.num_shared_parameters if decisions.pipeline_parallel > 1 else 0)
        shards = decisions.data_parallel if decisions.zero_stage else 1
        return StateBytes(count * self.state.weights, count * self.state.gradients, -(-count * self.state.optimizer // shards))

    def option(self, layer: int, samples: int, level: str, scale: float = 1.0) -> Option:
        """One way to run a layer, which takes `scale` times its time."""
        cost, alone = self.cost(layer), self.times(layer, samples)
        time = LayerTimes(alone.forward * scale, alone.backward * scale)
        saved = at(cost.saved_bytes, samples)
        forward_transient, backward_transient = at(cost.forward_transient_bytes, samples), at(cost.backward_transient_bytes, samples)
        if level == "none":
            return Option("none", time.forward, time.backward, time.backward, 0.0, saved, forward_transient, backward_transient)
        backward = time.forward + time.backward
        return Option("full", time.forward, backward, backward, 0.0, at(cost.received_bytes, samples), forward_transient, saved + backward_transient)

    def message(self, samples: int, layer: int) -> float:
        """Bytes that a micro-batch sends where a pipeline is cut behind a layer."""
        return at(self.cost(layer).sent_bytes, samples)

    def bandwidth(self, decisions: Decisions, same_node: bool) -> float:
        cluster = self.inputs.cluster
        link = cluster.intra_node if same_node else cluster.inter_node
        faster = 1.0 if same_node else alone_speedup(cluster, pipeline_senders(cluster, decisions))
        return link.bandwidth_bytes_per_second * cluster.efficiency.point_to_point * faster

    def same_node(self, decisions: Decisions) -> list[bool]:
        """For each boundary between pipeline ranks, whether both ranks (of the first copy) are on one node."""
        stride, per_node = axis_stride(decisions, "pp"), self.inputs.cluster.gpus_per_node
        return [rank * stride // per_node == (rank + 1) * stride // per_node for rank in range(decisions.pipeline_parallel - 1)]

    def reduce(self, decisions: Decisions, parameters: float) -> float:
        """Seconds of the gradients' all-reduce, or with ZeRO-1 of their reduce-scatter and the gather of the new weights."""
        if decisions.data_parallel == 1:
            return 0.0
        group = axis_group(self.inputs.cluster, decisions, "dp")
        fp32 = self.inputs.training.precision == "fp32"
        gradients = parameters * (4 if fp32 else load_software("meshwright").gradient_bytes)
        if decisions.zero_stage == 0:
            return all_reduce_seconds(group, gradients)
        weights = parameters * ELEMENT_BYTES[self.inputs.training.precision]
        return reduce_scatter_seconds(group, gradients) + all_gather_seconds(group, weights)

    def optimizer(self, decisions: Decisions, parameters: float) -> float:
        """Seconds of the update of the parameters that a rank owns."""
        cluster = self.cluster.spec
        owned = parameters / (decisions.data_parallel if decisions.zero_stage else 1)
        traffic = load_software("meshwright").optimizer_bytes * (1.0 if self.inputs.training.optimizer == "adam" else 0.5)
        scale = core_share(cluster, cluster.num_gpus) * cluster.efficiency.time_scale * cluster.efficiency.optimizer_scale
        return elementwise_seconds(cluster, owned * traffic) * scale

    def pipeline(self, decisions: Decisions, levels: tuple[str, ...] = LEVELS) -> Pipeline:
        """The chain in the numbers of the ILP: runs of one layer, and edges with the message behind each."""
        b, p, n = decisions.micro_batch_size, decisions.pipeline_parallel, self.model.num_layers
        scale = pipeline_factor(self.cluster.spec, p)
        runs = []
        for layer in range(n):
            cost = self.cost(layer)
            options = tuple(self.option(layer, b, level, scale) for level in levels)
            states = sum(self.states(decisions, cost)) + cost.frozen_bytes
            runs.append(Run(self.model.layers[layer].name, 1, options, states, cost.num_parameters + cost.num_shared_parameters * (p > 1)))
        near = self.same_node(decisions)
        fastest = self.bandwidth(decisions, any(near))
        cluster = self.inputs.cluster
        fixed: dict[Key, float] = {}
        if p > 1 and cluster.efficiency.receive_seconds:
            fixed[RECEIVE] = cluster.efficiency.receive_seconds
        for stage, same in enumerate(near):
            fixed["SEND_F", stage] = fixed["SEND_B", stage + 1] = message_seconds(cluster, 0.0, same)
        total = float(sum(run.parameters for run in runs)) or 1.0
        low, high = self.optimizer(decisions, total / 2), self.optimizer(decisions, total)
        slope = (high - low) / (total / 2)
        return Pipeline(
            runs=tuple(runs),
            ranks=stage_ranks(decisions.schedule, p, 1),
            limits=(float(self.capacity),) * p,
            moments=memory_moments(decisions.schedule, p, 1, decisions.num_microbatches),
            kinds="FB",
            fixed_seconds=fixed,
            reduce_pieces=self._reduce_pieces(decisions, total),
            optimizer_piece=Piece(slope, high - slope * total),
            edges=tuple(
                Edge(layer, layer + 1, self.message(b, layer) / fastest, kept=at(self.cost(layer).kept_bytes, b)) for layer in range(n - 1)
            )
            if p > 1
            else (),
            slowness=tuple(fastest / self.bandwidth(decisions, same) for same in near),
        )

    def _reduce_pieces(self, decisions: Decisions, total: float) -> tuple[Piece, ...]:
        if decisions.data_parallel == 1:
            return ()
        low, high = self.reduce(decisions, total / 2), self.reduce(decisions, total)
        slope = (high - low) / (total / 2)
        return (Piece(slope, high - slope * total),)


def counts_of(stages: tuple[Stage, ...], num_layers: int, levels: tuple[str, ...]) -> Counts:
    """Stages as the solver's counts."""
    found = []
    for stage in stages:
        again, mine = recomputed(stage), range(stage.first_layer, stage.first_layer + stage.num_layers)
        found.append(tuple(
            tuple(int(layer in mine and (level == "full") == (layer in again)) for level in levels) for layer in range(num_layers)
        ))  # fmt: skip
    return tuple(found)


def stages_of(decisions: Decisions, counts: Counts, levels: tuple[str, ...]) -> tuple[Stage, ...]:
    """The solver's counts as stages."""
    stages = []
    for rank, rows in zip(stage_ranks(decisions.schedule, decisions.pipeline_parallel, 1), counts, strict=True):
        mine = [layer for layer, row in enumerate(rows) if sum(row)]
        again = frozenset(layer for layer in mine for level, used in zip(levels, rows[layer], strict=True) if used and level == "full")
        stages.append(chain_stage(mine[0], len(mine), again, rank))
    return tuple(stages)


def predict_timeline(costs: ChainCosts, decisions: Decisions) -> Timeline:
    """The walk of the plan's action lists, event by event; where ranks share cores, with the cores shared."""
    pipeline = costs.pipeline(decisions)
    counts = counts_of(decisions.stages, costs.model.num_layers, LEVELS)
    times = stage_seconds(pipeline, counts)
    lists = plan_actions(decisions)
    rank_of = {id(actions[-1]): rank for rank, actions in enumerate(lists)}

    def seconds(action: Action) -> float:
        return times.get(("OPTIMIZER", rank_of.get(id(action), 0)) if action.kind == "OPTIMIZER" else (action.kind, action.stage), 0.0)

    def transfer(action: Action) -> float:
        return times.get((action.kind, action.stage), 0.0)

    cluster = costs.inputs.cluster
    receive = cluster.efficiency.receive_seconds
    if not costs.shared:
        return simulate(lists, seconds, transfer, receive_seconds=receive)
    share = core_share(cluster, cluster.num_gpus)

    def demand(rank: int, action: Action) -> Demand:
        if action.kind == "OPTIMIZER":
            return Demand(times["OPTIMIZER", rank] / share)
        return Demand(0.0, seconds(action)) if action.kind == "REDUCE" else Demand(seconds(action) / share)

    return shared_walk(lists, demand, transfer, cluster.cores_per_node or 1, placement(cluster, decisions), receive)


def step_seconds(costs: ChainCosts, decisions: Decisions) -> float:
    """The walked step."""
    if costs.shared:
        return predict_timeline(costs, decisions).end
    counts = counts_of(decisions.stages, costs.model.num_layers, LEVELS)
    whole = graph(decisions.schedule, decisions.pipeline_parallel, 1, decisions.num_microbatches)
    return whole.longest(stage_seconds(costs.pipeline(decisions), counts)) + costs.inputs.cluster.efficiency.step_seconds


def predict(costs: ChainCosts, decisions: Decisions) -> Predictions:
    """Memory and time of a plan, per pipeline rank and for the heaviest GPU."""
    pipeline = costs.pipeline(decisions)
    counts = counts_of(decisions.stages, costs.model.num_layers, LEVELS)
    loads, times = stage_loads(pipeline, counts), stage_seconds(pipeline, counts)
    compute = compute_actions(decisions.schedule, decisions.pipeline_parallel, 1, decisions.num_microbatches)
    ranks = []
    for index, stage in enumerate(decisions.stages):
        mine = range(stage.first_layer, stage.first_layer + stage.num_layers)
        held = [costs.states(decisions, costs.cost(layer)) for layer in mine]
        frozen = sum(costs.cost(layer).frozen_bytes for layer in mine)
        peak = max(moment_bytes(moment, loads) for moment in pipeline.moments if moment.rank == index)
        activations = peak - sum(map(sum, held)) - frozen
        memory = Memory.of(
            sum(item.weights for item in held), sum(item.gradients for item in held), sum(item.optimizer for item in held), activations, frozen
        )
        ranks.append(
            PipelineRankPrediction(
                pipeline_rank=index,
                stages=(index,),
                num_in_flight=num_in_flight(compute[index]),
                memory=memory,
                headroom_bytes=costs.capacity - memory.total_bytes,
                forward_seconds=times["F", index],
                backward_seconds=times["B", index],
            )
        )
    heaviest = max((rank.memory for rank in ranks), key=lambda memory: memory.total_bytes)
    return Predictions(memory=heaviest, pipeline_ranks=tuple(ranks), time=_time(costs, decisions, times))


def _time(costs: ChainCosts, decisions: Decisions, times: dict[tuple[str, int], float]) -> Time:
    """The step and what follows from it. No interval: errors were measured for transformers only."""
    timeline = predict_timeline(costs, decisions)
    step = timeline.end + costs.inputs.cluster.efficiency.step_seconds
    training, m = costs.inputs.training, decisions.num_microbatches
    samples = decisions.micro_batch_size
    flops = sum(
        operation.num_calls * at(operation.flops, samples)
        for layer in range(costs.model.num_layers)
        for operation in (*costs.cost(layer).forward, *costs.cost(layer).backward)
    )
    flops *= m * decisions.data_parallel
    peak = peak_flops_per_second(costs.inputs.cluster, training.precision) * decisions.world_size
    slowest = max(range(decisions.pipeline_parallel), key=lambda rank: times["F", rank] + times["B", rank])
    busy, reduction = m * (times["F", slowest] + times["B", slowest]), times.get(("REDUCE", slowest), 0.0)
    optimizer = times.get(("OPTIMIZER", slowest), 0.0)
    tokens = training.global_batch_size * training.sequence_length
    return Time(
        step_seconds=step,
        bubble_fraction=bubble_fraction(timeline),
        model_flops_utilization=flops / step / peak if step > 0 else None,
        tokens_per_second=tokens / step if training.sequence_length > 1 and step > 0 else None,
        step_flops=flops,
        breakdown_seconds={
            "compute": min(busy, step),
            "data_parallel_communication": reduction,
            "optimizer": optimizer,
            "bubble_and_pipeline_communication": max(0.0, step - busy - reduction - optimizer),
        }
        if math.isfinite(step)
        else {},
    )
