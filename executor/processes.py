"""Ranks as processes of this machine: started together, and stopped together whatever happens; and what it is called."""

from __future__ import annotations

import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as multiprocessing

from planner.errors import MeshwrightError
from planner.lifeline import end_with_parent, exit_on_signals


def run_ranks(world_size: int, function: Callable[..., None], arguments: tuple[Any, ...] = (), what: str = "the run") -> None:
    """Calls `function(rank, world_size, store_file, *arguments)` in `world_size` processes, and returns when all are done.

    The store file is for `torch.distributed.FileStore`. Raises MeshwrightError when a rank fails; then, and when this process
    is interrupted, the other ranks are stopped.
    """
    context = multiprocessing.get_context("spawn")
    with exit_on_signals(), tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [context.Process(target=_call, args=(function, rank, world_size, store, *arguments), daemon=True) for rank in range(world_size)]
        try:
            for process in processes:
                process.start()
            while any(process.is_alive() for process in processes) and not any(process.exitcode for process in processes):
                time.sleep(0.05)
            if any(process.exitcode for process in processes):
                raise MeshwrightError(f"a rank of {what} failed; its error stands above")
        finally:
            for process in processes:
                if process.is_alive():
                    process.terminate()
            for process in processes:
                process.join(10)


def _call(function: Callable[..., None], rank: int, world_size: int, store: str, *arguments: Any) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    end_with_parent(signal.SIGKILL, parent.pid)
    try:
        function(rank, world_size, store, *arguments)
    except MeshwrightError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_status)


def processor_name() -> str:
    """As /proc/cpuinfo says where there is one."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "CPU"
