"""Commands that start the executor: run, dry-run, calibrate, paradigms, demo. It always runs in processes of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from planner.cli.options import NUMBER, POSITIVE, json_option, require_folder
from planner.errors import InputError, MeshwrightError
from planner.plan import load_plan


def need_executor() -> None:
    """Raises when torch is not installed, saying what to install."""
    if importlib.util.find_spec("torch") is None:
        raise MeshwrightError("this command needs torch: install the extra, pip install 'meshwright[executor]'")


def start(arguments: Sequence[str], *, threads: int | None = 1) -> int:
    """Runs this Python with `arguments` in a process of its own, and returns its exit status.

    With `threads`, each process computes with that many, unless OMP_NUM_THREADS says otherwise.
    """
    environment = dict(os.environ)
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    process = subprocess.Popen([sys.executable, *arguments], env=environment)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
        raise


def torchrun(plan_file: str, world_size: int, arguments: Sequence[str]) -> int:
    """The plan on `world_size` processes of this machine, by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size), "-m", "executor", plan_file]
    return start([*launcher, *arguments])


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


@click.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path())
@click.option("--steps", type=POSITIVE, default=10, show_default=True, help="Optimizer steps.")
@click.option("--data", type=click.Path(), help="A text file (bytes are the tokens) or a token file. Default: a text that ships with Meshwright.")
@click.option("-o", "--output", type=click.Path(), help="Where to write the run document.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@click.option("--learning-rate", type=NUMBER, help="Peak learning rate.")
@click.option("--rehearse", is_flag=True, help="Real processes and messages; compute takes its predicted time instead of computing.")
@click.option("--resume", type=click.Path(), help="Go on from this checkpoint folder.")
@click.option("--checkpoint-every", type=POSITIVE, help="Steps between checkpoints.")
def run(plan_file: str, steps: int, data: str | None, output: str | None, **options: Any) -> int:
    """Starts torchrun with the right arguments, and trains by the plan."""
    plan = load_plan(plan_file, "PLAN")
    need_executor()
    if data is not None and not Path(data).is_file():
        raise InputError("--data", data, "a readable file is expected")
    if output is not None:
        require_folder(output)
    arguments = _arguments(steps=steps, data=data, output=output, **options)
    return torchrun(plan_file, plan.decisions.world_size, arguments)


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
        require_folder(output)
    with tempfile.TemporaryDirectory() as folder:
        target = output or str(Path(folder) / "dry_run.json")
        status = start(["-m", "executor.dry_run", plan_file, *_arguments(rank=rank, device=device, output=target)])
        if status:
            return status
        return _show_dry_run(plan_file, target, as_json)


def _show_dry_run(plan_file: str, path: str, as_json: bool) -> int:
    from planner import tables
    from planner.cli.planning import print_json
    from planner.run import load_dry_run

    document = load_dry_run(path)
    if as_json:
        print_json(document)
        return 0
    plan = load_plan(plan_file, "PLAN")
    click.echo(tables.show(tables.dry_run_table(plan, document)), nl=False)
    return 0


@click.command()
@click.option("-o", "--output", type=click.Path(), required=True, help="Where to write the cluster file.")
@click.option("--num-gpus", type=POSITIVE, help="Ranks to measure collectives with. Default: 2 on CPUs, all GPUs with CUDA.")
@click.option("--from", "run_file", type=click.Path(), help="Correct the plan's cluster by what this run measured (with --plan).")
@click.option("--plan", "plan_file", type=click.Path(), help="The plan of the run given by --from.")
def calibrate(output: str, num_gpus: int | None, run_file: str | None, plan_file: str | None) -> int:
    """Measures this machine (matmul, memory, collectives, point to point) and writes a cluster file."""
    need_executor()
    require_folder(output)
    return start(["-m", "executor.calibrate", *_arguments(output=output, num_gpus=num_gpus, **{"from": run_file}, plan=plan_file)])
