"""A model's chain of layers in the numbers that the ILP needs: seconds, bytes and the moments of peak memory.

`Costs` reads them from the memory and time models once per distinct set of decisions that they depend on, and
`pipeline` puts them together for a candidate. Tests hold the result against `predict_memory` and `predict_time`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from planner.critical_path import RECEIVE, Key
from planner.estimate import capacity_bytes
from planner.graph import LayerKind
from planner.layer_time import (
    LayerSeconds,
    layer_seconds,
    optimizer_seconds,
    parameters_per_rank,
    reduce_seconds,
    software_of,
    timed_layer,
    transfer_seconds,
)
from planner.memory import boundary_bytes, fixed_bytes, layer_needs
from planner.model import ModelSpec
from planner.moments import memory_moments
from planner.network import axis_stride
from planner.pipeline import Counts, Option, Piece, Pipeline, Run
from planner.plan import (
    SPLIT_BACKWARD_SCHEDULES,
    Decisions,
    Inputs,
    Recompute,
    Stage,
    as_recompute,
    has_embedding,
    has_head,
    make_stages,
    recompute_counts,
    stage_blocks,
    stage_ranks,
)
from planner.states import layer_buffers, layer_states

Layer = tuple[LayerKind, Recompute]
ALL_LAYERS: tuple[Layer, ...] = (("embedding", "none"), ("block", "none"), ("block", "selective"), ("block", "full"), ("head", "none"))


class LayerLoad(NamedTuple):
    """Bytes of a layer on one rank, as the terms of `solver.Run` and `solver.Option`."""

    states: float
    saved: float
    deferred: float
    left: float
    """Of the micro-batch at work, once a layer below is at work in its backward pass."""
    forward_transient: float
    backward_transient: float
    weight_transient: float


def layer_load(inputs: Inputs, decisions: Decisions, kind: LayerKind, recompute: Recompute) -> LayerLoad:
    """`memory.layer_needs` as terms that add up, without states. With one pipeline rank they are what `predict_memory` finds. With several they lie
    above that by some boundary activations: the last layer of a stage is taken for one further down where that needs more, and the gradient that
    the stage has received for one with each layer.
    """
    several, split = decisions.pipeline_parallel > 1, decisions.schedule in SPLIT_BACKWARD_SCHEDULES
    needs = [layer_needs(inputs, decisions, kind, recompute, held=held) for held in ((False, True) if several and kind == "block" else (False,))]
    kept, deferred = max(need.kept for need in needs), max(need.deferred for need in needs) if split else 0
    forward, backward, weights = (max(sum(getattr(need, name)) for need in needs) for name in ("forward", "backward", "weights"))
    put_off = split and not decisions.sequence_parallel and inputs.model.num_norms_per_layer < 4  # among what the last layer defers
    received = boundary_bytes(inputs, decisions) if several and kind != "head" and not put_off else 0
    return LayerLoad(0.0, kept, deferred, deferred + received, forward - kept, backward - kept, weights - deferred if split else 0)


class Costs:
    """The memory and time models for one set of inputs, each figure asked for once."""

    def __init__(self, inputs: Inputs, *, free_cuts: bool = False) -> None:
        self.inputs = inputs
        self.free_cuts = free_cuts
        """Whether cuts are free with several stages per rank, too."""
        self.software = software_of(inputs)
        self.capacity = capacity_bytes(inputs)
        self.step_seconds = self.software.step_seconds
        """Fixed cost of a step, on top of the walk."""
        self._seconds: dict[object, dict[Layer, LayerSeconds]] = {}
        self._parameters: dict[tuple[int, LayerKind], float] = {}
        self._pieces: dict[object, tuple[Piece, ...]] = {}
        self._optimizer: dict[object, Piece] = {}
        self._blocks: dict[object, LayerSeconds] = {}
        self._fixed: dict[object, tuple[float, ...]] = {}
        self._links: dict[object, list[float]] = {}
        self._bytes: dict[object, dict[Layer, LayerLoad]] = {}
        self._loads: dict[object, LayerLoad] = {}

    def seconds(self, decisions: Decisions) -> dict[Layer, LayerSeconds]:
        """Of one micro-batch through each kind of layer."""
        key = self.seconds_key(decisions)
        found = self._seconds.get(key)
        if found is None:
            found = self._seconds[key] = {layer: layer_seconds(self.inputs, decisions, *layer, self.software) for layer in ALL_LAYERS}
        return found

    def block_seconds(self, decisions: Decisions) -> LayerSeconds:
        """Of one micro-batch through a block, nothing recomputed."""
        key = self.seconds_key(decisions)
        if key in self._seconds:
            return self._seconds[key]["block", "none"]
        if key not in self._blocks:
            self._blocks[key] = layer_seconds(self.inputs, decisions, "block", "none", self.software)
        return self._blocks[key]

    def communication(self, decisions: Decisions) -> float:
        """Of one micro-batch through all layers, the seconds of tensor-parallel communication, nothing recomputed."""
        if decisions.tensor_parallel == 1:
            return 0.0
        kinds: tuple[tuple[LayerKind, int], ...] = (("embedding", 1), ("block", self.inputs.model.num_layers), ("head", 1))
        return sum(count * timed_layer(self.inputs, decisions, kind, "none", self.software)[1] for kind, count in kinds)

    def seconds_key(self, decisions: Decisions) -> tuple[object, ...]:
        """What the seconds of a layer depend on."""
        stride = axis_stride(decisions, "tp") if decisions.tensor_parallel > 1 else 0
        return decisions.tensor_parallel, decisions.micro_batch_size, decisions.sequence_parallel, stride, decisions.pipeline_parallel > 1

    def bytes(self, decisions: Decisions) -> dict[Layer, LayerLoad]:
        """On one rank, of each kind of layer."""
        copy = ends_apart(decisions)
        key = (
            decisions.tensor_parallel,
            decisions.micro_batch_size,
            decisions.sequence_parallel,
            decisions.zero_stage,
            decisions.data_parallel // decisions.data_parallel_replicate if decisions.zero_stage else 0,
            copy,
            decisions.pipeline_parallel > 1,
            decisions.schedule in SPLIT_BACKWARD_SCHEDULES,
        )
        found = self._bytes.get(key)
        if found is None:
            kinds: tuple[LayerKind, ...] = ("embedding", "block", "head")
            states = {kind: float(sum(layer_states(self.inputs, decisions, kind, tied_copy=copy))) for kind in kinds}
            buffers = {kind: layer_buffers(self.inputs, decisions, kind) for kind in kinds}
            found = self._bytes[key] = {
                layer: self._load(decisions, layer, buffers[layer[0]])._replace(states=states[layer[0]]) for layer in ALL_LAYERS
            }
        return found

    def _load(self, decisions: Decisions, layer: Layer, buffers: tuple[int, int, int]) -> LayerLoad:
        """`layer_load`, which depends on ZeRO and data parallelism by the buffers alone."""
        key = (
            layer,
            buffers,
            decisions.tensor_parallel,
            decisions.micro_batch_size,
            decisions.sequence_parallel,
            decisions.pipeline_parallel > 1,
            decisions.schedule in SPLIT_BACKWARD_SCHEDULES,
        )
        found = self._loads.get(key)
        if found is None:
            found = self._loads[key] = layer_load(self.inputs, decisions, *layer)
        return found

    def parameters(self, decisions: Decisions, kind: LayerKind) -> float:
        """Of one layer on one tensor-parallel rank."""
        key = decisions.tensor_parallel, kind
        found = self._parameters.get(key)
        if found is None:
            found = self._parameters[key] = parameters_per_rank(self.inputs.model, *key)
        return found

    def total_parameters(self, decisions: Decisions) -> float:
        """Of the whole chain on one tensor-parallel rank."""
        ends = self.parameters(decisions, "embedding") + self.parameters(decisions, "head")
        return ends + self.inputs.model.num_layers * self.parameters(decisions, "block")

    def limits(self, decisions: Decisions) -> tuple[float, ...]:
        """Bytes of each rank that its layers may need: the capacity without what the rank needs beside them."""
        key = (
            decisions.schedule,
            decisions.pipeline_parallel,
            decisions.num_virtual_stages,
            decisions.num_microbatches,
            decisions.tensor_parallel,
            decisions.micro_batch_size,
            decisions.sequence_parallel,
        )
        if key not in self._fixed:
            self._fixed[key] = tuple(float(self.capacity - fixed) for fixed in fixed_bytes(self.inputs, decisions))
        return self._fixed[key]

    def reduce_pieces(self, decisions: Decisions) -> tuple[Piece, ...]:
        """Tangents of the reduction's seconds by a stage's parameters, which are convex and piecewise linear.

        They touch it at a part of a block, at more than one, and at all layers.
        """
        if decisions.data_parallel == decisions.tensor_parallel == 1:
            return ()
        program, zero = self.software, decisions.zero_stage
        beside_compute = program.overlap_reduction or zero == 3
        counts = decisions.num_microbatches if zero >= 2 else 0
        key = (
            decisions.tensor_parallel,
            decisions.data_parallel,
            decisions.data_parallel_replicate,
            zero,
            axis_stride(decisions, "dp"),
            decisions.pipeline_parallel,
            axis_stride(decisions, "tp") if decisions.sequence_parallel else 0,
            counts,
            self.seconds_key(decisions) if beside_compute else None,
        )
        if key not in self._pieces:
            self._pieces[key] = self._tangents(decisions)
        return self._pieces[key]

    def _tangents(self, decisions: Decisions) -> tuple[Piece, ...]:
        block, most = self.parameters(decisions, "block"), self.total_parameters(decisions)
        least = min(self.parameters(decisions, kind) for kind in ("embedding", "head"))
        points = (1.5 * block, max(min(least, 0.9 * block), 1.0), most)
        values = [reduce_seconds(self.inputs, decisions, at, self.software) for at in points]
        (middle, low, high), (between, first, last) = points, values
        whole = (last - first) / (high - low) if high > low else 0.0
        if low < middle < high and abs(first + whole * (middle - low) - between) <= 1e-12 * abs(between):
            return (Piece(whole, first - whole * low),)  # convex, and on a line at three points
        found: list[Piece] = []
        for point, value in zip(points, values, strict=True):
            slope = (reduce_seconds(self.inputs, decisions, point * 1.001, self.software) - value) / (0.001 * point)
            piece = Piece(slope, value - slope * point)
            if all(abs(piece(point) - other(point)) > 1e-9 * abs(other(point)) for other in found):
                found.append(piece)
        return tuple(found)

    def optimizer_piece(self, decisions: Decisions) -> Piece:
        """The optimizer's seconds by a rank's parameters, an affine function."""
        shards = decisions.data_parallel // decisions.data_parallel_replicate if decisions.zero_stage else 1
        key = (decisions.tensor_parallel, shards, decisions.pipeline_parallel, axis_stride(decisions, "pp"), ends_apart(decisions))
        if key not in self._optimizer:
            self._optimizer[key] = self._optimizer_piece(decisions)
        return self._optimizer[key]

    def _optimizer_piece(self, decisions: Decisions) -> Piece:
        most = self.total_parameters(decisions)
        low, high = (optimizer_seconds(self.inputs, decisions, at, self.software) for at in (most / 2, most))
        slope = (high - low) / (most / 2)
        return Piece(slope, high - slope * most)

    def fixed_seconds(self, decisions: Decisions) -> dict[Key, float]:
        """Of the messages that leave each stage for a neighbour on another rank; where sends block, they hold its rank."""
        p = decisions.pipeline_parallel
        if p == 1:
            return {}
        links, receive = self.links(decisions), self.inputs.cluster.efficiency.receive_seconds
        ranks = stage_ranks(decisions.schedule, p, decisions.num_virtual_stages)
        found: dict[Key, float] = {RECEIVE: receive} if receive else {}
        for stage in range(len(ranks) - 1):
            if ranks[stage] == ranks[stage + 1]:
                continue
            if self.software.blocking_transfers:
                found["F", stage] = found["B", stage + 1] = found["I", stage + 1] = links[ranks[stage]]
            else:
                found["SEND_F", stage] = found["SEND_B", stage + 1] = links[ranks[stage]]
        return found

    def least_message(self, decisions: Decisions) -> float:
        """Seconds of the fastest message between neighbouring pipeline ranks."""
        return min(self.links(decisions)[:-1], default=0.0) if decisions.pipeline_parallel > 1 else 0.0

    def profile(self, decisions: Decisions) -> Profile:
        """What a layout (everything but schedule and stages) contributes."""
        figures: list[float] = []
        for time in self.seconds(decisions).values():
            figures += time
        for need in self.bytes(decisions).values():
            figures += need
        p = decisions.pipeline_parallel
        if p > 1:
            figures += self.links(decisions)
            figures.append(float(boundary_bytes(self.inputs, decisions)))
        figures += self.optimizer_piece(decisions)
        return Profile(tuple(figures), self.reduce_pieces(decisions))

    def links(self, decisions: Decisions) -> list[float]:
        """Seconds of a message from each pipeline rank to the next one, around the ring."""
        key = (decisions.pipeline_parallel, axis_stride(decisions, "pp"), self.seconds_key(decisions))
        found = self._links.get(key)
        if found is None:
            found = self._links[key] = [
                transfer_seconds(self.inputs, decisions, rank, self.software) for rank in range(decisions.pipeline_parallel)
            ]
        return found

    def pipeline(self, decisions: Decisions, levels: tuple[Recompute, ...], *, timed_only: bool = False) -> Pipeline:
        """What the ILP needs to cut the chain under these decisions, blocks at the recompute levels given.

        With `timed_only` the moments of memory are left out, for walks alone.
        """
        seconds, needs = self.seconds(decisions), self.bytes(decisions)

        def run(kind: LayerKind, length: int, names: tuple[Recompute, ...]) -> Run:
            options = []
            for name in names:
                time, need = seconds[kind, name], needs[kind, name]
                options.append(
                    Option(
                        name,
                        time.forward,
                        time.backward,
                        time.backward_input,
                        time.backward_weight,
                        need.saved,
                        need.forward_transient,
                        need.backward_transient,
                        need.deferred,
                        need.weight_transient,
                        (0.0, need.left, 0.0),
                    )
                )
            return Run(kind, length, tuple(options), needs[kind, names[0]].states, self.parameters(decisions, kind))

        ranks = stage_ranks(decisions.schedule, decisions.pipeline_parallel, decisions.num_virtual_stages)
        return Pipeline(
            runs=(run("embedding", 1, ("none",)), run("block", self.inputs.model.num_layers, levels), run("head", 1, ("none",))),
            ranks=ranks,
            limits=self.limits(decisions),
            moments=()
            if timed_only
            else memory_moments(decisions.schedule, decisions.pipeline_parallel, decisions.num_virtual_stages, decisions.num_microbatches),
            kinds="FIW" if decisions.schedule in SPLIT_BACKWARD_SCHEDULES else "FB",
            fixed_seconds=self.fixed_seconds(decisions),
            reduce_pieces=self.reduce_pieces(decisions),
            optimizer_piece=self.optimizer_piece(decisions),
            patterns=regular_sizes(self.inputs.model.num_layers, decisions.num_stages) if self.are_regular(decisions) else (),
        )

    def are_regular(self, decisions: Decisions) -> bool:
        """Whether the cuts of a candidate are regular."""
        return decisions.num_virtual_stages > 1 and not self.free_cuts


@functools.lru_cache(maxsize=256)
def regular_sizes(num_blocks: int, num_stages: int) -> tuple[tuple[int, ...], ...]:
    """Layers per stage that a plan with several stages per rank may have: regular, apart from the two ends.

    The first stage has the embedding and some blocks, the last the head and some blocks; the others share the rest as
    evenly as can be, with the longer ones in the middle, next to each other and so on different ranks. Megatron-LM knows
    only the fully even of these. With free cuts, interleaved stages differ by less than the model is sure of, at a price:
    a proof takes minutes.
    """
    inner, most = num_stages - 2, -(-num_blocks // num_stages) + 1
    found: dict[tuple[int, ...], None] = {}
    for first in range(most, max(most - 6, -1), -1):
        for last in range(most, max(most - 6, -1), -1):
            rest = num_blocks - first - last
            if rest < inner or (inner == 0 and rest):
                continue
            base, extra = divmod(rest, inner) if inner else (0, 0)
            if base + (extra > 0) > most:
                continue
            start = (inner - extra + 1) // 2
            middle = [base + (1 if start <= index < start + extra else 0) for index in range(inner)]
            found[(first + 1, *middle, last + 1)] = None
    return tuple(found)


class Profile(NamedTuple):
    """All that a layout contributes to time and memory, smaller being better in every entry."""

    figures: tuple[float, ...]
    pieces: tuple[Piece, ...]


def dominates(a: Profile, b: Profile) -> bool:
    """Whether `a` is nowhere worse: then whatever `b` does, the same stages and schedule with `a` do as fast and as small."""
    if any(x > y * (1 + 1e-12) for x, y in zip(a.figures, b.figures, strict=True)):
        return False
    other = b.pieces or (Piece(0.0, 0.0),)
    return all(any(p.slope <= q.slope * (1 + 1e-9) and p.intercept <= q.intercept + 1e-12 for q in other) for p in a.pieces)


def ends_apart(decisions: Decisions) -> bool:
    """Whether embedding and head lie on different pipeline ranks, so that a tied head has a copy of the table."""
    return decisions.pipeline_parallel > 1 and decisions.schedule != "ZBVZeroBubble"


def stages_of(decisions: Decisions, counts: Counts, levels: tuple[Recompute, ...]) -> tuple[Stage, ...]:
    """The solver's counts as the stages of a plan."""
    sizes, recompute = [], []
    for rows in counts:
        sizes.append(sum(sum(row) for row in rows))
        blocks = dict(zip(levels, rows[1], strict=True))
        recompute.append(as_recompute(blocks.get("none", 0), blocks.get("selective", 0), blocks.get("full", 0)))
    ranks = stage_ranks(decisions.schedule, decisions.pipeline_parallel, decisions.num_virtual_stages)
    return make_stages(sizes, recompute, ranks)


def counts_of(decisions: Decisions, model: ModelSpec, levels: tuple[Recompute, ...]) -> Counts:
    """A plan's stages as the solver's counts."""
    found = []
    for stage in decisions.stages:
        blocks = recompute_counts(stage, len(stage_blocks(stage, model)))
        row = tuple(getattr(blocks, level) for level in levels)
        found.append(((int(has_embedding(stage)),), row, (int(has_head(stage, model)),)))
    return tuple(found)
