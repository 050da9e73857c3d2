"""One rank of any plan on fake tensors and a fake process group: the executor's own code at full scale, with no memory.

    python -m executor.dry_run plan.json [--rank R] -o out.json

Builds the rank, runs one whole step (schedule, reduction, optimizer) and returns the traced peak by category. Each rank
needs a fresh process, since a process group is made once.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from planner.documents import convert, dumps, parse_json, write_text
from planner.errors import InputError, MeshwrightError
from planner.lifeline import child_environment, end_with_parent
from planner.plan import Decisions, Memory, Plan, load_plan, plan_hash
from planner.run import DRY_RUN_SCHEMA, DryRun, DryRunRank
from planner.schedule import compute_actions, num_in_flight


def rank_of_pipeline_rank(plan: Plan, pipeline_rank: int) -> int:
    """The global rank at (pipeline rank, dp 0, tp 0), which holds the largest parts of what does not divide."""
    from executor.mesh import rank_of

    return rank_of({"pp": pipeline_rank, "dp": 0, "tp": 0}, plan.decisions)


def dry_run_rank(plan: Plan, pipeline_rank: int) -> Memory:
    """Traced peak of one rank of `pipeline_rank`, in this process: call it once a process."""
    return dry_run(plan, rank_of_pipeline_rank(plan, pipeline_rank))


def steady_microbatches(decisions: Decisions, pipeline_rank: int) -> int:
    """The micro-batches that a dry run needs: the fewest after which the schedule only repeats what it holds, and a few more.

    As many as there are where the schedule holds all of them at once (GPipe).
    """
    p, v, m = decisions.pipeline_parallel, decisions.num_virtual_stages, decisions.num_microbatches

    def held(count: int) -> int:
        return num_in_flight(compute_actions(decisions.schedule, p, v, count)[pipeline_rank])

    size = m // max(1, m // p) if v > 1 else p
    for count in range(2 * size, m, size):
        if held(count) == held(count + size) == held(m):
            return min(count + 2 * size, m)
    return m


def check(plan: Plan, device: str) -> None:
    """Raises InputError for a model that the executor does not have, or a device that is not there."""
    import torch

    from executor.model import check_model

    check_model(plan.inputs.model, plan.decisions.tensor_parallel)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device", device, "no CUDA device is available")


def dry_run(plan: Plan, rank: int, device: str = "cpu") -> Memory:
    """Traced peak of global rank `rank` over one step, by category. With device "cuda", real tensors on this GPU."""
    import torch
    import torch.distributed as dist
    import torch.testing._internal.distributed.fake_pg  # registers the "fake" backend
    from torch._subclasses.fake_tensor import FakeTensorMode

    from executor.mesh import make_mesh
    from executor.optimizer import OptimizerOptions
    from executor.train import RunOptions, Trainer

    decisions, training, model = plan.decisions, plan.inputs.training, plan.inputs.model
    check(plan, device)
    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=decisions.world_size)
    try:
        copies = max(1, decisions.tensor_parallel // model.num_key_value_heads)
        mesh = make_mesh(decisions, rank, key_value_copies=copies, only_own_groups=True)
        with nullcontext() if device == "cuda" else FakeTensorMode():
            options = RunOptions(optimizer=OptimizerOptions(kind=training.optimizer))
            trainer = Trainer(plan, mesh, options, torch.device(device), initialise=False)
            trainer.shorten(steady_microbatches(decisions, mesh.pp.index))
            trainer.load_empty()
            tracker = trainer.track_memory()
            with tracker:
                trainer.step()
            return tracker.memory()
    finally:
        dist.destroy_process_group()


def dry_run_in_process(plan: Plan, rank: int, device: str = "cpu") -> DryRunRank:
    """`dry_run` in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder) / "plan.json", Path(folder) / "out.json"
        write_text(path, dumps(plan))
        command = [sys.executable, "-W", "ignore", "-m", "executor.dry_run", str(path), "--rank", str(rank), "--device", device, "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, env=child_environment())
        if not output.exists():
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise MeshwrightError(f"the dry run of rank {rank} failed: {lines[-1].removeprefix('error: ')}")
        document = convert(parse_json(output.read_text(), "dry run"), DryRun, "dry run", DRY_RUN_SCHEMA)
        return document.pipeline_ranks[0]


def dry_run_plan(plan: Plan, device: str = "cpu") -> DryRun:
    """One rank of each pipeline rank, each in a fresh process. Raises InputError before there is one."""
    check(plan, device)
    ranks = range(plan.decisions.pipeline_parallel)
    found = tuple(dry_run_in_process(plan, rank_of_pipeline_rank(plan, pipeline_rank), device) for pipeline_rank in ranks)
    return DryRun(plan_hash=plan_hash(plan), pipeline_ranks=found)


def main(argv: list[str]) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m executor.dry_run", description="Traced peak memory of a plan's ranks.")
    parser.add_argument("plan", help="a plan document")
    parser.add_argument("--rank", type=int, help="a global rank (default: one of each pipeline rank)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the rank's real tensors on one GPU")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="where to write the dry-run document")
    options = parser.parse_args(argv)
    try:
        plan = load_plan(options.plan)
        if options.rank is None:
            document = dry_run_plan(plan, options.device)
        else:
            if not 0 <= options.rank < plan.decisions.world_size:
                raise InputError("--rank", options.rank, f"0 to {plan.decisions.world_size - 1} is expected")
            from executor.mesh import coordinates_of

            started = time.perf_counter()
            memory = dry_run(plan, options.rank, options.device)
            place = coordinates_of(options.rank, plan.decisions)["pp"]
            wall = time.perf_counter() - started
            row = DryRunRank(pipeline_rank=place, rank=options.rank, memory=memory, wall_seconds=wall)
            document = DryRun(plan_hash=plan_hash(plan), pipeline_ranks=(row,))
        write_text(options.output, dumps(document))
    except MeshwrightError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_status
    return 0


if __name__ == "__main__":
    end_with_parent(signal.SIGTERM)
    sys.exit(main(sys.argv[1:]))
