"""Seconds of one message or collective: latency plus bandwidth on the link that the group really uses.

Which link that is follows from the plan's rank order: the group of an axis holds ranks a fixed stride apart, and ranks
fill the nodes in order. Ring collectives as in Patarasuk and Yuan 2009; a ring that passes through a node with c of
the group's ranks can use c network cards, as NCCL's channels do.
"""

from __future__ import annotations

from math import ceil, log2
from typing import NamedTuple

from msgspec import UNSET

from planner.cluster import ClusterSpec, CollectiveCurve
from planner.plan import Axis, Decisions, replace


class Group(NamedTuple):
    """Ranks that communicate, as each of them sees it."""

    size: int
    nodes: int
    bandwidth: float
    """Bytes per second that one rank moves in a large ring, efficiency included."""
    latency: float
    """Seconds of an empty message on the slowest link."""
    curves: tuple[CollectiveCurve, ...] = ()
    """What was measured of groups of this shape."""


def axis_stride(decisions: Decisions, axis: Axis) -> int:
    """Distance between neighbouring ranks of an axis."""
    sizes = {"tp": decisions.tensor_parallel, "dp": decisions.data_parallel, "pp": decisions.pipeline_parallel}
    stride = 1
    for name in decisions.rank_order:
        if name == axis:
            return stride
        stride *= sizes[name]
    return stride


def alone_speedup(cluster: ClusterSpec, senders: int) -> float:
    """How many times the bandwidth between nodes each of `senders` ranks of a node gets while its other ranks leave the link to them."""
    measured, per_node = cluster.inter_node.alone_speedup, cluster.gpus_per_node
    return 1.0 if measured is UNSET or senders >= per_node else max(1.0, min(measured, per_node / senders))


def pipeline_senders(cluster: ClusterSpec, decisions: Decisions) -> int:
    """How many ranks of a node send to the next stage at once where that is on another node: those of its last stage."""
    return min(axis_stride(decisions, "pp"), cluster.gpus_per_node)


def group(cluster: ClusterSpec, size: int, stride: int, senders: int | None = None) -> Group:
    """The group of `size` ranks that lie `stride` apart; between nodes with `senders` ranks of each at once, by default all of them."""
    efficiency = cluster.efficiency
    per_node = max(1, min(size, cluster.gpus_per_node // stride)) if stride <= cluster.gpus_per_node else 1
    nodes = ceil(size / per_node)
    curves = tuple(curve for curve in cluster.collectives if curve.num_ranks == size and curve.num_nodes == nodes)
    inside = cluster.intra_node
    if nodes == 1:
        latency = inside.latency_seconds * efficiency.collective_latency
        return Group(size, 1, inside.bandwidth_bytes_per_second * efficiency.collective, latency, curves)
    outside = cluster.inter_node
    bandwidth = min(inside.bandwidth_bytes_per_second, outside.bandwidth_bytes_per_second * per_node) if per_node > 1 else (
        outside.bandwidth_bytes_per_second
    )
    latency = outside.latency_seconds * efficiency.inter_node_collective_latency
    faster = 1.0 if senders is None else alone_speedup(cluster, senders)
    if faster > 1.0:
        curves = tuple(replace(curve, bandwidth_bytes_per_second=curve.bandwidth_bytes_per_second * faster) for curve in curves)
    return Group(size, nodes, bandwidth * efficiency.inter_node_collective * faster, latency, curves)


def axis_group(cluster: ClusterSpec, decisions: Decisions, axis: Axis) -> Group:
    """The group of a mesh axis."""
    sizes = {"tp": decisions.tensor_parallel, "dp": decisions.data_parallel, "pp": decisions.pipeline_parallel}
    return group(cluster, sizes[axis], axis_stride(decisions, axis))


def all_reduce_seconds(ranks: Group, num_bytes: float) -> float:
    """2·(n-1)/n of the bytes through the ring; the latency is a ring's or a double tree's, whichever is less."""
    measured = _measured("all_reduce", ranks, num_bytes)
    return 2.0 * _ring_seconds(ranks, num_bytes) if measured is None else measured


def all_gather_seconds(ranks: Group, num_bytes: float) -> float:
    """Every rank ends up with `num_bytes`, having begun with 1/n of it."""
    measured = _measured("all_gather", ranks, num_bytes)
    return _ring_seconds(ranks, num_bytes) if measured is None else measured


def reduce_scatter_seconds(ranks: Group, num_bytes: float) -> float:
    """Every rank begins with `num_bytes` and ends with 1/n of the sum."""
    measured = _measured("reduce_scatter", ranks, num_bytes)
    return _ring_seconds(ranks, num_bytes) if measured is None else measured


def _ring_seconds(ranks: Group, num_bytes: float) -> float:
    n = ranks.size
    if n == 1 or num_bytes <= 0:
        return 0.0
    return (n - 1) / n * num_bytes / ranks.bandwidth + ranks.latency * min(n - 1, 2 * log2(n) + 1)


def _measured(kind: str, ranks: Group, num_bytes: float) -> float | None:
    """By the curve of groups of this shape, None where there is none."""
    for curve in ranks.curves:
        if curve.kind == kind and ranks.size > 1 and num_bytes > 0:
            return curve.latency_seconds + num_bytes / curve.bandwidth_bytes_per_second
    return None


def message_seconds(cluster: ClusterSpec, num_bytes: float, same_node: bool, senders: int | None = None) -> float:
    """A message between two ranks, of one node or of two; then with `senders` ranks of a node at once, by default all of them."""
    link = cluster.intra_node if same_node else cluster.inter_node
    faster = 1.0 if same_node or senders is None else alone_speedup(cluster, senders)
    return link.latency_seconds + num_bytes / (link.bandwidth_bytes_per_second * cluster.efficiency.point_to_point * faster)
