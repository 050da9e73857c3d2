"""A rank from its command line to its end: the process group, the run, and the files that rank 0 writes."""

from __future__ import annotations

import argparse
import datetime
import os
from pathlib import Path

import torch
import torch.distributed as dist

from executor.agent import SPEAKS, record
from executor.checkpoint import Checkpointer, find_checkpoint, resume
from executor.data import Data, Source, open_tokens
from executor.measure import StorageTracker
from executor.mesh import make_mesh
from executor.model import check_model
from executor.optimizer import OptimizerOptions
from executor.options import arguments, check_module_options, check_outputs
from executor.rank import RankTrainer
from executor.rehearse import Rehearsal, script
from executor.restart import Again, agree, attempt, begin, find_again, own_store
from executor.results import collect, write_run
from executor.scalars import check_tensorboard, scalar_writer
from executor.together import OtherRankError, all_or_none
from executor.traced_build import prepare
from executor.traced_stage import pipeline_sets
from executor.traced_train import ModuleTrainer
from executor.train import RunOptions, StepFigures, Trainer, progress_line, stderr_progress, train
from planner.chain_plan import ChainPlan, load_any_plan
from planner.errors import InputError, MeshwrightError
from planner.plan import Plan, Training, replace


def choose_device(name: str) -> torch.device:
    """CUDA where there is a GPU for this process, else the CPU.

    A GPU starts work from 8 queues unless CUDA is told otherwise before it starts; a rank has a stream for each of its groups and channels, and
    a message that can't go yet would hold up what shares its queue.
    """
    if name != "cpu":
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device", "cuda", "no CUDA device is available")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def start_process_group(plan: Plan | ChainPlan, device: torch.device, timeout_seconds: float) -> int:
    """Joins the other ranks of this attempt as torchrun's environment says. Returns this process's rank."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = plan.decisions.world_size
    if world != wanted:
        sizes = plan.decisions
        detail = f"data {sizes.data_parallel} x tensor {sizes.tensor_parallel} x pipeline {sizes.pipeline_parallel}"
        raise InputError("world size", world, f"the plan needs {wanted} processes ({detail}): torchrun --nproc-per-node {wanted}")
    timeout = datetime.timedelta(seconds=timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(backend, store=own_store(store), rank=rank, world_size=world, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return dist.get_rank()


def main(argv: list[str]) -> int:
    """Runs a rank. Returns its exit status; what went wrong is one line on stderr, from the first rank or from the agent."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        options = arguments(argv)
        plan = load_any_plan(options.plan)
        check_module_options(options, isinstance(plan, ChainPlan))
        check_outputs(options)
        if options.rehearse:
            run_rehearsal(plan, options)
        else:
            run(plan, options)
    except MeshwrightError as error:
        if not isinstance(error, OtherRankError):
            record(error)
            if rank == 0 and SPEAKS not in os.environ:
                stderr_progress(f"error: {error}")
        return error.exit_status
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def run(plan: Plan | ChainPlan, options: argparse.Namespace) -> None:
    """Trains, and writes the run document on rank 0."""
    device = choose_device(options.device)
    check_tensorboard(options.tensorboard)
    if options.resume:
        find_checkpoint(options.resume)
    trainer, data = module_start(plan, options, device) if isinstance(plan, ChainPlan) else transformer_start(plan, options, device)
    mesh, rank, training = trainer.mesh, trainer.mesh.rank, plan.inputs.training
    first = start_or_go_on(trainer, options)
    last_step = first + options.steps
    num_tokens = training.global_batch_size * training.sequence_length
    unit = "samples" if isinstance(plan, ChainPlan) and training.sequence_length == 1 else "tokens"
    scalars = scalar_writer(options.tensorboard, trainer.step_index) if rank == 0 else None

    def on_step(figures: StepFigures) -> None:
        if scalars is not None:
            scalars(figures, num_tokens)
            line = progress_line(figures.step, last_step, figures.loss, figures.seconds, num_tokens, figures.gradient_norm, unit)
            stderr_progress(line)

    checkpointer = None
    if options.checkpoint_every:
        checkpointer = Checkpointer(trainer, options.checkpoint_folder, keep=options.keep_checkpoints, say=stderr_progress)

    def after_step() -> None:
        if checkpointer is not None:
            checkpointer.poll()
            if trainer.step_index % options.checkpoint_every == 0:
                checkpointer.save()

    figures, tracker, sent = train(trainer, data, last_step - trainer.step_index, on_step, after_step)
    if checkpointer is not None:
        checkpointer.finish()
    document = collect(plan, mesh, trainer.recorder.records(), tracker, sent, figures, device, options.output, rehearsed=False)
    if document is not None and options.output:
        write_run(options.output, *document)
    if mesh.world_size > 1:
        dist.barrier()
    if checkpointer is not None:
        checkpointer.check()


