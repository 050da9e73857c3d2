"""Short measurements of the links between ranks: collectives on groups inside a node and across nodes, and messages.

Groups that a run would use at once are measured at once: all pairs of a node together, or one rank of every node. Collectives follow
each other here; what they cost more between a step's layers `executor.probe_steps` finds. On CPUs every message comes after a
millisecond of compute, which does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist

from executor.mesh import Axis
from executor.probes import one_call_seconds
from executor.transport import hasten_transport, irecv, isend
from planner.measurements import CollectivePoint, MessagePoint

SIZES = (1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
CUDA_SIZES = (1 << 12, 1 << 18, 1 << 22, 1 << 26)
BUDGET_SECONDS = 0.12
MOST_CALLS = 200.0


def collective_points(device: torch.device, per_node: int) -> Iterator[CollectivePoint]:
    """All ranks take part, and get the same points: the mean over the groups of what each rank found."""
    world = dist.get_world_size()
    nodes = world // per_node
    layouts: list[tuple[list[list[int]], int]] = []
    if per_node > 2 and per_node % 2 == 0:
        layouts.append(([[first, first + 1] for first in range(0, world, 2)], 1))
    if per_node > 1:
        layouts.append(([list(range(node * per_node, (node + 1) * per_node)) for node in range(nodes)], 1))
    if nodes > 1:
        layouts.append(([[place + node * per_node for node in range(nodes)] for place in range(per_node)], nodes))
        if per_node > 1:
            layouts.append(([list(range(world))], nodes))
    kinds: tuple[Literal["all_reduce", "all_gather", "reduce_scatter"], ...] = ("all_reduce", "all_gather", "reduce_scatter")
    for groups, num_nodes in layouts:
        axis = _axis(groups)
        for kind in kinds:
            for size in CUDA_SIZES if device.type == "cuda" else SIZES:
                yield CollectivePoint(kind, axis.size, size, _agreed(_time_collective(axis, kind, size, device), device), num_nodes)
        dist.destroy_process_group(axis.group)


def message_points(device: torch.device, per_node: int) -> Iterator[MessagePoint]:
    """Half of a round trip between neighbours: pairs inside the nodes at once, then all ranks of two nodes, and one rank of each alone."""
    world, rank = dist.get_world_size(), dist.get_rank()
    pairs: list[tuple[list[tuple[int, int]], bool, bool]] = []
    if per_node > 1:
        pairs.append(([(first, first + 1) for first in range(0, world - 1, 2)], True, False))
    if world > per_node:
        pairs.append(([(place, place + per_node) for place in range(per_node)], False, False))
        if per_node > 1:
            pairs.append(([(0, per_node)], False, True))
    hasten_transport()
    for both, inside, alone in pairs:
        mine = next((pair for pair in both if rank in pair), None)
        for size in CUDA_SIZES if device.type == "cuda" else SIZES:
            seconds = _time_messages(mine, size, device)
            yield MessagePoint(size, _agreed(seconds, device), inside, alone=alone)


def _axis(groups: list[list[int]]) -> Axis:
    found = None
    for ranks in groups:
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            found = Axis("probe", tuple(ranks), ranks.index(dist.get_rank()), group)
    assert found is not None
    hasten_transport()
    return found


def _agreed(seconds: float, device: torch.device) -> float:
    """The mean of all ranks that measured."""
    both = torch.tensor([seconds, float(seconds > 0)], dtype=torch.float64, device=device)
    dist.all_reduce(both)
    return float(both[0] / both[1])


def _time_collective(axis: Axis, kind: str, size: int, device: torch.device) -> float:
    count = size // 4 // axis.size * axis.size
    whole, part = torch.ones(count, device=device), torch.ones(count // axis.size, device=device)
    call: Callable[[], Any] = {
        "all_reduce": lambda: axis.all_reduce(whole.fill_(1.0)),
        "all_gather": lambda: axis.all_gather(whole, part),
        "reduce_scatter": lambda: axis.reduce_scatter(part, whole),
    }[kind]
    return _typical(lambda: one_call_seconds(call, device), device)


def _time_messages(pair: tuple[int, int] | None, size: int, device: torch.device) -> float:
    """Half of a round trip; 0 on a rank that has nobody to send to."""
    if pair is None:
        return _typical(None, device)
    first = dist.get_rank() == pair[0]
    other = pair[1] if first else pair[0]
    tensor = torch.ones(size // 4, device=device)
    between = _compute(device)

    def message(sends: bool) -> None:
        (isend(tensor, other) if sends else irecv(torch.empty_like(tensor), other)).wait()

    def trip() -> float:
        seconds = 0.0
        for sends in (first, not first):
            between()
            seconds += one_call_seconds(partial(message, sends), device)
        return seconds

    return _typical(trip, device) / 2


def _compute(device: torch.device) -> Callable[[], Any]:
    """About a millisecond of work on a CPU core, nothing on a GPU, where kernels queue up without the host."""
    if device.type == "cuda":
        return lambda: None
    left, right = torch.ones(320, 320), torch.ones(320, 320)
    return lambda: left @ right


def _typical(timed: Callable[[], float] | None, device: torch.device) -> float:
    """A low quantile, since noise only adds, of calls for about BUDGET_SECONDS; how many all ranks agree on, also those that only wait."""
    first = BUDGET_SECONDS / MOST_CALLS
    if timed is not None:
        timed()
        first = min(one_call_seconds(timed, device) for _ in range(2))
    count = torch.tensor([max(4.0, min(MOST_CALLS, BUDGET_SECONDS / first))], dtype=torch.float64, device=device)
    dist.all_reduce(count, dist.ReduceOp.MIN)
    found = sorted(timed() for _ in range(int(count))) if timed is not None else [0.0]
    return found[len(found) // 5]
