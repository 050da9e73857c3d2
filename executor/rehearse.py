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
from executor.pipeline import Pipeline, SleepCompute
from planner.plan import Inputs, Plan, replace, stage_ranks
from planner.schedule import COMPUTE_KINDS, IN_TURN_SCHEDULES, plan_actions
from planner.timing import predict_timeline

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


def script(plan: Plan, scale: float | None = None) -> Script:
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


def _without_sharing(inputs: Inputs) -> Inputs:
    """A rank that sleeps needs no core, so the times are those of ranks with cores of their own."""
    return replace(inputs, cluster=replace(inputs.cluster, cores_per_node=None)) if inputs.cluster.cores_per_node else inputs


class Rehearsal:
    """One rank of a rehearsed plan."""

    def __init__(self, plan: Plan, mesh: Mesh, lines: Script) -> None:
        inputs, decisions = plan.inputs, plan.decisions
        self.plan, self.mesh, self.script = plan, mesh, lines
        self.recorder = Recorder(torch.device("cpu"))
        ranks = stage_ranks(decisions.schedule, decisions.pipeline_parallel, decisions.num_virtual_stages)
        tokens = decisions.micro_batch_size * inputs.training.sequence_length
        rows = (tokens // decisions.tensor_parallel if decisions.sequence_parallel else tokens, inputs.model.hidden_size)
        dtype = torch.float32 if inputs.training.precision == "fp32" else torch.bfloat16
        device = torch.device("cpu")
        actions, in_turn = plan_actions(decisions)[mesh.pp.index], decisions.schedule in IN_TURN_SCHEDULES
        self.pipeline = Pipeline(actions, ranks, mesh, rows, dtype, device, self.recorder, in_turn=in_turn)
        self.compute = SleepCompute(self._seconds, len(ranks) - 1, rows, dtype, self._reducer(dtype))

    def _seconds(self, kind: str, stage: int) -> float:
        return self.script.optimizer[self.mesh.pp.index] if kind == "OPTIMIZER" else self.script.seconds[kind, stage]

    def _reducer(self, dtype: torch.dtype) -> Callable[[int], None]:
        """Reduces as many elements over the data-parallel ranks as the stage has parameters on this rank."""
        decisions, model = self.plan.decisions, self.plan.inputs.model
        per_layer = model.num_parameters / (model.num_layers + 2) / decisions.tensor_parallel
        buffer = torch.zeros(BUFFER_ELEMENTS if self.mesh.dp.size > 1 else 0, dtype=dtype)

        def reduce(stage: int) -> None:
            left = int(per_layer * decisions.stages[stage].num_layers) if self.mesh.dp.size > 1 else 0
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
