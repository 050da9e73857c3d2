"""From measured messages and collectives to the links of a cluster: latency, bandwidth, and what collectives reach of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Literal

from msgspec import UNSET, UnsetType

from planner.cluster import ClusterSpec, CollectiveCurve, Link
from planner.measurements import CollectivePoint, Measurements, MessagePoint
from planner.network import Group, all_gather_seconds, all_reduce_seconds, reduce_scatter_seconds
from planner.plan import replace
from planner.simplex import minimise, squared_logarithms


def _collective_prediction(latency: float, bandwidth: float, point: CollectivePoint) -> float:
    ranks = Group(point.num_ranks, 1, bandwidth, latency)
    function = {"all_reduce": all_reduce_seconds, "all_gather": all_gather_seconds, "reduce_scatter": reduce_scatter_seconds}[point.kind]
    return function(ranks, point.num_bytes)


def fit_link(cluster: ClusterSpec, measured: Measurements, inside: bool) -> ClusterSpec:
    """The link inside a node or between nodes: its bandwidth and latency by messages, and what collectives reach of it."""
    messages = fitted_messages(measured.messages, inside)
    collectives = [point for point in measured.collectives if (point.num_nodes == 1) == inside]
    if not messages and not collectives:
        return cluster

    def of_collective(logs: Sequence[float]) -> float:
        return squared_logarithms(_collective_prediction(math.exp(logs[0]), math.exp(logs[1]), point) / point.seconds for point in collectives)

    start = [math.log(1e-4), math.log(1e9)]
    latency, speed = _line([(point.num_bytes, point.seconds) for point in messages]) if messages else (1e-4, 1e9)
    collective_latency, collective_speed = (math.exp(x) for x in minimise(of_collective, start)) if collectives else (latency, speed)
    if inside:
        bandwidth, share = max(speed, collective_speed), speed / max(speed, collective_speed)
    else:  # one share of both links is what messages reach
        share = cluster.efficiency.point_to_point if fitted_messages(measured.messages, inside=True) else 1.0
        bandwidth = speed / share
    alone = _alone_speedup(measured.messages, inside)
    link = Link(bandwidth_bytes_per_second=bandwidth, latency_seconds=latency, source="measured", alone_speedup=alone)
    name = "collective" if inside else "inter_node_collective"
    changes = {name: min(1.0, collective_speed / bandwidth), f"{name}_latency": collective_latency / latency, "point_to_point": share}
    efficiency = replace(cluster.efficiency, **changes)
    return replace(cluster, efficiency=efficiency, **{"intra_node" if inside else "inter_node": link})


def _alone_speedup(points: Iterable[MessagePoint], inside: bool) -> float | UnsetType:
    """What large messages between nodes gain where one pair has the link to itself, by messages of the same size that all pairs sent at once."""
    together = {point.num_bytes: point.seconds for point in points if point.inside == inside and not (point.alone or point.in_training)}
    alone = {point.num_bytes: point.seconds for point in points if point.inside == inside and point.alone}
    sizes = sorted(together.keys() & alone.keys())[-2:]
    if not sizes:
        return UNSET
    return max(1.0, statistics.geometric_mean(together[size] / alone[size] for size in sizes))


def fitted_messages(points: Iterable[MessagePoint], inside: bool) -> list[MessagePoint]:
    """Those seen in training, and of those measured alone what is larger."""
    same = [point for point in points if point.inside == inside and not point.alone]
    largest = max((point.num_bytes for point in same if point.in_training), default=0)
    return [point for point in same if point.in_training or point.num_bytes > 2 * largest]


def fit_curves(cluster: ClusterSpec, points: Sequence[CollectivePoint]) -> ClusterSpec:
    """A line for each collective on each shape of group."""
    groups: dict[tuple[Literal["all_reduce", "all_gather", "reduce_scatter"], int, int], list[CollectivePoint]] = {}
    for point in points:
        groups.setdefault((point.kind, point.num_ranks, point.num_nodes), []).append(point)
    curves = []
    for (kind, num_ranks, num_nodes), same in groups.items():
        latency, bandwidth = _line([(point.num_bytes, point.seconds) for point in same])
        curves.append(
            CollectiveCurve(
                kind=kind, num_ranks=num_ranks, num_nodes=num_nodes, latency_seconds=latency, bandwidth_bytes_per_second=bandwidth
            )
        )
    return replace(cluster, collectives=tuple(curves))


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Latency and bandwidth of seconds = latency + bytes / bandwidth."""

    def cost(logs: Sequence[float]) -> float:
        return squared_logarithms((math.exp(logs[0]) + num_bytes / math.exp(logs[1])) / seconds for num_bytes, seconds in points)

    least = min(seconds for _, seconds in points)
    most = max(num_bytes / seconds for num_bytes, seconds in points)
    latency, bandwidth = minimise(cost, [math.log(least), math.log(most)])
    return math.exp(latency), math.exp(bandwidth)
