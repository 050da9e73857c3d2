"""torchtitan: a Python module with a `Trainer.Config`, which is how torchtitan is configured (no longer TOML).

Only its Llama 3 model is configured: torchtitan has no GPT-2 style model (LayerNorm, GELU, learned positions).
"""

from __future__ import annotations

from msgspec import UNSET

from planner.export.common import (
    Notes,
    flag,
    header,
    note_rank_order,
    refuse,
    require_llama,
    script,
    stage_modules,
    strongest_level,
    torchrun,
)
from planner.model import ModelSpec
from planner.plan import Plan

TARGET = "torchtitan"
MODULE = "meshwright_plan"
_TEMPLATE = """{header}
from torchtitan.components.data import ConcatThenSplitPackingConfig, GrainDataLoader
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import default_adamw
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.llama3 import (
    _EMBEDDING_INIT,
    _EMBEDDING_SKIP_INIT,
    _NORM_INIT,
    _build_llama3_layers,
    _output_linear_init,
    parallelize_llama,
)
from torchtitan.models.llama3.model import Llama3Model
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

MODEL = {model}
TRAINING = {training}
PARALLELISM = {parallelism}
ACTIVATION_CHECKPOINT = {activation_checkpoint}


def model_spec(attn_backend: str = "flex") -> ModelSpec:
    dim, vocab_size = MODEL["dim"], MODEL["vocab_size"]
    rope = ComplexRoPE.Config(
        dim=dim // MODEL["n_heads"], max_context_length=MODEL["max_context_length"], theta=MODEL["rope_theta"], **MODEL["rope_scaling"]
    )
    layers = _build_llama3_layers(
        n_layers=MODEL["n_layers"],
        dim=dim,
        n_heads=MODEL["n_heads"],
        n_kv_heads=MODEL["n_kv_heads"],
        hidden_dim=MODEL["hidden_dim"],
        rope=rope,
        attn_backend=attn_backend,
    )
    for layer in layers:
        layer.attention_norm.eps = layer.ffn_norm.eps = MODEL["norm_eps"]
    tied = MODEL["enable_weight_tying"]
    config = Llama3Model.Config(
        dim=dim,
        vocab_size=vocab_size,
        enable_weight_tying=tied,
        tok_embeddings=Embedding.Config(
            num_embeddings=vocab_size, embedding_dim=dim, param_init=_EMBEDDING_SKIP_INIT if tied else _EMBEDDING_INIT
        ),
        norm=RMSNorm.Config(normalized_shape=dim, eps=MODEL["norm_eps"], param_init=_NORM_INIT),
        lm_head=Linear.Config(in_features=dim, out_features=vocab_size, param_init=_output_linear_init(dim)),
        layers=layers,
    )
    return ModelSpec(
        name="llama3",
        flavor="meshwright",
        model=config,
        parallelize_fn=parallelize_llama,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=None,
        state_dict_adapter=Llama3StateDictAdapter,
    )


def trainer() -> Trainer.Config:
    # The data set, the tokenizer and the learning rate are torchtitan's own test set and defaults: put yours here.
    return Trainer.Config(
        model_spec=model_spec(),
        loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=MODEL["vocab_size"])),
        optimizer=default_adamw(lr=3e-4),
        dataloader=GrainDataLoader.Config(dataset=ConcatThenSplitPackingConfig(dataset=DATASETS["c4_test"])),
        training=TrainingConfig(**TRAINING),
        parallelism=ParallelismConfig(**PARALLELISM),
        activation_checkpoint={{"none": None, "selective": SelectiveAC.Config(), "full": FullAC.Config()}}[ACTIVATION_CHECKPOINT],
    )
"""


