"""`python -m executor.calibrate --output cluster.json`: measures this machine, and writes it as a cluster file.

By itself it starts its ranks on this machine and stops them. Under torchrun on several hosts, the ranks that torchrun
started measure, the link between the hosts too, and the first one writes the file. With `--from RUN --plan PLAN` nothing is
measured: the plan's cluster is corrected by what the run measured.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from executor.probe_links import collective_points, message_points
from executor.probe_steps import train_shortly
from executor.probes import layer_points, layer_shapes, matmul_points, memory_points, optimizer_points
from executor.processes import processor_name, run_ranks
from planner.calibration import Residual, fit
from planner.calibration_rounds import spread_fraction, typical
from planner.cluster import ClusterSpec
from planner.correction import correct
from planner.documents import dumps, write_text
from planner.errors import InputError, MeshwrightError
from planner.lifeline import end_with_parent
from planner.measurements import Measurements
from planner.plan import load_plan, plan_hash, replace
from planner.run import load_actions, load_run

TIMEOUT_SECONDS = 120.0
MOST_ROUNDS = 100


def main(argv: list[str]) -> int:
    """Calibrates. Returns the exit status; what went wrong is one line on stderr."""
    options = _arguments(argv)
    try:
        if (options.run is None) != (options.plan is None):
            missing, given = ("--plan", "--from") if options.plan is None else ("--from", "--plan")
            raise InputError(missing, None, f"{given} needs it: a run is compared with its plan")
        if not 1 <= options.rounds <= MOST_ROUNDS:
            raise InputError("--rounds", options.rounds, f"1 to {MOST_ROUNDS} is expected")
        if options.run is not None:
            _correct(options.run, options.plan, options.output)
        elif "RANK" in os.environ:
            _rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), None, options.rounds, options.output)
        else:
            _start(options.num_gpus, options.rounds, options.output)
    except MeshwrightError as error:
        if os.environ.get("RANK", "0") == "0":
            _say(f"error: {error}")
        return error.exit_status
    return 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m executor.calibrate", description="Measures this machine and writes a cluster file.")
    parser.add_argument("--output", required=True, metavar="FILE")
    parser.add_argument("--num-gpus", type=int, metavar="N", help="ranks to measure with (default: all GPUs, or 2 processes on CPUs)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="measure everything N times and take the medians (default: 1)")
    parser.add_argument("--from", dest="run", metavar="RUN", help="correct the plan's cluster by this run document")
    parser.add_argument("--plan", metavar="PLAN", help="the plan of that run")
    return parser.parse_args(argv)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _start(num_gpus: int | None, rounds: int, output: str) -> None:
    """Measures with ranks on this machine."""
    gpus = torch.cuda.device_count()
    world = (gpus or 2) if num_gpus is None else num_gpus
    if world < 1 or (gpus and world > gpus):
        raise InputError("--num-gpus", world, f"1 to {gpus} (the GPUs of this machine) is expected" if gpus else "a positive integer is expected")
    run_ranks(world, _rank, (rounds, output), "the calibration")


def _rank(rank: int, world: int, store: str | None, rounds: int, output: str) -> None:
    """One rank's part: it measures, and rank 0 fits and writes."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", rank))
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    started = time.perf_counter()
    backend = "nccl" if cuda else "gloo"
    where: dict[str, Any] = {} if store is None else {"store": dist.FileStore(store, world), "rank": rank, "world_size": world}
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS), **where)
    measured: list[Measurements] = []
    try:
        for turn in range(rounds):
            if rank == 0 and rounds > 1:
                _say(f"round {turn + 1} of {rounds}")
            measured.append(measure(device, local, per_node, _say if rank == 0 else lambda line: None))
    finally:
        dist.destroy_process_group()
    if rank == 0:
        fitted = fit(typical(measured))
        report(fitted.residuals)
        source = f"{fitted.cluster.source}; torch {torch.__version__}, {world} ranks, {time.perf_counter() - started:.0f} s"
        if rounds > 1:
            spread = f"{rounds} rounds, steps differ by +-{100 * spread_fraction(measured):.0f} %"
            _say(f"  {spread}")
            source += f", {spread}"
        write_cluster(fitted.cluster, source, output)
        _say(f"{time.perf_counter() - started:.0f} s; wrote {output}")


