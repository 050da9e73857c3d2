"""Short training of tiny models by all ranks under a few plans: what layers, collectives and messages take inside of a step.

Alone, a layer finds its weights in the cache, and a collective its transport awake and all ranks at hand. In a step neither is so. Here each
plan is trained for about a second, every collective is timed on every rank, and the parts are told apart:

    computing        a rank's forward and backward passes, less the collectives within them
    collectives      the whole time that a rank spends in them, waiting for the last rank included, since a step pays for both
    messages         from the start of a send to the end of its receive, where the receiver waited for it
    late receives    how long a receive takes whose message was sent before it began
    the rest         the optimizer, from the last rank's start to its end, and what no action covers

A point is the median over steps of a step's sums, for a step's time is a sum.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from executor.clock import clock_offsets
from executor.data import Data, open_tokens
from executor.measure import Record
from executor.mesh import Axis, Mesh, coordinates_of, make_mesh
from executor.probes import variant
from executor.train import RunOptions, Trainer
from planner.cluster import presets as clusters
from planner.cluster import with_num_gpus
from planner.errors import InputError
from planner.measurements import MessagePoint, StepPoint
from planner.model import ModelSpec
from planner.plan import (
    Axis as AxisName,
)
from planner.plan import Decisions, Inputs, Memory, Plan, Precision, Predictions, SolverReport, Time, Training, check, digest, even_stages, replace

WARM_STEPS = 2
LEAST_STEPS = 3
MOST_STEPS = 20
BUDGET_SECONDS = 0.8
"""Of a plan's steps, the first ones not counted; twice as long for two ranks where collectives lie in the passes, since they vary most."""

INSIDE: tuple[AxisName, ...] = ("tp", "dp", "pp")
ACROSS: tuple[AxisName, ...] = ("dp", "tp", "pp")


class Short(NamedTuple):
    """A plan to train for a moment."""

    model: ModelSpec
    sequence_length: int
    precision: Precision
    decisions: Decisions


class Found(NamedTuple):
    """What short training found, the same on all ranks."""

    steps: list[StepPoint]
    messages: list[MessagePoint]
    late_receives: list[MessagePoint]


