"""A plan: what it was given, what was decided, and what is predicted, as three separate objects.

It is the one thing that passes between planner and executor. `check` holds every rule that a plan must keep, for
both of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Literal, Protocol, TypeVar, get_args

import msgspec

from planner.cluster import ClusterSpec
from planner.cluster import validate as validate_cluster
from planner.documents import Document, builtins, convert, parse_json, read_text
from planner.errors import InputError
from planner.model import ModelSpec
from planner.model import validate as validate_model
from planner.values import COUNT, FRACTION, POSITIVE, SIGNED, check_values

SCHEMA = "meshwright.plan/1"
T = TypeVar("T", bound=msgspec.Struct)

ScheduleName = Literal["Naive", "GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"]
Recompute = Literal["none", "selective", "full"]
Precision = Literal["mixed-bf16", "fp32", "bf16"]
Optimizer = Literal["adam", "sgd"]
Axis = Literal["tp", "dp", "pp"]
Profile = Literal["meshwright", "megatron"]
Attention = Literal["fused", "unfused"]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)
ATTENTIONS: tuple[str, ...] = get_args(Attention)
RECOMPUTE_LEVELS: tuple[str, ...] = get_args(Recompute)
SPLIT_BACKWARD_SCHEDULES = frozenset({"InterleavedZeroBubble", "ZBVZeroBubble"})
"""Schedules that run the gradients of inputs and of weights as separate actions."""
INTERLEAVED_SCHEDULES = frozenset({"Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"})
"""Schedules whose pipeline ranks hold several stages."""


class RecomputeCounts(Document, frozen=True, kw_only=True):
    """How many of a stage's transformer blocks are at each level, in order: first `full`, then `selective`, then `none`."""

    none: int = 0
    selective: int = 0
    full: int = 0


class Stage(Document, frozen=True, kw_only=True):
    """Consecutive layers of the layer chain on one pipeline rank."""

    first_layer: int
    num_layers: int
    recompute: Recompute | RecomputeCounts
    pipeline_rank: int
    recomputed_layers: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET
    """Only in plans of traced modules, whose layers differ: which of them are recomputed, where some are."""


class Decisions(Document, frozen=True, kw_only=True):
    """What a plan decides. Layer 0 is the embedding, 1..L the blocks, L + 1 the head (final norm and projection)."""

    RULES = dict.fromkeys(
        ("data_parallel", "tensor_parallel", "pipeline_parallel", "micro_batch_size", "num_microbatches", "num_virtual_stages",
         "data_parallel_replicate"),
        COUNT,
    )  # fmt: skip

    data_parallel: int
    tensor_parallel: int
    pipeline_parallel: int
    zero_stage: int = 0
    sequence_parallel: bool = False
    micro_batch_size: int
    num_microbatches: int
    schedule: ScheduleName = "1F1B"
    num_virtual_stages: int = 1
    """Stages per pipeline rank."""
    rank_order: tuple[Axis, ...] = ("tp", "dp", "pp")
    """Mesh axes from the fastest varying (neighbouring ranks) to the slowest."""
    data_parallel_replicate: int = 1
    """Replicas of the shard group: with ZeRO, states are sharded over data_parallel / data_parallel_replicate ranks (HSDP)."""
    stages: tuple[Stage, ...]

    @property
    def world_size(self) -> int:
        return self.data_parallel * self.tensor_parallel * self.pipeline_parallel

    @property
    def num_stages(self) -> int:
        return self.pipeline_parallel * self.num_virtual_stages


class Training(Document, frozen=True, kw_only=True):
    """What is asked of the training run."""

    RULES = {"global_batch_size": COUNT, "sequence_length": COUNT, "memory_fraction": FRACTION}

    global_batch_size: int
    sequence_length: int
    precision: Precision = "mixed-bf16"
    optimizer: Optimizer = "adam"
    profile: Profile = "meshwright"
    """Whose implementation is costed: this package's executor, or Megatron-LM's published formulas."""
    program: str | None = None
    """The program whose step time is predicted, of planner/data/software.json; null for the profile's."""
    attention: Attention | None = None
    """Whether attention is one operation that never stores the scores, or three that do. None: as the profile has it, fused in
    `meshwright`; the formula of `megatron` stores the scores."""
    memory_fraction: float = 1.0
    """Of a GPU's memory that a plan may use."""


