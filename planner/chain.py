"""A model's chain of layers in the numbers that the ILP needs: seconds, bytes and the moments of peak memory.

`Costs` reads them from the memory and time models once per distinct set of decisions that they depend on, and
`pipeline` puts them together for a candidate. Tests hold the result against `predict_memory` and `predict_time`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from planner.estimate import capacity_bytes
from planner.critical_path import Key
from planner.graph import LayerKind
from planner.layer_time import (
    LayerSeconds,
    layer_seconds,
    optimizer_seconds,
    parameters_per_rank,
    reduce_seconds,
    software_of,
    transfer_seconds,
)
from planner.memory import LayerBytes, boundary_bytes, layer_bytes
from planner.network import axis_stride
from planner.plan import SPLIT_BACKWARD_SCHEDULES, Decisions, Inputs, Recompute, Stage, as_recompute, make_stages, stage_ranks
from planner.schedule import compute_actions
from planner.solver import Counts, Moment, Option, Piece, Pipeline, Run

Layer = tuple[LayerKind, Recompute]
ALL_LAYERS: tuple[Layer, ...] = (("embedding", "none"), ("block", "none"), ("block", "selective"), ("block", "full"), ("head", "none"))


class Costs:
    """The memory and time models for one set of inputs, each figure asked for once."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.software = software_of(inputs)
        self.capacity = capacity_bytes(inputs)
        self.step_seconds = self.software.step_seconds
        """Fixed cost of a step, on top of the walk."""
        self._seconds: dict[object, dict[Layer, LayerSeconds]] = {}
        self._messages: dict[object, float] = {}
        self._bytes: dict[object, dict[Layer, LayerBytes]] = {}

    def seconds(self, decisions: Decisions) -> dict[Layer, LayerSeconds]:
        """Of one micro-batch through each kind of layer."""
        key = (
            decisions.tensor_parallel,
            decisions.micro_batch_size,
            decisions.sequence_parallel,
            axis_stride(decisions, "tp") if decisions.tensor_parallel > 1 else 0,
        )
        found = self._seconds.get(key)
        if found is None:
            found = self._seconds[key] = {layer: layer_seconds(self.inputs, decisions, *layer, self.software) for layer in ALL_LAYERS}
        return found

    def bytes(self, decisions: Decisions) -> dict[Layer, LayerBytes]:
        """On one rank, of each kind of layer."""
        copy = ends_apart(decisions)
        key = (
            decisions.tensor_parallel,
            decisions.micro_batch_size,
            decisions.sequence_parallel,
            decisions.zero_stage,
            decisions.data_parallel // decisions.data_parallel_replicate if decisions.zero_stage else 0,
            copy,
            decisions.schedule in SPLIT_BACKWARD_SCHEDULES,
        )
        found = self._bytes.get(key)
        if found is None:
            found = self._bytes[key] = {
                (kind, level): layer_bytes(self.inputs, decisions, kind, level, tied_copy=copy) for kind, level in ALL_LAYERS
            }
        return found

    def parameters(self, decisions: Decisions, kind: LayerKind) -> float:
        """Of one layer on one tensor-parallel rank."""
        return parameters_per_rank(self.inputs.model, decisions.tensor_parallel, kind)

    def total_parameters(self, decisions: Decisions) -> float:
        """Of the whole chain on one tensor-parallel rank."""
        ends = self.parameters(decisions, "embedding") + self.parameters(decisions, "head")
        return ends + self.inputs.model.num_layers * self.parameters(decisions, "block")

    def limit(self, decisions: Decisions) -> float:
        """Bytes of a rank that its layers may need: the capacity without the communication buffers."""
        return self.capacity - (2.0 * boundary_bytes(self.inputs, decisions) if decisions.pipeline_parallel > 1 else 0.0)

    def reduce_pieces(self, decisions: Decisions) -> tuple[Piece, ...]:
        """Tangents of the reduction's seconds by a stage's parameters, which are convex and piecewise linear.

        They touch it at the least, the middle and the most that a stage can hold.
        """
        if decisions.data_parallel == 1:
            return ()
        least = min(self.parameters(decisions, kind) for kind in ("embedding", "block", "head"))
        most = self.total_parameters(decisions)
        found: list[Piece] = []
        for point in (most / decisions.num_stages, max(least, 1.0), most):
            value, beside = (reduce_seconds(self.inputs, decisions, at, self.software) for at in (point, point * 1.001))
            slope = (beside - value) / (0.001 * point)
            piece = Piece(slope, value - slope * point)
            if all(abs(piece(at) - other(at)) > 1e-9 * abs(other(at)) for other in found for at in (most,)):
                found.append(piece)
        return tuple(found)

    def optimizer_piece(self, decisions: Decisions) -> Piece:
        """The optimizer's seconds by a rank's parameters, an affine function."""
        most = self.total_parameters(decisions)
        low, high = (optimizer_seconds(self.inputs, decisions, at, self.software) for at in (most / 2, most))
        slope = (high - low) / (most / 2)
        return Piece(slope, high - slope * most)

    def fixed_seconds(self, decisions: Decisions) -> dict[Key, float]:
        """Of the messages that leave each stage for a neighbour on another rank; where sends block, they hold its rank."""
        p = decisions.pipeline_parallel
        if p == 1:
            return {}
        links = [transfer_seconds(self.inputs, decisions, rank, self.software) for rank in range(p)]
        ranks = stage_ranks(decisions.schedule, p, decisions.num_virtual_stages)
        found: dict[Key, float] = {}
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
        p = decisions.pipeline_parallel
        key = (p, decisions.tensor_parallel, decisions.micro_batch_size, decisions.sequence_parallel, axis_stride(decisions, "pp"),
               axis_stride(decisions, "tp"))  # fmt: skip
        found = self._messages.get(key)
        if found is None:
            found = min((transfer_seconds(self.inputs, decisions, rank, self.software) for rank in range(p - 1)), default=0.0)
            self._messages[key] = found
        return found

    def pipeline(self, decisions: Decisions, levels: tuple[Recompute, ...]) -> Pipeline:
        """What the ILP needs to cut the chain under these decisions, blocks at the recompute levels given."""
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
                    )
                )
            return Run(kind, length, tuple(options), needs[kind, names[0]].states, self.parameters(decisions, kind))

        ranks = stage_ranks(decisions.schedule, decisions.pipeline_parallel, decisions.num_virtual_stages)
        return Pipeline(
            runs=(run("embedding", 1, ("none",)), run("block", self.inputs.model.num_layers, levels), run("head", 1, ("none",))),
            ranks=ranks,
            limits=(self.limit(decisions),) * decisions.pipeline_parallel,
            moments=memory_moments(
                decisions.schedule, decisions.pipeline_parallel, decisions.num_virtual_stages, decisions.num_microbatches
            ),
            kinds="FIW" if decisions.schedule in SPLIT_BACKWARD_SCHEDULES else "FB",
            fixed_seconds=self.fixed_seconds(decisions),
            reduce_pieces=self.reduce_pieces(decisions),
            optimizer_piece=self.optimizer_piece(decisions),
        )


