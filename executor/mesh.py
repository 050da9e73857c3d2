"""Ranks to coordinates to process groups, and the collectives on one axis with their bytes counted.

Every group is a slice of one grid of ranks: `rank_order` names the axes from the fastest varying to the slowest, so
rank = Σ coordinate[axis] · (product of the degrees of the axes before it).

Bytes are what one rank sends with ring algorithms (Thakur et al. 2005; Patarasuk and Yuan 2009): 2·(n-1)/n·N for an
all-reduce of N bytes, (n-1)/n·N for an all-gather or a reduce-scatter of N bytes in all, N for a message.

Messages go through *channels*: one for each direction (activations, gradients), sending and receiving pipeline rank. gloo's messages carry tags,
so that channels can share groups. NCCL's carry none, and those of one communicator are done one after the other, each when both ranks
have come to it: there, every channel is a communicator of its own. On one channel both ranks come to the messages in the same order
in every schedule, which tests/test_schedule.py holds.
"""

from __future__ import annotations

import datetime
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from executor.transport import hasten_transport, irecv, isend
from planner.plan import Decisions, stage_ranks

_ALL_GATHER: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


Channel = tuple[str, int, int]
"""Direction ("F" or "B"), sending and receiving pipeline rank."""


class _Done:
    """A finished piece of communication."""

    def wait(self) -> None:
        return None


DONE = _Done()


@dataclass(slots=True)
class Axis:
    """This rank's group along one axis: `ranks` are global ranks, `index` this rank's place among them.

    With one rank every collective is free and returns at once. `sent_bytes` is shared by all axes of a mesh.
    """

    name: str
    ranks: tuple[int, ...]
    index: int
    group: Any = None
    sent_bytes: Counter[str] = field(default_factory=Counter)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def all_reduce(self, tensor: torch.Tensor, operation: Any = dist.ReduceOp.SUM, *, wait: bool = True) -> Any:
        """Reduces `tensor` in place over the axis. With `wait` false, returns a handle to wait on."""
        count = len(self.ranks)
        if count == 1:
            return DONE
        self.sent_bytes[self.name] += 2 * (count - 1) * tensor.nbytes // count
        work = dist.all_reduce(tensor, operation, group=self.group, async_op=not wait)
        return DONE if wait else work

    def all_gather(self, output: torch.Tensor, shard: torch.Tensor, *, wait: bool = True) -> Any:
        """Fills `output` (size·n rows) with every rank's `shard` (n rows); `shard` may be this rank's slice of `output`."""
        count = len(self.ranks)
        if count == 1:
            if output.data_ptr() != shard.data_ptr():
                output.copy_(shard)
            return DONE
        self.sent_bytes[self.name] += (count - 1) * output.nbytes // count
        work = _ALL_GATHER(output, shard, group=self.group, async_op=not wait)
        return DONE if wait else work

    def reduce_scatter(self, shard: torch.Tensor, whole: torch.Tensor, *, wait: bool = True) -> Any:
        """Sums `whole` over the axis and leaves this rank's part in `shard`, which may be that slice of `whole`."""
        count = len(self.ranks)
        if count == 1:
            if whole.data_ptr() != shard.data_ptr():
                shard.copy_(whole)
            return DONE
        self.sent_bytes[self.name] += (count - 1) * whole.nbytes // count
        work = _REDUCE_SCATTER(shard, whole, group=self.group, async_op=not wait)
        return DONE if wait else work