class Inputs(Document, frozen=True, kw_only=True):
    """What a plan was made from."""

    model: ModelSpec
    cluster: ClusterSpec
    training: Training


class Memory(Document, frozen=True, kw_only=True):
    """Bytes on one GPU at its peak. The total is the sum of the others."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    buffers_bytes: int
    total_bytes: int

    @classmethod
    def of(cls, weights: float, gradients: float, optimizer: float, activations: float = 0, buffers: float = 0) -> Memory:
        parts = [round(part) for part in (weights, gradients, optimizer, activations, buffers)]
        return cls(
            weights_bytes=parts[0],
            gradients_bytes=parts[1],
            optimizer_bytes=parts[2],
            activations_bytes=parts[3],
            buffers_bytes=parts[4],
            total_bytes=sum(parts),
        )


class PipelineRankPrediction(Document, frozen=True, kw_only=True):
    """One pipeline rank: its stages, its peak and its time per micro-batch."""

    RULES = {"headroom_bytes": SIGNED}

    pipeline_rank: int
    stages: tuple[int, ...]
    num_in_flight: int
    memory: Memory
    headroom_bytes: int | None
    forward_seconds: float | None
    backward_seconds: float | None


class Time(Document, frozen=True, kw_only=True):
    """Time of one optimizer step and what follows from it. Null where an input is missing."""

    RULES = {"step_seconds": POSITIVE, "bubble_fraction": SIGNED}

    step_seconds: float | None = None
    step_seconds_interval: tuple[float, float] | None = None
    bubble_fraction: float | None = None
    model_flops_utilization: float | None = None
    hardware_flops_utilization: float | None = None
    tokens_per_second: float | None = None
    training_days: float | None = None
    gpu_years: float | None = None
    gpu_hours: float | None = None
    cost: float | None = None
    """Of the whole run, in the currency of the price per GPU-hour."""
    energy_kwh: float | None = None
    """Of the whole run, at the GPUs' rated power."""
    step_flops: float | None = None
    breakdown_seconds: dict[str, float] = {}
    """What the step is made of on its slowest rank: compute, tensor-parallel and pipeline communication, bubble, reduction, optimizer."""


class Predictions(Document, frozen=True, kw_only=True):
    """What a plan is predicted to need. `memory` is the heaviest GPU's."""

    memory: Memory
    pipeline_ranks: tuple[PipelineRankPrediction, ...]
    time: Time


class RunnerUp(Document, frozen=True, kw_only=True):
    """A plan that lost, and why."""

    decisions: Decisions
    step_seconds: float | None
    peak_bytes: int | None
    why_not: str


class SolverReport(Document, frozen=True, kw_only=True):
    """How the plan was found and how good it is proven to be."""

    name: str
    status: str
    objective_seconds: float | None
    bound_seconds: float | None
    gap_fraction: float | None
    num_candidates: int
    num_pruned: int
    wall_seconds: float
    runners_up: tuple[RunnerUp, ...] = ()
    reasons: tuple[str, ...] = ()
    """Why this plan: the placement of the axes, and what binds."""


class Plan(Document, frozen=True, kw_only=True):
    schema: str = SCHEMA
    inputs: Inputs
    inputs_hash: str
    decisions: Decisions
    predictions: Predictions
    solver: SolverReport


def recompute_counts(stage: Stage, num_blocks: int) -> RecomputeCounts:
    """The stage's recompute levels as counts of its `num_blocks` transformer blocks."""
    if isinstance(stage.recompute, RecomputeCounts):
        return stage.recompute
    return RecomputeCounts(**{stage.recompute: num_blocks})


def as_recompute(none: int = 0, selective: int = 0, full: int = 0) -> Recompute | RecomputeCounts:
    """Counts in their shortest form: the level's name where all blocks share one."""
    if selective == full == 0:
        return "none"
    if none == full == 0:
        return "selective"
    if none == selective == 0:
        return "full"
    return RecomputeCounts(none=none, selective=selective, full=full)


def stage_blocks(stage: Stage, model: ModelSpec) -> range:
    """The indices (0-based) of the transformer blocks of `stage`."""
    first = max(stage.first_layer, 1)
    last = min(stage.first_layer + stage.num_layers, model.num_layers + 1)
    return range(first - 1, max(last - 1, first - 1))


