"""A rehearsal: real processes, groups, messages and schedule; a compute action takes its predicted time instead of computing.

So a 16-stage schedule can be tried on two cores, where real compute would fight for them. Times are scaled up where the
predicted ones are too short for a machine to keep: an action takes at least LEAST_ACTION_SECONDS. The scale stands in the
run's environment as `rehearsal_scale`. It always runs on CPU processes with gloo.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from executor.measure import Recorder
from executor.mesh import Mesh
from executor.pipeline import Message, Pipeline, SleepCompute
from planner.chain_plan import ChainInputs, ChainPlan
from planner.either import predict_timeline
from planner.plan import Inputs, Plan, replace, stage_ranks
from planner.schedule import COMPUTE_KINDS, IN_TURN_SCHEDULES, plan_actions
from planner.traced import at

LEAST_ACTION_SECONDS = 0.02
"""A wake-up of a process comes tenths of a millisecond late."""
BUFFER_ELEMENTS = 1 << 22
"""Gradients are reduced from one buffer, again and again, so that a large model's rehearsal needs little memory."""


@dataclass(frozen=True, slots=True)
class Script:
    """What every action takes, by kind and stage; the optimizer by pipeline rank."""

    seconds: dict[tuple[str, int], float]
    optimizer: tuple[float, ...]
    scale: float


def script(plan: Plan | ChainPlan, scale: float | None = None) -> Script:
    """The plan's predicted times, times `scale`; by default the one that gives the shortest action its least time."""
    inputs, decisions = plan.inputs, plan.decisions
    alone = _without_sharing(inputs)
    timeline = predict_timeline(alone, decisions)
    seconds: dict[tuple[str, int], float] = {}
    optimizer = [0.0] * decisions.pipeline_parallel
    for event in timeline.events:
        if event.kind in COMPUTE_KINDS:
            seconds[event.kind, event.stage] = event.end - event.start
        elif event.kind == "OPTIMIZER":
            optimizer[event.rank] = event.end - event.start
    chosen = scale or max(1.0, LEAST_ACTION_SECONDS / min(seconds.values()))
    return Script({key: chosen * value for key, value in seconds.items()}, tuple(chosen * value for value in optimizer), chosen)


def _without_sharing(inputs: Inputs | ChainInputs) -> Inputs | ChainInputs:
    """A rank that sleeps needs no core, so the times are those of ranks with cores of their own."""
    return replace(inputs, cluster=replace(inputs.cluster, cores_per_node=None)) if inputs.cluster.cores_per_node else inputs


def _messages(plan: Plan | ChainPlan, dtype: torch.dtype) -> list[Message]:
    """What each stage but the last hands on."""
    decisions, training = plan.decisions, plan.inputs.training
    if isinstance(plan, ChainPlan):
        lasts = [stage.first_layer + stage.num_layers - 1 for stage in decisions.stages[:-1]]
        sent = [at(plan.inputs.model.cost(last).sent_bytes, decisions.micro_batch_size) for last in lasts]
        return [Message((-(-int(size) // dtype.itemsize),), dtype) for size in sent]
    tokens = decisions.micro_batch_size * training.sequence_length
    rows = tokens // decisions.tensor_parallel if decisions.sequence_parallel else tokens
    return [Message((rows, plan.inputs.model.hidden_size), dtype)] * (decisions.num_stages - 1)


def _stage_parameters(plan: Plan | ChainPlan) -> list[int]:
    """The parameters of each stage that a rank reduces; a transformer's spread evenly over its layers."""
    if isinstance(plan, ChainPlan):
        ranges = [range(stage.first_layer, stage.first_layer + stage.num_layers) for stage in plan.decisions.stages]
        return [sum(plan.inputs.model.cost(layer).num_parameters for layer in layers) for layers in ranges]
    model = plan.inputs.model
    per_layer = model.num_parameters / (model.num_layers + 2) / plan.decisions.tensor_parallel
    return [int(per_layer * stage.num_layers) for stage in plan.decisions.stages]


class Rehearsal:
    """One rank of a rehearsed plan."""

    def __init__(self, plan: Plan | ChainPlan, mesh: Mesh, lines: Script) -> None:
        decisions = plan.decisions
        self.plan, self.mesh, self.script = plan, mesh, lines
        self.recorder = Recorder(torch.device("cpu"))
        ranks = stage_ranks(decisions.schedule, decisions.pipeline_parallel, decisions.num_virtual_stages)
        dtype = torch.float32 if plan.inputs.training.precision == "fp32" else torch.bfloat16
        messages = _messages(plan, dtype)
        device = torch.device("cpu")
        actions, in_turn = plan_actions(decisions)[mesh.pp.index], decisions.schedule in IN_TURN_SCHEDULES
        self.pipeline = Pipeline(actions, ranks, mesh, messages, device, self.recorder, in_turn=in_turn)
        self.compute = SleepCompute(self._seconds, len(ranks) - 1, messages, self._reducer(dtype))

    def _seconds(self, kind: str, stage: int) -> float:
        return self.script.optimizer[self.mesh.pp.index] if kind == "OPTIMIZER" else self.script.seconds[kind, stage]

    def _reducer(self, dtype: torch.dtype) -> Callable[[int], None]:
        """Reduces as many elements over the data-parallel ranks as the stage has parameters on this rank."""
        parameters = _stage_parameters(self.plan)
        buffer = torch.zeros(BUFFER_ELEMENTS if self.mesh.dp.size > 1 else 0, dtype=dtype)

        def reduce(stage: int) -> None:
            left = parameters[stage] if self.mesh.dp.size > 1 else 0
            while left > 0:
                self.mesh.dp.all_reduce(buffer[: min(left, BUFFER_ELEMENTS)])
                left -= BUFFER_ELEMENTS

        return reduce

    def step(self) -> float:
        """One step from a common start. Returns its seconds."""
        if self.mesh.world_size > 1:
            dist.barrier()
        self.recorder.begin_step()
        start = time.perf_counter()
        self.pipeline.run(self.compute)
        if self.mesh.world_size > 1:
            self.mesh.world_sum(torch.zeros(2))
        return time.perf_counter() - start
