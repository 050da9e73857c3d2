"""Measuring a run: peak bytes by category, and the start and end of every action.

Bytes are counted by storage: each counted once however many tensors share it, from its first use until it is freed, on
real or fake tensors.
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from planner.plan import Memory

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "buffers")


class StorageTracker(TorchDispatchMode):
    """While active, counts every storage that an operation returns; new ones belong to `category`.

    `peak` is the breakdown by category when the total was highest since the last `reset`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.category = "activations"
        self.totals = dict.fromkeys(CATEGORIES, 0)
        self.total = 0
        self.peak = dict(self.totals)
        self.peak_total = 0
        self._live: dict[int, tuple[int, str, Any]] = {}

    def add(self, tensor: torch.Tensor, category: str) -> None:
        """Counts the storage of `tensor`, or moves it to `category` when it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if known is not None and known[2]() is storage:
            self._count(known[1], -known[0])
            reference = known[2]
        else:
            reference = weakref.ref(storage, lambda _, key=key: self._free(key))  # type: ignore[misc]
        size = storage.nbytes()
        self._live[key] = (size, category, reference)
        self._count(category, size)

    def reset(self) -> None:
        """Forgets the peak."""
        self.peak, self.peak_total = dict(self.totals), self.total

    def memory(self) -> Memory:
        """The peak by category."""
        return Memory.of(*(self.peak[category] for category in CATEGORIES))

    @contextmanager
    def counting_as(self, category: str) -> Iterator[None]:
        """Storages that begin meanwhile belong to `category`."""
        before, self.category = self.category, category
        try:
            yield
        finally:
            self.category = before

    def _count(self, category: str, size: int) -> None:
        self.totals[category] += size
        self.total += size
        if self.total >= self.peak_total:
            self.peak_total, self.peak = self.total, dict(self.totals)

    def _free(self, key: int) -> None:
        known = self._live.pop(key, None)
        if known is not None:
            self._count(known[1], -known[0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self._see(result)
        elif isinstance(result, (tuple, list)):
            for item in result:
                if isinstance(item, torch.Tensor):
                    self._see(item)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        known = self._live.get(storage._cdata)
        if known is None or known[2]() is not storage:
            self.add(tensor, self.category)


class Record(NamedTuple):
    """An action with its times in nanoseconds of the host's clock."""

    kind: str
    stage: int
    microbatch: int
    start: int
    end: int


class Recorder:
    """Start and end of every action of a step. On CUDA by events, so that nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._rows: list[tuple[str, int, int, Any, Any]] = []
        self._origin: Any = None
        self._origin_ns = 0

    def begin_step(self) -> None:
        self._rows.clear()
        if self.cuda:
            torch.cuda.synchronize()
            self._origin = torch.cuda.Event(enable_timing=True)
            self._origin.record()
            self._origin_ns = time.perf_counter_ns()

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()  # type: ignore[no-untyped-call]
        return event

    def add(self, kind: str, stage: int, microbatch: int, start: Any, end: Any) -> None:
        self._rows.append((kind, stage, microbatch, start, end))

    def records(self) -> list[Record]:
        """The actions since `begin_step`."""
        if not self.cuda:
            return [Record(*row) for row in self._rows]
        torch.cuda.synchronize()

        def at(event: Any) -> int:
            return self._origin_ns + int(self._origin.elapsed_time(event) * 1e6)

        return [Record(kind, stage, microbatch, at(start), at(end)) for kind, stage, microbatch, start, end in self._rows]


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment(device: torch.device, world_size: int) -> dict[str, str | int | float | bool]:
    """What a measurement depends on beside the plan."""
    found: dict[str, str | int | float | bool] = {
        "torch": str(torch.__version__),
        "python": sys.version.split()[0],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "backend": "nccl" if device.type == "cuda" else "gloo",
        "world_size": world_size,
        "num_threads": torch.get_num_threads(),
        "num_cores": os.cpu_count() or 0,
    }
    return found


def count_all(tracker: StorageTracker, tensors: Iterable[torch.Tensor], category: str) -> None:
    for tensor in tensors:
        tracker.add(tensor, category)