def has_embedding(stage: Stage) -> bool:
    return stage.first_layer == 0


def has_head(stage: Stage, model: ModelSpec) -> bool:
    return stage.first_layer + stage.num_layers == model.num_layers + 2


def block_levels(stage: Stage, model: ModelSpec) -> list[Recompute]:
    """The recompute level of each transformer block of `stage`, in order."""
    counts = recompute_counts(stage, len(stage_blocks(stage, model)))
    return ["full"] * counts.full + ["selective"] * counts.selective + ["none"] * counts.none  # type: ignore[return-value]


def stage_ranks(schedule: str, pipeline_parallel: int, num_virtual_stages: int) -> tuple[int, ...]:
    """Pipeline rank of each stage: round robin, or back and forth for ZBVZeroBubble (the V of Qi et al. 2024)."""
    ranks = range(pipeline_parallel)
    if schedule == "ZBVZeroBubble":
        return (*ranks, *reversed(ranks))
    return tuple(ranks) * num_virtual_stages


def digest(document: Any) -> str:
    """SHA-256 of the canonical JSON of a document."""
    text = json.dumps(builtins(document), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Hashed(Protocol):
    """A plan of either kind."""

    @property
    def inputs(self) -> msgspec.Struct: ...

    @property
    def decisions(self) -> Decisions: ...


def plan_hash(plan: Hashed) -> str:
    """Identifies what a plan says to do: its inputs and decisions, not its predictions."""
    return digest((plan.inputs, plan.decisions))


def is_traced(value: Any) -> bool:
    """Whether the JSON value is a plan of a traced module (`planner.chain_plan`)."""
    inputs = value.get("inputs") if isinstance(value, dict) else None
    model = inputs.get("model") if isinstance(inputs, dict) else None
    return isinstance(model, dict) and "layers" in model


def load_plan(path: str, field: str = "plan") -> Plan:
    """The plan stored at `path`, checked. Raises InputError for that of a traced module, which has no transformer's shape."""
    value = parse_json(read_text(path, field), path)
    if is_traced(value):
        allowed = "a plan of a transformer is expected; one of a traced module can be shown, simulated, run, compared and reported"
        raise InputError(f"{path}: inputs.model.name", value["inputs"]["model"].get("name"), allowed)
    plan = convert(value, Plan, path, SCHEMA)
    validate_model(plan.inputs.model, f"{path}: inputs.model")
    validate_cluster(plan.inputs.cluster, f"{path}: inputs.cluster")
    check(plan.inputs, plan.decisions, path)
    check_predictions(plan.predictions, plan.decisions, path)
    if plan.inputs_hash != digest(plan.inputs):
        raise InputError(f"{path}: inputs_hash", plan.inputs_hash, "the hash of `inputs` is expected: the file was changed after it was made")
    return plan


def check_predictions(predictions: Predictions, decisions: Decisions, where: str) -> None:
    """Raises InputError unless the predictions are of the decisions' pipeline ranks, in order, or of none, and their memory adds up."""
    ranks = predictions.pipeline_ranks
    if ranks and [rank.pipeline_rank for rank in ranks] != list(range(decisions.pipeline_parallel)):
        found = [rank.pipeline_rank for rank in ranks]
        raise InputError(f"{where}: predictions.pipeline_ranks", found, f"each rank from 0 to {decisions.pipeline_parallel - 1} once is expected")
    for rank in ranks:
        if not all(0 <= stage < decisions.num_stages for stage in rank.stages):
            path = f"{where}: predictions.pipeline_ranks[{rank.pipeline_rank}].stages"
            raise InputError(path, rank.stages, f"stages from 0 to {decisions.num_stages - 1} are expected")
    for path, memory in [("memory", predictions.memory), *((f"pipeline_ranks[{index}].memory", rank.memory) for index, rank in enumerate(ranks))]:
        parts = (memory.weights_bytes, memory.gradients_bytes, memory.optimizer_bytes, memory.activations_bytes, memory.buffers_bytes)
        if memory.total_bytes != sum(parts):
            allowed = f"the sum of the parts, {sum(parts)}, is expected"
            raise InputError(f"{where}: predictions.{path}.total_bytes", memory.total_bytes, allowed)
    if ranks and predictions.memory.total_bytes != (most := max(rank.memory.total_bytes for rank in ranks)):
        allowed = f"that of the heaviest pipeline rank, {most}, is expected"
        raise InputError(f"{where}: predictions.memory.total_bytes", predictions.memory.total_bytes, allowed)


def check(inputs: Inputs, decisions: Decisions, where: str = "plan") -> None:
    """Raises InputError naming the first rule that the decisions break."""

    def refuse(field: str, value: object, allowed: str) -> None:
        raise InputError(f"{where}: decisions.{field}", value, allowed)

    model, training = inputs.model, inputs.training
    check_values(decisions, where, "decisions")
    if decisions.world_size != inputs.cluster.num_gpus:
        refuse(
            "data_parallel",
            f"{decisions.data_parallel} x {decisions.tensor_parallel} x {decisions.pipeline_parallel}",
            f"data x tensor x pipeline parallel must be the {inputs.cluster.num_gpus} GPUs of the cluster",
        )
    check_tensor_parallel(model, decisions.tensor_parallel, f"{where}: decisions.tensor_parallel")
    if decisions.sequence_parallel and decisions.tensor_parallel == 1:
        refuse("sequence_parallel", True, "it needs tensor_parallel above 1")
    if decisions.sequence_parallel and training.sequence_length % decisions.tensor_parallel:
        refuse("sequence_parallel", True, f"tensor_parallel must divide the sequence length {training.sequence_length}")
    if training.sequence_length > model.max_sequence_length and model.position_embedding == "learned":
        raise InputError(
            f"{where}: sequence_length", training.sequence_length, f"at most {model.max_sequence_length} learned positions exist"
        )
    samples = decisions.data_parallel * decisions.micro_batch_size * decisions.num_microbatches
    if samples != training.global_batch_size:
        refuse(
            "num_microbatches",
            f"{decisions.data_parallel} x {decisions.micro_batch_size} x {decisions.num_microbatches}",
            f"data parallel x micro-batch size x micro-batches must be the global batch size {training.global_batch_size}",
        )
    if not 0 <= decisions.zero_stage <= 3:
        refuse("zero_stage", decisions.zero_stage, "0, 1, 2 or 3 is expected")
    if decisions.data_parallel % decisions.data_parallel_replicate:
        refuse("data_parallel_replicate", decisions.data_parallel_replicate, f"a divisor of data_parallel ({decisions.data_parallel})")
    check_schedule(
        decisions.schedule, decisions.pipeline_parallel, decisions.num_virtual_stages, decisions.num_microbatches, f"{where}: decisions"
    )
    if sorted(decisions.rank_order) != ["dp", "pp", "tp"]:
        refuse("rank_order", decisions.rank_order, "tp, dp and pp, each once")
    check_stages(model, decisions, where)


def check_tensor_parallel(model: ModelSpec, tensor_parallel: int, where: str) -> None:
    """Raises InputError unless `tensor_parallel` divides what it splits."""
    for name in ("num_attention_heads", "num_key_value_heads", "ffn_hidden_size"):
        size = getattr(model, name)
        if size % tensor_parallel:
            if name == "num_key_value_heads" and tensor_parallel % size == 0:
                continue  # key-value heads are then replicated, each on tensor_parallel / size ranks
            raise InputError(where, tensor_parallel, f"it must divide {name} = {size} of {model.name}")


def check_schedule(schedule: str, pipeline_parallel: int, num_virtual_stages: int, num_microbatches: int, where: str) -> None:
    """Raises InputError when the schedule can't run with these numbers."""
    if schedule == "ZBVZeroBubble" and num_virtual_stages != 2:
        raise InputError(f"{where}.num_virtual_stages", num_virtual_stages, "ZBVZeroBubble has exactly 2 stages a rank")
    if schedule not in INTERLEAVED_SCHEDULES and num_virtual_stages != 1:
        raise InputError(f"{where}.num_virtual_stages", num_virtual_stages, f"{schedule} has exactly 1 stage a rank")
    if schedule in INTERLEAVED_SCHEDULES and pipeline_parallel < 2:
        raise InputError(f"{where}.schedule", schedule, "it needs pipeline_parallel of at least 2")
    if schedule in ("Interleaved1F1B", "InterleavedZeroBubble"):
        if num_virtual_stages < 2:
            raise InputError(f"{where}.num_virtual_stages", num_virtual_stages, f"{schedule} needs at least 2 stages a rank")
        rounds = max(1, num_microbatches // pipeline_parallel)
        if num_microbatches % rounds:
            raise InputError(
                f"{where}.num_microbatches",
                num_microbatches,
                f"{schedule} runs micro-batches in {rounds} rounds, so a multiple of {rounds} is expected",
            )


def check_stages(model: ModelSpec, decisions: Decisions, where: str = "plan") -> None:
    """Raises InputError unless every layer lies on exactly one stage, and every stage on its schedule's rank."""
    total = model.num_layers + 2
    if len(decisions.stages) != decisions.num_stages:
        raise InputError(
            f"{where}: decisions.stages", f"{len(decisions.stages)} stages", f"pipeline_parallel x num_virtual_stages = {decisions.num_stages}"
        )
    ranks = stage_ranks(decisions.schedule, decisions.pipeline_parallel, decisions.num_virtual_stages)
    expected = 0
    for index, stage in enumerate(decisions.stages):
        path = f"{where}: decisions.stages[{index}]"
        if stage.first_layer != expected:
            raise InputError(f"{path}.first_layer", stage.first_layer, f"{expected} is expected: every layer on exactly one stage")
        if stage.num_layers < 1:
            raise InputError(f"{path}.num_layers", stage.num_layers, "at least 1 layer is expected")
        if stage.pipeline_rank != ranks[index]:
            raise InputError(f"{path}.pipeline_rank", stage.pipeline_rank, f"{decisions.schedule} puts this stage on rank {ranks[index]}")
        expected += stage.num_layers
        if stage.recomputed_layers is not msgspec.UNSET:
            raise InputError(f"{path}.recomputed_layers", stage.recomputed_layers, "only plans of traced modules have it")
        if isinstance(stage.recompute, RecomputeCounts):
            counts = (stage.recompute.none, stage.recompute.selective, stage.recompute.full)
            blocks = len(stage_blocks(stage, model))
            if min(counts) < 0 or sum(counts) != blocks:
                raise InputError(f"{path}.recompute", counts, f"counts that add up to the stage's {blocks} blocks are expected")
    if expected != total:
        raise InputError(
            f"{where}: decisions.stages", f"{expected} layers", f"{total} are expected: {model.num_layers} blocks, the embedding and the head"
        )


def even_stages(model: ModelSpec, schedule: str, pipeline_parallel: int, num_virtual_stages: int, recompute: Recompute) -> tuple[Stage, ...]:
    """Stages with blocks as even as can be, the embedding on the first and the head on the last (Megatron's layout).

    Where the blocks don't divide, the middle stages get one more, since embedding and head weigh on the ends.
    """
    count = pipeline_parallel * num_virtual_stages
    if model.num_layers + 2 < count:
        option = "--pp" if num_virtual_stages == 1 else f"--pp x {num_virtual_stages} stages a rank"
        raise InputError(option, count, f"{model.name} has {model.num_layers + 2} layers, embedding and head included, so at most as many stages")
    base, extra = divmod(model.num_layers, count)
    start = (count - extra + 1) // 2
    blocks = [base + (1 if start <= index < start + extra else 0) for index in range(count)]
    sizes = [blocks[index] + (index == 0) + (index == count - 1) for index in range(count)]
    return make_stages(sizes, [recompute] * count, stage_ranks(schedule, pipeline_parallel, num_virtual_stages))


def make_stages(
    sizes: Iterable[int], recompute: Iterable[Recompute | RecomputeCounts], ranks: Iterable[int]
) -> tuple[Stage, ...]:
    """Stages of consecutive layers from their sizes."""
    stages, first = [], 0
    for size, level, rank in zip(sizes, recompute, ranks, strict=True):
        stages.append(Stage(first_layer=first, num_layers=size, recompute=level, pipeline_rank=rank))
        first += size
    return tuple(stages)


def replace(document: T, **changes: Any) -> T:
    """A copy of a frozen document with some fields changed."""
    return msgspec.structs.replace(document, **changes)
