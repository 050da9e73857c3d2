"""A rank of a plan, whatever its stages are made of: its units, their optimizer, its action list, and its memory by category."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from executor.data import Source
from executor.measure import Recorder, StorageTracker, count_all
from executor.mesh import Axis, Mesh
from executor.optimizer import OptimizerOptions, UnitOptimizer, squared_norm
from executor.pipeline import Compute, Message, Pipeline
from executor.units import Unit
from planner.chain_plan import ChainPlan
from planner.plan import Decisions, Plan, Training, stage_ranks
from planner.schedule import IN_TURN_SCHEDULES, plan_actions

_BUFFER_KINDS = frozenset({"REDUCE", "OPTIMIZER"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How to train; none of it is part of the plan."""

    seed: int = 0
    learning_rate: float = 3e-4
    min_learning_rate: float = 0.0
    warmup_steps: int = 0
    decay_steps: int = 0
    """Steps of the cosine from the peak to `min_learning_rate`, warm-up not counted; 0 keeps the rate constant."""
    clip_norm: float = 1.0
    """0 for no clipping."""
    dropout: float = 0.0
    compile: bool = False
    """Whether norms and activation functions are compiled."""
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)


def learning_rate(options: RunOptions, step: int) -> float:
    """The rate of `step`: linear warm-up, then a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983)."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    if not options.decay_steps:
        return options.learning_rate
    progress = min((step - options.warmup_steps) / options.decay_steps, 1.0)
    low = options.min_learning_rate
    return low + (options.learning_rate - low) * 0.5 * (1.0 + math.cos(math.pi * progress))


def compute_dtype(precision: str) -> torch.dtype:
    """The type of weights and activations."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


@dataclass(frozen=True, slots=True)
class StepResult:
    """Tensors, so that nothing waits for the device; on every rank the same."""

    loss: torch.Tensor
    gradient_norm: torch.Tensor


class RankTrainer(ABC):
    """One rank of a plan. A subclass makes its units and what they compute."""

    plan: Plan | ChainPlan
    compute: Compute
    pipeline: Pipeline

    def __init__(self, decisions: Decisions, training: Training, mesh: Mesh, options: RunOptions, device: torch.device) -> None:
        self.decisions, self.training = decisions, training
        self.mesh, self.options, self.device = mesh, options, device
        self.recorder = Recorder(device)
        self.units: list[Unit] = []
        self.optimizers: list[UnitOptimizer] = []
        self.shared_units: list[tuple[Unit, Axis]] = []
        """Units that other pipeline ranks hold too, with those ranks: their gradients are added up."""
        self.buffers: dict[str, torch.Tensor] = {}
        """What a forward pass changes beside the units, by name: a checkpoint holds it too."""
        self.step_index = 0
        self._result: StepResult | None = None
        self.tracker: StorageTracker | None = None

    @abstractmethod
    def load(self, data: Source) -> None:
        """Brings this step's data."""

    @abstractmethod
    def _loss(self) -> torch.Tensor | None:
        """This rank's part of the global batch's mean loss; None where it has none."""

    @abstractmethod
    def _held(self) -> Iterable[torch.Tensor]:
        """What it holds beside its units."""

    def _hold(self, units: Iterable[Unit]) -> None:
        """Takes the units and makes their optimizer."""
        self.units = list(units)
        self.optimizers = [UnitOptimizer(unit, self.options.optimizer, self.training.precision == "mixed-bf16") for unit in self.units]

    def _make_pipeline(self, messages: Sequence[Message]) -> Pipeline:
        decisions = self.decisions
        ranks = stage_ranks(decisions.schedule, decisions.pipeline_parallel, decisions.num_virtual_stages)
        actions, in_turn = plan_actions(decisions)[self.mesh.pp.index], decisions.schedule in IN_TURN_SCHEDULES
        return Pipeline(actions, ranks, self.mesh, messages, self.device, self.recorder, in_turn=in_turn)

    # a step

    def sample_indices(self) -> range:
        """This rank's samples of the global batch."""
        count = self.decisions.num_microbatches * self.decisions.micro_batch_size
        first = self.mesh.coordinates["dp"] * count
        return range(first, first + count)

    def _seed_masks(self, tensor_parallel_index: int = 0) -> None:
        """Seeds dropout by the seed, the step, the pipeline and data-parallel rank, and the index."""
        place = self.mesh.coordinates
        rank = (place["pp"] * self.decisions.data_parallel + place["dp"]) * self.decisions.tensor_parallel + tensor_parallel_index
        torch.manual_seed(hash((self.options.seed, self.step_index, rank)) % 2**63)

    def step(self) -> StepResult:
        """One optimizer step on what `load` has brought."""
        self.recorder.begin_step()
        self.pipeline.run(self.compute, self._categorised if self.tracker is not None else None)
        self.step_index += 1
        assert self._result is not None
        return self._result

    def _optimizer_step(self) -> None:
        for unit, axis in self.shared_units:
            axis.all_reduce(unit.grad_shard)
        self._result = self._reduce_results()
        scale = None
        if self.options.clip_norm:
            scale = (self.options.clip_norm / (self._result.gradient_norm + 1e-6)).clamp_(max=1.0)
        rate = learning_rate(self.options, self.step_index)
        gathers = []
        for unit, optimizer in zip(self.units, self.optimizers, strict=True):
            optimizer.step(rate, scale)
            gathers.append(unit.gather_updated())
            unit.clear_gradients()
        for gather in gathers:
            gather.wait()

    def _reduce_results(self) -> StepResult:
        """The mean loss and the global gradient norm, the same on all ranks."""
        norm = squared_norm(self.units, self.device)
        loss = self._loss()
        if loss is None:
            loss = torch.zeros((), device=self.device)
        decisions = self.decisions
        if decisions.zero_stage == 0 or decisions.data_parallel_replicate > 1:
            copies = decisions.data_parallel if decisions.zero_stage == 0 else decisions.data_parallel_replicate
            norm = norm / copies
        both = torch.stack((loss, norm))
        self.mesh.world_sum(both)
        return StepResult(both[0], both[1].sqrt())

    # measuring

    def track_memory(self) -> StorageTracker:
        """Counts storages from now on: what the rank holds already, then what each action makes."""
        tracker = StorageTracker()
        for unit, optimizer in zip(self.units, self.optimizers, strict=True):
            tracker.add(unit.weights if unit.weights is not None else unit.weight_shard, "weights")
            tracker.add(unit.grads if unit.grads is not None else unit.grad_shard, "gradients")
            count_all(tracker, (*optimizer.tensors.values(), optimizer.num_steps), "optimizer")
            unit.on_allocate = tracker.add
        count_all(tracker, self._held(), "buffers")
        tracker.reset()
        self.tracker = tracker
        return tracker

    def stop_tracking(self) -> None:
        self.tracker = None
        for unit in self.units:
            unit.on_allocate = lambda tensor, category: None

    @contextmanager
    def _categorised(self, kind: str) -> Iterator[None]:
        assert self.tracker is not None
        with self.tracker.counting_as("buffers" if kind in _BUFFER_KINDS else "activations"):
            yield
