"""The training loop: builds a rank's part of the model from a plan, and runs its steps."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from executor.data import Data, Source
from executor.functions import State, compile_kernels
from executor.huggingface import reader
from executor.measure import StorageTracker
from executor.mesh import Mesh
from executor.model import StageModel, build_stages
from executor.pipeline import Message, StageCompute
from executor.rank import RankTrainer, RunOptions, StepResult, compute_dtype, learning_rate
from executor.together import all_or_none
from executor.units import Unit
from planner.errors import MeshwrightError
from planner.plan import Plan, replace
from planner.schedule import plan_actions

__all__ = ["RunOptions", "StepFigures", "Trainer", "learning_rate", "progress_line", "stderr_progress", "train"]


class Trainer(RankTrainer):
    """One rank of a transformer's plan."""

    plan: Plan
    compute: StageCompute

    def __init__(
        self, plan: Plan, mesh: Mesh, options: RunOptions, device: torch.device, *, initialise: bool = True, load_from: str | None = None
    ) -> None:
        inputs, decisions = plan.inputs, plan.decisions
        training, model = inputs.training, inputs.model
        super().__init__(decisions, training, mesh, options, device)
        self.plan = plan
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
        self._hold(unit for stage in self.stages.values() for unit in stage.units)
        if load_from is not None:
            value = reader(model, load_from)
            for unit, optimizer in zip(self.units, self.optimizers, strict=True):
                optimizer.adopt(unit.load(value))
        elif initialise:
            for unit, optimizer in zip(self.units, self.optimizers, strict=True):
                optimizer.adopt(unit.initialise(options.seed))
        tokens = decisions.micro_batch_size * training.sequence_length
        rows = (tokens // mesh.tp.size if decisions.sequence_parallel else tokens, model.hidden_size)
        self.pipeline = self._make_pipeline([Message(rows, dtype)] * (decisions.num_stages - 1))
        self.compute = StageCompute(self.stages, decisions.num_stages - 1, self.state, device, self._optimizer_step)
        self.shared_units = [(unit, mesh.tied) for unit in self._tied_units()]

    def _tied_units(self) -> list[Unit]:
        """The table whose gradients first and last pipeline rank add up."""
        stages = self.plan.decisions.stages
        shared = stages[0].pipeline_rank == stages[-1].pipeline_rank
        if not self.plan.inputs.model.tied_embeddings or self.mesh.tied.size == 1 or shared:
            return []
        return [unit for unit in self.units if unit.layout.name == "embedding.tokens"]

    # a step

    def load(self, data: Source) -> None:
        """This step's tokens and targets, on the ranks that need them. Raises InputError, or OtherRankError, where a rank's can't be used."""
        assert isinstance(data, Data)
        needs_tokens = any(stage.has_embedding for stage in self.stages.values())
        needs_targets = any(stage.has_head for stage in self.stages.values())
        self.compute.tokens = self.compute.targets = None
        with all_or_none(self.device) if data.unchecked else nullcontext():
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
        self.state.loss_sum = None
        if self.options.dropout:
            self._seed_dropout()
        return super().step()

    def _seed_dropout(self) -> None:
        """Masks differ over steps and data- and pipeline-parallel ranks, and agree over tensor-parallel ones unless those hold different rows."""
        self._seed_masks(self.mesh.tp.index if self.state.sequence_parallel else 0)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[tokens, V] for one micro-batch of tokens [tokens], in a plan with one stage and whole weights on every rank."""
        (stage,) = self.stages.values()
        assert stage.logits is not None and self.mesh.tp.size == 1 and self.plan.decisions.zero_stage < 3
        x = torch.zeros((), device=self.device)
        for position, (_, layer) in enumerate(stage.layers[:-1]):
            x = layer(x, tokens if position == 0 else None)
        return stage.logits(x)

    def _loss(self) -> torch.Tensor | None:
        loss = self.state.loss_sum
        return None if loss is None or self.mesh.tp.index else loss * self.state.loss_scale

    def _held(self) -> Iterable[torch.Tensor]:
        held = (self.compute.tokens, self.compute.targets, *(tensor for stage in self.stages.values() for tensor in stage.constants))
        return [tensor for tensor in held if tensor is not None]


def progress_line(step: int, num_steps: int, loss: float, seconds: float, num_tokens: int, norm: float, unit: str = "tokens") -> str:
    return f"step {step + 1}/{num_steps}  loss {loss:.4f}  grad norm {norm:.3f}  {seconds * 1e3:.0f} ms  {num_tokens / seconds:,.0f} {unit}/s"


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
    trainer: RankTrainer, data: Source, num_steps: int, on_step: Callable[[StepFigures], None], after_step: Callable[[], None] = lambda: None
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
