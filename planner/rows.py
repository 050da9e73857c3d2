"""One published measurement as a plan: its row of facts turned into inputs, decisions and a program, or why it can't be.

A row has the fields model, cluster, parallel, batch, recompute, precision, source and notes, as in
planner/data/published.json. What a row leaves out is filled in by the rules of `_Reader`, each of which is a default of
the source's software and never depends on what was measured.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import msgspec

from planner.errors import InputError
from planner.model import ModelSpec
from planner.model import validate as validate_model
from planner.plan import Decisions, Inputs, Recompute, Training, check_tensor_parallel, even_stages
from planner.row_facts import Measured, NotExpressible, RowFacts, count_of, measured_of, number_of
from planner.row_machines import cluster_of, program_name, program_of
from planner.software import Software

__all__ = ["Case", "Measured", "NotExpressible", "case_of", "measured_of"]


class Case(NamedTuple):
    """A row as a plan."""

    inputs: Inputs
    decisions: Decisions
    software: Software
    zero_bubble_memory: float | None
    """For the hand-made zero-bubble schedules, their activation memory in units of 1F1B's (1 or 2); else null."""


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


class _Reader:
    """Reads one row. Holds its parts, so that a default can look at the whole."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.facts = RowFacts(row)
        self.row, self.year, self.degree = row, self.facts.year, self.facts.degree
        self.model_facts, self.batch, self.parallel = self.facts.model, self.facts.batch, self.facts.parallel

    def case(self) -> Case:
        self.refuse_what_no_plan_says()
        model = self.model()
        tp, pp = self.degree("tp"), self.degree("pp")
        cp = self.degree("cp")
        gpus = count_of(self.facts.cluster.get("gpu_count"))
        dp = count_of(self.parallel.get("dp")) or (gpus // (tp * pp * cp) if gpus and gpus % (tp * pp * cp) == 0 else None)
        if dp is None:
            raise NotExpressible("parallel.dp: the data-parallel degree is not given")
        if gpus is not None and gpus != tp * pp * dp * cp:
            raise NotExpressible(f"parallel: tp {tp} x pp {pp} x dp {dp} x cp {cp} is not gpu_count {gpus}")
        cluster = cluster_of(self.facts, tp * pp * dp * cp)
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
        software = program_of(self.facts, cluster)
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
        if (count_of(self.parallel.get("ep")) or 1) > 1:
            raise NotExpressible("parallel.ep: expert parallelism is not planned")
        if any(self.parallel.get(name) for name in ("offload", "offload_optimizer", "offload_param")):
            raise NotExpressible("parallel.offload: offloading to host memory is not planned")

    def need(self, facts: dict[str, Any], name: str, where: str) -> int:
        value = count_of(facts.get(name))
        if value is None:
            raise NotExpressible(f"{where}.{name}: a positive whole number is needed, {facts.get(name)!r} is given")
        return value

    def sequence_length(self) -> int:
        return self.need(self.model_facts, "seq", "model")

    def model(self) -> ModelSpec:
        facts = self.model_facts
        layers, hidden, heads = (self.need(facts, name, "model") for name in ("layers", "hidden", "heads"))
        head_dim = count_of(facts.get("head_dim")) or hidden // heads
        gated = bool(facts.get("gated_ffn"))
        position = str(facts.get("pos_embedding") or ("rope" if gated else "learned")).lower()
        kind = "alibi" if "alibi" in position else "rope" if "rope" in position or "rotary" in position else "learned"
        rms = "rms" in str(facts.get("norm") or ("rmsnorm" if gated else "layernorm")).lower()
        bias = facts.get("linear_bias")
        bias = (not gated) if bias is None else bool(bias)
        tied = facts.get("tied_embeddings")
        name = str(facts.get("name") or "unnamed")
        # Where a source gives none: GPT-2's vocabulary, padded as Megatron does; SentencePiece's where its scripts use that.
        usual = 32000 if program_name(self.facts) == "megatron-zero-bubble" else 50304
        vocab = count_of(facts.get("vocab_padded")) or count_of(facts.get("vocab")) or usual
        return validate_model(
            ModelSpec(
                name=name,
                num_layers=layers,
                hidden_size=hidden,
                ffn_hidden_size=count_of(facts.get("ffn")) or 4 * hidden,
                num_attention_heads=heads,
                num_key_value_heads=count_of(facts.get("kv_heads")) or heads,
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

    def microbatches(self, dp: int, pp: int) -> tuple[float, int]:
        """Micro-batch size and how many of them; a batch that doesn't divide is rounded to whole micro-batches."""
        total = number_of(self.batch.get("global_batch"))
        micro, m = count_of(self.batch.get("micro_batch")), count_of(self.batch.get("num_microbatches"))
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
        virtual = count_of(self.parallel.get("vpp")) or 1
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
            value = count_of(self.parallel.get(name))
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
