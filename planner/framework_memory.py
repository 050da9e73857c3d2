"""Peak memory of the programs that published rows ran, in closed form: facts about programs as data, formulas here.

The allocator's peak on a rank is

    states + max(Σ over its stages of kept bytes x micro-batches in flight + the largest transient + gathered buffers,
                 what the optimizer's step adds) + what the program holds for good

and what a tool reports of it depends on the tool (`Reported`): the allocator's peak, what it reserved, or what the driver
counts. Symbols as in `planner.model`; t is the tensor-parallel degree. Facts with their sources are in
data/framework_memory.json, and docs/published_memory.md compares what follows from them with measured memory.
"""

from __future__ import annotations

import functools
import itertools
import json
from importlib import resources
from typing import Literal, NamedTuple

from planner.documents import Document, convert
from planner.graph import LayerKind
from planner.megatron_memory import BlockTerms, block_terms
from planner.memory import in_flight
from planner.model import ModelSpec
from planner.plan import Decisions, Inputs, Memory, Recompute, Stage, block_levels, has_embedding, has_head, make_stages, replace
from planner.states import ends_apart, layer_units

MemoryKind = Literal["allocated", "reserved", "device"]


class MemoryProgram(Document, frozen=True, kw_only=True):
    """One training program, as far as its memory depends on it. Bytes per parameter are those before any sharding."""

    name: str
    weights: float = 2
    """Sharded from ZeRO-3 on."""
    gradients: float = 2
    """Sharded from ZeRO-2 on."""
    optimizer: float = 12
    """Sharded from ZeRO-1 on."""
    accumulation: float = 0
    """A second set of gradients that is never sharded, such as fp32 sums beside bf16 gradients."""
    step: float = 0
    """Temporaries of the optimizer's step, per parameter that the rank updates; no activations live then."""
    dropout: bool = False
    """Whether dropout masks are kept, 1 byte an element, and attention's probabilities before and after dropout."""
    keep_gathered: bool = False
    """Whether linear layers keep the rows that sequence parallelism gathered, and not their own share of them."""
    qkv_copies: float = 0
    """Bytes kept per element of queries, keys and values beside the formula's: rotary embedding as separate kernels."""
    inner_copies: float = 0
    """Bytes kept per feed-forward unit beside the formula's: a gated activation function as separate kernels."""
    op_keeps_output: bool = True
    """Whether selective recomputation by operation keeps the block's last product too, which no backward pass reads."""
    logit_forward: float = 10
    """Bytes per logit at the loss's largest moment in the forward pass: 16-bit logits, fp32 ones, their exponentials."""
    logit_backward: float = 6
    """The same of its backward pass: fp32 gradients made in place of the probabilities, and their 16-bit copy."""
    weight_gradients: Literal["none", "largest", "cached"] = "largest"
    """16-bit gradients beside the sums: none, those of the largest matrix, or a buffer for each shape of matrix, kept for good."""
    gathered_stages: bool = False
    """Whether with a pipeline ZeRO-3 keeps a stage's gathered weights and unreduced fp32 gradients from first to last micro-batch."""
    stages: Literal["blocks", "last", "flops"] = "blocks"
    """What the pipeline's cut evens out: blocks, as the plan's stages do; blocks, the last ranks with one more where they don't divide;
    or the multiplications of blocks and head."""
    resident_bytes: float = 0
    """Held for good: workspaces and communication buckets."""
    source: str


class Reported(Document, frozen=True, kw_only=True):
    """What a tool reports: factor x the allocator's peak + constant."""

    kind: MemoryKind
    factor: float = 1
    constant_bytes: float = 0
    source: str


class Reader(Document, frozen=True, kw_only=True):
    """How the memory of rows is to be read, whose source, group or memory kind has `pattern`."""

    pattern: str
    kind: MemoryKind
    ranks: Literal["all", "first_node"] = "all"
    """The GPUs that the figure is the largest of."""
    source: str


class Facts(Document, frozen=True, kw_only=True):
    programs: tuple[MemoryProgram, ...]
    aliases: dict[str, str]
    """Programs of planner/data/software.json that share another's memory."""
    reported: tuple[Reported, ...]
    readers: tuple[Reader, ...]
    """The first whose pattern is found decides."""
    calibrated: dict[str, str]
    """Groups of published rows that constants were fitted to, and which."""


@functools.cache
def facts() -> Facts:
    text = (resources.files("planner") / "data" / "framework_memory.json").read_text(encoding="utf-8")
    return convert(json.loads(text), Facts, "framework_memory.json")