def run_options(options: argparse.Namespace, training: Training) -> RunOptions:
    """How to train, as the command line says."""
    return RunOptions(
        seed=options.seed,
        learning_rate=options.learning_rate,
        min_learning_rate=options.min_learning_rate,
        warmup_steps=options.warmup_steps,
        decay_steps=options.decay_steps,
        clip_norm=options.clip_norm,
        dropout=options.dropout,
        compile=options.compile,
        optimizer=OptimizerOptions(kind=training.optimizer, weight_decay=options.weight_decay),
    )


def transformer_start(plan: Plan, options: argparse.Namespace, device: torch.device) -> tuple[RankTrainer, Source]:
    """This rank of a transformer's plan, and its data."""
    training, decisions, model = plan.inputs.training, plan.decisions, plan.inputs.model
    check_model(model, decisions.tensor_parallel, options.plan)
    data = Data(open_tokens(options.data, model.vocab_size), model.vocab_size, training.sequence_length, training.global_batch_size, options.seed)
    rank = start_process_group(plan, device, options.timeout)
    copies = max(1, decisions.tensor_parallel // model.num_key_value_heads)
    mesh = make_mesh(decisions, rank, key_value_copies=copies, timeout_seconds=options.timeout)
    with all_or_none(device):
        return Trainer(plan, mesh, run_options(options, training), device, load_from=options.load), data


def module_start(plan: ChainPlan, options: argparse.Namespace, device: torch.device) -> tuple[RankTrainer, Source]:
    """This rank of a traced module's plan, and its made-up data."""
    prepared = prepare(plan, options.model, options.seed)
    rank = start_process_group(plan, device, options.timeout)
    shared = pipeline_sets(prepared.cut, plan.decisions.stages)
    mesh = make_mesh(plan.decisions, rank, pipeline_sets=shared, timeout_seconds=options.timeout)
    with all_or_none(device):
        return ModuleTrainer(plan, prepared.cut, prepared.state, mesh, run_options(options, plan.inputs.training), device), prepared.data


def start_or_go_on(trainer: RankTrainer, options: argparse.Namespace) -> int:
    """Brings the trainer to where it begins: the start, `--resume`, or the last checkpoint of the attempt before. Returns the steps that were done
    when the run first began."""
    folder = Path(options.checkpoint_folder)
    again: Again | None = None
    if options.checkpoint_every and attempt():
        again = agree(find_again(folder, options.steps) if trainer.mesh.rank == 0 else None)
    source = again.checkpoint if again is not None and again.checkpoint is not None else options.resume
    done = resume(trainer, source) if source else 0
    if attempt() and trainer.mesh.rank == 0:
        stderr_progress(f"restarted (attempt {attempt() + 1}): goes on after step {done}" + (f", from {source}" if source else ""))
    if again is not None:
        return again.first_step
    if options.checkpoint_every and trainer.mesh.rank == 0:
        begin(folder, done)
    return done


def run_rehearsal(plan: Plan | ChainPlan, options: argparse.Namespace) -> None:
    """Rehearses, and writes the run document on rank 0: no losses, and no memory."""
    device = torch.device("cpu")
    rank = start_process_group(plan, device, options.timeout)
    mesh = make_mesh(plan.decisions, rank, timeout_seconds=options.timeout)
    lines = script(plan)
    rehearsal = Rehearsal(plan, mesh, lines)
    figures = []
    for step in range(options.steps):
        mesh.sent_bytes.clear()
        figures.append(StepFigures(step, 0.0, 0.0, rehearsal.step(), 0.0))
        if rank == 0:
            milliseconds = figures[-1].seconds * 1e3
            stderr_progress(f"rehearsed step {step + 1}/{options.steps}  {milliseconds:.0f} ms at {lines.scale:.3g} x the predicted times")
    document = collect(
        plan, mesh, rehearsal.recorder.records(), StorageTracker(), dict(mesh.sent_bytes), figures, device, options.output, rehearsed=True
    )
    if document is not None and options.output:
        run_document, timeline = document
        run_document = replace(run_document, environment={**run_document.environment, "rehearsal_scale": lines.scale})
        write_run(options.output, run_document, timeline)
