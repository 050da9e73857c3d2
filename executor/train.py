"""The training loop: builds a rank's part of the model from a plan, and runs its steps."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from executor.data import Data
from executor.functions import State, compile_kernels
from executor.huggingface import reader
from executor.measure import Recorder, StorageTracker
from executor.mesh import Mesh
from executor.model import StageModel, build_stages
from executor.optimizer import OptimizerOptions, UnitOptimizer, squared_norm
from executor.pipeline import Pipeline, StageCompute
from executor.units import Unit
from planner.errors import MeshwrightError
from planner.plan import Plan, replace, stage_ranks
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


class Trainer:
    """One rank of a plan: its stages, their optimizer, and its action list."""

    def __init__(
        self, plan: Plan, mesh: Mesh, options: RunOptions, device: torch.device, *, initialise: bool = True, load_from: str | None = None
    ) -> None:
        inputs, decisions = plan.inputs, plan.decisions
        training, model = inputs.training, inputs.model
        self.plan, self.mesh, self.options, self.device = plan, mesh, options, device
        dtype = compute_dtype(training.precision)
        self.state = State(
            tp=mesh.tp,
            sequence_parallel=decisions.sequence_parallel,
            norm=model.norm,
            epsilon=model.norm_epsilon,
            activation=model.activation,
            gated=model.gated_ffn,
            loss_scale=1.0 / (training.global_batch_size * training.sequence_length),
        )
        if options.compile:
            compile_kernels(self.state)
        self.stages: dict[int, StageModel] = build_stages(
            model,
            decisions,
            training.sequence_length,
            mesh,
            self.state,
            dtype=dtype,
            device=device,
            dropout=options.dropout,
            unfused_attention=training.attention == "unfused",
        )
        self.units: list[Unit] = [unit for stage in self.stages.values() for unit in stage.units]
        self.optimizers = [UnitOptimizer(unit, options.optimizer, training.precision == "mixed-bf16") for unit in self.units]
        if load_from is not None:
            value = reader(model, load_from)
            for unit, optimizer in zip(self.units, self.optimizers, strict=True):
                optimizer.adopt(unit.load(value))
        elif initialise:
            for unit, optimizer in zip(self.units, self.optimizers, strict=True):
                optimizer.adopt(unit.initialise(options.seed))
        self.recorder = Recorder(device)
        ranks = stage_ranks(decisions.schedule, decisions.pipeline_parallel, decisions.num_virtual_stages)
        tokens = decisions.micro_batch_size * training.sequence_length
        rows = (tokens // mesh.tp.size if decisions.sequence_parallel else tokens, model.hidden_size)
        actions, in_turn = plan_actions(decisions)[mesh.pp.index], decisions.schedule in IN_TURN_SCHEDULES
        self.pipeline = Pipeline(actions, ranks, mesh, rows, dtype, device, self.recorder, in_turn=in_turn)
        self.compute = StageCompute(self.stages, len(ranks) - 1, self.state, device, self._optimizer_step)
        self.tied_units = self._tied_units()
        self.step_index = 0
        self._result: StepResult | None = None
        self.tracker: StorageTracker | None = None

    def _seed_dropout(self) -> None:
        """Masks differ over steps and data- and pipeline-parallel ranks, and agree over tensor-parallel ones unless those hold different rows."""
        place = self.mesh.coordinates
        rank = (place["pp"] * self.plan.decisions.data_parallel + place["dp"]) * self.plan.decisions.tensor_parallel
        rank += place["tp"] if self.state.sequence_parallel else 0
        torch.manual_seed(hash((self.options.seed, self.step_index, rank)) % 2**63)

    def _tied_units(self) -> list[Unit]:
        """The table whose gradients first and last pipeline rank add up."""
        stages = self.plan.decisions.stages
        shared = stages[0].pipeline_rank == stages[-1].pipeline_rank
        if not self.plan.inputs.model.tied_embeddings or self.mesh.tied.size == 1 or shared:
            return []
        return [unit for unit in self.units if unit.layout.name == "embedding.tokens"]

    # a step

    def sample_indices(self) -> range:
        """This rank's samples of the global batch."""
        decisions = self.plan.decisions
        count = decisions.num_microbatches * decisions.micro_batch_size
        first = self.mesh.coordinates["dp"] * count
        return range(first, first + count)

    def load(self, data: Data) -> None:
        """This step's tokens and targets, on the ranks that need them."""
        needs_tokens = any(stage.has_embedding for stage in self.stages.values())
        needs_targets = any(stage.has_head for stage in self.stages.values())
        self.compute.tokens = self.compute.targets = None
        if needs_tokens or needs_targets:
            tokens, targets = data.batch(self.step_index, self.sample_indices(), self.plan.decisions.num_microbatches)
            self.compute.tokens = tokens.to(self.device) if needs_tokens else None
            self.compute.targets = targets.to(self.device) if needs_targets else None

    def shorten(self, num_microbatches: int) -> None:
        """Runs steps of the first `num_microbatches` only: for a dry run."""
        decisions = replace(self.plan.decisions, num_microbatches=num_microbatches)
        self.pipeline.actions = plan_actions(decisions)[self.mesh.pp.index]

    def load_empty(self) -> None:
        """Space for a step's tokens and targets, without contents: for fake tensors."""
        decisions, training = self.plan.decisions, self.plan.inputs.training
        shape = (decisions.num_microbatches, decisions.micro_batch_size * training.sequence_length)
        stages = self.stages.values()
        self.compute.tokens = torch.zeros(shape, dtype=torch.int64, device=self.device) if any(stage.has_embedding for stage in stages) else None
        self.compute.targets = torch.zeros(shape, dtype=torch.int64, device=self.device) if any(stage.has_head for stage in stages) else None

    def step(self) -> StepResult:
        """One optimizer step on what `load` has brought."""
        self.recorder.begin_step()
        self.state.loss_sum = None
        if self.options.dropout:
            self._seed_dropout()
        self.pipeline.run(self.compute, self._categorised if self.tracker is not None else None)
        self.step_index += 1
        assert self._result is not None
        return self._result

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[tokens, V] for one micro-batch of tokens [tokens], in a plan with one stage and whole weights on every rank."""
        (stage,) = self.stages.values()
        assert stage.logits is not None and self.mesh.tp.size == 1 and self.plan.decisions.zero_stage < 3
        x = torch.zeros((), device=self.device)
        for position, (_, layer) in enumerate(stage.layers[:-1]):
            x = layer(x, tokens if position == 0 else None)
        return stage.logits(x)

    def _optimizer_step(self) -> None:
        for unit in self.tied_units:
            self.mesh.tied.all_reduce(unit.grad_shard)
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
        loss = self.state.loss_sum
        if loss is None or self.mesh.tp.index:
            loss = torch.zeros((), device=self.device)
        decisions = self.plan.decisions
        if decisions.zero_stage == 0 or decisions.data_parallel_replicate > 1:
            copies = decisions.data_parallel if decisions.zero_stage == 0 else decisions.data_parallel_replicate
            norm = norm / copies
        both = torch.stack((loss * self.state.loss_scale, norm))
        self.mesh.world_sum(both)
        return StepResult(both[0], both[1].sqrt())

    # measuring

    def track_memory(self) -> StorageTracker:
        """Counts storages from now on: what the rank holds already, then what each action makes."""
        tracker = StorageTracker()
        for unit, optimizer in zip(self.units, self.optimizers, strict=True):
            tracker.add(unit.weights if unit.weights is not None else unit.weight_shard, "weights")
            tracker.add(unit.grads if unit.grads is not None else unit.grad_shard, "gradients")
            for tensor in (*optimizer.tensors.values(), optimizer.num_steps):
                tracker.add(tensor, "optimizer")
            unit.on_allocate = tracker.add
        constants = [tensor for stage in self.stages.values() for tensor in stage.constants]
        for held in (self.compute.tokens, self.compute.targets, *constants):
            if held is not None:
                tracker.add(held, "buffers")
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


def progress_line(step: int, num_steps: int, loss: float, seconds: float, num_tokens: int, norm: float) -> str:
    return f"step {step + 1}/{num_steps}  loss {loss:.4f}  grad norm {norm:.3f}  {seconds * 1e3:.0f} ms  {num_tokens / seconds:,.0f} tokens/s"


def stderr_progress(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


@dataclass(frozen=True, slots=True)
class StepFigures:
    """A finished step as numbers."""

    step: int
    loss: float
    gradient_norm: float
    seconds: float
    learning_rate: float


def train(
    trainer: Trainer, data: Data, num_steps: int, on_step: Callable[[StepFigures], None], after_step: Callable[[], None] = lambda: None
) -> tuple[list[StepFigures], StorageTracker, dict[str, int]]:
    """`num_steps` steps from where the trainer stands; the first is tracked for memory, which slows it. `after_step` is not timed.

    Returns each step's figures, the tracker, and the bytes that this rank sent in the last step along each axis.
    """
    figures: list[StepFigures] = []
    tracker: StorageTracker | None = None
    sent = trainer.mesh.sent_bytes
    for _ in range(num_steps):
        trainer.load(data)
        sent.clear()
        started = time.perf_counter()
        if tracker is None:
            tracker = trainer.track_memory()
            with tracker:
                result = trainer.step()
            trainer.stop_tracking()
        else:
            result = trainer.step()
        loss, norm = float(result.loss), float(result.gradient_norm)
        seconds = time.perf_counter() - started
        step = trainer.step_index - 1
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise MeshwrightError(f"step {step + 1}: loss {loss}, gradient norm {norm}: training has diverged; a lower --learning-rate may help")
        figures.append(StepFigures(step, loss, norm, seconds, learning_rate(trainer.options, step)))
        on_step(figures[-1])
        after_step()
    assert tracker is not None
    return figures, tracker, dict(sent)
