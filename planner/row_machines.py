"""The hardware and the program of a row of published measurements, by the words of its source.

What a row leaves out is a default of the source's software or network, and never depends on what was measured.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from planner.cluster import ClusterSpec, Link, presets
from planner.row_facts import NotExpressible, RowFacts, count_of
from planner.software import Software, load_software

# The first pattern that is found in a row's GPU name decides; TPUs and others have no preset.
GPU_PRESETS: tuple[tuple[str, str], ...] = (
    (r"gb300", "gb300-288gb"), (r"gb200", "gb200-186gb"), (r"gh200", "gh200-96gb"), (r"b300", "b300-288gb"), (r"b200", "b200-180gb"),
    (r"h200", "h200-141gb"), (r"h100.*(96 ?gb|2\.4 ?tb)", "h100-96gb"), (r"h100.*pcie", "h100-pcie-80gb"), (r"h100|h800", "h100-80gb"),
    (r"a100.*pcie.*40", "a100-pcie-40gb"), (r"a100.*pcie", "a100-pcie-80gb"), (r"a100.*40 ?gb", "a100-40gb"),
    (r"a100|a800|ampere", "a100-80gb"), (r"v100.*(sxm3|dgx-?2)", "v100-dgx2"), (r"v100.*16 ?gb", "v100-16gb"), (r"v100", "v100-32gb"),
    (r"mi250", "mi250x-gcd"), (r"mi300x", "mi300x"), (r"mi325x", "mi325x"), (r"a10g", "a10g-24gb"), (r"a6000", "a6000-48gb"),
    (r"tpu ?v4", "tpu-v4"), (r"tpu ?v5e", "tpu-v5e"), (r"tpu ?v5p", "tpu-v5p"),
    (r"l40s", "l40s-48gb"), (r"\bl4\b", "l4-24gb"), (r"4090", "rtx4090-24gb"), (r"3090", "rtx3090-24gb"),
)  # fmt: skip
# The first pattern that is found in a row's source decides which program ran it.
PROGRAMS: tuple[tuple[str, str], ...] = (
    (r"llm-foundry|mosaicml", "llm-foundry"),
    (r"torchtitan", "torchtitan"),
    (r"internevo|internlm", "internevo"),
    (r"simumax", "megatron-te"),
    (r"nemo|megatron.?bridge|megatron-core|mcore", "nemo"),
    (r"zero.?bubble|2401\.10241", "megatron-zero-bubble"),
    (r"bigscience|bloom", "megatron-deepspeed"),
    (r"deepspeed.*zero-?3|zero-?3.*deepspeed", "deepspeed-zero3"),
    (r"2304\.11277|pytorch fsdp", "fsdp-paper"),
    (r"tinyllama|lit-?gpt", "lit-gpt"),
    (r"gpt-neox", "gpt-neox"),
    (r"megatron-turing|mt-?nlg", "megatron-deepspeed"),
    (r"nanotron|picotron", "nanotron"),
    (r"maxtext.*tpu|tpu.*maxtext", "maxtext"),
)


def cluster_of(facts: RowFacts, num_gpus: int) -> ClusterSpec:
    """The preset that the row's GPU names, with the row's own nodes and network. Raises NotExpressible where there is none."""
    name = str(facts.cluster.get("gpu") or "").lower()
    preset = next((preset for pattern, preset in GPU_PRESETS if re.search(pattern, name)), None)
    if preset is None:
        raise NotExpressible(f"cluster.gpu: no cluster preset for {facts.cluster.get('gpu')!r}")
    cluster = presets()[preset]
    per_node = count_of(facts.cluster.get("gpus_per_node")) or cluster.gpus_per_node
    if preset.startswith("tpu"):
        per_node = max(1, num_gpus // (count_of(facts.parallel.get("dcn_dp")) or 1))  # a slice: what the torus joins
    changes: dict[str, Any] = {"num_gpus": num_gpus, "gpus_per_node": per_node}
    rate = link_bytes_per_second(str(facts.cluster.get("inter_node") or ""), per_node)
    if rate is not None:
        changes["inter_node"] = Link(
            bandwidth_bytes_per_second=rate, latency_seconds=cluster.inter_node.latency_seconds, source="the row"
        )
    network = str(facts.cluster.get("inter_node") or "").lower()
    if re.search(r"infiniband|\b(h|n|e)dr\b|\bib\b", network):
        # A network of its own, without the congestion of Ethernet: half the jitter, by assumption.
        changes["efficiency"] = msgspec.structs.replace(cluster.efficiency, jitter=0.5 * cluster.efficiency.jitter)
    elif "omni" in network:
        # Omni-Path's host-driven transfers reach less with GPU buffers; by assumption.
        share = 0.65
        changes["efficiency"] = msgspec.structs.replace(
            cluster.efficiency,
            inter_node_collective=share * cluster.efficiency.inter_node_collective,
            point_to_point=share * cluster.efficiency.point_to_point,
        )
    if "a800" in name:
        changes["intra_node"] = msgspec.structs.replace(cluster.intra_node, bandwidth_bytes_per_second=200e9, source="A800: NVLink at 400 GB/s")
    return msgspec.structs.replace(cluster, **changes)


def link_bytes_per_second(text: str, gpus_per_node: int) -> float | None:
    """Bytes per second for each GPU from a phrase such as "8x 200Gb/s HDR per node" or "400 Gb/s per GPU"."""
    match = re.search(r"(?:(\d+)\s*x\s*)?([\d.]+)\s*([GT])b/s(.*)", text)
    if not match:
        return None
    total = int(match.group(1) or 1) * float(match.group(2)) * (1e12 if match.group(3) == "T" else 1e9) / 8
    if "per gpu" in match.group(4).lower():
        return total
    return total / gpus_per_node


def program_name(facts: RowFacts) -> str:
    """The program that ran the row, by its source, else by its year."""
    for pattern, name in PROGRAMS:
        if re.search(pattern, facts.text):
            return name
    if facts.year <= 2020:
        return "megatron-2020-a100" if "a100" in str(facts.cluster.get("gpu")).lower() else "megatron-2020"
    return {2021: "megatron-2021", 2022: "megatron-2022"}.get(facts.year, "megatron")


def program_of(facts: RowFacts, cluster: ClusterSpec) -> Software:
    """That program with what the row says of it."""
    program = load_software(program_name(facts))
    if "ddp local" in facts.text or "not overlapped" in facts.text:
        program = msgspec.structs.replace(program, overlap_reduction=False)
    elif "ddp torch" in facts.text:
        program = msgspec.structs.replace(program, overlap_reduction=True)
    if program.name == "megatron-deepspeed" and "bf16" in str(facts.row.get("precision")):
        program = msgspec.structs.replace(program, gradient_bytes=4)
    if program.name == "megatron-zero-bubble" and str(facts.parallel.get("schedule")).startswith("1f1b"):
        program = msgspec.structs.replace(program, blocking_transfers=True)
    if program.name == "torchtitan" and ("compile=true" in facts.text or "torch.compile;" in facts.text or "_compile" in facts.text):
        program = load_software("torchtitan-compile")
    if "asynctp" in facts.text.replace("asynctp_", "").replace(" ", "") and "vanillatp" not in facts.text:
        program = msgspec.structs.replace(program, overlap_tensor_forward=0.5, overlap_tensor_backward=0.5)
    return _in_fp8(facts, program, cluster)


def _in_fp8(facts: RowFacts, software: Software, cluster: ClusterSpec) -> Software:
    """With fp8 the linear layers' products are faster by the ratio of the measured ceilings. Each operand is read for its
    largest value, read again and written: 2 + 2 + 1 bytes an element.
    """
    text = str(facts.row.get("precision") or "").lower()
    if "fp8" not in text:
        return software
    if "rowwise" in text:
        raise NotExpressible("precision: fp8 with a scale for each row is not modelled")
    if cluster.gpu.fp8_matmul_speedup is None:
        raise NotExpressible(f"precision: {facts.row.get('precision')!r} on {cluster.gpu.name}, whose fp8 speed is not known")
    speed = software.matmul_speed * cluster.gpu.fp8_matmul_speedup
    return msgspec.structs.replace(software, matmul_speed=speed, cast_bytes=5.0)
