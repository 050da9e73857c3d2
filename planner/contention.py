"""The walk of a step where ranks share cores: more processes on a node than it has cores.

A rank that computes gets min(1, cores / ranks computing on its node) of a core, and one that waits gets none, so idle
time of a pipeline is used by the other ranks: what a bubble costs then depends on who else has work. A pipeline rank has
tensor x data parallel copies, spread over the nodes by the plan's rank order, which go in step: the slowest copy sets the
pace (processor sharing, Kleinrock 1967, J. ACM 14(2), taken as a fluid).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from planner.cluster import ClusterSpec
from planner.plan import Decisions
from planner.schedule import COMPUTE_KINDS, Action, Actions
from planner.timeline import DeadlockError, Event, Timeline


class Demand(NamedTuple):
    """What an action takes: seconds of a core, then seconds of waiting that need none."""

    work: float
    wait: float = 0.0


class _Rank:
    """Where a pipeline rank stands in its list."""

    __slots__ = ("actions", "position", "start", "state", "until", "work")

    def __init__(self, actions: Actions) -> None:
        self.actions = actions
        self.position = 0
        self.state = "ready"
        self.start = 0.0
        self.work = 0.0
        self.until = 0.0


def shares_cores(cluster: ClusterSpec, world_size: int) -> bool:
    """Whether ranks of a node share its cores."""
    return cluster.cores_per_node is not None and min(world_size, cluster.gpus_per_node) > cluster.cores_per_node


def placement(cluster: ClusterSpec, decisions: Decisions) -> list[dict[int, int]]:
    """For each pipeline rank, how many of its copies lie on each node."""
    sizes = {"tp": decisions.tensor_parallel, "dp": decisions.data_parallel, "pp": decisions.pipeline_parallel}
    found: list[dict[int, int]] = [{} for _ in range(decisions.pipeline_parallel)]
    for place in itertools.product(*(range(sizes[axis]) for axis in decisions.rank_order)):
        rank, stride = 0, 1
        for axis, index in zip(decisions.rank_order, place, strict=True):
            rank += index * stride
            stride *= sizes[axis]
        mine = found[place[decisions.rank_order.index("pp")]]
        node = rank // cluster.gpus_per_node
        mine[node] = mine.get(node, 0) + 1
    return found


def shared_walk(
    lists: Sequence[Actions],
    demand: Callable[[int, Action], Demand],
    transfer_seconds: Callable[[Action], float],
    cores_per_node: int,
    copies: Sequence[dict[int, int]],
    receive_seconds: float = 0.0,
) -> Timeline:
    """As `planner.timeline.simulate`, with cores shared. `demand(rank, action)` is that of every action but messages."""
    ranks = [_Rank(actions) for actions in lists]
    owned = [frozenset(actions) for actions in lists]
    arrivals: dict[tuple[str, int, int], float] = {}
    transfers: dict[tuple[str, int, int], float] = {}
    ends: set[Action] = set()
    last_stage = max((action.stage for actions in lists for action in actions), default=0)
    events: list[Event] = []
    now = 0.0

    def finish(index: int, rank: _Rank) -> None:
        action = rank.actions[rank.position]
        events.append(Event(index, action.kind, action.stage, action.microbatch, rank.start, now))
        if action.kind in COMPUTE_KINDS:
            ends.add(action)
        rank.position += 1
        rank.state, rank.start = "ready", now

    def begin(index: int, rank: _Rank) -> bool:
        """Starts the rank's next action if it can be; True when something changed."""
        if rank.state != "ready" or rank.position >= len(rank.actions):
            return False
        action = rank.actions[rank.position]
        kind, stage, microbatch = action
        if kind.startswith("SEND"):
            neighbour = stage + 1 if kind == "SEND_F" else stage - 1
            message = ("RECV_" + kind[-1], neighbour, microbatch)
            transfers[message] = transfer_seconds(action)
            arrivals[message] = now + transfers[message]
            finish(index, rank)
            return True
        if kind.startswith("RECV"):
            arrival = arrivals.get(action)
            if arrival is None:
                return False
            least = receive_seconds + transfers[action] if receive_seconds > 0.0 else 0.0
            rank.state, rank.until = "waiting", max(rank.start + least, now, arrival)
            return True
        if kind in "FBI" and not _ready(action, last_stage, ends, owned[index]):
            return False
        need = demand(index, action)
        rank.work, rank.until = need.work, need.wait
        rank.state = "working"
        return True

    while True:
        while any([begin(index, rank) for index, rank in enumerate(ranks)]):
            pass
        working = [index for index, rank in enumerate(ranks) if rank.state == "working"]
        waiting = [rank for rank in ranks if rank.state == "waiting"]
        if not working and not waiting:
            break
        speeds = _speeds(working, copies, cores_per_node)
        step = min([ranks[index].work / speeds[index] for index in working] + [rank.until - now for rank in waiting])
        now += step
        for index in working:
            rank = ranks[index]
            rank.work -= step * speeds[index]
            if rank.work <= 1e-12:
                rank.state, rank.until = "waiting", now + rank.until
        for index, rank in enumerate(ranks):
            if rank.state == "waiting" and rank.until <= now + 1e-12:
                finish(index, rank)
    stuck = [rank.actions[rank.position] for rank in ranks if rank.position < len(rank.actions)]
    if stuck:
        raise DeadlockError(f"the schedule waits for itself: {stuck}")
    return Timeline(source="simulated", events=tuple(events))


def _ready(action: Action, last_stage: int, ends: set[Action], own: frozenset[Action]) -> bool:
    """Whether the neighbouring stage's compute is done, where it is on the same rank; else a receive has seen to it."""
    kind, stage, microbatch = action
    neighbour = stage - 1 if kind == "F" else stage + 1
    if not 0 <= neighbour <= last_stage:
        return True
    before = Action(kind, neighbour, microbatch)
    return before in ends or before not in own


def _speeds(working: Sequence[int], copies: Sequence[dict[int, int]], cores_per_node: int) -> dict[int, float]:
    """The share of a core that each working pipeline rank's slowest copy gets."""
    active: dict[int, int] = {}
    for index in working:
        for node, count in copies[index].items():
            active[node] = active.get(node, 0) + count
    return {index: min(min(1.0, cores_per_node / active[node]) for node in copies[index]) for index in working}
