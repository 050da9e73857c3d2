"""One clock for the ranks of several hosts."""

import random
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
import torch.distributed as dist

from executor.clock import best_offset, clock_offsets
from executor.processes import run_ranks
from planner.errors import MeshwrightError


def test_the_quickest_ping_bounds_the_error() -> None:
    noise = random.Random(1)
    true = 123_456_789
    pings = []
    for index in range(50):
        sent = 1_000_000 * index
        there, back = noise.randint(20_000, 900_000), noise.randint(20_000, 900_000)
        pings.append((sent, sent + there - true, sent + there + back))
    offset = best_offset(pings)
    assert abs(offset.nanoseconds - true) <= offset.error_nanoseconds
    assert offset.error_nanoseconds == (min(ping[2] - ping[0] for ping in pings) + 1) // 2


def ask(rank: int, world: int, store: str, output: str) -> None:
    """Ranks 2 and 3 are on another "host", whose clock is an hour ahead."""
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    ahead = 3_600_000_000_000 if rank >= 2 else 0
    found = clock_offsets("ab"[rank // 2], torch.device("cpu"), lambda: time.perf_counter_ns() + ahead)
    if rank == 0:
        assert found is not None
        Path(output).write_text(" ".join(str(offset.nanoseconds) for offset in found))
    else:
        assert found is None
    dist.destroy_process_group()


def test_offsets_between_processes(tmp_path: Path) -> None:
    output = tmp_path / "offsets"
    run_ranks(4, ask, (str(output),))
    first, second, third, fourth = (int(word) for word in output.read_text().split())
    assert first == second == 0
    assert third == fourth
    assert abs(third + 3_600_000_000_000) < 50_000_000


def fail(rank: int, world: int, store: str) -> None:
    if rank == 1:
        raise MeshwrightError("no")
    time.sleep(3600)


def test_ranks_are_stopped_together() -> None:
    with pytest.raises(MeshwrightError, match="a rank of the run failed"):
        run_ranks(2, fail)  # and not after the other rank's hour
