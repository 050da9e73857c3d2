"""The hardware: a GPU, the links between GPUs, and how many of them there are. Presets and cluster files are data."""

from __future__ import annotations

import difflib
import functools
import json
import os
from importlib import resources
from typing import Literal

import msgspec

from planner.documents import Document, convert, load
from planner.errors import InputError
from planner.values import AT_LEAST_ONE, COUNT, FRACTION, POSITIVE, check_values, count_up_to, whole_number

SCHEMA = "meshwright.cluster/1"
Device = Literal["cuda", "cpu", "other"]
MOST_GPUS = 10_000_000
LAYER_PASSES = tuple(f"{kind}.{name}" for kind in ("embedding", "block", "head") for name in ("forward", "backward"))
"""What `Efficiency.layer_scale` may name."""
_REACHED = {
    "matmul": FRACTION, "memory": FRACTION, "attention": FRACTION, "attention_backward": FRACTION, "layer_scale": POSITIVE,
    "optimizer_scale": POSITIVE, "pipeline_scale": POSITIVE,
}  # fmt: skip

RENDEZVOUS_SECONDS = 1e-6
"""Least `Efficiency.receive_seconds` where late receives were seen: above 0, so that they take their message's time."""


class Gpu(Document, frozen=True, kw_only=True):
    """One accelerator (or one CPU rank). FLOP/s are dense, without sparsity."""

    RULES = {
        "memory_bytes": COUNT, "peak_flops_per_second": POSITIVE, "memory_bandwidth_bytes_per_second": POSITIVE, "num_multiprocessors": COUNT,
        "fp8_matmul_speedup": POSITIVE,
    }  # fmt: skip

    name: str
    memory_bytes: int
    """What a process can allocate at most, the driver's share already taken off."""
    peak_flops_per_second: dict[str, float]
    """Peak by data type: "bf16", "fp16", "fp32"."""
    memory_bandwidth_bytes_per_second: float
    reserved_bytes: int = 0
    """Held by the runtime outside the allocator: CUDA context, communicator buffers."""
    num_multiprocessors: int | None = None
    """Units that the tiles of a matrix product are spread over; null where that is not modelled."""
    fp8_matmul_speedup: float | None = None
    """Speed of matrix products in fp8 over those in bf16, as measured or fitted; null where there is no fp8 or neither is known."""
    power_watts: float | None = None
    source: str = ""


class Link(Document, frozen=True, kw_only=True):
    """A link as one GPU sees it: what it can send, one direction, and the time of an empty message."""

    RULES = {"bandwidth_bytes_per_second": POSITIVE, "alone_speedup": AT_LEAST_ONE}

    bandwidth_bytes_per_second: float
    latency_seconds: float
    source: str = ""
    alone_speedup: float | msgspec.UnsetType = msgspec.UNSET
    """Measured between nodes: how many times that bandwidth a pair of ranks gets while the other ranks of its nodes leave the link alone."""


class ComputeEfficiency(Document, frozen=True, kw_only=True):
    """What computing reaches of the peaks: those fields of `Efficiency`, under the same names."""

    RULES = _REACHED

    matmul: float
    memory: float
    attention: float
    attention_backward: float
    matmul_depth_overhead: float
    kernel_seconds: float
    layer_scale: dict[str, float]
    optimizer_scale: float
    pipeline_scale: float | msgspec.UnsetType = msgspec.UNSET
    attention_block_seconds: float | msgspec.UnsetType = msgspec.UNSET


