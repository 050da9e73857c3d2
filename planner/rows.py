"""One published measurement as a plan: its row of facts turned into inputs, decisions and a program, or why it can't be.

A row has the fields model, cluster, parallel, batch, recompute, precision, source and notes, as in
planner/data/published.json. What a row leaves out is filled in by the rules of `_Reader`, each of which is a default of
the source's software and never depends on what was measured.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import msgspec

from planner.cluster import ClusterSpec, Link, presets
from planner.errors import InputError, MeshwrightError
from planner.model import ModelSpec
from planner.model import validate as validate_model
from planner.plan import Decisions, Inputs, Recompute, Training, check_tensor_parallel, even_stages
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


class Case(NamedTuple):
    """A row as a plan."""

    inputs: Inputs
    decisions: Decisions
    software: Software
    zero_bubble_memory: float | None
    """For the hand-made zero-bubble schedules, their activation memory in units of 1F1B's (1 or 2); else null."""


class Measured(NamedTuple):
    step_seconds: float | None
    peak_bytes: float | None


class NotExpressible(MeshwrightError):
    """A row whose configuration has no place in a plan, or that does not say enough."""


def case_of(row: Any) -> Case:
    """The plan that `row` describes. Raises NotExpressible with the reason when there is none."""
    if not isinstance(row, dict):
        raise NotExpressible("a row must be a JSON object")
    try:
        return _Reader(row).case()
    except InputError as error:
        raise NotExpressible(str(error)) from None
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, OverflowError, RecursionError) as error:
        raise NotExpressible(f"the row can't be read: {type(error).__name__}: {error}") from None


def measured_of(row: Any) -> Measured:
    """Step time and peak memory that a row reports, from whichever of its figures gives them most directly.

    GB of memory as GPU tools print them count as 2^30 bytes.
    """
    measured = row.get("measured") if isinstance(row, dict) else None
    if not isinstance(measured, dict):
        return Measured(None, None)
    gib = _number(measured.get("memory_gib")) or _number(measured.get("memory_gb"))
    return Measured(_measured_seconds(row, measured), gib * 2**30 if gib else None)


def _measured_seconds(row: dict[str, Any], measured: dict[str, Any]) -> float | None:
    direct = _number(measured.get("iter_time_s")) or _number(measured.get("iter_time_s_derived"))
    if direct:
        return direct
    batch, cluster, model = (_object(row.get(name)) for name in ("batch", "cluster", "model"))
    gpus, samples, sequence = _number(cluster.get("gpu_count")), _number(batch.get("global_batch")), _number(model.get("seq"))
    tokens = samples * sequence if samples and sequence else None
    rate = _number(measured.get("tokens_per_s_total"))
    if tokens and rate:
        return tokens / rate
    rate = _number(measured.get("tokens_per_s_per_gpu"))
    if tokens and rate and gpus:
        return tokens / (rate * gpus)
    rate = _number(measured.get("samples_per_s_per_gpu"))
    if samples and rate and gpus:
        return samples / (rate * gpus)
    rate = _number(measured.get("samples_per_s"))
    if samples and rate:
        return samples / rate
    return _number(row.get("derived_step_seconds"))


