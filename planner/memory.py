"""Bytes on each GPU, in closed form: what every option of the executor keeps, and what it needs for a moment.

A rank's peak is the largest over the actions of its schedule of

    weights + gradients + optimizer + Σ saved activations of the micro-batches in flight + what the action needs itself

Two implementation profiles exist. `meshwright` describes this package's executor, and is checked against its traced
runs. `megatron` is the published formula of Megatron-LM: s·b·h·(34 + 5·a·s/h) per block and its variants (Korthikanti et
al. 2022, arXiv 2205.05198, equations 1 to 6). Symbols as in `planner.model`; e is the bytes per activation element.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from msgspec import UNSET

from planner.activations import LayerActivations, Peak, layer_activations
from planner.graph import LayerKind
from planner.megatron_memory import megatron_activations
from planner.plan import (
    SPLIT_BACKWARD_SCHEDULES,
    Decisions,
    Inputs,
    Memory,
    Recompute,
    Stage,
    block_levels,
    has_embedding,
    has_head,
    stage_blocks,
    stage_ranks,
)
from planner.schedule import IN_TURN_SCHEDULES, Actions, compute_actions
from planner.shapes import shape_of
from planner.states import element_bytes, layer_buffers, layer_states, layer_units, vector_parameters

OPTIMIZER_CHUNK_ELEMENTS = 1 << 22
"""Elements that the executor's optimizer updates at a time."""


def layer_needs(inputs: Inputs, decisions: Decisions, kind: LayerKind, level: Recompute = "none", *, held: bool = False) -> LayerActivations:
    """Activations of one layer, by the profile of the inputs; `decisions.stages` is not read."""
    split = decisions.schedule in SPLIT_BACKWARD_SCHEDULES
    if inputs.training.profile == "megatron":
        return megatron_activations(inputs, decisions, kind, level)
    shape = shape_of(inputs, decisions, layer_buffers(inputs, decisions, kind))
    return layer_activations(shape, kind, level, held, split)


class StageNeeds(NamedTuple):
    """One stage on one rank: states, and activations per micro-batch as in `LayerActivations`."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    kept: int
    forward: Peak
    backward: Peak
    deferred: int
    weights: Peak


def stage_needs(inputs: Inputs, decisions: Decisions, stage: Stage) -> StageNeeds:
    """The layers of a stage put together: forwards go up the stage, backwards come down, each on top of what is kept below."""
    model = inputs.model
    split = decisions.schedule in SPLIT_BACKWARD_SCHEDULES
    apart = decisions.stages[0].pipeline_rank != decisions.stages[-1].pipeline_rank
    last = has_head(stage, model)
    kinds: list[tuple[LayerKind, Recompute]] = [("embedding", "none")] if has_embedding(stage) else []
    kinds += [("block", level) for level in block_levels(stage, model)]
    kinds += [("head", "none")] if last else []
    states = [0, 0, 0]
    for kind in ("embedding", "block", "head"):
        number = sum(1 for name, _ in kinds if name == kind)
        if number:
            for index, size in enumerate(layer_states(inputs, decisions, kind, tied_copy=apart)):
                states[index] += number * size
    received = 0 if last else boundary_bytes(inputs, decisions)
    keys = [(kind, level, not last and position == len(kinds) - 1 and kind == "block") for position, (kind, level) in enumerate(kinds)]
    needs = {key: layer_needs(inputs, decisions, key[0], key[1], held=key[2]) for key in dict.fromkeys(keys)}
    layers = [needs[key] for key in keys]
    below = 0
    forward = backward = weights = Peak(0, 0)
    above = sum(layer.deferred for layer in layers) if split else 0
    deferred = above
    for position, layer in enumerate(layers):
        above -= layer.deferred if split else 0
        forward = _larger(forward, layer.forward, below)
        extra = 0 if position == len(layers) - 1 else received
        if split and not decisions.sequence_parallel and model.num_norms_per_layer < 4:
            extra = 0  # the received gradient is among what the last layer puts off
        backward = _larger(backward, layer.backward, below + above + extra)
        below += layer.kept
    if split:
        below_deferred = 0
        for layer in layers:
            weights = _larger(weights, layer.weights, below_deferred)
            below_deferred += layer.deferred
    return StageNeeds(states[0], states[1], states[2], below, forward, backward, deferred, weights)


def _larger(found: Peak, peak: Peak, base: int) -> Peak:
    """The larger of two moments, the second on top of `base`."""
    return found if sum(found) >= sum(peak) + base else Peak(peak.activations + base, peak.buffers)


def predict_memory(inputs: Inputs, decisions: Decisions) -> tuple[Memory, ...]:
    """Peak memory of one GPU of each pipeline rank, in bytes."""
    known: dict[tuple[object, ...], StageNeeds] = {}  # most stages are alike
    stages = []
    for stage in decisions.stages:
        alike = (stage.num_layers, stage.recompute, has_embedding(stage), has_head(stage, inputs.model))
        if alike not in known:
            known[alike] = stage_needs(inputs, decisions, stage)
        stages.append(known[alike])
    lists = _short_actions(decisions)
    boundary = boundary_bytes(inputs, decisions)
    owners = [stage.pipeline_rank for stage in decisions.stages]
    found = []
    for rank in range(decisions.pipeline_parallel):
        mine = {index: stages[index] for index, owner in enumerate(owners) if owner == rank}
        peak = walk_rank(lists[rank], mine, boundary, decisions)
        held = batch_bytes(inputs, decisions, rank) + position_bytes(inputs, decisions, rank)
        update = optimizer_buffer_bytes(inputs, decisions, rank)
        if update > sum(peak):
            peak = Peak(0, update)
        found.append(
            Memory.of(
                sum(stage.weights_bytes for stage in mine.values()),
                sum(stage.gradients_bytes for stage in mine.values()),
                sum(stage.optimizer_bytes for stage in mine.values()),
                peak.activations,
                peak.buffers + held,
            )
        )
    return tuple(found)


def batch_bytes(inputs: Inputs, decisions: Decisions, pipeline_rank: int) -> int:
    """The step's tokens on the rank of the first stage, and its targets on that of the last, 8 bytes each."""
    if inputs.training.profile == "megatron":
        return 0
    ends = (decisions.stages[0].pipeline_rank, decisions.stages[-1].pipeline_rank)
    tokens = decisions.num_microbatches * decisions.micro_batch_size * inputs.training.sequence_length
    return 8 * tokens * sum(1 for end in ends if end == pipeline_rank)


