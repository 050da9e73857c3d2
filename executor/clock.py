"""One clock for the ranks of several hosts: how far each host's monotonic clock is from the first rank's.

A ping carries the asked rank's time. Its reading belongs to a moment between the ping's sending and its answer's arrival,
so half the round trip bounds the error, and the quickest of many pings is the best one (Cristian 1989, Distributed
Computing 3(3)). Ranks of one host read the same clock, so only the first rank of every other host is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from executor.transport import irecv, isend

NUM_PINGS = 40


class Offset(NamedTuple):
    """What to add to a host's clock to get the first rank's, and the most that it can be off; nanoseconds."""

    nanoseconds: int
    error_nanoseconds: int


def best_offset(pings: Sequence[tuple[int, int, int]]) -> Offset:
    """From (sent, asked rank's time, answered) of every ping, the first and last by the asking rank's clock."""
    sent, theirs, answered = min(pings, key=lambda ping: ping[2] - ping[0])
    return Offset((sent + answered) // 2 - theirs, (answered - sent + 1) // 2)


def clock_offsets(host: str, device: torch.device, now: Callable[[], int] = time.perf_counter_ns) -> list[Offset] | None:
    """The offset of every rank's clock, on rank 0; None on the others. All ranks of the default group take part.

    `host` names this rank's host, `now` reads its clock in nanoseconds, and messages lie on `device`.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [Offset(0, 0)]
    rank = dist.get_rank()
    hosts = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, host)
    asked = {host: index for index, host in reversed(list(enumerate(hosts))) if host != hosts[0]}
    found: dict[str, Offset] = {hosts[0]: Offset(0, 0)}
    for host, other in sorted(asked.items(), key=lambda item: item[1]):
        if rank == 0:
            found[host] = best_offset([_ask(other, device, now) for _ in range(NUM_PINGS)])
        elif rank == other:
            for _ in range(NUM_PINGS):
                _answer(device, now)
    return [found[host] for host in hosts] if rank == 0 else None


def _ask(other: int, device: torch.device, now: Callable[[], int]) -> tuple[int, int, int]:
    message = torch.zeros(1, dtype=torch.int64, device=device)
    sent = now()
    isend(message, other).wait()
    irecv(message, other).wait()
    return sent, int(message), now()


def _answer(device: torch.device, now: Callable[[], int]) -> None:
    message = torch.zeros(1, dtype=torch.int64, device=device)
    irecv(message, 0).wait()
    message[0] = now()
    isend(message, 0).wait()
