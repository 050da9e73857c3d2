"""Megatron-LM: a launch script for `pretrain_gpt.py`.

Uneven stages go through `--pipeline-model-parallel-layout`, whose stages are separated by `|` and written with E
(embedding), t (transformer layer) and L (final norm, head and loss), in stage order, virtual stages included.
"""

from __future__ import annotations

from msgspec import UNSET

from planner.export.common import Notes, effective_order, flag, header, recompute_words, refuse, script, stage_levels, torchrun, without_option
from planner.model import ModelSpec
from planner.plan import Plan, has_embedding, has_head, stage_blocks

TARGET = "megatron"


def export_megatron(plan: Plan) -> dict[str, str]:
    """`megatron.sh`. Raises InputError for what Megatron-LM has no option for."""
    notes: Notes = []
    arguments = [
        *_parallel(plan, notes),
        *_zero(plan, notes),
        *_recompute(plan, notes),
        *_batch(plan),
        *_model(plan, notes),
        *_precision(plan, notes),
    ]
    fsdp = "--use-megatron-fsdp" in arguments
    before = [
        *([] if fsdp else ["# Communication must be queued before the compute that it overlaps with.", "export CUDA_DEVICE_MAX_CONNECTIONS=1"]),
        "# What the plan does not decide: give your own as arguments, such as --data-path, --tokenizer-type, --train-iters, --lr.",
        "if [ $# -eq 0 ]; then set -- --mock-data --train-iters 10 --lr 1.0e-4; fi",
    ]
    command = [*torchrun(plan, TARGET), '"${MEGATRON:-.}/pretrain_gpt.py"', *arguments, '"$@"']
    return {"megatron.sh": script(header(plan, "Megatron-LM", notes), command, before)}


def pipeline_layout(plan: Plan) -> str:
    """The stages in Megatron's layout notation: `Et*11|t*12|...|t*11L`."""
    parts = []
    for stage in plan.decisions.stages:
        count = len(stage_blocks(stage, plan.inputs.model))
        blocks = "" if count == 0 else "t" if count == 1 else f"t*{count}"
        parts.append(("E" if has_embedding(stage) else "") + blocks + ("L" if has_head(stage, plan.inputs.model) else ""))
    return "|".join(parts)


def _parallel(plan: Plan, notes: Notes) -> list[str]:
    decisions = plan.decisions
    out = [
        flag("--tensor-model-parallel-size", decisions.tensor_parallel),
        flag("--pipeline-model-parallel-size", decisions.pipeline_parallel),
    ]
    if decisions.pipeline_parallel > 1:
        if decisions.schedule not in ("1F1B", "Interleaved1F1B"):
            raise refuse(TARGET, "schedule", decisions.schedule, "Megatron-LM runs 1F1B and Interleaved1F1B")
        out.append(flag("--pipeline-model-parallel-layout", pipeline_layout(plan)))
    if decisions.schedule == "Interleaved1F1B":
        p, m = decisions.pipeline_parallel, decisions.num_microbatches
        if m < p:
            raise refuse(TARGET, "num_microbatches", m, f"Interleaved1F1B needs at least pipeline_parallel = {p} there")
        group = m // max(1, m // p)
        if group != p:
            out.append(flag("--microbatch-group-size-per-virtual-pipeline-stage", group))
    if decisions.sequence_parallel:
        out.append("--sequence-parallel")
    order = effective_order(decisions, decisions.rank_order)
    if order == effective_order(decisions, ("tp", "dp", "pp")):
        return out
    if order != effective_order(decisions, ("tp", "pp", "dp")):
        raise refuse(TARGET, "rank_order", decisions.rank_order, "Megatron-LM has tp, dp, pp and tp, pp, dp")
    return [*out, "--use-tp-pp-dp-mapping"]


def _zero(plan: Plan, notes: Notes) -> list[str]:
    decisions = plan.decisions
    if decisions.data_parallel == 1 or decisions.zero_stage == 0:
        return []
    optimizer = plan.inputs.training.optimizer
    if optimizer != "adam":
        allowed = f"Megatron-LM's distributed optimizer, which zero_stage {decisions.zero_stage} needs, has Adam only: plan with --zero-stage 0"
        raise refuse(TARGET, "optimizer", optimizer, allowed)
    out = ["--use-distributed-optimizer"]
    if decisions.zero_stage > 1:
        strategy = {2: "optim_grads", 3: "optim_grads_params"}[decisions.zero_stage]
        out += ["--use-megatron-fsdp", flag("--data-parallel-sharding-strategy", strategy), flag("--ckpt-format", "fsdp_dtensor")]
        notes.append(f"ZeRO-{decisions.zero_stage} is Megatron-FSDP there, which needs a Megatron-LM of 2025 or later.")
    if decisions.data_parallel_replicate > 1:
        out.append(flag("--num-distributed-optimizer-instances", decisions.data_parallel_replicate))
    return out


