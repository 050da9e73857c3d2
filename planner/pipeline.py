"""A chain of layers as the ILP sees it, and what given stages of it take and need: numbers only, no transformers.

`Pipeline` is what `planner.solver` is asked to cut; `stage_seconds` and `excess_bytes` say what a cut takes and whether it fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from planner.critical_path import Key


class Option(NamedTuple):
    """One way to run a layer. Seconds are of one micro-batch, bytes of one rank."""

    name: str
    forward: float
    backward: float
    backward_input: float
    backward_weight: float
    saved: float
    """Bytes kept per micro-batch in flight, from the forward to the backward pass (of the input gradients)."""
    forward_transient: float = 0.0
    """Bytes needed beyond that while it runs."""
    backward_transient: float = 0.0
    deferred: float = 0.0
    """Bytes kept per micro-batch from the backward pass of the input gradients to that of the weights."""
    weight_transient: float = 0.0
    """Bytes needed beyond `deferred` while the latter runs."""
    above: tuple[float, float, float] | None = None
    """Bytes of the micro-batch at work that the layer has while one below it on its stage is at work, forward, backward and on the weights;
    None for the most that it ever has. Of a run, layers with the first option lie at the top of a stage."""

    def transient(self, direction: str) -> float:
        """Of a direction: F, B or W."""
        return self.forward_transient if direction == "F" else self.backward_transient if direction == "B" else self.weight_transient

    def given_back(self, direction: str) -> float:
        """Bytes that it has less while a layer below it on its stage is at work in a direction, of what a micro-batch saves or defers; negative
        where it has more."""
        held = self.deferred if direction == "W" else self.saved
        if self.above is None:
            return min(0.0, self.saved - self.deferred) if direction == "B" else 0.0
        return held - self.above["FBW".index(direction)]

    def seconds(self, kind: str) -> float:
        """Of a compute action: F, B, I or W."""
        return {"F": self.forward, "B": self.backward, "I": self.backward_input, "W": self.backward_weight}[kind]


class Run(NamedTuple):
    """`length` identical layers in a row."""

    name: str
    length: int
    options: tuple[Option, ...]
    states: float = 0.0
    """Bytes of weights, gradients and optimizer state of one layer."""
    parameters: float = 0.0
    """Of one layer on one rank; reduction and optimizer take time by them."""


class Edge(NamedTuple):
    """What one layer sends to a later one, where that is not the same for every cut. Both are runs of one layer."""

    source: int
    """Index of the run that sends; `target` that of the one that receives."""
    target: int
    message: float = 0.0
    """Seconds, either way, that it adds to the message at each boundary between stages that it crosses."""
    leaving: float = 0.0
    """Seconds of the source's stage, and in `entering` of the target's, when they are not the same."""
    entering: float = 0.0
    kept: float = 0.0
    """Bytes per micro-batch in flight that the source's stage then keeps of what it sent."""


class Piece(NamedTuple):
    """An affine function of a number of parameters, in seconds."""

    slope: float
    intercept: float

    def __call__(self, parameters: float) -> float:
        return self.slope * parameters + self.intercept


_NOTHING = Piece(0.0, 0.0)


class Moment(NamedTuple):
    """A moment at which a rank's memory may peak: micro-batches in flight per stage, and the stage that is at work."""

    rank: int
    in_flight: tuple[tuple[int, int, int], ...]
    """(stage, micro-batches saved, micro-batches deferred) of the rank's stages; the one at work is among them."""
    stage: int
    direction: str
    """What it does: F, B (of the input gradients where the backward pass is split) or W."""


Choice = tuple[tuple[int, ...], ...]
"""Of the one run with several options, the layers by option on each of a rank's stages."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What `solve_pipeline` is given."""

    runs: tuple[Run, ...]
    ranks: tuple[int, ...]
    """Pipeline rank of each stage."""
    limits: tuple[float, ...]
    """Bytes of each rank for what the layers need."""
    moments: tuple[Moment, ...]
    kinds: str
    """Kinds of compute action that the schedule has: "FB" or "FIW"."""
    fixed_seconds: Mapping[Key, float] = field(default_factory=dict)
    """Seconds that do not depend on the layers: of messages, and what a pass takes beyond its layers."""
    reduce_pieces: tuple[Piece, ...] = ()
    """Seconds of a stage's reduction by its parameters: the largest of these."""
    optimizer_piece: Piece = _NOTHING
    """Seconds of a rank's optimizer by its parameters."""
    patterns: tuple[tuple[int, ...], ...] = ()
    """Layers per stage that may be chosen from; empty for any."""
    forced: tuple[float, ...] = ()
    """Seconds by which recomputation must lengthen the layers of each rank together, as `planner.forced` finds; empty for none."""
    choices: tuple[tuple[Choice, ...], ...] = ()
    """For each rank the choices of which one is to be taken, as `planner.choices` finds; no choice, or no entry: any that fits."""
    edges: tuple[Edge, ...] = ()
    """What crossing a boundary between stages costs, where it is not the same for every cut."""
    slowness: tuple[float, ...] = ()
    """Factor on the edges' messages over the boundary after each stage; empty where all links are alike."""

    def slow(self, stage: int) -> float:
        """Factor on messages over the boundary after a stage."""
        return self.slowness[stage] if stage < len(self.slowness) else 1.0

    @property
    def num_stages(self) -> int:
        return len(self.ranks)

    @property
    def num_layers(self) -> int:
        return sum(run.length for run in self.runs)


