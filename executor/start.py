"""`plan run`: checks the command line, the plan and this machine, then is torchrun's agent for one process per rank.

What is wrong is said here, once and on one line, with the exit status that torchrun would bury in its own report.
"""

from __future__ import annotations

import os
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from executor.options import arguments, check_module_options, check_outputs
from planner.chain_plan import ChainPlan, load_any_plan
from planner.errors import DoesNotFitError, InputError, MeshwrightError
from planner.lifeline import end_with_parent
from planner.plan import Plan

GIB = 2**30
PROCESS_BYTES = 240 * 2**20
"""Resident memory of a rank that has done nothing yet: torch and a gloo group, measured with torch 2.13 on Linux."""

ABOUT = "Starts torchrun with one process per rank on this machine, and trains by the plan."


def main(argv: list[str]) -> int:
    """Trains. Returns the exit status; what went wrong is one line on stderr."""
    try:
        options = arguments(argv, "plan run", ABOUT)
        plan = load_any_plan(options.plan, "PLAN")
        check_module_options(options, isinstance(plan, ChainPlan))
        check_inputs(options)
        check_outputs(options)
        check_machine(plan, options)
        if isinstance(plan, ChainPlan) and not options.rehearse:
            check_module(plan, options.model)
    except MeshwrightError as error:
        sys.stderr.write(f"plan: {error}\n")
        return error.exit_status
    from executor.agent import start_ranks

    return start_ranks(plan.decisions.world_size, argv)


def check_inputs(options: Namespace) -> None:
    """Raises InputError for a file or folder to read that is not there."""
    if options.data not in (None, "synthetic") and not os.path.isfile(options.data):
        raise InputError("--data", options.data, "a readable file is expected")
    for name in ("resume", "load"):
        folder = getattr(options, name)
        if folder is not None and not os.path.isdir(folder):
            raise InputError(f"--{name}", folder, "an existing folder is expected")


def check_module(plan: ChainPlan, reference: str) -> None:
    """Raises InputError unless the module that `reference` builds is the plan's and can be cut as planned. Allocates none of it."""
    from executor.traced_build import fake_cut

    fake_cut(plan, reference)


def check_machine(plan: Plan | ChainPlan, options: Namespace) -> None:
    """Raises InputError when this machine has too few GPUs for the plan, DoesNotFitError when it has too little memory."""
    import torch

    world = plan.decisions.world_size
    gpus = torch.cuda.device_count() if options.device != "cpu" and not options.rehearse else 0
    if gpus == 0:
        if options.device == "cuda":
            raise InputError("--device", "cuda", "no CUDA device is available")
        check_host_memory([0] * world if options.rehearse else peaks(plan), available_bytes())
        return
    if gpus < world:
        allowed = f"it needs {world} GPUs and this machine has {gpus}: start it with torchrun on several nodes, or with --device cpu"
        raise InputError("PLAN", options.plan, allowed)
    smallest = min(torch.cuda.get_device_properties(index).total_memory for index in range(world))
    if max(peaks(plan)) > smallest:
        raise DoesNotFitError(f"the plan needs {max(peaks(plan)) / GIB:.1f} GiB on its fullest GPU; here a GPU has {smallest / GIB:.1f} GiB")


def peaks(plan: Plan | ChainPlan) -> list[int]:
    """The predicted peak of every rank, in bytes; at least a whole traced module in fp32, which each rank makes to take its part."""
    copies = plan.decisions.world_size // plan.decisions.pipeline_parallel
    whole = 4 * plan.inputs.model.num_parameters if isinstance(plan, ChainPlan) else 0
    return [max(rank.memory.total_bytes, whole) for rank in plan.predictions.pipeline_ranks for _ in range(copies)]


def check_host_memory(need: Sequence[int], available: int) -> None:
    """Raises DoesNotFitError when ranks that need these bytes can't all run in the memory that the machine has left."""
    total = sum(need) + PROCESS_BYTES * len(need)
    if total > available:
        raise DoesNotFitError(
            f"{len(need)} ranks on this machine's CPUs need {total / GIB:.1f} GiB, of which {available / GIB:.1f} GiB are free; "
            "would fit: `plan dry-run` (one rank, no memory), `plan run --rehearse` (no weights), or more nodes with torchrun"
        )


def available_bytes() -> int:
    """Memory that new processes can have, in bytes: what is free here, and no more than this container's limit."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        return min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return free


if __name__ == "__main__":
    end_with_parent(signal.SIGTERM)
    sys.exit(main(sys.argv[1:]))
