"""DeepSpeed: `ds_config.json`, a launch script, and with pipeline parallelism a `PipelineModule` with the plan's cuts.

DeepSpeed partitions a pipeline evenly by layers or parameters and has no option for given cuts, so the exported module
overrides the method that sets them. Its pipeline runs 1F1B, and refuses ZeRO-2 and ZeRO-3
(deepspeed/runtime/pipe/engine.py).
"""

from __future__ import annotations

import json

from planner.export.common import Notes, flag, header, note_rank_order, refuse, script, strongest_level, torchrun
from planner.plan import Plan

TARGET = "deepspeed"
_MODULE = '''{header}
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

# Layer 0 is the embedding, the last layer the final norm with the head. Stage i holds layers PARTS[i] to PARTS[i + 1] - 1.
PARTS = {parts}
ACTIVATION_CHECKPOINT_INTERVAL = {interval}
TOPOLOGY = {{"num_pp": {pp}, "num_mp": {tp}, "num_dp": {dp}}}


class PlannedPipeline(PipelineModule):
    """A PipelineModule whose stages are cut as planned: PlannedPipeline(layers=[embedding, *blocks, head], loss_fn=...)."""

    def __init__(self, layers, **arguments):
        layers = list(layers)
        if len(layers) != PARTS[-1]:
            raise ValueError(f"the plan is for {{PARTS[-1]}} layers, embedding and head included, not {{len(layers)}}")
        arguments.setdefault("topology", PipeModelDataParallelTopology(**TOPOLOGY))
        arguments.setdefault("activation_checkpoint_interval", ACTIVATION_CHECKPOINT_INTERVAL)
        super().__init__(layers=layers, **arguments)

    def _partition_layers(self, method="uniform"):
        self.parts = list(PARTS)
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=PARTS[stage], stop=PARTS[stage + 1])
'''


def export_deepspeed(plan: Plan) -> dict[str, str]:
    """`ds_config.json`, `deepspeed.sh` and, with a pipeline, `planned_pipeline.py`.

    Raises InputError for what DeepSpeed refuses or has no option for.
    """
    decisions, training = plan.decisions, plan.inputs.training
    pipeline = decisions.pipeline_parallel > 1
    if pipeline and decisions.zero_stage >= 2:
        raise refuse(TARGET, "zero_stage", decisions.zero_stage, "0 or 1: DeepSpeed refuses ZeRO-2 and ZeRO-3 with pipeline parallelism")
    if pipeline and decisions.schedule != "1F1B":
        raise refuse(TARGET, "schedule", decisions.schedule, "1F1B is the one that DeepSpeed's pipeline runs")
    if decisions.data_parallel_replicate > 1:
        raise refuse(TARGET, "data_parallel_replicate", decisions.data_parallel_replicate, "1: this export has no hierarchical sharding there")
    if training.precision == "bf16":
        raise refuse(TARGET, "precision", "bf16", "DeepSpeed keeps fp32 master weights: plan with mixed-bf16 or fp32")
    if decisions.sequence_parallel:
        raise refuse(TARGET, "sequence_parallel", True, "DeepSpeed's tensor parallelism has no Megatron-style sequence parallelism")
    notes: Notes = []
    level = strongest_level(plan, TARGET, notes)
    note_rank_order(plan, TARGET, notes)
    if level != "none":
        notes.append(
            "recomputation: PlannedPipeline checkpoints every layer."
            if pipeline
            else "recomputation is the model's own there: call model.gradient_checkpointing_enable(), or deepspeed.checkpointing on each block."
        )
    if level == "selective":
        notes.append("DeepSpeed has no selective recomputation, so blocks are recomputed in full: less memory, slower.")
    if training.precision == "mixed-bf16":
        notes.append("DeepSpeed may accumulate gradients in fp32 (data_types.grad_accum_dtype), where the plan counts 2 bytes a parameter.")
    config: dict[str, object] = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": decisions.micro_batch_size,
        "gradient_accumulation_steps": decisions.num_microbatches,
        "bf16": {"enabled": training.precision == "mixed-bf16"},
        "zero_optimization": {"stage": decisions.zero_stage if decisions.data_parallel > 1 else 0},
        "optimizer": {"type": "AdamW" if training.optimizer == "adam" else "SGD", "params": {"lr": 1e-4}},
    }
    if training.optimizer != "adam" and decisions.zero_stage:
        config["zero_allow_untested_optimizer"] = True
    files: dict[str, str] = {}
    if pipeline:
        if decisions.tensor_parallel > 1:
            notes.append(
                f"in a pipeline DeepSpeed leaves tensor parallelism to the layers: yours must split over the {decisions.tensor_parallel} ranks of the"
                " topology's model axis, as Megatron-DeepSpeed's do."
            )
        config["pipeline"] = {"activation_checkpoint_interval": int(level != "none")}
        files["planned_pipeline.py"] = _MODULE.format(
            header=header(plan, TARGET, notes),
            parts=[stage.first_layer for stage in decisions.stages] + [plan.inputs.model.num_layers + 2],
            interval=int(level != "none"),
            pp=decisions.pipeline_parallel,
            tp=decisions.tensor_parallel,
            dp=decisions.data_parallel,
        )
    elif decisions.tensor_parallel > 1:
        config["tensor_parallel"] = {"autotp_size": decisions.tensor_parallel}
    before = [
        f"# Your training script reads ds_config.json{' and builds its model as a planned_pipeline.PlannedPipeline' if pipeline else ''}.",
        f"# Sequence length: {training.sequence_length}.",
    ]
    command = [*torchrun(plan, TARGET), '"${TRAIN:-train.py}"', flag("--deepspeed_config", "ds_config.json"), '"$@"']
    return {"ds_config.json": json.dumps(config, indent=2) + "\n", "deepspeed.sh": script(header(plan, "DeepSpeed", notes), command, before)} | files
