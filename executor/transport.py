"""Messages between ranks, and the threads that move them and add up sums on CPUs: how soon they get a core from the ranks' compute."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

REAL_TIME_PRIORITY = 1
"""Of gloo's threads; that of a thread which posts a message is higher by one."""
SLICE_NS = 100_000
SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""The system call's number."""


class _Scheduling(ctypes.Structure):
    """Linux's struct sched_attr."""

    _fields_ = (
        ("size", ctypes.c_uint32), ("policy", ctypes.c_uint32), ("flags", ctypes.c_uint64), ("nice", ctypes.c_int32), ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64), ("deadline", ctypes.c_uint64), ("period", ctypes.c_uint64),
    )  # fmt: skip


_hastened = False
"""Whether gloo's threads of this process have been given real-time priority."""


def hasten_transport() -> int:
    """Lets gloo's threads in this process interrupt the ranks' compute at once, and returns how many of them may.

    They sleep nearly always, but a message waits for them: as ordinary threads they get a core that computes after 1 to 5 ms only. So they get
    the lowest real-time priority (round robin) where the system allows it, as it does to root and to users with a limit for it of 2 or more
    (`ulimit -r`); messages are then to be posted by `isend` and `irecv`.
    Elsewhere they get short time slices, which needs no privilege and helps a little: Linux's scheduler (EEVDF, 6.12 and newer)
    lets a thread that wakes up interrupt one of a longer slice, unless it has just had more than its share, for then it waits for the next
    tick. Does nothing on other systems, nor where the process has been given another scheduling policy than the usual one; and leaves
    real-time priority alone where it has been made nicer. Call it when the groups have been made.
    """
    global _hastened
    if sys.platform != "linux" or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return 0
    try:
        threads = _gloo_threads()
        if os.getpriority(os.PRIO_PROCESS, 0) <= 0:
            try:
                _rise()
                _sink()
                for thread in threads:
                    os.sched_setscheduler(thread, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(REAL_TIME_PRIORITY))
                _hastened = _hastened or bool(threads)
                return len(threads)
            except PermissionError:
                pass
        return _shorten_slices(threads)
    except OSError:
        return 0


def _rise() -> None:
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(REAL_TIME_PRIORITY + 1))


def _sink() -> None:
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@contextmanager
def posting() -> Iterator[None]:
    """Wraps what posts a message in this thread, and does not wait for it.

    Gloo's thread asks again and again for a connection that another thread has locked, as the one that posts a message does. Had that one no
    real-time priority, and had gloo's thread just taken the core from it, it would not go on before the system lets ordinary threads run
    again, which may take nearly a second. So it has a higher priority than gloo's threads meanwhile.
    """
    if not _hastened:
        yield
        return
    _rise()
    try:
        yield
    finally:
        _sink()


def isend(tensor: torch.Tensor, to: int, group: Any = None, tag: int = 0) -> Any:
    """Posts `tensor` for rank `to`. Returns a handle to wait on; until then the tensor must be left as it is."""
    with posting():
        return dist.isend(tensor, to, group=group, tag=tag)


def irecv(tensor: torch.Tensor, source: int, group: Any = None, tag: int = 0) -> Any:
    """Posts that rank `source` will fill `tensor`. Returns a handle to wait on."""
    with posting():
        return dist.irecv(tensor, source, group=group, tag=tag)


def _gloo_threads() -> list[int]:
    """A thread gives itself its name when it first runs, so those of a group just made are waited for."""
    found: list[int] = []
    while True:
        before = found
        found = sorted(int(folder.name) for folder in Path("/proc/self/task").iterdir() if "gloo" in (folder / "comm").read_text())
        if found == before:
            return found
        time.sleep(0.002)


def _shorten_slices(threads: list[int]) -> int:
    number = SCHED_SETATTR.get(platform.machine())
    if number is None:
        return 0
    system = ctypes.CDLL(None, use_errno=True)
    wanted = _Scheduling(size=ctypes.sizeof(_Scheduling), nice=os.getpriority(os.PRIO_PROCESS, 0), runtime=SLICE_NS)
    return sum(system.syscall(number, thread, ctypes.byref(wanted), 0) == 0 for thread in threads)