def _number(value: Any) -> float | None:
    """`value` when it is a positive finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        return None
    return float(value)


def _count(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number == int(number) and number < 1e12 else None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


class _Reader:
    """Reads one row. Holds its parts, so that a default can look at the whole."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.row = row
        self.model_facts = _object(row.get("model"))
        self.cluster_facts = _object(row.get("cluster"))
        self.parallel = _object(row.get("parallel"))
        self.batch = _object(row.get("batch"))
        source = _object(row.get("source"))
        self.year = _count(source.get("year")) or 2024
        notes = row.get("notes")
        self.notes = " ".join(str(note) for note in notes) if isinstance(notes, list) else str(notes or "")
        self.text = " ".join(str(part) for part in (*source.values(), self.notes, row.get("group"), row.get("id"))).lower()

    def case(self) -> Case:
        self.refuse_what_no_plan_says()
        model = self.model()
        tp, pp = self.degree("tp"), self.degree("pp")
        cp = self.degree("cp")
        gpus = _count(self.cluster_facts.get("gpu_count"))
        dp = _count(self.parallel.get("dp")) or (gpus // (tp * pp * cp) if gpus and gpus % (tp * pp * cp) == 0 else None)
        if dp is None:
            raise NotExpressible("parallel.dp: the data-parallel degree is not given")
        if gpus is not None and gpus != tp * pp * dp * cp:
            raise NotExpressible(f"parallel: tp {tp} x pp {pp} x dp {dp} x cp {cp} is not gpu_count {gpus}")
        cluster = self.cluster(tp * pp * dp * cp)
        micro, m = self.microbatches(dp, pp)
        if cp > 1:
            # Context parallelism cuts each sample over cp ranks, which reduce gradients together: data parallelism with a
            # share of a sample each. Its exchange of keys and values, which attention hides, is left out.
            dp, micro = dp * cp, micro / cp
        check_tensor_parallel(model, tp, "parallel.tp")
        schedule, virtual, zero_bubble = self.schedule(pp, model)
        for name, value, most in (("model.layers", model.num_layers, 10_000), ("parallel.pp", pp * virtual, 1_000), ("batch", m, 1_000_000)):
            if value > most:
                raise NotExpressible(f"{name}: {value} is out of range, {most} at most")
        software = self.in_fp8(self.software(), cluster)
        recompute, software = self.recompute(software)
        shards = self.shards(dp)
        decisions = Decisions(
            data_parallel=dp,
            tensor_parallel=tp,
            pipeline_parallel=pp,
            zero_stage=self.zero_stage(),
            sequence_parallel=self.sequence_parallel(tp),
            micro_batch_size=micro,  # type: ignore[arg-type]
            num_microbatches=m,
            schedule=schedule,
            num_virtual_stages=virtual,
            data_parallel_replicate=dp // shards,
            stages=even_stages(model, schedule, pp, virtual, recompute),
        )
        training = Training(
            global_batch_size=round(dp * micro * m),
            sequence_length=self.sequence_length(),
            precision=self.precision(),
            profile="megatron",
        )
        return Case(Inputs(model=model, cluster=cluster, training=training), decisions, software, zero_bubble)

    def refuse_what_no_plan_says(self) -> None:
        if self.model_facts.get("moe"):
            raise NotExpressible("model.moe: mixtures of experts are not planned")
        if (_count(self.parallel.get("ep")) or 1) > 1:
            raise NotExpressible("parallel.ep: expert parallelism is not planned")
        if any(self.parallel.get(name) for name in ("offload", "offload_optimizer", "offload_param")):
            raise NotExpressible("parallel.offload: offloading to host memory is not planned")

    def degree(self, name: str) -> int:
        return _count(self.parallel.get(name)) or 1

    def need(self, facts: dict[str, Any], name: str, where: str) -> int:
        value = _count(facts.get(name))
        if value is None:
            raise NotExpressible(f"{where}.{name}: a positive whole number is needed, {facts.get(name)!r} is given")
        return value

    def sequence_length(self) -> int:
        return self.need(self.model_facts, "seq", "model")

    def model(self) -> ModelSpec:
        facts = self.model_facts
        layers, hidden, heads = (self.need(facts, name, "model") for name in ("layers", "hidden", "heads"))
        head_dim = _count(facts.get("head_dim")) or hidden // heads
        gated = bool(facts.get("gated_ffn"))
        position = str(facts.get("pos_embedding") or ("rope" if gated else "learned")).lower()
        kind = "alibi" if "alibi" in position else "rope" if "rope" in position or "rotary" in position else "learned"
        rms = "rms" in str(facts.get("norm") or ("rmsnorm" if gated else "layernorm")).lower()
        bias = facts.get("linear_bias")
        bias = (not gated) if bias is None else bool(bias)
        tied = facts.get("tied_embeddings")
        name = str(facts.get("name") or "unnamed")
        # Where a source gives none: GPT-2's vocabulary, padded as Megatron does; SentencePiece's where its scripts use that.
        vocab = _count(facts.get("vocab_padded")) or _count(facts.get("vocab")) or (32000 if self.program() == "megatron-zero-bubble" else 50304)
        return validate_model(
            ModelSpec(
                name=name,
                num_layers=layers,
                hidden_size=hidden,
                ffn_hidden_size=_count(facts.get("ffn")) or 4 * hidden,
                num_attention_heads=heads,
                num_key_value_heads=_count(facts.get("kv_heads")) or heads,
                head_dim=head_dim,
                vocab_size=vocab,
                max_sequence_length=self.sequence_length(),
                position_embedding=kind,  # type: ignore[arg-type]
                num_position_embeddings=self.sequence_length() if kind == "learned" else 0,
                norm="rmsnorm" if rms else "layernorm",
                activation="silu" if gated else "gelu",
                gated_ffn=gated,
                qkv_bias=bias,
                attention_output_bias=bias,
                mlp_bias=bias,
                embedding_norm="bloom" in name.lower(),
                parallel_block="neox" in name.lower(),
                tied_embeddings=(not gated) if tied is None else bool(tied),
            ),
            "model",
        )

    def cluster(self, num_gpus: int) -> ClusterSpec:
        name = str(self.cluster_facts.get("gpu") or "").lower()
        preset = next((preset for pattern, preset in GPU_PRESETS if re.search(pattern, name)), None)
        if preset is None:
            raise NotExpressible(f"cluster.gpu: no cluster preset for {self.cluster_facts.get('gpu')!r}")
        cluster = presets()[preset]
        per_node = _count(self.cluster_facts.get("gpus_per_node")) or cluster.gpus_per_node
        if preset.startswith("tpu"):
            per_node = max(1, num_gpus // (_count(self.parallel.get("dcn_dp")) or 1))  # a slice: what the torus joins
        changes: dict[str, Any] = {"num_gpus": num_gpus, "gpus_per_node": per_node}
        rate = _link_bytes_per_second(str(self.cluster_facts.get("inter_node") or ""), per_node)
        if rate is not None:
            changes["inter_node"] = Link(
                bandwidth_bytes_per_second=rate, latency_seconds=cluster.inter_node.latency_seconds, source="the row"
            )
        network = str(self.cluster_facts.get("inter_node") or "").lower()
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

    def microbatches(self, dp: int, pp: int) -> tuple[float, int]:
        """Micro-batch size and how many of them; a batch that doesn't divide is rounded to whole micro-batches."""
        total = _number(self.batch.get("global_batch"))
        micro, m = _count(self.batch.get("micro_batch")), _count(self.batch.get("num_microbatches"))
        if total is None and micro and m:
            return micro, m
        if total is None:
            raise NotExpressible("batch.global_batch: the global batch size is not given")
        local = total / dp
        if micro is None:
            micro = max(1, round(local / m)) if m else (max(1, math.floor(local)) if pp == 1 and local <= 4 else 1)
        return micro, max(1, round(local / micro))

    def schedule(self, pp: int, model: ModelSpec) -> tuple[Any, int, float | None]:
        text = str(self.parallel.get("schedule") or "").lower()
        virtual = _count(self.parallel.get("vpp")) or 1
        if pp == 1:
            return "1F1B", 1, None
        if "zb-v" in text or "zbv" in text:
            return "ZBVZeroBubble", 2, None
        if text.startswith("zb"):
            return "InterleavedZeroBubble", 1, (2.0 if "2p" in text or "h2" in text else 1.0)
        if "gpipe" in text or "afab" in text:
            return "GPipe", 1, None
        if "interleav" in text and self.parallel.get("vpp") is None and model.num_layers % pp == 0:
            # Not said how often: as often as divides a rank's layers, 8 times at most.
            virtual = max(count for count in range(1, 9) if model.num_layers // pp % count == 0)
        if virtual > 1 and pp * virtual <= model.num_layers + 2:
            return "Interleaved1F1B", virtual, None
        return "1F1B", 1, None

    def program(self) -> str:
        for pattern, name in PROGRAMS:
            if re.search(pattern, self.text):
                return name
        if self.year <= 2020:
            return "megatron-2020-a100" if "a100" in str(self.cluster_facts.get("gpu")).lower() else "megatron-2020"
        return {2021: "megatron-2021", 2022: "megatron-2022"}.get(self.year, "megatron")

    def software(self) -> Software:
        program = load_software(self.program())
        if "ddp local" in self.text or "not overlapped" in self.text:
            program = msgspec.structs.replace(program, overlap_reduction=False)
        elif "ddp torch" in self.text:
            program = msgspec.structs.replace(program, overlap_reduction=True)
        if program.name == "megatron-deepspeed" and "bf16" in str(self.row.get("precision")):
            program = msgspec.structs.replace(program, gradient_bytes=4)
        if program.name == "megatron-zero-bubble" and str(self.parallel.get("schedule")).startswith("1f1b"):
            program = msgspec.structs.replace(program, blocking_transfers=True)
        if program.name == "torchtitan" and ("compile=true" in self.text or "torch.compile;" in self.text or "_compile" in self.text):
            program = load_software("torchtitan-compile")
        if "asynctp" in self.text.replace("asynctp_", "").replace(" ", "") and "vanillatp" not in self.text:
            program = msgspec.structs.replace(program, overlap_tensor_forward=0.5, overlap_tensor_backward=0.5)
        return program

    def in_fp8(self, software: Software, cluster: ClusterSpec) -> Software:
        """With fp8 the linear layers' products are faster by the ratio of the measured ceilings. Each operand is read for its
        largest value, read again and written: 2 + 2 + 1 bytes an element.
        """
        text = str(self.row.get("precision") or "").lower()
        if "fp8" not in text:
            return software
        if "rowwise" in text:
            raise NotExpressible("precision: fp8 with a scale for each row is not modelled")
        if cluster.gpu.fp8_matmul_speedup is None:
            raise NotExpressible(f"precision: {self.row.get('precision')!r} on {cluster.gpu.name}, whose fp8 speed is not known")
        speed = software.matmul_speed * cluster.gpu.fp8_matmul_speedup
        return msgspec.structs.replace(software, matmul_speed=speed, cast_bytes=5.0)

    def recompute(self, software: Software) -> tuple[Recompute, Software]:
        value = self.row.get("recompute")
        text = str(value or "").lower()
        if text.startswith("full"):
            return "full", software
        if text.startswith("selective(op)"):
            return "selective", msgspec.structs.replace(software, selective_recompute="op")
        if text.startswith("selective"):
            return "selective", software
        if text.startswith("none") or text in ("minimal", "qkv_proj_offloaded"):
            return "none", software  # XLA's policies that keep the outputs of matrix products
        if value is None:
            return ("full" if self.year <= 2021 else "selective" if software.attention == "unfused" else "none"), software
        raise NotExpressible(f"recompute: {value!r} is not planned")

    def zero_stage(self) -> int:
        stage = self.parallel.get("zero_stage")
        if isinstance(stage, int) and 0 <= stage <= 3:
            return stage
        if self.parallel.get("zero1_group"):
            return 1
        return 1 if self.year >= 2023 else 0

    def shards(self, dp: int) -> int:
        """Ranks that the states are sharded over."""
        for name in ("zero1_group", "fsdp_shard"):
            value = _count(self.parallel.get(name))
            if value and dp % value == 0:
                return value
        return dp

    def sequence_parallel(self, tp: int) -> bool:
        value = self.parallel.get("sequence_parallel")
        if tp == 1 or self.sequence_length() % tp:
            return False
        return self.year >= 2023 if value is None else bool(value)

    def precision(self) -> Any:
        text = str(self.row.get("precision") or "").lower()
        if "fp4" in text:
            raise NotExpressible(f"precision: {self.row.get('precision')!r} is not planned")
        return "fp32" if text.startswith("fp32") else "mixed-bf16"


def _link_bytes_per_second(text: str, gpus_per_node: int) -> float | None:
    """Bytes per second for each GPU from a phrase such as "8x 200Gb/s HDR per node" or "400 Gb/s per GPU"."""
    match = re.search(r"(?:(\d+)\s*x\s*)?([\d.]+)\s*([GT])b/s(.*)", text)
    if not match:
        return None
    total = int(match.group(1) or 1) * float(match.group(2)) * (1e12 if match.group(3) == "T" else 1e9) / 8
    if "per gpu" in match.group(4).lower():
        return total
    return total / gpus_per_node
