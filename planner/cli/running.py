"""Commands that start the executor: run, dry-run, calibrate, paradigms, demo. It always runs in processes of its own."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from planner.cli.options import POSITIVE, json_option
from planner.errors import InputError, MeshwrightError
from planner.lifeline import child_environment, exit_on_signals
from planner.places import check_folder, check_output
from planner.plan import load_plan
from planner.words import gib


def need_executor() -> None:
    """Raises when torch is not installed, saying what to install."""
    if importlib.util.find_spec("torch") is None:
        raise MeshwrightError("this command needs torch: install the extra, pip install 'meshwright[executor]'")


def start(arguments: Sequence[str], *, threads: int | None = 1) -> int:
    """Runs this Python with `arguments` in a process of its own, and returns its exit status.

    With `threads`, each process computes with that many, unless OMP_NUM_THREADS says otherwise. It ends with this process, and ignores the
    Ctrl-C that a terminal sends to all of them: this process ends it.
    """
    environment = child_environment()
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with exit_on_signals():
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            process = subprocess.Popen([sys.executable, *arguments], env=environment)
        finally:
            signal.signal(signal.SIGINT, interrupt)
        try:
            return process.wait()
        except BaseException:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
        finally:
            signal.signal(signal.SIGINT, interrupt)


def _arguments(**options: Any) -> list[str]:
    """Options as command-line arguments; None and False are left out."""
    out: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        out.append(f"--{name.replace('_', '-')}")
        if value is not True:
            out.append(str(value))
    return out


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="PLAN [OPTIONS]")
def run(arguments: tuple[str, ...]) -> int:
    """Starts torchrun with the right arguments, and trains by the plan."""
    need_executor()
    return start(["-m", "executor.start", *arguments])


@click.command("dry-run")
@click.argument("plan_file", metavar="PLAN", type=click.Path())
@click.option("--rank", type=click.IntRange(min=0), help="Only this global rank; default: one rank of each pipeline stage.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="cuda: the rank's real tensors on one GPU, under a fake process group.")
@click.option("-o", "--output", type=click.Path(), help="Where to write the document.")
@json_option
def dry_run(plan_file: str, rank: int | None, device: str | None, output: str | None, as_json: bool) -> int:
    """One rank of each stage by the executor's own code on fake tensors: its peak, without the memory."""
    import tempfile

    plan = load_plan(plan_file, "PLAN")
    need_executor()
    if rank is not None and rank >= plan.decisions.world_size:
        raise InputError("--rank", rank, f"a rank below the world size {plan.decisions.world_size} is expected")
    if output is not None:
        check_output(output, (plan_file,))
    with tempfile.TemporaryDirectory() as folder:
        target = output or str(Path(folder) / "dry_run.json")
        status = start(["-m", "executor.dry_run", plan_file, *_arguments(rank=rank, device=device, output=target)])
        if status:
            return status
        return _show_dry_run(plan_file, target, as_json)


def _show_dry_run(plan_file: str, path: str, as_json: bool) -> int:
    from planner.cli.output import print_json
    from planner.run import load_dry_run
    from planner.tables import results, text

    document = load_dry_run(path)
    if as_json:
        print_json(document)
        return 0
    plan = load_plan(plan_file, "PLAN")
    click.echo(text.show(results.dry_run_table(plan, document)), nl=False)
    return 0


@click.command()
@click.option("-o", "--output", type=click.Path(), required=True, help="Where to write the cluster file.")
@click.option("--num-gpus", type=POSITIVE, help="Ranks to measure collectives with. Default: 2 on CPUs, all GPUs with CUDA.")
@click.option("--rounds", type=POSITIVE, help="Measure everything this often and take the medians, where the machine's speed changes. Default: 1.")
@click.option("--from", "run_file", type=click.Path(), help="Correct the plan's cluster by what this run measured (with --plan).")
@click.option("--plan", "plan_file", type=click.Path(), help="The plan of the run given by --from.")
def calibrate(output: str, num_gpus: int | None, rounds: int | None, run_file: str | None, plan_file: str | None) -> int:
    """Measures this machine (matmul, memory, collectives, point to point) and writes a cluster file."""
    need_executor()
    check_output(output, (run_file, plan_file))
    return start(["-m", "executor.calibrate", *_arguments(output=output, num_gpus=num_gpus, rounds=rounds, **{"from": run_file}, plan=plan_file)])


@click.command()
@click.option("--model", default="mini-gpt", show_default=True, help="A small preset, or any model that this machine can train.")
@click.option("--steps", type=POSITIVE, default=8, show_default=True)
@click.option("-o", "--output", type=click.Path(), default="runs/demo", show_default=True, help="A folder for what it makes.")
def demo(model: str, steps: int, output: str) -> int:
    """The main job on this machine's CPUs with 4 processes: calibrate, solve, dry run, run, compare, report."""
    import time

    from planner.model import load_model

    need_executor()
    spec = load_model(model)
    if 16 * spec.num_parameters > _machine_bytes():
        raise InputError("--model", model, f"one is expected whose training state, 16 bytes a parameter, fits this machine's {gib(_machine_bytes())}")
    length = min(spec.max_sequence_length, 256)
    check_folder("--output", output)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()

    def stage(number: int, text: str) -> None:
        click.echo(f"[{number}/6, {time.perf_counter() - begin:4.0f} s] {text}", err=True)

    cluster, plan_file, run_file = folder / "cluster.json", folder / "plan.json", folder / "run.json"
    dry_file, page = folder / "dry_run.json", folder / "report.html"
    stage(1, "measuring this machine")
    run_command(["calibrate", "--output", str(cluster), "--num-gpus", "4"])
    stage(2, "choosing a plan for 4 processes, two of them in a pipeline")
    solve = ["solve", "--model", model, "--cluster", f"{cluster}:4", "--global-batch-size", "16", "--sequence-length", str(length)]
    run_command([*solve, "--precision", "fp32", "--pp", "2", "-o", str(plan_file)])
    stage(3, "tracing the executor's memory on fake tensors")
    run_command(["dry-run", str(plan_file), "-o", str(dry_file)])
    stage(4, f"training {steps} steps with torchrun")
    run_command(["run", str(plan_file), "--steps", str(steps), "-o", str(run_file)])
    stage(5, "comparing")
    run_command(["compare", str(plan_file), str(run_file), "--dry-run", str(dry_file)])
    stage(6, "drawing the report")
    run_command(["report", str(plan_file), str(run_file), "--dry-run", str(dry_file), "-o", str(page)])
    click.echo(f"\nThe report: {page.resolve()}")
    return 0