class Efficiency(Document, frozen=True, kw_only=True):
    """How much of the peaks is reached. Each is a fraction in (0, 1] unless it says otherwise."""

    RULES = _REACHED | {
        "collective": FRACTION, "inter_node_collective": FRACTION, "point_to_point": FRACTION, "native_matmul": POSITIVE,
        "native_attention": POSITIVE, "matmul_misaligned": POSITIVE, "time_scale": POSITIVE, "fresh_bandwidth_bytes_per_second": POSITIVE,
    }  # fmt: skip

    matmul: float = 0.8
    """Of peak FLOP/s, by a large matrix product."""
    memory: float = 0.8
    """Of memory bandwidth, by element-wise operations."""
    collective: float = 0.8
    """Of link bandwidth, by a large ring collective inside a node."""
    inter_node_collective: float = 0.8
    """Of link bandwidth, by a large ring collective between nodes."""
    point_to_point: float = 0.8
    """Of link bandwidth, by a large message between two ranks."""
    attention: float = 0.6
    """Of peak FLOP/s, by the forward pass of fused (flash) attention."""
    attention_backward: float = 0.5
    """Of peak FLOP/s, by the backward pass of fused attention."""
    native_matmul: float = 1.0
    """Speed of matrix products in libraries tuned for this GPU over `matmul`."""
    native_attention: float = 1.0
    """Speed of attention kernels written for this GPU (cuDNN, FlashAttention-3) over `attention`."""
    matmul_depth_overhead: float = 0.0
    """Added to the inner dimension of a matrix product: what starting and ending a tile costs, in elements."""
    matmul_edge_overhead: float = 0.0
    """Added to both outer dimensions of a matrix product: what is lost at the edges of the tiles, in elements."""
    matmul_misaligned: float | None = None
    """Measured: factor on the time of a matrix product whose sizes are no multiples of 16 bytes, where a GPU has tensor cores.
    Null where it was not measured: such products then run at the fp32 peak, without tensor cores."""
    kernel_seconds: float = 0.0
    """Least time of a kernel: its launch and its ramp."""
    jitter: float = 0.0
    """Standard deviation of a node's time for a step, as a share of it: a step waits for the slowest node."""
    time_scale: float = 1.0
    """Fitted: measured over predicted compute time on this cluster. 1 where nothing was fitted."""
    layer_scale: dict[str, float] = msgspec.field(default_factory=dict)
    """Fitted: the same by layer and pass ("block.forward", "head.backward"), on top; 1 for those not named."""
    optimizer_scale: float = 1.0
    """Fitted: the same for the optimizer's step."""
    collective_latency: float = 1.0
    """Latency of one step of a collective inside a node over that of a message."""
    inter_node_collective_latency: float = 1.0
    """The same between nodes."""
    wait_seconds: float = 0.0
    """What a collective between pieces of compute costs beyond the same one right after another: waiting for the last rank, waking the
    transport, cold caches afterwards."""
    fresh_bandwidth_bytes_per_second: float | None = None
    """At which buffers that are made anew are filled and first read, page faults and cold caches included: the weights that ZeRO-3 gathers,
    the gradients that ZeRO-2 and 3 make for each micro-batch. Null where that is not counted."""
    receive_seconds: float = 0.0
    """Above 0 where a message between pipeline stages only begins to move when its receiver asks for it (gloo), however long before it was
    sent: what such a receive takes beyond the message itself, for the sender's transport must first get a core."""
    pipeline_scale: float | msgspec.UnsetType = msgspec.UNSET
    """Measured: what passes take on ranks that wait for each other's messages over what they take without (CPUs: cold caches after each wait)."""
    step_seconds: float = 0.0
    """Fixed cost of a step on this machine: loading data, adding up the loss, logging."""
    attention_block_seconds: float | msgspec.UnsetType = msgspec.UNSET
    """Measured: what the backward pass of fused attention takes for each block of a head's queries beyond its arithmetic (CPUs)."""
    bf16: ComputeEfficiency | msgspec.UnsetType = msgspec.UNSET
    """Measured: what holds for bf16 and mixed-bf16 instead, where it is not what holds for fp32 (CPUs)."""
    source: str = ""


class CollectiveCurve(Document, frozen=True, kw_only=True):
    """Measured: a collective on groups of this shape takes latency_seconds + bytes / bandwidth_bytes_per_second.

    The bytes are those of the whole tensor, so the bandwidth is not that of a link.
    """

    RULES = {"num_ranks": COUNT, "num_nodes": COUNT, "bandwidth_bytes_per_second": POSITIVE}

    kind: Literal["all_reduce", "all_gather", "reduce_scatter"]
    num_ranks: int
    num_nodes: int
    latency_seconds: float
    bandwidth_bytes_per_second: float