Counts = tuple[tuple[tuple[int, ...], ...], ...]
"""Layers by stage, run and option."""


def stage_seconds(pipeline: Pipeline, counts: Sequence[Sequence[Sequence[float]]]) -> dict[Key, float]:
    """Seconds of everything that lies on the paths, for these layers on the stages."""
    found = dict(pipeline.fixed_seconds)
    held = [0.0] * (max(pipeline.ranks) + 1)
    for stage, rows in enumerate(counts):
        parameters = 0.0
        for run, row in zip(pipeline.runs, rows, strict=True):
            for option, count in zip(run.options, row, strict=True):
                if count:
                    parameters += count * run.parameters
                    for kind in pipeline.kinds:
                        found[kind, stage] = found.get((kind, stage), 0.0) + count * option.seconds(kind)
        found["REDUCE", stage] = max((piece(parameters) for piece in pipeline.reduce_pieces), default=0.0)
        held[pipeline.ranks[stage]] += parameters
    for rank, parameters in enumerate(held):
        found["OPTIMIZER", rank] = pipeline.optimizer_piece(parameters)
    for stage, edge, crossing, leaves, enters in _edge_uses(pipeline, counts):
        for key, value in (
            (("F", stage), edge.leaving * leaves + edge.entering * enters),
            (("SEND_F", stage), edge.message * crossing * pipeline.slow(stage)),
            (("SEND_B", stage + 1), edge.message * crossing * pipeline.slow(stage)),
        ):
            if value:
                found[key] = found.get(key, 0.0) + value
    return found


def _edge_uses(pipeline: Pipeline, counts: Sequence[Sequence[Sequence[float]]]) -> Iterable[tuple[int, Edge, float, float, float]]:
    """For each stage and edge, whether it crosses the boundary after the stage, leaves the stage, and enters it."""
    if not pipeline.edges:
        return
    done = [0.0] * len(pipeline.runs)
    before = done
    for stage, rows in enumerate(counts):
        here = [float(sum(row)) for row in rows]
        before, done = done, [a + b for a, b in zip(done, here, strict=True)]
        for edge in pipeline.edges:
            a, b = edge.source, edge.target
            crossing, earlier = done[a] - done[b], before[a] - before[b]
            if b == a + 1:
                yield stage, edge, crossing, crossing, earlier
            else:
                yield stage, edge, crossing, max(0.0, here[a] - here[b]), max(0.0, here[b] - here[a])


class StageLoad(NamedTuple):
    """Bytes of a stage: its states, what one micro-batch saves and defers, and what it needs beyond that while it works, by direction."""

    states: float
    saved: float
    deferred: float
    transients: dict[str, float]


def stage_load(pipeline: Pipeline, rows: Sequence[Sequence[float]]) -> StageLoad:
    """Bytes of a stage with these layers by run and option."""
    states = saved = deferred = 0.0
    for run, row in zip(pipeline.runs, rows, strict=True):
        for option, count in zip(run.options, row, strict=True):
            if count:
                states += count * run.states
                saved += count * option.saved
                deferred += count * option.deferred
    transients = {"F": 0.0, "B": 0.0, "W": 0.0}
    for direction in "FBW" if "W" in pipeline.kinds else "FB":
        back = most = 0.0
        for run, row in zip(reversed(pipeline.runs), reversed(rows), strict=True):
            for option, count in zip(run.options, row, strict=True):
                if count:
                    each = option.given_back(direction)
                    more = -each * (count - 1) if each < 0.0 and count > 1 else 0.0  # at the lowest of them, else at the highest
                    most = max(most, option.transient(direction) - back + more)
                    back += count * each
        transients[direction] = most
    return StageLoad(states, saved, deferred, transients)


def stage_loads(pipeline: Pipeline, counts: Sequence[Sequence[Sequence[float]]]) -> list[StageLoad]:
    """Bytes of every stage."""
    found = [stage_load(pipeline, rows) for rows in counts]
    for stage, edge, _, leaves, _ in _edge_uses(pipeline, counts):
        if edge.kept:
            kept = edge.kept * leaves
            found[stage] = found[stage]._replace(saved=found[stage].saved + kept)
    return found


def moment_bytes(moment: Moment, loads: Sequence[StageLoad] | Mapping[int, StageLoad]) -> float:
    """Bytes that the layers of a rank need at a moment; loads by stage, of that rank's at least."""
    total = loads[moment.stage].transients[moment.direction]
    for stage, saved, deferred in moment.in_flight:
        load = loads[stage]
        total += load.states + saved * load.saved + deferred * load.deferred
    return total


def excess_bytes(pipeline: Pipeline, counts: Counts) -> tuple[float, Moment]:
    """How far the fullest moment lies above its rank's limit (negative: below it), and which moment that is."""
    loads = stage_loads(pipeline, counts)
    return max((moment_bytes(moment, loads) - pipeline.limits[moment.rank], moment) for moment in pipeline.moments)