@dataclass(frozen=True, slots=True)
class Mesh:
    """Where this rank stands and its groups."""

    rank: int
    world_size: int
    coordinates: dict[str, int]
    tp: Axis
    dp: Axis
    pp: Axis
    shard: Axis
    """The ranks of the data-parallel axis that ZeRO shards over."""
    replicate: Axis
    """The ranks of the data-parallel axis that hold the same shard."""
    tied: Axis
    """First and last pipeline rank, which both hold a tied table."""
    key_value: Axis
    """Tensor-parallel ranks that hold the same key-value heads."""
    sent_bytes: Counter[str]
    channels: dict[Channel, Any] = field(default_factory=dict)
    """The group of each channel that begins or ends on this rank."""
    tagged: bool = True
    """Whether channels share groups, so that messages need tags."""
    among: dict[tuple[int, ...], Axis] = field(default_factory=dict)
    """By sets of pipeline ranks that share parameters: those of this rank's pipeline; only this rank itself where it is none of them."""

    def world_sum(self, tensor: torch.Tensor) -> None:
        """Adds `tensor` up over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def close(self) -> None:
        """Takes its groups down, where other groups will be made in these processes: gloo's threads wake up a hundred times a second for
        as long as their group is there, and keep the cores awake, so that messages of other groups come sooner than they would alone.

        All ranks must be done with the groups. The default group stays.
        """
        groups = [self.pp.group, *(axis.group for axis in self._summing()), *self.channels.values()]
        for group in {id(group): group for group in groups if group is not None}.values():
            dist.destroy_process_group(group)

    def connect(self, device: torch.device) -> None:
        """Sends a little through every group, in the same order on all ranks.

        NCCL connects ranks at their first message or sum, for which each waits on its host: within a step they may come to their first
        messages in orders that wait for each other, and the time that it takes would count as the step's.
        """
        little = torch.zeros(1, device=device)
        for axis in self._summing():
            if axis.group is not None:
                dist.all_reduce(little, group=axis.group)
        for channel, group in sorted(self.channels.items(), key=lambda item: item[0]):
            _, source, target = channel
            if self.pp.index == source:
                isend(little, self.pp.ranks[target], group).wait()
            else:
                irecv(little, self.pp.ranks[source], group).wait()
        float(little)  # waits for the device

    def _summing(self) -> tuple[Axis, ...]:
        """The axes that have collectives, and not only messages."""
        return (self.tp, self.dp, self.shard, self.replicate, self.tied, self.key_value, *self.among.values())


def coordinates_of(rank: int, decisions: Decisions) -> dict[str, int]:
    """The coordinates {pp, dp, tp} of a global rank."""
    sizes = {"tp": decisions.tensor_parallel, "dp": decisions.data_parallel, "pp": decisions.pipeline_parallel}
    found = {}
    for axis in decisions.rank_order:
        rank, found[axis] = divmod(rank, sizes[axis])
    return {axis: found[axis] for axis in ("pp", "dp", "tp")}


def rank_of(coordinates: dict[str, int], decisions: Decisions) -> int:
    """The global rank at `coordinates`."""
    sizes = {"tp": decisions.tensor_parallel, "dp": decisions.data_parallel, "pp": decisions.pipeline_parallel}
    rank, stride = 0, 1
    for axis in decisions.rank_order:
        rank += coordinates[axis] * stride
        stride *= sizes[axis]
    return rank


def channels_of(decisions: Decisions) -> list[Channel]:
    """The channels of a pipeline, in the order in which they are made."""
    owners = stage_ranks(decisions.schedule, decisions.pipeline_parallel, decisions.num_virtual_stages)
    crossed = {(here, there) for here, there in itertools.pairwise(owners) if here != there}
    return sorted([("F", here, there) for here, there in crossed] + [("B", there, here) for here, there in crossed])


def make_mesh(
    decisions: Decisions,
    rank: int,
    *,
    key_value_copies: int = 1,
    pipeline_sets: Iterable[tuple[int, ...]] = (),
    timeout_seconds: float = 600.0,
    only_own_groups: bool = False,
    tagged: bool | None = None,
) -> Mesh:
    """The mesh of `decisions` on the default process group. `pipeline_sets` are sets of pipeline ranks that share parameters.

    Groups get the timeout themselves, since groups ignore the one of `init_process_group`. Every rank makes every group in
    the same order, unless `only_own_groups` (a fake process group, where no other rank exists). `tagged` is for tests: by default the
    backend decides whether channels share groups, and groups are connected here where they would not be before their first use.
    """
    if tagged is None:
        tagged = not dist.is_initialized() or dist.get_backend() != dist.Backend.NCCL
    sent: Counter[str] = Counter()
    own = coordinates_of(rank, decisions)
    timeout = datetime.timedelta(seconds=timeout_seconds)

    def axis(name: str, groups: Sequence[tuple[int, ...]]) -> Axis:
        mine = Axis(name, (rank,), 0, None, sent)
        for ranks in groups:
            if len(ranks) == 1 or (only_own_groups and rank not in ranks):
                continue
            group = dist.new_group(list(ranks), timeout=timeout)
            if rank in ranks:
                mine = Axis(name, ranks, ranks.index(rank), group, sent)
        return mine

    sizes = {"pp": decisions.pipeline_parallel, "dp": decisions.data_parallel, "tp": decisions.tensor_parallel}

    def slices(name: str, parts: Callable[[int], Sequence[Sequence[int]]]) -> list[tuple[int, ...]]:
        """All groups along `name`: for each place on the other axes, `parts(size)` lists the coordinates of each group."""
        others = [other for other in sizes if other != name]
        found = []
        for place in itertools.product(*(range(sizes[other]) for other in others)):
            base = dict(zip(others, place, strict=True))
            if only_own_groups and any(own[other] != base[other] for other in others):
                continue
            for part in parts(sizes[name]):
                found.append(tuple(rank_of(base | {name: value}, decisions) for value in part))
        return found

    def all_of(size: int) -> list[list[int]]:
        return [list(range(size))]

    def blocks(length: int) -> Callable[[int], list[list[int]]]:
        return lambda size: [list(range(start, start + length)) for start in range(0, size, length)]

    replicas = decisions.data_parallel_replicate
    shards = decisions.data_parallel // replicas
    pp = axis("pp", slices("pp", all_of))
    tp, dp = axis("tp", slices("tp", all_of)), axis("dp", slices("dp", all_of))
    if replicas == 1:
        shard, replicate = dp, Axis("dp", (rank,), 0, None, sent)
    else:
        shard = axis("dp", slices("dp", blocks(shards)))
        replicate = axis("dp", slices("dp", lambda size: [list(range(index, size, shards)) for index in range(shards)]))
    tied = axis("pp", slices("pp", lambda size: [[0, size - 1]] if size > 1 else [[0]]))
    key_value = axis("tp", slices("tp", blocks(key_value_copies)))

    def only(chosen: tuple[int, ...]) -> Callable[[int], Sequence[Sequence[int]]]:
        return lambda size: [chosen]

    among = {chosen: axis("pp", slices("pp", only(chosen))) for chosen in sorted(pipeline_sets)}
    own_channels = [channel for channel in channels_of(decisions) if own["pp"] in channel[1:]]
    if tagged:
        groups = {"F": pp.group, "B": axis("pp", slices("pp", all_of)).group}
        channels = {channel: groups[channel[0]] for channel in own_channels}
    else:
        made = {channel: axis("pp", slices("pp", only(channel[1:]))).group for channel in channels_of(decisions)}
        channels = {channel: made[channel] for channel in own_channels}
    hasten_transport()
    mesh = Mesh(
        rank=rank,
        world_size=decisions.world_size,
        coordinates=own,
        tp=tp,
        dp=dp,
        pp=pp,
        shard=shard,
        replicate=replicate,
        tied=Axis("pp", (rank,), 0, None, sent) if rank not in tied.ranks else tied,
        key_value=key_value,
        sent_bytes=sent,
        channels=channels,
        tagged=tagged,
        among=among,
    )
    if not tagged:
        mesh.connect(torch.device("cuda" if dist.get_backend() == dist.Backend.NCCL else "cpu"))
    return mesh