def run_command(arguments: list[str]) -> None:
    """Another command of this program, in this process; stops at the first that does not end with 0."""
    from planner.cli import plan

    status = plan.main(arguments, standalone_mode=False)
    if status:
        raise MeshwrightError(f"`plan {arguments[0]}` ended with status {status}")


@click.command()
@click.option("--model", required=True, help="A preset, an HF config.json, or package.module:callable.")
@click.option("--world-size", type=POSITIVE, required=True, help="GPUs, or processes of this machine with --run.")
@click.option("--cluster", default=None, help="A preset or cluster file. Default: cpu with --run, else a100-80gb.")
@click.option("--global-batch-size", type=POSITIVE, help="Default: 4 samples per rank.")
@click.option("--sequence-length", type=POSITIVE)
@click.option("--micro-batch-size", type=POSITIVE, default=1, show_default=True)
@click.option("--run", "really", is_flag=True, help="Run each of them on this machine, and measure.")
@click.option("--steps", type=POSITIVE, default=4, show_default=True)
@click.option("-o", "--output", type=click.Path(), help="Where to write a page with the table and the picture.")
@json_option
def paradigms(
    model: str,
    world_size: int,
    cluster: str | None,
    global_batch_size: int | None,
    sequence_length: int | None,
    micro_batch_size: int,
    really: bool,
    steps: int,
    output: str | None,
    as_json: bool,
) -> int:
    """Naive model parallel, data, pipeline, FSDP/ZeRO-3, tensor, 2D and 3D parallel side by side."""
    from planner.cli.options import checked_length
    from planner.cli.output import print_json
    from planner.cluster import load_cluster
    from planner.model import load_model
    from planner.paradigms import paradigms, require_one
    from planner.plan import Training
    from planner.tables import results, text

    if output is not None:
        check_output(output, (model, cluster))
    if really:
        need_executor()
    spec = load_model(model)
    hardware = load_cluster(cluster or ("cpu" if really else "a100-80gb"))
    length = checked_length(sequence_length or min(spec.max_sequence_length, 256 if really else 4096), spec)
    training = Training(
        global_batch_size=global_batch_size or 4 * world_size * micro_batch_size,
        sequence_length=length,
        precision="fp32" if really else "mixed-bf16",
    )
    document = paradigms(spec, hardware, training, world_size, micro_batch_size)
    if really:
        document = _measure_paradigms(spec, hardware, training, document, steps)
    if output is not None:
        from planner.documents import write_text
        from planner.report import paradigms_report

        write_text(output, paradigms_report(document))
        click.echo(f"wrote {output}", err=True)
    if as_json:
        print_json(document)
    else:
        click.echo(text.show(*results.paradigms_view(document)), nl=False)
    require_one(document, run=really)
    return 0


def _machine_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _measure_paradigms(model: Any, cluster: Any, training: Any, document: Any, steps: int) -> Any:
    """Runs every paradigm that has a plan, one after the other; not those that need more memory than this machine's CPUs have."""
    import tempfile

    from planner.cluster import with_num_gpus
    from planner.documents import dumps, write_text
    from planner.estimate import predict
    from planner.paradigms import as_plan, total_bytes, with_measurement
    from planner.plan import Inputs, replace
    from planner.run import load_run

    inputs = Inputs(model=model, cluster=with_num_gpus(cluster, document.world_size), training=training)
    memory = _machine_bytes() if cluster.device == "cpu" else None
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for index, paradigm in enumerate(document.paradigms):
            if paradigm.decisions is None:
                measured.append(paradigm)
                continue
            predictions = predict(inputs, paradigm.decisions)
            need = total_bytes(predictions, document.world_size)
            if memory is not None and need > memory:
                reason = f"its ranks need {gib(need)} together, and this machine has {gib(memory)}"
                measured.append(replace(paradigm, why_not=reason))
                continue
            click.echo(f"[{index + 1}/{len(document.paradigms)}] running {paradigm.name}", err=True)
            plan_file, run_file = Path(folder) / f"plan{index}.json", Path(folder) / f"run{index}.json"
            write_text(plan_file, dumps(as_plan(inputs, paradigm.decisions, predictions)))
            status = start(["-m", "executor.start", str(plan_file), "--steps", str(steps), "--output", str(run_file)])
            if status:
                measured.append(replace(paradigm, why_not=f"the run ended with status {status}"))
                continue
            measured.append(with_measurement(paradigm, load_run(run_file)))
    return replace(document, paradigms=tuple(measured))