def position_bytes(inputs: Inputs, decisions: Decisions, pipeline_rank: int | None = None) -> int:
    """The tables of positions on every rank that has blocks (on any rank without `pipeline_rank`): rotary ones in fp32, 4 bytes for each of s
    positions and turned element of a head; in the compute type ALiBi's biases of the rank's heads, a/t·s², and a window's mask, s²."""
    model, length = inputs.model, inputs.training.sequence_length
    if inputs.training.profile == "megatron":
        return 0
    mine = [stage for stage in decisions.stages if stage.pipeline_rank == pipeline_rank]
    if pipeline_rank is not None and not any(block_levels(stage, model) for stage in mine):
        return 0
    width = element_bytes(inputs.training.precision)
    if model.position_embedding == "alibi":
        return model.num_attention_heads // decisions.tensor_parallel * length**2 * width
    blocks = range(model.num_layers) if pipeline_rank is None else [block for stage in mine for block in stage_blocks(stage, model)]
    windowed = model.sliding_window is not UNSET and any(model.window_of(block, length) is not None for block in blocks)
    return length * (model.rotary_size // 2) * 2 * 4 + (length**2 * width if windowed else 0)


def optimizer_buffer_bytes(inputs: Inputs, decisions: Decisions, pipeline_rank: int) -> int:
    """What the optimizer's step needs beside the states: one chunk of gradients in fp32, in mixed precision.

    Matrices and vectors of a unit are updated apart, since only the former decay.
    """
    if inputs.training.precision != "mixed-bf16" or inputs.training.profile == "megatron":
        return 0
    model = inputs.model
    shards = decisions.data_parallel // decisions.data_parallel_replicate if decisions.zero_stage else 1
    apart = decisions.stages[0].pipeline_rank != decisions.stages[-1].pipeline_rank
    undecayed = vector_parameters(model, decisions.tensor_parallel)
    largest = 0
    for stage in decisions.stages:
        if stage.pipeline_rank == pipeline_rank:
            kinds: list[LayerKind] = ["block"] if block_levels(stage, model) else []
            kinds += ["embedding"] if has_embedding(stage) else []
            kinds += ["head"] if has_head(stage, model) else []
            for kind in kinds:
                for unit in layer_units(model, kind, decisions.tensor_parallel, tied_copy=apart):
                    decayed = unit - undecayed if kind == "block" else unit
                    largest = max(largest, min(-(-unit // shards), decayed))
    return 4 * min(OPTIMIZER_CHUNK_ELEMENTS, largest)


def fixed_bytes(inputs: Inputs, decisions: Decisions) -> tuple[int, ...]:
    """What each pipeline rank needs at most beside its layers: the step's batch, tables of positions, what passes between two of its own stages,
    what it has sent, and what the optimizer's chunk needs beyond the least of layers; `decisions.stages` is not read."""
    p = decisions.pipeline_parallel
    owners = stage_ranks(decisions.schedule, p, decisions.num_virtual_stages)
    boundary, megatron = boundary_bytes(inputs, decisions), inputs.training.profile == "megatron"
    tokens = 0 if megatron else decisions.num_microbatches * decisions.micro_batch_size * inputs.training.sequence_length
    chunk = positions = 0
    if not megatron:
        chunk, positions = _optimizer_chunk(inputs, decisions), position_bytes(inputs, decisions)
    found = []
    for rank in range(p):
        mine = [stage for stage, owner in enumerate(owners) if owner == rank]
        neighbours = [(stage, to) for stage in mine for to in (stage - 1, stage + 1) if 0 <= to < len(owners)]
        sent = sum(owners[to] != rank for _, to in neighbours) if decisions.schedule in IN_TURN_SCHEDULES else 0
        own = sum(owners[to] == rank for _, to in neighbours)
        ends = (owners[0] == rank) + (owners[-1] == rank)
        found.append(8 * tokens * ends + positions + (sent + own) * boundary + chunk)
    return tuple(found)


def _optimizer_chunk(inputs: Inputs, decisions: Decisions) -> int:
    """Bytes of the optimizer's chunk that may not find room where the layers of any rank have had their activations."""
    if inputs.training.precision != "mixed-bf16":
        return 0
    kinds: tuple[LayerKind, ...] = ("embedding", "block", "head")
    units = [unit for kind in kinds for unit in layer_units(inputs.model, kind, decisions.tensor_parallel, tied_copy=True)]
    least = [sum(layer_needs(inputs, decisions, kind, level).backward) for kind, level in _LEAST]
    activations = max(least) if decisions.pipeline_parallel == 1 else min(least)
    return max(0, 4 * min(OPTIMIZER_CHUNK_ELEMENTS, max(units)) - activations)


_LEAST: tuple[tuple[LayerKind, Recompute], ...] = (("embedding", "none"), ("block", "full"), ("head", "none"))
"""Layers that need least of their kind."""


def walk_rank(actions: Actions, stages: dict[int, StageNeeds], boundary: int, decisions: Decisions) -> Peak:
    """The moment when a rank's activations and buffers are largest, over its compute actions in order.

    A received activation is among what its stage keeps; what a stage hands to its neighbour on the same rank lives until that runs.
    Where messages go in turn, a stage keeps the last that it has sent in each direction; elsewhere a message is let go
    when it has arrived, for which no time is counted.
    """
    live = 0
    best = Peak(0, 0)
    in_turn, last = decisions.schedule in IN_TURN_SCHEDULES, decisions.num_stages - 1
    sent: set[tuple[str, int]] = set()

    def hand_on(direction: str, index: int, to: int) -> int:
        """Bytes that stay live from now on because stage `index` has made something for stage `to`."""
        if not 0 <= to <= last or (to not in stages and (not in_turn or (direction, index) in sent)):
            return 0
        sent.add((direction, index))
        return boundary

    for kind, index, _ in actions:
        stage = stages[index]
        if kind == "F":
            if index > 0 and index - 1 in stages:
                live -= boundary
            best = _larger(best, stage.forward, live)
            live += stage.kept + hand_on("F", index, index + 1)
        elif kind == "W":
            live -= stage.deferred
            best = _larger(best, stage.weights, live)
        else:
            if index + 1 in stages:
                live -= boundary
            live -= stage.kept
            best = _larger(best, stage.backward, live)
            live += (stage.deferred if kind == "I" else 0) + hand_on("B", index, index - 1)
    return best


def boundary_bytes(inputs: Inputs, decisions: Decisions) -> int:
    """Bytes of one micro-batch's activations between two stages, on one rank."""
    tokens = decisions.micro_batch_size * inputs.training.sequence_length
    if decisions.sequence_parallel:
        tokens //= decisions.tensor_parallel
    return tokens * inputs.model.hidden_size * element_bytes(inputs.training.precision)


def in_flight(decisions: Decisions) -> tuple[int, ...]:
    """Micro-batches whose activations each stage holds, at the moment when its pipeline rank holds most in all."""
    counts = [0] * decisions.num_stages
    for actions in _short_actions(decisions):
        live: dict[int, int] = {}
        best = 0
        best_live: dict[int, int] = {}
        for kind, stage, _ in actions:
            if kind == "F":
                live[stage] = live.get(stage, 0) + 1
                if sum(live.values()) > best:
                    best, best_live = sum(live.values()), dict(live)
            elif kind in "BW":
                live[stage] -= 1
        for stage, count in best_live.items():
            counts[stage] = count
    return tuple(counts)


def _short_actions(decisions: Decisions) -> tuple[Actions, ...]:
    """The compute actions, with no more micro-batches than it takes to reach the steady state.

    After the warm-up each further micro-batch repeats the same pattern, so the peak is reached within the first rounds.
    """
    p, v, m = decisions.pipeline_parallel, decisions.num_virtual_stages, decisions.num_microbatches
    return compute_actions(decisions.schedule, p, v, _shorter(decisions.schedule, p, m))


@functools.cache
def _shorter(schedule: str, p: int, m: int) -> int:
    if schedule in ("1F1B", "Naive"):
        return min(m, 2 * p + 2)
    if schedule == "GPipe" or m <= 4 * p:
        return m
    if schedule in ("Interleaved1F1B", "InterleavedZeroBubble"):
        # keep the micro-batches per round, which set the warm-up
        return 4 * (m // max(1, m // p))
    return 4 * p
