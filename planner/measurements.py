"""What the probes of `executor.calibrate` measured on a machine, and what `planner.calibration` fits the constants to. Seconds are per call."""

from __future__ import annotations

from typing import Literal, NamedTuple

from planner.graph import LayerKind
from planner.model import ModelSpec
from planner.plan import Decisions, Precision


class MatmulPoint(NamedTuple):
    """A (rows x depth) by (depth x columns) product."""

    precision: Precision
    rows: int
    columns: int
    depth: int
    seconds: float


class MemoryPoint(NamedTuple):
    """An element-wise operation by the bytes that it reads and writes."""

    num_bytes: int
    seconds: float


class LayerPoint(NamedTuple):
    """`num_layers` layers of a kind in one pass, without parallelism."""

    model: ModelSpec
    kind: LayerKind
    num_layers: int
    micro_batch_size: int
    sequence_length: int
    precision: Precision
    forward_seconds: float
    backward_seconds: float


class StepPoint(NamedTuple):
    """Training by a plan: what its parts take inside of a step.

    `forward_seconds` and `backward_seconds` are those of one micro-batch through the whole model, computing only;
    `communication_seconds` a rank's collectives within the passes of a step, waiting for the last rank included;
    `reduction_seconds` its reductions behind them; `rest_seconds` the optimizer from the last rank's start, and what no action covers.
    """

    model: ModelSpec
    decisions: Decisions
    sequence_length: int
    precision: Precision
    forward_seconds: float
    backward_seconds: float
    communication_seconds: float
    reduction_seconds: float
    rest_seconds: float


class OptimizerPoint(NamedTuple):
    """The optimizer's update of `num_parameters` parameters."""

    precision: Precision
    num_parameters: int
    seconds: float


class CollectivePoint(NamedTuple):
    """A collective over `num_ranks` ranks on `num_nodes` nodes, `num_bytes` those of the whole tensor."""

    kind: Literal["all_reduce", "all_gather", "reduce_scatter"]
    num_ranks: int
    num_bytes: int
    seconds: float
    num_nodes: int = 1


class MessagePoint(NamedTuple):
    """A message from one rank to another."""

    num_bytes: int
    seconds: float
    inside: bool = True
    in_training: bool = False
    alone: bool = False
    """Whether one pair sent between its nodes while their other ranks did not; otherwise all of them did at once."""


class Measurements(NamedTuple):
    """What was measured, and where."""

    device: str
    device_name: str
    num_gpus: int
    gpus_per_node: int
    cores_per_node: int | None
    memory_bytes: int
    num_multiprocessors: int | None
    matmuls: tuple[MatmulPoint, ...]
    memory: tuple[MemoryPoint, ...]
    layers: tuple[LayerPoint, ...]
    optimizer: tuple[OptimizerPoint, ...]
    collectives: tuple[CollectivePoint, ...] = ()
    messages: tuple[MessagePoint, ...] = ()
    steps: tuple[StepPoint, ...] = ()
    late_receives: tuple[MessagePoint, ...] = ()
    """How long receives took whose messages had been sent before."""
    reserved_bytes: int = 0