def measure(device: torch.device, local_rank: int, per_node: int, say: Any) -> Measurements:
    """What every rank measures together; the ranks that find no core of their own wait meanwhile."""
    world = dist.get_world_size()
    cuda = device.type == "cuda"
    cores = None if cuda else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    works = cores is None or local_rank < cores
    say(f"{min(per_node, cores or per_node)} ranks of a node at once: matrix products, memory, layers, optimizer")
    matmuls, memory, layers, optimizer = _measure_device(device, works)
    say(f"collectives and messages between {world} ranks")
    collectives = list(collective_points(device, per_node)) if world > 1 else []
    messages = list(message_points(device, per_node)) if world > 1 else []
    say("training for a moment")
    trained = train_shortly(device, world, per_node, say)
    return Measurements(
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if cuda else processor_name(),
        num_gpus=world,
        gpus_per_node=per_node,
        cores_per_node=cores,
        memory_bytes=_memory_bytes(device, per_node),
        reserved_bytes=0 if cuda else _process_bytes(),
        num_multiprocessors=torch.cuda.get_device_properties(device).multi_processor_count if cuda else None,
        matmuls=matmuls,
        memory=memory,
        layers=layers,
        optimizer=optimizer,
        collectives=tuple(collectives),
        messages=(*messages, *trained.messages),
        steps=tuple(trained.steps),
        late_receives=tuple(trained.late_receives),
    )


def _measure_device(device: torch.device, works: bool) -> tuple[tuple[Any, ...], ...]:
    """On this rank's device: products, memory traffic, layers, optimizer. The ranks go from part to part together."""
    layers = [lambda shape=shape: layer_points(shape, device) for shape in layer_shapes(device.type)]
    parts: list[Callable[[], Iterator[Any]]] = [lambda: matmul_points(device), lambda: memory_points(device), *layers]
    parts.append(lambda: optimizer_points(device))
    found: list[tuple[Any, ...]] = []
    for part in parts:
        dist.barrier()
        found.append(tuple(part()) if works else ())
    dist.barrier()
    matmuls, memory, *of_layers, optimizer = found
    return matmuls, memory, tuple(point for points in of_layers for point in points), optimizer


def _memory_bytes(device: torch.device, per_node: int) -> int:
    """Of the GPU, what is free of the driver's share; of a node's memory, a rank's part."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    import psutil

    return int(psutil.virtual_memory().available // per_node)


def _process_bytes() -> int:
    """What a rank on CPUs takes of its share before any tensor: interpreter, torch, groups."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def report(residuals: tuple[Residual, ...]) -> None:
    """How well the fitted model gives back what was measured, on stderr."""
    for residual in residuals:
        _say(
            f"  {residual.name:<18} {residual.num_points:>3} points, mean error {100 * residual.mean_error_fraction:5.1f} %, "
            f"worst {100 * residual.worst_error_fraction:5.1f} %"
        )


def write_cluster(cluster: ClusterSpec, source: str, output: str) -> None:
    write_text(output, dumps(replace(cluster, source=source)), "--output")


def _correct(run_file: str, plan_file: str, output: str) -> None:
    plan, run = load_plan(plan_file, "--plan"), load_run(run_file, "--from")
    if run.plan_hash != plan_hash(plan):
        raise InputError("--from", run_file, "a run of the plan given by --plan is expected: this one ran another plan")
    if run.rehearsed:
        raise InputError("--from", run_file, "a run that computed is expected: this one was rehearsed")
    corrected = correct(plan.inputs, plan.decisions, run, load_actions(run_file, run))
    before, after = corrected.before, corrected.after
    measured = run.summary.step_seconds
    _say(f"step measured {1e3 * measured:.1f} ms")
    for name, value in (("before", before), ("after", after)):
        _say(f"  predicted {name:<6} {1e3 * value:.1f} ms, error {100 * (value / measured - 1):+.1f} %")
    for name, ratio in corrected.ratios.items():
        _say(f"  {name:<22} measured / predicted {ratio:.3f}")
    write_cluster(corrected.cluster, f"{plan.inputs.cluster.source}; corrected by a run of {plan.inputs.model.name}".lstrip("; "), output)


if __name__ == "__main__":
    end_with_parent(signal.SIGTERM)
    sys.exit(main(sys.argv[1:]))