def _recompute(plan: Plan, notes: Notes) -> list[str]:
    stages = stage_levels(plan)
    levels = {level for stage in stages for level in stage}
    if levels <= {"none"}:
        return []
    whole = [flag("--recompute-granularity", "full"), flag("--recompute-method", "uniform"), flag("--recompute-num-layers", 1)]
    if "full" not in levels:
        if "none" in levels:
            words = recompute_words(plan)
            notes.append(f"the plan recomputes {words}; selective recomputation covers every layer there: less memory than planned, slower.")
        modules = _selective_modules(plan, notes)
        return ["--recompute-granularity selective", f"--recompute-modules {modules}"] if modules else whole
    if levels == {"full"}:
        return whole
    # `block` recomputes the first N layers of each stage: N such that no stage recomputes less than planned.
    counts = [sum(level != "none" for level in stage) for stage in stages]
    most = max(counts)
    exact = "selective" not in levels and all(count == min(most, len(stage)) for count, stage in zip(counts, stages, strict=True))
    if not exact:
        notes.append(
            f"the plan recomputes {recompute_words(plan)}; Megatron-LM has one number for all stages, so the first {most} layers of each are"
            " recomputed in full: no stage takes more memory than planned, and some are slower."
        )
    return [flag("--recompute-granularity", "full"), flag("--recompute-method", "block"), flag("--recompute-num-layers", most)]


def _selective_modules(plan: Plan, notes: Notes) -> str:
    """The modules whose recomputation keeps no more than `selective` in the plan; none where only whole layers do.

    Megatron-LM's selective recomputation (the profile `megatron`) is that of attention's core. Here it is that of both norms' outputs and of the
    activation function's, and with unfused attention of its core too. Transformer Engine's fused norm and linear keeps the output of the first
    norm, R·h elements; recomputing the MLP frees its first linear's output for that, T·f / t, or twice that with a gate.
    """
    training, model, decisions = plan.inputs.training, plan.inputs.model, plan.decisions
    if training.profile == "megatron":
        return "core_attn"
    between = 1 if decisions.sequence_parallel else decisions.tensor_parallel
    said = "the plan recomputes norms and activation functions alone, for which Megatron-LM has no option"
    if between * model.hidden_size > (2 if model.gated_ffn else 1) * model.ffn_hidden_size:
        notes.append(f"{said}: layers are recomputed in full, since the MLP alone would not make up for the norms' outputs. Less memory, slower.")
        return ""
    notes.append(f"{said}: the whole MLP is recomputed, which takes no more memory than planned and is slower.")
    return "core_attn layernorm mlp" if training.attention == "unfused" else "layernorm mlp"


def _batch(plan: Plan) -> list[str]:
    return [
        flag("--micro-batch-size", plan.decisions.micro_batch_size),
        flag("--global-batch-size", plan.inputs.training.global_batch_size),
        flag("--seq-length", plan.inputs.training.sequence_length),
        flag("--optimizer", plan.inputs.training.optimizer),
        # its default of 0.9 would keep a momentum that the plan does not count
        *([flag("--sgd-momentum", 0.0)] if plan.inputs.training.optimizer == "sgd" else []),
    ]


