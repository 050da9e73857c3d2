"""Ranks as processes of this machine: started together, and stopped together whatever happens; and what it is called."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as multiprocessing

from planner.errors import MeshwrightError


def run_ranks(world_size: int, function: Callable[..., None], arguments: tuple[Any, ...] = (), what: str = "the run") -> None:
    """Calls `function(rank, world_size, store_file, *arguments)` in `world_size` processes, and returns when all are done.

    The store file is for `torch.distributed.FileStore`. Raises MeshwrightError when a rank fails; then, and when this process
    is interrupted, the other ranks are stopped.
    """
    context = multiprocessing.get_context("spawn")
    before = _exit_on_terminate()
    with tempfile.TemporaryDirectory() as folder:
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
            if before is not None:
                signal.signal(signal.SIGTERM, before)


def _exit_on_terminate() -> Any:
    """From now on SIGTERM ends this process as an exception does, so that its ranks are stopped. Returns the handler before."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _call(function: Callable[..., None], rank: int, world_size: int, store: str, *arguments: Any) -> None:
    try:
        function(rank, world_size, store, *arguments)
    except MeshwrightError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_status)


class _Scheduling(ctypes.Structure):
    """Linux's struct sched_attr."""

    _fields_ = (
        ("size", ctypes.c_uint32), ("policy", ctypes.c_uint32), ("flags", ctypes.c_uint64), ("nice", ctypes.c_int32), ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64), ("deadline", ctypes.c_uint64), ("period", ctypes.c_uint64),
    )  # fmt: skip


SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""The system call's number."""
TRANSPORT_SLICE_NS = 100_000


def hasten_transport() -> int:
    """Gives gloo's threads in this process short time slices, and returns how many took them.

    On CPUs those threads move the messages and add up the sums, and share the cores with the ranks' compute. Linux's scheduler (EEVDF,
    6.12 and newer) lets a thread that wakes up interrupt another one at once only where its slice is the shorter one; else it waits for
    that one's slice of some milliseconds. Needs no privilege, and does nothing on other systems, nor where the process has been given
    another scheduling policy than the usual one. Call it when the groups have been made.
    """
    number = SCHED_SETATTR.get(platform.machine())
    if sys.platform != "linux" or number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return 0
    try:
        system = ctypes.CDLL(None, use_errno=True)
        threads = [int(folder.name) for folder in Path("/proc/self/task").iterdir() if "gloo" in (folder / "comm").read_text()]
        nice = os.getpriority(os.PRIO_PROCESS, 0)
    except OSError:
        return 0
    wanted = _Scheduling(size=ctypes.sizeof(_Scheduling), nice=nice, runtime=TRANSPORT_SLICE_NS)
    return sum(system.syscall(number, thread, ctypes.byref(wanted), 0) == 0 for thread in threads)


def processor_name() -> str:
    """As /proc/cpuinfo says where there is one."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "CPU"
