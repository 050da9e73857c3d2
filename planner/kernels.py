"""Seconds of one operation on one device: matrix products and attention by roofline, element-wise work by bandwidth.

A kernel takes as long as the slower of its arithmetic and its memory traffic, and its launch on top (Williams et al.
2009, "Roofline"). What share of the peak a matrix product reaches depends on its shape: see `matmul_seconds`.
"""

from __future__ import annotations

from math import log, sqrt

from msgspec import UNSET

from planner.cluster import ClusterSpec
from planner.plan import Precision

TILE = 128
"""Rows and columns of the part of a product that one multiprocessor works on."""
ELEMENT_BYTES: dict[str, int] = {"mixed-bf16": 2, "bf16": 2, "fp32": 4}
"""Bytes of an activation or weight in the forward pass."""


def peak_flops_per_second(cluster: ClusterSpec, precision: Precision) -> float:
    """The device's peak for the data type that matrix products of this precision use; fp16 stands in where bf16 is not known."""
    peaks = cluster.gpu.peak_flops_per_second
    wanted = ("fp32",) if precision == "fp32" else ("bf16", "fp16", "fp32")
    for name in wanted:
        if name in peaks:
            return peaks[name]
    return max(peaks.values())


def matmul_seconds(cluster: ClusterSpec, precision: Precision, rows: float, columns: float, depth: float, batch: float = 1) -> float:
    """Time of `batch` products of a (rows x depth) with a (depth x columns) matrix.

    Arithmetic: 2·rows·columns·depth·batch FLOPs at `efficiency.matmul` of the peak, with d0 = `matmul_depth_overhead`
    added to the depth for the prologue and epilogue of each tile, and e0 = `matmul_edge_overhead` to rows and columns for
    what tiles lose at the edges and in the last wave. No product is done before one tile of 128 x 128 is. Tensor cores
    want sizes in multiples of 8 (16 bytes; NVIDIA's matrix multiplication guide); batches of others run at the peak of
    fp32, which needs none. Traffic: each operand once, at `efficiency.memory` of the bandwidth.
    """
    if rows <= 0 or columns <= 0 or depth <= 0 or batch <= 0:
        return 0.0
    efficiency, gpu = cluster.efficiency, cluster.gpu
    size = ELEMENT_BYTES[precision]
    traffic = batch * size * (rows * depth + depth * columns + rows * columns) / (gpu.memory_bandwidth_bytes_per_second * efficiency.memory)
    edge, deep = efficiency.matmul_edge_overhead, depth + efficiency.matmul_depth_overhead
    volume = (rows + edge) * (columns + edge) * deep * batch
    if gpu.num_multiprocessors:
        volume = max(volume, TILE * TILE * gpu.num_multiprocessors * deep)
    arithmetic = 2.0 * volume / (peak_flops_per_second(cluster, precision) * efficiency.matmul)
    if gpu.num_multiprocessors and batch > 1 and size < 4 and (depth % 8 or columns % 8):
        arithmetic = _misaligned_seconds(cluster, volume, arithmetic)
    return max(arithmetic, traffic) + efficiency.kernel_seconds


def _misaligned_seconds(cluster: ClusterSpec, volume: float, aligned: float) -> float:
    """Time of multiply-adds that tensor cores can't do, which take `aligned` seconds where they can."""
    factor, peak = cluster.efficiency.matmul_misaligned, cluster.gpu.peak_flops_per_second.get("fp32")
    if factor is not None:
        return factor * aligned
    return max(aligned, 2.0 * volume / peak) if peak else aligned


def elementwise_seconds(cluster: ClusterSpec, num_bytes: float, num_kernels: float = 1) -> float:
    """Time of `num_kernels` kernels that read and write `num_bytes` in all."""
    efficiency = cluster.efficiency
    if num_bytes <= 0:
        return 0.0
    return num_bytes / (cluster.gpu.memory_bandwidth_bytes_per_second * efficiency.memory) + num_kernels * efficiency.kernel_seconds


def core_share(cluster: ClusterSpec, num_ranks: int) -> float:
    """How much slower a rank computes when all ranks of its node compute at once on shared cores; 1 where each has a device."""
    if not cluster.cores_per_node:
        return 1.0
    return max(1.0, min(num_ranks, cluster.gpus_per_node) / cluster.cores_per_node)


def slowest_node_factor(cluster: ClusterSpec) -> float:
    """Time of the slowest of n nodes over the mean: 1 + sigma·sqrt(2·ln n), the expected maximum of n normal variables."""
    nodes = cluster.num_nodes
    return 1.0 + cluster.efficiency.jitter * sqrt(2.0 * log(nodes)) if nodes > 1 else 1.0


def pipeline_factor(cluster: ClusterSpec, pipeline_parallel: int) -> float:
    """Time of passes on ranks that wait for each other's messages over that without (`Efficiency.pipeline_scale`); 1 where it was not measured."""
    scale = cluster.efficiency.pipeline_scale
    return 1.0 if pipeline_parallel == 1 or scale is UNSET else scale
