"""A plan of a traced module: the same document as any plan, with the chain of layers in place of a transformer's shape.

Layers are counted as the chain's are, from 0. Tensor and sequence parallelism are 1 and off: how to split a module's
products is not known of an arbitrary one.
"""

from __future__ import annotations

import msgspec

from planner.cluster import ClusterSpec, validate
from planner.documents import Document, convert, parse_json, read_text
from planner.errors import InputError
from planner.plan import (
    SCHEMA,
    Decisions,
    Plan,
    Predictions,
    RecomputeCounts,
    SolverReport,
    Stage,
    Training,
    check_predictions,
    check_schedule,
    digest,
    is_traced,
    load_plan,
    stage_ranks,
)
from planner.traced import TracedModel
from planner.values import check_values

CHAIN_SCHEDULES = ("1F1B", "GPipe", "Naive")
"""Schedules with one stage per rank and a whole backward pass: splitting it needs code that knows the layers."""
CHAIN_ZERO_STAGES = (0, 1)


class ChainInputs(Document, frozen=True, kw_only=True):
    """What a plan of a traced module was made from."""

    model: TracedModel
    cluster: ClusterSpec
    training: Training


class ChainPlan(Document, frozen=True, kw_only=True):
    schema: str = SCHEMA
    inputs: ChainInputs
    inputs_hash: str
    decisions: Decisions
    predictions: Predictions
    solver: SolverReport


def load_any_plan(path: str, field: str = "plan") -> Plan | ChainPlan:
    """The plan stored at `path`, of either kind, checked. No code of a traced module is loaded."""
    value = parse_json(read_text(path, field), path)
    if not is_traced(value):
        return load_plan(path, field)
    plan = convert(value, ChainPlan, path, SCHEMA)
    validate(plan.inputs.cluster, f"{path}: inputs.cluster")
    check_chain(plan.inputs, plan.decisions, path)
    check_predictions(plan.predictions, plan.decisions, path)
    if plan.inputs_hash != digest(plan.inputs):
        raise InputError(f"{path}: inputs_hash", plan.inputs_hash, "the hash of `inputs` is expected: the file was changed after it was made")
    return plan


def recomputed(stage: Stage) -> frozenset[int]:
    """The layers of a stage that are recomputed."""
    if stage.recomputed_layers is not msgspec.UNSET:
        return frozenset(stage.recomputed_layers)
    layers = range(stage.first_layer, stage.first_layer + stage.num_layers)
    return frozenset(layers) if stage.recompute == "full" else frozenset()


def chain_stage(first: int, size: int, again: frozenset[int], rank: int) -> Stage:
    """A stage of `size` layers of which those in `again` are recomputed."""
    if not again or len(again) == size:
        return Stage(first_layer=first, num_layers=size, recompute="full" if again else "none", pipeline_rank=rank)
    counts = RecomputeCounts(none=size - len(again), full=len(again))
    return Stage(first_layer=first, num_layers=size, recompute=counts, pipeline_rank=rank, recomputed_layers=tuple(sorted(again)))


def check_chain(inputs: ChainInputs, decisions: Decisions, where: str = "plan") -> None:
    """Raises InputError naming the first rule that the model or the decisions break."""

    def refuse(field: str, value: object, allowed: str) -> None:
        raise InputError(f"{where}: {field}", value, allowed)

    model, d = inputs.model, decisions
    if len(model.layers) != model.num_layers or not model.layers:
        refuse("inputs.model.num_layers", model.num_layers, f"the {len(model.layers)} layers listed are expected")
    for index, layer in enumerate(model.layers):
        if not 0 <= layer.cost < len(model.costs):
            refuse(f"inputs.model.layers[{index}].cost", layer.cost, f"an index below {len(model.costs)} is expected")
    check_values(decisions, where, "decisions")
    for name, only in (("tensor_parallel", 1), ("num_virtual_stages", 1), ("data_parallel_replicate", 1), ("sequence_parallel", False)):
        if getattr(d, name) != only:
            refuse(f"decisions.{name}", getattr(d, name), f"{only} is the only value for a traced module")
    if d.world_size != inputs.cluster.num_gpus:
        refuse("decisions.data_parallel", d.data_parallel, f"data x pipeline parallel must be the {inputs.cluster.num_gpus} GPUs of the cluster")
    if d.data_parallel * d.micro_batch_size * d.num_microbatches != inputs.training.global_batch_size:
        allowed = f"data parallel x micro-batch size x micro-batches must be the global batch size {inputs.training.global_batch_size}"
        refuse("decisions.num_microbatches", d.num_microbatches, allowed)
    if d.zero_stage not in CHAIN_ZERO_STAGES:
        refuse("decisions.zero_stage", d.zero_stage, "0 or 1 is expected for a traced module")
    if d.schedule not in CHAIN_SCHEDULES:
        refuse("decisions.schedule", d.schedule, f"one of {', '.join(CHAIN_SCHEDULES)} is expected for a traced module")
    check_schedule(d.schedule, d.pipeline_parallel, d.num_virtual_stages, d.num_microbatches, f"{where}: decisions")
    if sorted(d.rank_order) != ["dp", "pp", "tp"]:
        refuse("decisions.rank_order", d.rank_order, "tp, dp and pp, each once")
    if len(d.stages) != d.pipeline_parallel:
        refuse("decisions.stages", f"{len(d.stages)} stages", f"pipeline_parallel = {d.pipeline_parallel} are expected")
    expected = 0
    for index, (stage, rank) in enumerate(zip(d.stages, stage_ranks(d.schedule, d.pipeline_parallel, 1), strict=True)):
        path = f"decisions.stages[{index}]"
        if stage.first_layer != expected or stage.num_layers < 1:
            refuse(f"{path}.first_layer", stage.first_layer, f"{expected} is expected, with at least one layer: every layer on exactly one stage")
        if stage.pipeline_rank != rank:
            refuse(f"{path}.pipeline_rank", stage.pipeline_rank, f"{rank} is expected")
        expected += stage.num_layers
        again = recomputed(stage)
        if not again <= set(range(stage.first_layer, expected)) or stage != chain_stage(stage.first_layer, stage.num_layers, again, rank):
            refuse(f"{path}.recompute", stage.recompute, "none, full, or counts of both with recomputed_layers of the stage that agree")
    if expected != model.num_layers:
        refuse("decisions.stages", f"{expected} layers", f"{model.num_layers} are expected")