def short_plans(device: str, num_ranks: int, per_node: int) -> list[Short]:
    """Data parallel in shapes from launch-bound to compute-bound, then each way of splitting a model; those that these ranks allow."""
    if device == "cuda":
        gpt, llama = variant("tiny-gpt", 1024, 16, 4), variant("tiny-llama", 2048, 16, 4)
        shapes = ((llama, 4, 1024), (gpt, 8, 1024), (gpt, 1, 512))
        return [found for model, batch, length in shapes for found in _short(model, length, "mixed-bf16", batch, 2, dp=num_ranks)]
    n, nodes, times = num_ranks, num_ranks // per_node, 2 if num_ranks <= 2 else 1  # more ranks often share cores, and take longer
    gpt, llama, small = variant("tiny-gpt", 160, 4, 4 + times), variant("tiny-llama", 192, 8, 2 + times), variant("tiny-gpt", 160, 4, 3)
    rows: list[tuple[ModelSpec, int, int, int, dict[str, Any]]] = [
        (gpt, 128, 4, 2, {"dp": n}), (gpt, 128, 1, 4 * times, {"dp": n}), (llama, 64, 4, 2 * times, {"dp": n}),
        (gpt, 64, 1, 4 * times, {"dp": n}),
    ]  # fmt: skip
    if n > 1:
        rows += [(llama, 64, 4, 2, {"dp": n, "zero": 3}), (small, 64, 1, 2, {"dp": n, "zero": 3})]
        rows += [(gpt, 128, 2, 2 * times * n, {"pp": n}), (gpt, 128, 1, 2 * times * n, {"pp": n, "virtual": 2})]
        rows += [(gpt, 64, 1, 2, {"tp": n}), (gpt, 128, 4, 2, {"tp": n})] if nodes == 1 else [(gpt, 32, 1, 2, {"tp": n})]
        rows += [(llama, 64, 4, 2, {"tp": n, "sequence": True})] if nodes == 1 else []
    if 1 < per_node < n:
        for order, tp in ((INSIDE, per_node), (ACROSS, nodes)):
            rows += [(gpt, 64, 1, 2, {"tp": tp, "dp": n // tp, "zero": zero, "order": order}) for zero in (0, 3)]
        rows += [(gpt, 64, 4, 2, {"tp": per_node, "pp": nodes})]
    elif per_node > 2 and per_node % 2 == 0:
        rows += [(gpt, 64, 1, 2, {"tp": 2, "dp": n // 2, "zero": zero}) for zero in (0, 3)]
    found = [short for model, length, batch, count, degrees in rows for short in _short(model, length, "fp32", batch, count, **degrees)]
    gpt, llama = variant("tiny-gpt", 128, 4, 4 + times), variant("tiny-llama", 256, 8, 2 + times)
    for model, length, batch, count in ((gpt, 128, 4, 2), (gpt, 128, 1, 4 * times), (llama, 64, 4, 2 * times)):
        found += _short(model, length, "mixed-bf16", batch, count, dp=n)
    return found + (list(_short(gpt, 128, "mixed-bf16", 2, 2 * times * n, pp=n)) if n > 1 else [])


def _short(
    model: ModelSpec, length: int, precision: Precision, batch: int, count: int, *, tp: int = 1, dp: int = 1, pp: int = 1, zero: int = 0,
    virtual: int = 1, sequence: bool = False, order: tuple[AxisName, ...] = INSIDE,
) -> Iterator[Short]:  # fmt: skip
    """The plan, or nothing where it breaks a rule, as tensor parallelism over more ranks than there are heads."""
    schedule: Literal["1F1B", "Interleaved1F1B"] = "1F1B" if virtual == 1 else "Interleaved1F1B"
    model = replace(model, num_layers=max(model.num_layers, pp * virtual))
    try:
        decisions = Decisions(
            data_parallel=dp, tensor_parallel=tp, pipeline_parallel=pp, zero_stage=zero if dp > 1 else 0, sequence_parallel=sequence,
            micro_batch_size=batch, num_microbatches=max(count, pp), schedule=schedule, num_virtual_stages=virtual, rank_order=order,
            stages=even_stages(model, schedule, pp, virtual, "none"),
        )  # fmt: skip
        short = Short(model, length, precision, decisions)
        check(_inputs(short), decisions)
    except InputError:
        return
    yield short


def _inputs(short: Short) -> Inputs:
    decisions = short.decisions
    batch = decisions.data_parallel * decisions.micro_batch_size * decisions.num_microbatches
    training = Training(global_batch_size=batch, sequence_length=short.sequence_length, precision=short.precision)
    return Inputs(model=short.model, cluster=with_num_gpus(clusters()["cpu"], decisions.world_size), training=training)


def _plan(short: Short) -> Plan:
    """Without predictions, which training does not read."""
    nothing = Predictions(memory=Memory.of(0, 0, 0), pipeline_ranks=(), time=Time())
    solver = SolverReport(
        name="none", status="given", objective_seconds=None, bound_seconds=None, gap_fraction=None, num_candidates=1, num_pruned=0, wall_seconds=0.0
    )
    inputs = _inputs(short)
    return Plan(inputs=inputs, inputs_hash=digest(inputs), decisions=short.decisions, predictions=nothing, solver=solver)


# timing a rank's collectives


class _Call(NamedTuple):
    """A collective: when it began, in nanoseconds of the host's clock, and the seconds that the rank spent in it."""

    start: int
    seconds: float


@dataclass(slots=True)
class _TimedAxis(Axis):
    """An axis that writes down its collectives. Of one that is waited for later, the call and the wait count."""

    log: list[_Call] = field(default_factory=list)

    def all_reduce(self, tensor: torch.Tensor, operation: Any = dist.ReduceOp.SUM, *, wait: bool = True) -> Any:
        return self._timed(wait, lambda: Axis.all_reduce(self, tensor, operation, wait=wait))

    def all_gather(self, output: torch.Tensor, shard: torch.Tensor, *, wait: bool = True) -> Any:
        return self._timed(wait, lambda: Axis.all_gather(self, output, shard, wait=wait))

    def reduce_scatter(self, shard: torch.Tensor, whole: torch.Tensor, *, wait: bool = True) -> Any:
        return self._timed(wait, lambda: Axis.reduce_scatter(self, shard, whole, wait=wait))

    def _timed(self, wait: bool, call: Callable[[], Any]) -> Any:
        start = time.perf_counter_ns()
        work = call()
        spent = (time.perf_counter_ns() - start) / 1e9
        if wait or self.size == 1:
            self.log.append(_Call(start, spent))
            return work
        return _TimedWork(work, self.log, spent)


class _TimedWork:
    """The handle of a collective that goes on meanwhile."""

    def __init__(self, work: Any, log: list[_Call], spent: float) -> None:
        self.work, self.log, self.spent = work, log, spent

    def wait(self) -> None:
        start = time.perf_counter_ns()
        self.work.wait()
        spent = (time.perf_counter_ns() - start) / 1e9
        self.log.append(_Call(start, self.spent + spent))


def _timed_mesh(mesh: Mesh, log: list[_Call]) -> Mesh:
    def timed(axis: Axis) -> Axis:
        return axis if axis.size == 1 else _TimedAxis(axis.name, axis.ranks, axis.index, axis.group, axis.sent_bytes, log)

    return changed(
        mesh, tp=timed(mesh.tp), dp=timed(mesh.dp), shard=timed(mesh.shard), replicate=timed(mesh.replicate), tied=timed(mesh.tied),
        key_value=timed(mesh.key_value),
    )  # fmt: skip


# training


class _Step(NamedTuple):
    """A rank's step."""

    records: list[Record]
    calls: list[_Call]
    seconds: float


def train_shortly(device: torch.device, num_ranks: int, per_node: int, say: Any) -> Found:
    """Every rank takes part in every plan."""
    found = Found([], [], [])
    shifts: list[Any] = [[offset.nanoseconds for offset in clock_offsets(socket.gethostname(), device) or ()]]
    dist.broadcast_object_list(shifts, 0)
    for short in short_plans(device.type, num_ranks, per_node):
        ranks = [[_shifted(step, shift) for step in steps] for steps, shift in zip(_train(short, device), shifts[0], strict=True)]
        found.steps.append(_step_point(short, ranks))
        if short.decisions.pipeline_parallel > 1:
            _add_messages(found, short, ranks, per_node)
        say(f"trained {_name(short.decisions)}: {1e3 * statistics.median(step.seconds for step in ranks[0]):.0f} ms a step")
    return found


def _shifted(step: _Step, nanoseconds: int) -> _Step:
    """On the first rank's clock."""
    records = [record._replace(start=record.start + nanoseconds, end=record.end + nanoseconds) for record in step.records]
    return _Step(records, [call._replace(start=call.start + nanoseconds) for call in step.calls], step.seconds)


def _name(decisions: Decisions) -> str:
    sizes = (("tp", decisions.tensor_parallel), ("dp", decisions.data_parallel), ("pp", decisions.pipeline_parallel))
    parts = [f"{name}{size}" for name, size in sizes if size > 1] or ["one rank"]
    return " ".join(parts + (["ZeRO-3"] if decisions.zero_stage else []) + (["sequence parallel"] if decisions.sequence_parallel else []))


def _train(short: Short, device: torch.device) -> list[list[_Step]]:
    """The counted steps of every rank."""
    log: list[_Call] = []
    copies = max(1, short.decisions.tensor_parallel // short.model.num_key_value_heads)
    mesh = make_mesh(short.decisions, dist.get_rank(), key_value_copies=copies, timeout_seconds=60)
    plan = _plan(short)
    trainer = Trainer(plan, _timed_mesh(mesh, log) if device.type == "cpu" else mesh, RunOptions(), device)
    training = plan.inputs.training
    data = Data(open_tokens(None, short.model.vocab_size), short.model.vocab_size, short.sequence_length, training.global_batch_size, 0)
    found: list[_Step] = []
    count = WARM_STEPS + LEAST_STEPS
    while len(found) < count:
        trainer.load(data)
        log.clear()
        started = time.perf_counter()
        float(trainer.step().loss)
        found.append(_Step(trainer.recorder.records(), list(log), time.perf_counter() - started))
        if len(found) == WARM_STEPS:
            inside = short.decisions.tensor_parallel > 1 or short.decisions.zero_stage == 3
            budget = BUDGET_SECONDS * (2 if inside and dist.get_world_size() == 2 else 1)
            wanted = torch.tensor([budget / found[-1].seconds], dtype=torch.float64, device=device)
            dist.all_reduce(wanted, dist.ReduceOp.MIN)
            count = WARM_STEPS + int(min(max(LEAST_STEPS, float(wanted)), MOST_STEPS))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found[WARM_STEPS:])
    del trainer
    mesh.close()
    return everyone


def _step_point(short: Short, ranks: list[list[_Step]]) -> StepPoint:
    """Medians over the steps of a step's sums, means over the ranks."""
    decisions = short.decisions
    rows = []
    for steps in zip(*ranks, strict=True):
        actions: dict[str, float] = defaultdict(float)
        calls: dict[str, float] = defaultdict(float)
        for step in steps:
            for record in step.records:
                actions["B" if record.kind in "BIW" else record.kind] += (record.end - record.start) / 1e9
            for call in step.calls:
                where = next((record.kind for record in step.records if record.start <= call.start <= record.end), "")
                calls["B" if where in ("B", "I", "W") else where] += call.seconds
        micro_batches = len(steps) / decisions.pipeline_parallel * decisions.num_microbatches
        inside = calls["F"] + calls["B"]
        rows.append((
            (actions["F"] - calls["F"]) / micro_batches, (actions["B"] - calls["B"]) / micro_batches, inside / len(steps),
            actions["REDUCE"] / len(steps), _rest(steps),
        ))  # fmt: skip
    forward, backward, communication, reduction, rest = (statistics.median(column) for column in zip(*rows, strict=True))
    return StepPoint(
        model=short.model, decisions=decisions, sequence_length=short.sequence_length, precision=short.precision, forward_seconds=forward,
        backward_seconds=backward, communication_seconds=communication, reduction_seconds=reduction, rest_seconds=rest,
    )  # fmt: skip


def _rest(steps: tuple[_Step, ...]) -> float:
    """The optimizer from the last start to the last end, and the first rank's time outside all actions."""
    last = [step.records[-1] for step in steps]
    together = (max(record.end for record in last) - max(record.start for record in last)) / 1e9
    first = steps[0]
    return together + max(0.0, first.seconds - (first.records[-1].end - first.records[0].start) / 1e9)


def _add_messages(found: Found, short: Short, ranks: list[list[_Step]], per_node: int) -> None:
    """Messages whose receiver waited for them, and receives that came late: the means of a plan, inside nodes and across."""
    size = short.decisions.micro_batch_size * short.sequence_length * short.model.hidden_size * (4 if short.precision == "fp32" else 2)
    waited: dict[bool, list[float]] = {True: [], False: []}
    late: dict[bool, list[float]] = {True: [], False: []}
    for steps in zip(*ranks, strict=True):
        for lane in _lanes(short.decisions):
            sent = {
                (record.kind[-1], record.stage + (1 if record.kind == "SEND_F" else -1), record.microbatch): (rank, record)
                for rank in lane for record in steps[rank].records if record.kind.startswith("SEND")
            }  # fmt: skip
            for rank in lane:
                for record in steps[rank].records:
                    if record.kind.startswith("RECV"):
                        sender, send = sent[record.kind[-1], record.stage, record.microbatch]
                        came_late = record.start > send.start
                        seconds = (record.end - (record.start if came_late else send.start)) / 1e9
                        (late if came_late else waited)[sender // per_node == rank // per_node].append(seconds)
    for points, values in ((found.messages, waited), (found.late_receives, late)):
        points += [MessagePoint(size, statistics.fmean(values[inside]), inside, True) for inside in (True, False) if values[inside]]


def _lanes(decisions: Decisions) -> list[list[int]]:
    """The global ranks of each pipeline."""
    lanes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank in range(decisions.world_size):
        place = coordinates_of(rank, decisions)
        lanes[place["dp"], place["tp"]].append(rank)
    return list(lanes.values())