def export_torchtitan(plan: Plan) -> dict[str, str]:
    """`meshwright_plan.py` and the script that runs it. Raises InputError for what torchtitan has no option for."""
    require_llama(plan, TARGET)
    model, decisions, training = plan.inputs.model, plan.decisions, plan.inputs.training
    if model.tied_embeddings and decisions.pipeline_parallel > 1:
        raise refuse(TARGET, "model.tied_embeddings", True, "torchtitan ties embeddings only without pipeline parallelism")
    if training.optimizer != "adam":
        raise refuse(TARGET, "optimizer", training.optimizer, "this export knows adam there")
    notes: Notes = []
    level = strongest_level(plan, TARGET, notes)
    if level == "selective":
        level = _selective(plan, notes)
    note_rank_order(plan, TARGET, notes)
    parts = {
        "model": {
            "dim": model.hidden_size,
            "n_layers": model.num_layers,
            "n_heads": model.num_attention_heads,
            "n_kv_heads": model.num_key_value_heads,
            "hidden_dim": model.ffn_hidden_size,
            "vocab_size": model.vocab_size,
            "max_context_length": max(model.max_sequence_length, training.sequence_length),
            "rope_theta": model.rope_theta,
            "rope_scaling": _rope_scaling(model),
            "norm_eps": model.norm_epsilon,
            "enable_weight_tying": model.tied_embeddings,
        },
        "training": {
            "num_tokens_per_microbatch_per_dp_rank": decisions.micro_batch_size * training.sequence_length,
            "num_tokens_per_train_step": training.global_batch_size * training.sequence_length,
            "max_context_length": training.sequence_length,
            "dtype": "bfloat16" if training.precision == "bf16" else "float32",
            "mixed_precision_param": "float32" if training.precision == "fp32" else "bfloat16",
            "disable_cuda_graphs": decisions.pipeline_parallel > 1,  # its trainer refuses them with a pipeline
        },
        "parallelism": _parallelism(plan, notes),
        "activation_checkpoint": level,
    }
    if training.precision == "mixed-bf16":
        notes.append("torchtitan keeps fp32 weights and gradients and casts for compute: 4 + 4 + 8 bytes a parameter, as many as 2 + 2 + 12.")
    text = _TEMPLATE.format(header=header(plan, TARGET, notes), **{name: _literal(value) for name, value in parts.items()})
    command = [*torchrun(plan, TARGET), "-m torchtitan.train", flag("--module", MODULE), flag("--config", "trainer"), '"$@"']
    run = script(header(plan, TARGET, []), command, ['export PYTHONPATH="$(cd "$(dirname "$0")" && pwd):${PYTHONPATH:-}"'])
    return {f"{MODULE}.py": text, "torchtitan.sh": run}


def _selective(plan: Plan, notes: Notes) -> str:
    """The level there that keeps no more than `selective` in the plan.

    Its `SelectiveAC` keeps every second matrix product and the outputs of reduce-scatters. In place of an output of the gated MLP, T·f / t elements,
    that is the output of its last linear, T·h before it is summed over the tensor-parallel ranks, and with sequence parallelism also after it.
    """
    model, decisions = plan.inputs.model, plan.decisions
    said = "torchtitan's selective recomputation keeps every second matrix product, and all but norms and activation functions are kept in the plan"
    if decisions.sequence_parallel and model.hidden_size * (decisions.tensor_parallel + 1) > model.ffn_hidden_size:
        notes.append(f"{said}: that would take more memory than planned, so blocks are recomputed in full: less memory, slower.")
        return "full"
    notes.append(f"{said}: less memory than planned, and slower.")
    return "selective"


def _rope_scaling(model: ModelSpec) -> dict[str, object]:
    scaling = model.rope_scaling
    if scaling is UNSET:
        return {"scaling": "none"}
    if scaling.rope_type != "llama3":
        raise refuse(TARGET, "model.rope_scaling.rope_type", scaling.rope_type, "this export knows llama3 there")
    return {
        "scaling": "llama",
        "scaling_factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


def _parallelism(plan: Plan, notes: Notes) -> dict[str, object]:
    decisions = plan.decisions
    if decisions.schedule == "Naive" and decisions.pipeline_parallel > 1:
        raise refuse(TARGET, "schedule", "Naive", "torchtitan's schedules fill the pipeline: GPipe, 1F1B and the interleaved ones")
    shard = decisions.data_parallel // decisions.data_parallel_replicate if decisions.zero_stage else 1
    if decisions.zero_stage == 1 and shard > 1:
        notes.append("torchtitan has no ZeRO-1: gradients are sharded as well (ZeRO-2), which takes less memory.")
    out: dict[str, object] = {
        "data_parallel_replicate_degree": decisions.data_parallel // shard,
        "data_parallel_shard_degree": shard,
        "fsdp_reshard_after_forward": "always" if decisions.zero_stage == 3 else "never",
        "tensor_parallel_degree": decisions.tensor_parallel,
        "enable_sequence_parallel": decisions.sequence_parallel,
        "pipeline_parallel_degree": decisions.pipeline_parallel,
    }
    if decisions.pipeline_parallel > 1:
        out |= {
            "pipeline_parallel_schedule": decisions.schedule,
            "num_pp_microbatches": decisions.num_microbatches,
            "module_fqns_per_model_part": stage_modules(plan, "tok_embeddings", "layers.{}", ("norm", "lm_head")),
        }
    return out


def _literal(value: object) -> str:
    """A Python literal; a dict with one entry a line."""
    if isinstance(value, dict):
        return "{\n" + "".join(f"    {key!r}: {_rows(item)},\n" for key, item in value.items()) + "}"
    return repr(value)


def _rows(value: object) -> str:
    if isinstance(value, list):
        return "[\n" + "".join(f"        {row!r},\n" for row in value) + "    ]"
    return repr(value)