class ClusterSpec(Document, frozen=True, kw_only=True):
    """GPUs in nodes: fast links inside a node, slower ones between nodes."""

    RULES = {"num_gpus": count_up_to(MOST_GPUS), "gpus_per_node": count_up_to(MOST_GPUS), "cores_per_node": COUNT}

    schema: str = SCHEMA
    name: str
    device: Device = "cuda"
    num_gpus: int
    gpus_per_node: int
    gpu: Gpu
    intra_node: Link
    inter_node: Link
    efficiency: Efficiency = Efficiency()
    collectives: tuple[CollectiveCurve, ...] = ()
    """Of groups that were measured; the others follow from the links."""
    cores_per_node: int | None = None
    """On CPUs, the cores that all ranks of a node share; null where each rank has a device of its own."""
    price_per_gpu_hour: float | None = None
    source: str = ""

    @property
    def num_nodes(self) -> int:
        return -(-self.num_gpus // self.gpus_per_node)


def in_precision(cluster: ClusterSpec, precision: str) -> ClusterSpec:
    """The cluster with the efficiencies that hold for this precision in the fields that hold for fp32."""
    own = cluster.efficiency.bf16
    if own is msgspec.UNSET or precision == "fp32":
        return cluster
    efficiency = msgspec.structs.replace(cluster.efficiency, bf16=msgspec.UNSET, **{name: getattr(own, name) for name in own.__struct_fields__})
    return msgspec.structs.replace(cluster, efficiency=efficiency)


def compute_efficiency(cluster: ClusterSpec) -> ComputeEfficiency:
    """Its efficiencies of computing, by themselves."""
    return ComputeEfficiency(**{name: getattr(cluster.efficiency, name) for name in ComputeEfficiency.__struct_fields__})


def validate(cluster: ClusterSpec, where: str = "--cluster") -> ClusterSpec:
    """`cluster` itself when its numbers are possible. Raises InputError that names the field."""
    check_values(cluster, where)
    reached = [("efficiency", cluster.efficiency.layer_scale)]
    if cluster.efficiency.bf16 is not msgspec.UNSET:
        reached.append(("efficiency.bf16", cluster.efficiency.bf16.layer_scale))
    for at, scales in reached:
        for name in scales:
            if name not in LAYER_PASSES:
                raise InputError(f"{where}: {at}.layer_scale", name, f"one of {', '.join(LAYER_PASSES)} is expected")
    gpu = cluster.gpu
    if gpu.reserved_bytes >= gpu.memory_bytes:
        raise InputError(f"{where}: gpu.reserved_bytes", gpu.reserved_bytes, f"less than memory_bytes ({gpu.memory_bytes}) is expected")
    if not gpu.peak_flops_per_second:
        raise InputError(f"{where}: gpu.peak_flops_per_second", {}, "at least one data type is expected")
    return cluster


@functools.cache
def presets() -> dict[str, ClusterSpec]:
    """All presets by name; `num_gpus` is that of one node."""
    found: dict[str, ClusterSpec] = {}
    folder = resources.files("planner") / "presets" / "clusters"
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".json"):
            spec = convert(json.loads(entry.read_text(encoding="utf-8")), ClusterSpec, entry.name, SCHEMA)
            found[spec.name] = spec
    return found


ALIASES = {"a100": "a100-80gb", "v100": "v100-32gb", "h100": "h100-80gb", "h200": "h200-141gb", "b200": "b200-180gb"}


def load_cluster(text: str, where: str = "--cluster") -> ClusterSpec:
    """The cluster that `text` names: `PRESET`, `PRESET:NUM_GPUS`, or a cluster file (`FILE` or `FILE:NUM_GPUS`)."""
    name, _, count = text.partition(":")
    if name.endswith(".json") or os.path.isfile(name):
        cluster = load(name, ClusterSpec, SCHEMA, where)
    else:
        key = ALIASES.get(name.lower(), name.lower())
        if key not in presets():
            close = difflib.get_close_matches(key, [*presets(), *ALIASES], n=3)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise InputError(where, text, f"{hint}`plan clusters` lists the presets; PRESET:NUM_GPUS or a cluster file works")
        cluster = presets()[key]
    if ":" in text:
        number = whole_number(count)
        if number is None or not 1 <= number <= MOST_GPUS:
            raise InputError(where, text, f"the number of GPUs after the colon must be a positive integer, at most {MOST_GPUS:,}")
        cluster = with_num_gpus(cluster, number)
    return validate(cluster, where)


def with_num_gpus(cluster: ClusterSpec, num_gpus: int) -> ClusterSpec:
    """The same hardware with another number of GPUs."""
    return msgspec.structs.replace(cluster, num_gpus=num_gpus)