def memory_program(name: str) -> MemoryProgram:
    """The facts of the program called `name`; those of Megatron-LM for one that is not known."""
    known = {program.name: program for program in facts().programs}
    return known.get(name) or known.get(facts().aliases.get(name, "megatron")) or known["megatron"]


def reported_as(kind: MemoryKind) -> Reported:
    return next(item for item in facts().reported if item.kind == kind)


def reported_bytes(allocated: float, kind: MemoryKind) -> float:
    """What a tool of that kind reports when the allocator's peak is `allocated`."""
    found = reported_as(kind)
    return found.factor * allocated + found.constant_bytes


def needed_bytes(allocated: float) -> float:
    """What a GPU must have: the context beside the allocator's peak, for blocks that are only kept are given back when it runs full."""
    return allocated + reported_as("device").constant_bytes


class StageMemory(NamedTuple):
    """One stage on one rank, in bytes; kept per micro-batch in flight."""

    weights: float
    gradients: float
    optimizer: float
    step: float
    kept: float
    transient: float
    buffers: float


class Run(NamedTuple):
    """What a rank's memory depends on beside the plan."""

    program: MemoryProgram
    fused_attention: bool = True
    selective: Literal["core", "op"] = "core"
    context_parallel: int = 1
    """Ranks that share each sample; the plan's data-parallel degree and micro-batch are those after the split."""
    flights: tuple[int, ...] | None = None
    """Micro-batches in flight on each stage, where not the plan's schedule sets them."""


def framework_memory(inputs: Inputs, decisions: Decisions, run: Run) -> tuple[Memory, ...]:
    """The allocator's peak on one GPU of each pipeline rank, in bytes."""
    decisions = _cut(inputs.model, decisions, run.program)
    stages = [_stage(inputs, decisions, run, stage) for stage in decisions.stages]
    counts = in_flight(decisions) if run.flights is None else run.flights
    received = _rows(inputs, decisions) * 2 * inputs.model.hidden_size if decisions.pipeline_parallel > 1 else 0.0
    found = []
    for rank in range(decisions.pipeline_parallel):
        mine = [(stages[i], counts[i]) for i, stage in enumerate(decisions.stages) if stage.pipeline_rank == rank]
        activations = sum(stage.kept * count for stage, count in mine) + max(stage.transient for stage, _ in mine) + received
        buffers = max(stage.buffers for stage, _ in mine)
        step = sum(stage.step for stage, _ in mine)
        if step > activations + buffers:
            activations, buffers = 0.0, step
        weights, gradients, optimizer = (sum(stage[index] for stage, _ in mine) for index in range(3))
        found.append(Memory.of(weights, gradients, optimizer, activations, buffers + run.program.resident_bytes))
    return tuple(found)


def _cut(model: ModelSpec, decisions: Decisions, program: MemoryProgram) -> Decisions:
    """The plan with the stages that the program cuts."""
    p = decisions.pipeline_parallel
    if program.stages == "blocks" or decisions.num_stages != p or p == 1:
        return decisions
    sizes = _sizes_by_flops(model, p) if program.stages == "flops" else _sizes_from_the_last(model, p)
    if 0 in sizes:
        return decisions
    return replace(decisions, stages=make_stages(sizes, [decisions.stages[0].recompute] * p, range(p)))


def _sizes_by_flops(model: ModelSpec, p: int) -> list[int]:
    """Layers of each rank, which takes them until it has its share of the multiplications."""
    costs = [0, *[model.attention_parameters + model.mlp_parameters] * model.num_layers, model.vocab_size * model.hidden_size]
    totals = list(itertools.accumulate(costs))
    sizes, rank = [0] * p, 0
    for total in totals:
        sizes[rank] += 1
        if rank < p - 1 and total * p > totals[-1] * (rank + 1):
            rank += 1
    return sizes


def _sizes_from_the_last(model: ModelSpec, p: int) -> list[int]:
    base, extra = divmod(model.num_layers, p)
    return [base + (rank >= p - extra) + (rank == 0) + (rank == p - 1) for rank in range(p)]


def _rows(inputs: Inputs, decisions: Decisions) -> float:
    """Tokens of a micro-batch that a rank holds where sequence parallelism splits them."""
    tokens = decisions.micro_batch_size * inputs.training.sequence_length
    return tokens / (decisions.tensor_parallel if decisions.sequence_parallel else 1)


