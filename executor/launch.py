"""The command line of a rank, and the run document that rank 0 writes."""

from __future__ import annotations

import argparse
import datetime
import os
import socket
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from executor.checkpoint import Checkpointer, find_checkpoint, resume
from executor.clock import clock_offsets
from executor.data import Data, open_tokens
from executor.measure import Record, StorageTracker, environment, peak_rss_bytes
from executor.mesh import Mesh, coordinates_of, make_mesh
from executor.model import check_model
from executor.optimizer import OptimizerOptions
from executor.rehearse import Rehearsal, script
from executor.train import RunOptions, StepFigures, Trainer, progress_line, stderr_progress, train
from planner.documents import dumps, write_text
from planner.errors import InputError, MeshwrightError
from planner.plan import Plan, load_plan, plan_hash, replace
from planner.run import Coordinates, Run, RunRank, Step, Summary
from planner.timeline import Event, Timeline, bubble_fraction, bubble_fractions, busy_seconds


def arguments(argv: list[str]) -> argparse.Namespace:
    """The options, checked as far as they can be without the plan."""
    parser = argparse.ArgumentParser(prog="python -m executor", description="Runs a plan. Start it with torchrun, one process per rank.")
    parser.add_argument("plan", help="a plan document")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="optimizer steps (default 10)")
    parser.add_argument("-o", "--output", metavar="FILE", help="where rank 0 writes the run document")
    parser.add_argument("--data", metavar="FILE", help='text, a token .bin, or "synthetic" (default: a text that ships with the package)')
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of the data (default 0)")
    parser.add_argument("--learning-rate", type=float, default=3e-4, metavar="RATE")
    parser.add_argument("--min-learning-rate", type=float, default=0.0, metavar="RATE", help="where the cosine ends")
    parser.add_argument("--warmup-steps", type=int, default=0, metavar="N")
    parser.add_argument("--decay-steps", type=int, default=0, metavar="N", help="length of the cosine; 0: constant rate")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--clip-norm", type=float, default=1.0, help="global gradient norm to clip to; 0: no clipping")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--checkpoint-every", type=int, default=0, metavar="N", help="save every N steps; 0: never")
    parser.add_argument("--checkpoint-folder", default="checkpoints", metavar="FOLDER", help="where step-N go (default checkpoints)")
    parser.add_argument("--keep-checkpoints", type=int, default=0, metavar="N", help="keep only the newest N; 0: all")
    parser.add_argument("--resume", metavar="FOLDER", help="a checkpoint step-N, or the folder with them: its newest")
    parser.add_argument("--compile", action="store_true", help="compile norms and activation functions (slow to start; pays on GPUs)")
    parser.add_argument("--tensorboard", metavar="FOLDER", help="write scalars there (needs the extra `tensorboard`)")
    parser.add_argument("--load", metavar="FOLDER", help="start from the Hugging Face safetensors there (GPT-2 and Llama families)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rehearse", action="store_true", help="real processes and messages; compute takes its predicted time instead of computing")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of a collective (default 600)")
    options = parser.parse_args(argv)
    lowest = {"steps": 1, "seed": 0, "warmup_steps": 0, "decay_steps": 0, "checkpoint_every": 0, "keep_checkpoints": 0}
    for name, low in lowest.items():
        if not low <= getattr(options, name) <= 2**40:
            raise InputError(f"--{name.replace('_', '-')}", getattr(options, name), f"a whole number of at least {low} is expected")
    for name, below in (("learning_rate", 1e6), ("min_learning_rate", 1e6), ("weight_decay", 1e6), ("clip_norm", 1e12), ("dropout", 1.0)):
        if not 0 <= getattr(options, name) < below:
            raise InputError(f"--{name.replace('_', '-')}", getattr(options, name), f"a number from 0 to below {below:g} is expected")
    if options.timeout <= 0:
        raise InputError("--timeout", options.timeout, "a positive number of seconds is expected")
    return options


