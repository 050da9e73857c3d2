"""Hugging Face accelerate: the YAML of `accelerate launch`: DDP, FSDP2, HSDP and tensor parallelism. No pipeline."""

from __future__ import annotations

from planner.export.common import Notes, header, nodes, note_rank_order, refuse, script, strongest_level, yaml_text
from planner.plan import Plan

TARGET = "accelerate"


def export_accelerate(plan: Plan) -> dict[str, str]:
    """`accelerate.yaml` and its launch script. Raises InputError for what accelerate has no option for."""
    decisions, training = plan.decisions, plan.inputs.training
    if decisions.pipeline_parallel > 1:
        raise refuse(TARGET, "pipeline_parallel", decisions.pipeline_parallel, "1: accelerate has no pipeline; megatron and torchtitan do")
    if decisions.sequence_parallel:
        raise refuse(TARGET, "sequence_parallel", True, "false: accelerate's tensor parallelism has no Megatron-style sequence parallelism")
    if training.precision == "bf16":
        raise refuse(TARGET, "precision", "bf16", "mixed-bf16 or fp32")
    notes: Notes = []
    level = strongest_level(plan, TARGET, notes)
    if level == "selective":
        notes.append("accelerate checkpoints whole blocks, so they are recomputed in full: less memory, slower.")
    note_rank_order(plan, TARGET, notes)
    count, processes = nodes(plan, TARGET)
    document: dict[str, object] = {
        "compute_environment": "LOCAL_MACHINE",
        "mixed_precision": "no" if training.precision == "fp32" else "bf16",
        "num_machines": count,
        "num_processes": count * processes,
        "machine_rank": 0,
        "main_training_function": "main",
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": plan.inputs.cluster.device == "cpu",
    }
    sharded = decisions.zero_stage > 0 and decisions.data_parallel > 1
    if sharded or decisions.tensor_parallel > 1:
        document |= _fsdp(plan, sharded, level, notes)
    else:
        document["distributed_type"] = {"cpu": "MULTI_CPU"}.get(plan.inputs.cluster.device, "MULTI_GPU") if decisions.world_size > 1 else "NO"
        if level != "none":
            notes.append("recomputation is the model's own there: call model.gradient_checkpointing_enable().")
    if training.precision == "mixed-bf16":
        notes.append("accelerate keeps fp32 weights and casts for compute: 4 + 4 + 8 bytes a parameter, as many as 2 + 2 + 12.")
    before = [
        f"# Your script reads batches of {decisions.micro_batch_size} x {training.sequence_length} tokens in each process;",
        f"# global batch {training.global_batch_size}.",
        f"export ACCELERATE_GRADIENT_ACCUMULATION_STEPS={decisions.num_microbatches}",
    ]
    command = ["accelerate launch --config_file accelerate.yaml"]
    if count > 1:
        command.append('--machine_rank "${NODE_RANK:?set NODE_RANK}" --main_process_ip "${MASTER_ADDR:?set MASTER_ADDR}"')
        command.append('--main_process_port "${MASTER_PORT:-29500}"')
    command += ['"${TRAIN:-train.py}"', '"$@"']
    head = header(plan, TARGET, notes)
    return {"accelerate.yaml": head + yaml_text(document), "accelerate.sh": script(head, command, before)}


def _fsdp(plan: Plan, sharded: bool, level: str, notes: Notes) -> dict[str, object]:
    decisions = plan.decisions
    if not sharded and decisions.data_parallel > 1:
        raise refuse(TARGET, "zero_stage", 0, "1, 2 or 3: accelerate has no plain data parallelism beside tensor parallelism")
    shard = decisions.data_parallel // decisions.data_parallel_replicate
    if sharded and shard == 1:
        raise refuse(TARGET, "data_parallel_replicate", decisions.data_parallel_replicate, f"less than data_parallel ({decisions.data_parallel})")
    if sharded and decisions.zero_stage == 1:
        notes.append("accelerate has no ZeRO-1: FSDP2 shards gradients as well (ZeRO-2), which takes less memory.")
    return {
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": decisions.zero_stage == 3,
            "fsdp_activation_checkpointing": level != "none",
            "fsdp_offload_params": False,
            "fsdp_cpu_ram_efficient_loading": False,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        },
        "parallelism_config": {
            "parallelism_config_dp_replicate_size": decisions.data_parallel_replicate,
            "parallelism_config_dp_shard_size": shard,
            "parallelism_config_tp_size": decisions.tensor_parallel,
            "parallelism_config_cp_size": 1,
        },
    }
