"""What the benchmarks share: plans made directly, text tables, result files, and a run of a plan."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planner.cluster import ClusterSpec, with_num_gpus
from planner.documents import dumps
from planner.estimate import predict
from planner.model import ModelSpec
from planner.paradigms import as_plan
from planner.plan import Decisions, Inputs, Plan, Recompute, Stage, Training, check, even_stages
from planner.run import Run, load_actions, load_run
from planner.timeline import Timeline

ROOT = Path(__file__).resolve().parent.parent


def make_plan(
    model: ModelSpec, cluster: ClusterSpec, *, tp: int = 1, pp: int = 1, dp: int = 1, micro_batch_size: int = 1, num_microbatches: int = 4,
    sequence_length: int = 128, schedule: str = "1F1B", virtual: int = 1, zero: int = 0, recompute: Recompute = "none",
    sequence_parallel: bool = False, precision: str = "fp32", stages: tuple[Stage, ...] | None = None,
) -> Plan:  # fmt: skip
    """A plan that nobody searched for. Raises InputError when its decisions break a rule."""
    training = Training(
        global_batch_size=dp * micro_batch_size * num_microbatches, sequence_length=sequence_length, precision=precision  # type: ignore[arg-type]
    )
    inputs = Inputs(model=model, cluster=with_num_gpus(cluster, tp * pp * dp), training=training)
    decisions = Decisions(
        data_parallel=dp, tensor_parallel=tp, pipeline_parallel=pp, zero_stage=zero, sequence_parallel=sequence_parallel,
        micro_batch_size=micro_batch_size, num_microbatches=num_microbatches, schedule=schedule, num_virtual_stages=virtual,  # type: ignore[arg-type]
        stages=even_stages(model, schedule, pp, virtual, recompute) if stages is None else stages,
    )  # fmt: skip
    check(inputs, decisions)
    return as_plan(inputs, decisions, predict(inputs, decisions))


def run_plan(plan: Plan, steps: int, *extra: str, launcher: Sequence[str] = (), timeout: float = 300.0) -> tuple[Run, Timeline | None]:
    """Runs a plan on this machine by torchrun (started through `launcher`), one thread a process."""
    environment = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ, "PYTHONPATH": _path()}
    with tempfile.TemporaryDirectory() as folder:
        plan_file, run_file = Path(folder) / "plan.json", Path(folder) / "run.json"
        plan_file.write_text(dumps(plan), encoding="utf-8")
        torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
        if not launcher:
            torchrun += ["--standalone", "--nproc-per-node", str(plan.decisions.world_size)]
        command = [*launcher, *torchrun, "-m", "executor", str(plan_file), "--steps", str(steps), "-o", str(run_file), *extra]
        for attempt in range(3):
            done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
            if done.returncode == 0 or attempt == 2:
                break
        if done.returncode:
            raise RuntimeError(f"the run failed ({done.returncode}):\n{done.stderr[-2000:]}")
        run = load_run(run_file)
        return run, load_actions(run_file, run)


def _path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def round_medians(seconds: Sequence[float], rounds: int) -> list[float]:
    """The median of each round's steps."""
    size = len(seconds) // rounds
    return [statistics.median(seconds[index * size : (index + 1) * size]) for index in range(rounds)]


def spread(seconds: Sequence[float], rounds: int) -> float:
    """Half of the difference between the slowest and the quickest round's median, over their mean: what the machine itself does."""
    medians = round_medians(seconds, rounds)
    return (max(medians) - min(medians)) / 2 / statistics.fmean(medians)


REWEIGHTINGS = 60
LEAST_RESIDUAL = 1e-4


def comparable_seconds(rounds: Sequence[Sequence[float | None]]) -> list[float]:
    """A time for each plan out of those of several rounds, None where a round left it out, on a machine whose speed changes from round to round.

    A plan's time in a round is taken as the plan's own times the round's factor; both are those with the least sum of absolute
    residuals of the logarithms, found by least squares reweighted over and over (Schlossmacher 1973, Journal of the American Statistical
    Association 68). The times given back are those of the median round. Every plan must be in some round, and the rounds must be joined by
    plans that they share.
    """
    import torch

    cells = [(turn, plan, math.log(seconds)) for turn, each in enumerate(rounds) for plan, seconds in enumerate(each) if seconds is not None]
    num_plans = len(rounds[0])
    design = torch.zeros(len(cells) + 1, num_plans + len(rounds), dtype=torch.float64)
    for row, (turn, plan, _) in enumerate(cells):
        design[row, plan] = design[row, num_plans + turn] = 1.0
    design[-1, num_plans:] = 1.0  # the factors' logarithms add up to 0
    logs = torch.tensor([*(log for _, _, log in cells), 0.0], dtype=torch.float64)
    weights = torch.ones_like(logs)
    for _ in range(REWEIGHTINGS):
        found = torch.linalg.lstsq(design * weights[:, None], logs * weights).solution
        weights = (logs - design @ found).abs().clamp(min=LEAST_RESIDUAL).rsqrt()
        weights[-1] = 1.0
    middle = statistics.median(found[num_plans:].tolist())
    return [math.exp(own + middle) for own in found[:num_plans].tolist()]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(zip(row, widths, strict=True)))
             for row in cells]  # fmt: skip
    return "\n".join([lines[0].rstrip(), "  ".join("-" * width for width in widths), *(line.rstrip() for line in lines[1:])]) + "\n"


def write_results(name: str, text: str, data: Any) -> None:
    """The same result for people and for programs: benchmarks/results/NAME.txt and .json."""
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def processor() -> str:
    """This machine in a few words."""
    import platform

    import torch

    from executor.processes import processor_name

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor_name()}, {cores} cores, Python {platform.python_version()}, torch {torch.__version__}"


def run_plans(
    plans: Sequence[Plan], *, steps: int = 5, rounds: int = 2, launcher: Sequence[str] = (), timeout: float = 900.0
) -> list[dict[str, list[float]]]:
    """What `benchmarks/worker.py` measures of each plan; all of them have the same number of ranks.

    `launcher` starts torchrun's arguments somewhere else, as `scripts/two-hosts exec` does; by default on this machine.
    """
    environment = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ, "PYTHONPATH": _path(), "PYTHON": sys.executable}
    world_size = plans[0].decisions.world_size
    with tempfile.TemporaryDirectory() as folder:
        plans_file, result_file = Path(folder) / "plans.json", Path(folder) / "result.json"
        plans_file.write_text("[" + ",".join(dumps(plan) for plan in plans) + "]", encoding="utf-8")
        start = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
        if launcher:
            start = [*launcher, "--nproc-per-node", str(world_size // 2)]
        command = [*start, str(ROOT / "benchmarks" / "worker.py"), str(plans_file), str(result_file), "--steps", str(steps), "--rounds", str(rounds)]
        for attempt in range(2):
            done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
            if done.returncode == 0:
                break
            sys.stderr.write(f"attempt {attempt + 1} failed: {done.stderr[-1500:]}\n")
        if done.returncode:
            raise RuntimeError(f"the runs failed ({done.returncode})")
        found: list[dict[str, list[float]]] = json.loads(result_file.read_text(encoding="utf-8"))
        return found