def ends_apart(decisions: Decisions) -> bool:
    """Whether embedding and head lie on different pipeline ranks, so that a tied head has a copy of the table."""
    return decisions.pipeline_parallel > 1 and decisions.schedule != "ZBVZeroBubble"


class _Live(NamedTuple):
    stage: int
    forward: bool


@functools.lru_cache(maxsize=256)
def memory_moments(schedule: str, pipeline_parallel: int, num_virtual_stages: int, num_microbatches: int) -> tuple[Moment, ...]:
    """The moments at which a rank may need most: of those at the same work, the ones that no other covers.

    Micro-batches in flight repeat their pattern once the pipeline is full, so a few rounds of them show all.
    """
    m = _enough_microbatches(schedule, pipeline_parallel, num_microbatches)
    final_kind = "W" if schedule in SPLIT_BACKWARD_SCHEDULES else "B"
    found: list[Moment] = []
    for rank, actions in enumerate(compute_actions(schedule, pipeline_parallel, num_virtual_stages, m)):
        stages = sorted({stage for _, stage, _ in actions})
        place = {stage: index for index, stage in enumerate(stages)}
        live = [0] * len(stages)
        seen: dict[_Live, dict[tuple[int, ...], None]] = {}
        for kind, stage, _ in actions:
            if kind == "F":
                live[place[stage]] += 1
            seen.setdefault(_Live(stage, kind == "F"), {})[tuple(live)] = None
            if kind == final_kind:
                live[place[stage]] -= 1
        for (stage, forward), vectors in seen.items():
            found.extend(Moment(rank, tuple(zip(stages, vector, strict=True)), stage, forward) for vector in _maximal(list(vectors)))
    return tuple(found)


def fullest_in_flight(decisions: Decisions) -> tuple[tuple[int, ...], ...]:
    """For each pipeline rank, the micro-batches in flight of each of its stages when they are most in all."""
    fullest: dict[int, tuple[int, ...]] = {}
    for moment in memory_moments(
        decisions.schedule, decisions.pipeline_parallel, decisions.num_virtual_stages, decisions.num_microbatches
    ):
        counts = tuple(count for _, count in moment.in_flight)
        if sum(counts) > sum(fullest.get(moment.rank, ())):
            fullest[moment.rank] = counts
    return tuple(fullest[rank] for rank in range(decisions.pipeline_parallel))


def _maximal(vectors: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those that no other is at least as large as in every entry."""
    kept: list[tuple[int, ...]] = []
    for vector in sorted(vectors, key=lambda item: (-sum(item), item)):
        if not any(all(a >= b for a, b in zip(other, vector, strict=True)) for other in kept):
            kept.append(vector)
    return kept


def _enough_microbatches(schedule: str, p: int, m: int) -> int:
    if schedule == "GPipe" or m <= 4 * p:
        return m
    if schedule in ("Interleaved1F1B", "InterleavedZeroBubble"):
        return 4 * (m // max(1, m // p))  # rounds of as many micro-batches, which set the warm-up
    return 4 * p


def stages_of(decisions: Decisions, counts: Counts, levels: tuple[Recompute, ...]) -> tuple[Stage, ...]:
    """The solver's counts as the stages of a plan."""
    sizes, recompute = [], []
    for rows in counts:
        sizes.append(sum(sum(row) for row in rows))
        blocks = dict(zip(levels, rows[1], strict=True))
        recompute.append(as_recompute(blocks.get("none", 0), blocks.get("selective", 0), blocks.get("full", 0)))
    ranks = stage_ranks(decisions.schedule, decisions.pipeline_parallel, decisions.num_virtual_stages)
    return make_stages(sizes, recompute, ranks)