def _model(plan: Plan, notes: Notes) -> list[str]:
    model = plan.inputs.model
    for name in ("parallel_block", "embedding_norm", "head_bias"):
        if getattr(model, name):
            raise refuse(TARGET, f"model.{name}", True, "Megatron-LM's GPT has no option for it")
    for name, value in (("embedding_scaled", model.embedding_scaled), *without_option(plan)):
        if value:
            raise refuse(TARGET, f"model.{name}", value, "this export has no option for it")
    if model.position_embedding == "alibi":
        raise refuse(TARGET, "model.position_embedding", "alibi", "Megatron-LM has learned and rotary positions")
    if model.num_norms_per_layer != 2:
        raise refuse(TARGET, "model.num_norms_per_layer", model.num_norms_per_layer, "Megatron-LM's layer has 2")
    if not model.final_norm:
        raise refuse(TARGET, "model.final_norm", False, "Megatron-LM's GPT ends with a norm")
    feed_forward = {("gelu", False): [], ("gelu_erf", False): [], ("silu", True): ["--swiglu"]}.get((model.activation, model.gated_ffn))
    if feed_forward is None:
        value = f"{'gated ' if model.gated_ffn else ''}{model.activation}"
        raise refuse(TARGET, "model.activation", value, "this export knows gelu and gated silu (SwiGLU) there")
    out = [
        flag("--num-layers", model.num_layers),
        flag("--hidden-size", model.hidden_size),
        flag("--ffn-hidden-size", model.ffn_hidden_size),
        flag("--num-attention-heads", model.num_attention_heads),
        flag("--kv-channels", model.head_dim),
        *feed_forward,
        *_biases(plan),
    ]
    if model.num_key_value_heads != model.num_attention_heads:
        out += ["--group-query-attention", flag("--num-query-groups", model.num_key_value_heads)]
    positions = model.num_position_embeddings or max(model.max_sequence_length, plan.inputs.training.sequence_length)
    out.append(flag("--max-position-embeddings", positions))
    if model.position_embedding == "rope":
        out += [flag("--position-embedding-type", "rope"), flag("--rotary-base", round(model.rope_theta))]
        out += [flag("--rotary-percent", model.rotary_size / model.head_dim), *(["--rotary-interleaved"] if model.rotary_neighbours is True else [])]
        out += _rope_scaling(model)
    else:
        out.append(flag("--position-embedding-type", "learned_absolute"))
    out += [flag("--normalization", "RMSNorm" if model.norm == "rmsnorm" else "LayerNorm"), flag("--norm-epsilon", model.norm_epsilon)]
    if model.qk_norm:
        out.append("--qk-layernorm")
    if not model.tied_embeddings:
        out.append("--untie-embeddings-and-output-weights")
    padded = -(-model.vocab_size // plan.decisions.tensor_parallel) * plan.decisions.tensor_parallel
    if padded != model.vocab_size:
        notes.append(f"the vocabulary of {model.vocab_size} is padded to {padded}, a multiple of tensor parallel.")
    out += [flag("--tokenizer-type", "NullTokenizer"), flag("--vocab-size", model.vocab_size), flag("--make-vocab-size-divisible-by", 1)]
    if plan.inputs.training.attention == "unfused":
        out.append(flag("--attention-backend", "unfused"))
    if plan.inputs.training.profile == "meshwright":
        out += [flag("--attention-dropout", 0.0), flag("--hidden-dropout", 0.0)]
    return out


def _rope_scaling(model: ModelSpec) -> list[str]:
    """Megatron-LM has Llama 3.1's scaling with the factor alone to choose."""
    scaling = model.rope_scaling
    if scaling is UNSET:
        return []
    given = (scaling.rope_type, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings)
    if given != ("llama3", 1.0, 4.0, 8192):
        raise refuse(TARGET, "model.rope_scaling", scaling.rope_type, "Megatron-LM has llama3 with frequency factors 1 and 4 and a length of 8192")
    return ["--use-rope-scaling", flag("--rope-scaling-factor", scaling.factor)]


def _biases(plan: Plan) -> list[str]:
    model = plan.inputs.model
    biases = (model.qkv_bias, model.attention_output_bias, model.mlp_bias)
    options: dict[tuple[bool, bool, bool], list[str]] = {
        (True, True, True): [],
        (False, False, False): ["--disable-bias-linear"],
        (True, False, False): ["--disable-bias-linear", "--add-qkv-bias"],
    }
    if biases not in options:
        raise refuse(TARGET, "model.qkv_bias, attention_output_bias, mlp_bias", biases, "Megatron-LM has all, none, or query-key-value only")
    return options[biases]


def _precision(plan: Plan, notes: Notes) -> list[str]:
    precision = plan.inputs.training.precision
    if precision == "bf16":
        raise refuse(TARGET, "precision", precision, "Megatron-LM keeps fp32 master weights: plan with mixed-bf16 or fp32")
    if precision == "fp32":
        return []
    notes.append("gradients are bf16, as planned (2 + 2 + 12 bytes a parameter); without --grad-reduce-in-bf16 they take 4 bytes.")
    return ["--bf16", "--grad-reduce-in-bf16"]