def _stage(inputs: Inputs, decisions: Decisions, run: Run, stage: Stage) -> StageMemory:
    model, program, t, zero = inputs.model, run.program, decisions.tensor_parallel, decisions.zero_stage
    levels = block_levels(stage, model)
    kinds: list[LayerKind] = ["embedding"] if has_embedding(stage) else []
    kinds += ["block"] * len(levels)
    kinds += ["head"] if has_head(stage, model) else []
    sizes = {kind: sum(layer_units(model, kind, t, tied_copy=ends_apart(decisions))) for kind in set(kinds)}
    parameters = sum(sizes[kind] for kind in kinds)
    shards = decisions.data_parallel // decisions.data_parallel_replicate
    weights, gradients, optimizer = (parameters / shards if zero >= least else float(parameters) for least in (3, 2, 1))
    tokens = decisions.micro_batch_size * inputs.training.sequence_length
    terms = block_terms(model, inputs.training.sequence_length, t, decisions.sequence_parallel)
    blocks = {level: _block(terms, run, level) for level in set(levels)}
    kept = sum(blocks[level][0] for level in levels)
    transient = max((block[1] for block in blocks.values()), default=0.0)
    if has_embedding(stage) and program.dropout:
        kept += terms.row / 2
    if has_head(stage, model):
        transient = max(transient, _head(terms, model, program, t, tokens))
    gathered = zero >= 3 and program.gathered_stages and decisions.pipeline_parallel > 1
    buffers = 6.0 * parameters if gathered else _buffers(model, decisions, program, sizes)
    return StageMemory(
        weights=weights * program.weights,
        gradients=gradients * program.gradients + parameters * program.accumulation,
        optimizer=optimizer * program.optimizer,
        step=optimizer * program.step,
        kept=kept * tokens,
        transient=transient * tokens,
        buffers=buffers,
    )


def _block(terms: BlockTerms, run: Run, level: Recompute) -> tuple[float, float]:
    """Bytes per token that a block keeps, and what its passes need beside that.

    In the MLP's backward pass the gradients of its two products replace what the second one kept: a row and the first one's
    output on top. Attention that is not fused has the gradient of its probabilities: 2 of the 5 bytes of `terms.scores`.
    """
    program = run.program
    whole = terms.rows + terms.split + (terms.masks if program.dropout else 0)
    if program.keep_gathered and terms.gathered:
        whole += 2 * (terms.gathered - terms.row)
    whole += (program.inner_copies * terms.inner + program.qkv_copies * terms.qkv) / 2
    if run.context_parallel > 1:
        whole += terms.attention  # attention's output before and after it changes hands
    scores = 0.0 if run.fused_attention else terms.scores * (1.0 if program.dropout else 0.4)
    whole += terms.statistics if run.fused_attention else scores
    backward = terms.row + max(terms.gathered + terms.up, 0.0 if run.fused_attention else 0.4 * terms.scores)
    if level == "none":
        return whole, backward
    kept = terms.row
    if level == "selective" and run.selective == "op":
        # every second product: queries, values, the MLP's first, its last; and attention's output
        kept += 2 * terms.attention + (terms.qkv - terms.attention) / 2 + terms.inner + terms.statistics
        kept += terms.row if program.op_keeps_output else 0
    elif level == "selective":
        kept = whole - scores
    return kept, whole - kept + backward


def _head(terms: BlockTerms, model: ModelSpec, program: MemoryProgram, tensor_parallel: int, tokens: float) -> float:
    """Bytes per token of the final norm, the projection and the loss: the largest of the loss's passes and of the weight gradient."""
    logits = -(-model.vocab_size // tensor_parallel)
    weight = 2 * logits * model.hidden_size / tokens if program.weight_gradients != "none" else 0
    return 3 * terms.row + terms.gathered + max(program.logit_forward * logits, program.logit_backward * logits, 2 * logits + weight)


def _buffers(model: ModelSpec, decisions: Decisions, program: MemoryProgram, sizes: dict[LayerKind, int]) -> float:
    """Gradients beside the sums. With ZeRO-3 gathered 16-bit weights of the ends and of two blocks, one running and one
    on its way, and their gradients in 16 bits and as the fp32 input of the reduction.
    """
    block = sizes.get("block", 0)
    if decisions.zero_stage >= 3:
        return 2.0 * (sum(sizes.values()) - block) + 2 * (2.0 + 6.0) * block
    if program.weight_gradients == "cached":
        return 2.0 * block
    if program.weight_gradients == "largest" and block:
        return 2.0 * (2 if model.gated_ffn else 1) * model.hidden_size * model.ffn_hidden_size / decisions.tensor_parallel
    return 0.0
