"""Processes that end together: those that a command starts end with it, whatever ends it.

On SIGTERM, SIGHUP and Ctrl-C the command ends them itself. That it was killed only the kernel can tell them, and Linux's does.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

PARENT = "MESHWRIGHT_PARENT"
"""Names, to a process that is to end with the one that starts it, the process id of that one."""
_PR_SET_PDEATHSIG = 1


def child_environment() -> dict[str, str]:
    """For a process that is to end with this one: it calls `end_with_parent`."""
    return os.environ | {PARENT: str(os.getpid())}


def end_with_parent(number: int, parent: int | None = None) -> None:
    """From now on this process gets the signal `number` when `parent` ends, on Linux; it gets it now where that has happened. By default the
    parent is what PARENT says, once, for this process's own children have another one; without it nothing is done."""
    named = os.environ.pop(PARENT, None)
    parent = int(named) if parent is None and named is not None else parent
    if parent is None:
        return
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def _exit(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Meanwhile SIGTERM and SIGHUP end this process as an exception does, so that it can end what it has started; but not where they are ignored,
    as under nohup."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _exit)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