def choose_device(name: str) -> torch.device:
    """CUDA where there is a GPU for this process, else the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device", "cuda", "no CUDA device is available")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def start_process_group(plan: Plan, device: torch.device, timeout_seconds: float) -> int:
    """Joins the other ranks as torchrun's environment says. Returns this process's rank."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = plan.decisions.world_size
    if world != wanted:
        sizes = plan.decisions
        detail = f"data {sizes.data_parallel} x tensor {sizes.tensor_parallel} x pipeline {sizes.pipeline_parallel}"
        raise InputError("world size", world, f"the plan needs {wanted} processes ({detail}): torchrun --nproc-per-node {wanted}")
    timeout = datetime.timedelta(seconds=timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return dist.get_rank()


def main(argv: list[str]) -> int:
    """Runs a rank. Returns its exit status; what went wrong is one line on stderr, from the first rank only where all see it."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        options = arguments(argv)
        plan = load_plan(options.plan)
        if options.rehearse:
            run_rehearsal(plan, options)
        else:
            check_model(plan.inputs.model, plan.decisions.tensor_parallel, options.plan)
            run(plan, options)
    except MeshwrightError as error:
        if rank == 0:
            stderr_progress(f"error: {error}")
        return error.exit_status
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def run(plan: Plan, options: argparse.Namespace) -> None:
    """Trains, and writes the run document on rank 0."""
    device = choose_device(options.device)
    training, decisions = plan.inputs.training, plan.decisions
    tokens = open_tokens(options.data, plan.inputs.model.vocab_size)
    data = Data(tokens, plan.inputs.model.vocab_size, training.sequence_length, training.global_batch_size, options.seed)
    if options.output and not Path(options.output).absolute().parent.is_dir():
        raise InputError("--output", options.output, "a file in an existing folder is expected")
    if options.resume:
        find_checkpoint(options.resume)
    rank = start_process_group(plan, device, options.timeout)
    copies = max(1, decisions.tensor_parallel // plan.inputs.model.num_key_value_heads)
    mesh = make_mesh(decisions, rank, key_value_copies=copies, timeout_seconds=options.timeout)
    run_options = RunOptions(
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
    trainer = Trainer(plan, mesh, run_options, device, load_from=options.load)
    first = resume(trainer, options.resume) if options.resume else 0
    num_tokens = training.global_batch_size * training.sequence_length

    scalars = scalar_writer(options.tensorboard) if rank == 0 else None

    def on_step(figures: StepFigures) -> None:
        if scalars is not None:
            scalars(figures, num_tokens)
            stderr_progress(progress_line(figures.step, options.steps + first, figures.loss, figures.seconds, num_tokens, figures.gradient_norm))

    checkpointer = Checkpointer(trainer, options.checkpoint_folder, keep=options.keep_checkpoints) if options.checkpoint_every else None

    def after_step() -> None:
        if checkpointer is not None and trainer.step_index % options.checkpoint_every == 0:
            checkpointer.save()

    figures, tracker, sent = train(trainer, data, options.steps, on_step, after_step)
    if checkpointer is not None:
        checkpointer.finish()
    document = collect(plan, mesh, trainer.recorder.records(), tracker, sent, figures, device, options.output, rehearsed=False)
    if document is not None and options.output:
        run_document, timeline = document
        write_text(actions_path(options.output), compact(timeline))
        write_text(options.output, dumps(run_document))
    if mesh.world_size > 1:
        dist.barrier()


def scalar_writer(folder: str | None) -> Callable[[StepFigures, int], None]:
    """Writes a step's figures to TensorBoard under torchtitan's names; does nothing without a folder."""
    if folder is None:
        return lambda figures, num_tokens: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard", folder, "TensorBoard is not installed: pip install meshwright[tensorboard]") from None
    writer = SummaryWriter(folder)  # type: ignore[no-untyped-call]

    def write(figures: StepFigures, num_tokens: int) -> None:
        values = {
            "loss_metrics/global_avg_loss": figures.loss,
            "grad_norm": figures.gradient_norm,
            "lr": figures.learning_rate,
            "throughput(tps)": num_tokens / figures.seconds,
            "time_metrics/end_to_end(s)": figures.seconds,
        }
        for name, value in values.items():
            writer.add_scalar(name, value, figures.step)  # type: ignore[no-untyped-call]
        writer.flush()  # type: ignore[no-untyped-call]

    return write


def run_rehearsal(plan: Plan, options: argparse.Namespace) -> None:
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
        write_text(actions_path(options.output), compact(timeline))
        write_text(options.output, dumps(run_document))


def actions_path(output: str) -> str:
    """Where the timeline of the run document `output` goes."""
    path = Path(output)
    return str(path.with_name(f"{path.stem}.actions.json"))


def compact(timeline: Timeline) -> str:
    """A timeline as JSON on one line."""
    import msgspec

    return msgspec.json.encode(timeline).decode() + "\n"


def collect(
    plan: Plan,
    mesh: Mesh,
    records: list[Record],
    tracker: StorageTracker,
    sent: dict[str, int],
    figures: list[StepFigures],
    device: torch.device,
    output: str | None,
    *,
    rehearsed: bool,
) -> tuple[Run, Timeline] | None:
    """The run document and the last step's timeline on rank 0, from what every rank measured; None on the others."""
    own = {
        "records": [tuple(record) for record in records],
        "memory": tracker.memory(),
        "rss": peak_rss_bytes(),
        "sent": sent,
        **_cuda_figures(device),
    }
    offsets = clock_offsets(socket.gethostname(), device)
    gathered: list[Any] = [None] * mesh.world_size
    if mesh.world_size > 1:
        dist.gather_object(own, gathered if mesh.rank == 0 else None)
    else:
        gathered = [own]
    if offsets is None:
        return None
    timeline = _timeline(gathered, [offset.nanoseconds for offset in offsets], "rehearsed" if rehearsed else "measured")
    places = [coordinates_of(rank, plan.decisions) for rank in range(mesh.world_size)]
    pipelines = {rank: (place["dp"], place["tp"]) for rank, place in enumerate(places)}
    bubbles, busy = bubble_fractions(timeline, pipelines), busy_seconds(timeline)
    actions_file = Path(actions_path(output)).name if output else None
    ranks = tuple(
        RunRank(
            rank=rank,
            coordinates=Coordinates(**places[rank]),
            memory=item["memory"],
            bubble_fraction=bubbles[rank],
            busy_seconds=busy[rank],
            actions_file=actions_file,
            rss_bytes=item["rss"],
            allocated_bytes=item.get("allocated"),
            reserved_bytes=item.get("reserved"),
            device_used_bytes=item.get("device_used"),
            communication_bytes=dict(item["sent"]),
        )
        for rank, item in enumerate(gathered)
    )
    num_tokens = plan.inputs.training.global_batch_size * plan.inputs.training.sequence_length
    steps = tuple(
        Step(
            step=item.step,
            loss=item.loss,
            seconds=item.seconds,
            num_tokens=num_tokens,
            gradient_norm=item.gradient_norm,
            learning_rate=item.learning_rate,
        )
        for item in figures
    )
    timed = [item.seconds for item in figures[1:]] or [figures[0].seconds]
    seconds = statistics.median(timed)
    summary = Summary(
        step_seconds=seconds,
        bubble_fraction=bubble_fraction(timeline, pipelines),
        peak_bytes=max(item.memory.total_bytes for item in ranks),
        tokens_per_second=num_tokens / seconds,
    )
    where = environment(device, mesh.world_size)
    return Run(plan_hash=plan_hash(plan), rehearsed=rehearsed, environment=where, steps=steps, ranks=ranks, summary=summary), timeline


def _cuda_figures(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
        "device_used": total - free,
    }


def _timeline(gathered: list[dict[str, Any]], shifts: list[int], source: str) -> Timeline:
    """All ranks' records on one clock, in seconds from the first action. `shifts` take each rank's clock to the first's."""
    rows = [
        (rank, kind, stage, microbatch, start + shift, end + shift)
        for rank, (item, shift) in enumerate(zip(gathered, shifts, strict=True))
        for kind, stage, microbatch, start, end in item["records"]
    ]
    first = min(row[4] for row in rows)
    events = tuple(
        Event(rank, kind, stage, microbatch, (start - first) / 1e9, (end - first) / 1e9) for rank, kind, stage, microbatch, start, end in rows
    )
    return Timeline(source=source, events=events)
