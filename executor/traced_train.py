"""One rank of a traced module's plan."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from executor.data import Source
from executor.mesh import Mesh
from executor.rank import RankTrainer, RunOptions, StepResult, compute_dtype
from executor.traced_data import ExampleData
from executor.traced_graph import Cut
from executor.traced_stage import ModuleCompute, ModuleState, RunningSegment, make_units, stage_parameters
from planner.chain_plan import ChainPlan


class ModuleTrainer(RankTrainer):
    """The stage of this rank, cut out of the user's module."""

    plan: ChainPlan
    compute: ModuleCompute

    def __init__(self, plan: ChainPlan, cut: Cut, state: ModuleState, mesh: Mesh, options: RunOptions, device: torch.device) -> None:
        decisions, training = plan.decisions, plan.inputs.training
        super().__init__(decisions, training, mesh, options, device)
        self.plan = plan
        place, dtype = mesh.pp.index, compute_dtype(training.precision)
        held = stage_parameters(cut, decisions.stages)
        shapes = {name: tuple(value.shape) for name, value in state.trained.items()}
        units = make_units(held, shapes, mesh, dtype, device, decisions.zero_stage)
        self._hold(unit for unit, _ in units)
        self.shared_units = [(unit, mesh.among[chosen]) for unit, chosen in units if len(chosen) > 1]
        for unit, optimizer in zip(self.units, self.optimizers, strict=True):
            optimizer.adopt(unit.load(lambda piece: state.trained[piece.name]))
        parameters = {name: _parameter(unit.w[name], unit.gradient(name)) for unit in self.units for name in unit.keys}
        names = {name for segment in cut.stages[place] for name in segment.state.values()} - set(parameters)
        self.fixed = {name: state.fixed[name].to(device, copy=True) for name in sorted(names)}
        self.buffers = {name: value for name, value in self.fixed.items() if name in state.buffers}
        self.pipeline = self._make_pipeline(cut.messages)
        self.compute = ModuleCompute(
            [RunningSegment(segment, parameters, self.fixed, device) for segment in cut.stages[place]],
            self.units,
            last=place == decisions.pipeline_parallel - 1,
            num_parts=decisions.num_microbatches * decisions.data_parallel,
            device=device,
            optimizer=self._optimizer_step,
        )

    def load(self, data: Source) -> None:
        """This step's inputs that the stage reads. They stay where they are made until their micro-batch needs them."""
        assert isinstance(data, ExampleData)
        decisions, compute = self.decisions, self.compute
        for index in sorted({index for segment in compute.segments for index in segment.inputs}):
            if data.is_batched(index):
                rows = data.batch(index, self.step_index, self.sample_indices())
                compute.batches[index] = rows.unflatten(0, (decisions.num_microbatches, decisions.micro_batch_size))
            elif index not in compute.fixed:
                value = data.fixed(index)
                compute.fixed[index] = value.to(self.device) if isinstance(value, torch.Tensor) else value

    def step(self) -> StepResult:
        """One optimizer step on what `load` has brought."""
        self.compute.loss = None
        self._seed_masks()
        return super().step()

    def _loss(self) -> torch.Tensor | None:
        return self.compute.loss

    def _held(self) -> Iterable[torch.Tensor]:
        return [*self.fixed.values(), *(value for value in self.compute.fixed.values() if isinstance(value, torch.Tensor))]


def _parameter(weight: torch.Tensor, gradient: torch.Tensor) -> nn.Parameter:
    """A parameter whose value and gradient are parts of its unit's buffers; autograd adds to a gradient that is there in place."""
    parameter = nn.Parameter(weight)
    parameter.grad = gradient
    return parameter
