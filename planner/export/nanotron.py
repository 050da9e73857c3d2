"""nanotron: the YAML of `run_train.py`, with its Llama model."""

from __future__ import annotations

from msgspec import UNSET

from planner.export.common import Notes, flag, header, note_rank_order, refuse, require_llama, script, strongest_level, torchrun, yaml_text
from planner.model import ModelSpec
from planner.plan import Plan, stage_blocks

TARGET = "nanotron"
ENGINES = {"1F1B": "1f1b", "GPipe": "afab"}


def export_nanotron(plan: Plan) -> dict[str, str]:
    """`nanotron.yaml` and its launch script. Raises InputError for what nanotron has no option for."""
    require_llama(plan, TARGET)
    model, decisions, training = plan.inputs.model, plan.decisions, plan.inputs.training
    if decisions.pipeline_parallel > 1 and decisions.schedule not in ENGINES:
        raise refuse(TARGET, "schedule", decisions.schedule, "nanotron runs 1F1B (1f1b) and GPipe (afab)")
    if decisions.zero_stage > 1:
        raise refuse(TARGET, "zero_stage", decisions.zero_stage, "nanotron has ZeRO 0 and 1")
    if decisions.data_parallel_replicate > 1:
        raise refuse(TARGET, "data_parallel_replicate", decisions.data_parallel_replicate, "1: nanotron shards over all of data parallel")
    notes: Notes = []
    level = strongest_level(plan, TARGET, notes)
    if level == "selective":
        notes.append("nanotron recomputes whole layers or none, so layers are recomputed in full: less memory, slower.")
    note_rank_order(plan, TARGET, notes)
    _note_cuts(plan, notes)
    if model.rope_scaling is not UNSET:
        notes.append("nanotron does not scale rotary positions: they are other ones than the plan's model has (rope_scaling).")
    if training.precision == "mixed-bf16":
        notes.append("nanotron adds an fp32 gradient buffer to bf16 training: 4 bytes a parameter (sharded by ZeRO-1) that the plan does not count.")
    document = {
        "general": {"project": "meshwright", "run": "plan", "seed": 42},
        "checkpoints": {"checkpoints_path": "checkpoints", "checkpoint_interval": 1000},
        "parallelism": {
            "dp": decisions.data_parallel,
            "pp": decisions.pipeline_parallel,
            "tp": decisions.tensor_parallel,
            "pp_engine": ENGINES.get(decisions.schedule, "1f1b"),
            "tp_mode": "REDUCE_SCATTER" if decisions.sequence_parallel else "ALL_REDUCE",
            "tp_linear_async_communication": decisions.sequence_parallel,
            "recompute_layer": level != "none",
        },
        "model": {
            "dtype": "float32" if training.precision == "fp32" else "bfloat16",
            "init_method": {"std": 0.02},
            "make_vocab_size_divisible_by": 1,
            "model_config": _model_config(model, training.sequence_length),
        },
        "optimizer": {
            "accumulate_grad_in_fp32": training.precision == "mixed-bf16",
            "clip_grad": 1.0,
            "weight_decay": 0.01,
            "zero_stage": decisions.zero_stage if decisions.data_parallel > 1 else 0,
            "learning_rate_scheduler": {"learning_rate": 3e-4, "lr_warmup_steps": 10, "lr_warmup_style": "linear", "lr_decay_style": "cosine"},
            "optimizer_factory": (
                {"name": "adamW", "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8, "torch_adam_is_fused": True}
                if training.optimizer == "adam"
                else {"name": "sgd"}
            ),
        },
        "tokens": {
            "sequence_length": training.sequence_length,
            "micro_batch_size": decisions.micro_batch_size,
            "batch_accumulation_per_replica": decisions.num_microbatches,
            "train_steps": 100,
        },
        "data_stages": [{"name": "train", "start_training_step": 1, "data": {"dataset": None, "seed": 42, "num_loading_workers": 1}}],
    }
    head = header(plan, TARGET, [*notes, "checkpoints, learning rate, train_steps and data_stages (null: random tokens) are yours to set."])
    command = [*torchrun(plan, TARGET), '"${NANOTRON:-.}/run_train.py"', flag("--config-file", "nanotron.yaml"), '"$@"']
    before = ["export CUDA_DEVICE_MAX_CONNECTIONS=1"]
    return {"nanotron.yaml": head + yaml_text(document), "nanotron.sh": script(header(plan, TARGET, notes), command, before)}


def _model_config(model: ModelSpec, sequence_length: int) -> dict[str, object]:
    return {
        "is_llama_config": True,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "max_position_embeddings": max(model.max_sequence_length, sequence_length),
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_interleaved": False,
        "tie_word_embeddings": model.tied_embeddings,
        "vocab_size": model.vocab_size,
    }


def nanotron_blocks(model: ModelSpec, pipeline_parallel: int) -> list[int]:
    """Transformer blocks that nanotron puts on each pipeline rank.

    It walks the blocks and moves on once the cost so far exceeds the rank's even share, with costs 4·a·d·h + 3·f·h for a
    layer and V·h for the head (nanotron, models/base.py and models/llama.py).
    """
    layer = 4 * model.query_size * model.hidden_size + 3 * model.ffn_hidden_size * model.hidden_size
    costs = [0, *[layer] * model.num_layers, 0, model.vocab_size * model.hidden_size]
    total = sum(costs)
    counts, rank, cumulative = [0] * pipeline_parallel, 0, 0
    for index, cost in enumerate(costs):
        cumulative += cost
        counts[rank] += 1 <= index <= model.num_layers
        if cumulative > total * ((rank + 1) / pipeline_parallel) and rank + 1 < pipeline_parallel:
            rank += 1
    return counts


def _note_cuts(plan: Plan, notes: Notes) -> None:
    if plan.decisions.pipeline_parallel == 1:
        return
    ours = [len(stage_blocks(stage, plan.inputs.model)) for stage in plan.decisions.stages]
    theirs = nanotron_blocks(plan.inputs.model, plan.decisions.pipeline_parallel)
    if ours != theirs:
        notes.append(
            f"nanotron cuts the pipeline itself, into stages of {theirs} blocks, and takes no cuts: the plan has {ours}."
            " Memory and time differ from the plan's; check that the largest stage still fits."
        )
