"""Lower bounds on the step time of whole families of candidates, from a few sums and no solver.

Notation: W seconds of one micro-batch through all layers, forward and backward, each layer at its fastest allowed
recompute level; w_s = f_s + b_s those of stage s (Σ w_s = W); c seconds of a message; p ranks, m micro-batches; tail_r
reduction and optimizer of rank r. Each bound is the length of one path through the schedule's graph, or a weighted mean
of several, so it holds for all cuts. The paths:

- *rank r is never idle*: the first micro-batch comes down to rank r, which then does all its work:
  Σ_{s<r} (f_s + c) + m w_r + tail_r. The mean over the ranks is (m W + Σ_r Σ_{s<r} (f_s + c)) / p + mean tail, and a stage
  has at least one layer. It holds for every schedule (`busy_bound`).
- *GPipe* waits twice, in the forward and in the backward phase: W + (m - 1) (f_i + b_j) for any i, j, in the mean over
  the ranks (m + p - 1)/p W, and 2 (p - 1) messages.
- *1F1B* at stage i: down to the last stage and back up to i, then stage i without a pause from its first backward to
  its last forward, then down again and all the way up: Σ_{j<i} w_j + (m - p + i + 1) w_i + 2 Σ_{j>i} w_j. For m > p a convex
  combination of these p paths weighs all stages alike (the weights λ_i satisfy λ_i (m-p+i-1) = λ_{i+1} (m-p+i+1) >= 0),
  which gives (m + p - 1)/p W. And a micro-batch enters stage 0 only after the p-th before it has left: ceil(m/p) round
  trips of W + 2 (p - 1) c.
  Since Σ_{j>i} w_j = W - Σ_{j<=i} w_j, the slowest stage i gives 2 W + (m - p - 1) w_i, with whole blocks on it.
- *Naive* has one path: m (W + 2 (p - 1) c).

Memory: `rank_rooms` says how many blocks a rank can hold and in which time, with blocks divisible; `least_work` is then W
with the recomputation that memory forces, and `never_idle_bound` the first bound with both.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from planner.chain import Costs, Layer, regular_sizes
from planner.layer_time import LayerSeconds
from planner.pipeline import Piece
from planner.plan import SPLIT_BACKWARD_SCHEDULES, Decisions, Recompute, stage_ranks


def whole_seconds(seconds: dict[Layer, LayerSeconds], num_blocks: int, levels: tuple[Recompute, ...]) -> float:
    """W: one micro-batch through all layers, each at its fastest level."""
    ends = sum(seconds[kind, "none"].forward + seconds[kind, "none"].backward for kind in ("embedding", "head"))
    return ends + num_blocks * min(seconds["block", level].forward + seconds["block", level].backward for level in levels)


def busy_bound(decisions: Decisions, whole: float) -> float:
    """No schedule can be faster than the mean rank's work."""
    return decisions.num_microbatches * whole / decisions.pipeline_parallel


class Least(NamedTuple):
    """The least seconds of a stage: the first holds the embedding, all others but the last at least one block."""

    first_forward: float
    first_backward: float
    forward: float
    backward: float
    message: float

    def fill(self, rank: int, backward: bool) -> float:
        """Of the stages before `rank`, and the messages between them, down and with `backward` up again."""
        if rank == 0:
            return 0.0
        down = self.first_forward + (rank - 1) * self.forward + rank * self.message
        return down + (self.first_backward + (rank - 1) * self.backward + rank * self.message if backward else 0.0)


def least_stages(costs: Costs, decisions: Decisions, levels: tuple[Recompute, ...]) -> Least:
    seconds = costs.seconds(decisions)
    fastest = min((seconds["block", level] for level in levels), key=lambda time: time.forward + time.backward)
    first = seconds["embedding", "none"]
    return Least(first.forward, first.backward, fastest.forward, fastest.backward, costs.least_message(decisions))


def schedule_bound(decisions: Decisions, whole: float, least: Least, whole_weight: float = 0.0) -> float:
    """A lower bound without reduction and optimizer. `whole_weight` is the share of W that weight gradients take."""
    p, m, v = decisions.pipeline_parallel, decisions.num_microbatches, decisions.num_virtual_stages
    if p == 1:
        return m * whole
    split = decisions.schedule in SPLIT_BACKWARD_SCHEDULES
    hops = 2 * (p - 1) if decisions.schedule == "ZBVZeroBubble" else p * v - 1
    alone = whole - (whole_weight if split else 0.0) + 2 * hops * least.message
    if decisions.schedule == "Naive":
        return m * alone
    filled = whole * (m + p - 1) / p + 2 * (p - 1) * least.message
    if decisions.schedule == "GPipe":
        return filled
    if decisions.schedule == "1F1B":
        return max(math.ceil(m / p) * alone, filled if m > p else whole * (1 + (m - 1) / (2 * p)))
    return max(alone, m * whole / p + sum(least.fill(rank, not split) for rank in range(p)) / p)


class RegularCut(NamedTuple):
    """One of the regular cuts of a schedule with several stages per rank, in blocks."""

    held: tuple[int, ...]
    """Of each rank."""
    before: tuple[int, ...]
    """Of the stages that lie before each rank's first one."""
    sizes: tuple[tuple[int, ...], ...]
    """Layers per stage of the cuts that this stands for."""


@functools.lru_cache(maxsize=1024)
def regular_cuts(num_blocks: int, schedule: str, pipeline_parallel: int, num_virtual_stages: int) -> tuple[RegularCut, ...]:
    """The regular cuts (`chain.regular_sizes`), those with the same blocks on and before each rank once."""
    ranks = stage_ranks(schedule, pipeline_parallel, num_virtual_stages)
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[int, ...]]] = {}
    for sizes in regular_sizes(num_blocks, len(ranks)):
        blocks = [size - (stage == 0) - (stage == len(sizes) - 1) for stage, size in enumerate(sizes)]
        held = [0] * pipeline_parallel
        for stage, count in enumerate(blocks):
            held[ranks[stage]] += count
        before = tuple(itertools.accumulate(blocks[: pipeline_parallel - 1], initial=0))
        found.setdefault((tuple(held), before), []).append(sizes)
    return tuple(RegularCut(held, before, tuple(sizes)) for (held, before), sizes in found.items())


def regular_bound(costs: Costs, decisions: Decisions, levels: tuple[Recompute, ...]) -> float:
    """The first bound for the best of the regular cuts, whose stages are known: the slowest rank of each cut."""
    return min(regular_bounds(costs, decisions, levels, first_only=True))[0]


def regular_bounds(
    costs: Costs, decisions: Decisions, levels: tuple[Recompute, ...], *, first_only: bool = False,
    recomputed: Callable[[tuple[int, ...]], Sequence[float]] | None = None, enough: float = math.inf,
) -> list[tuple[float, tuple[tuple[int, ...], ...]]]:  # fmt: skip
    """The bound of each regular cut, with its sizes; with `first_only` it need be right for the least of them alone.

    `recomputed` gives for a cut the seconds of recomputation that each rank can't do without; it is asked where they are below `enough`.
    """
    seconds, m, p = costs.seconds(decisions), decisions.num_microbatches, decisions.pipeline_parallel
    block = min((seconds["block", level] for level in levels), key=lambda time: time.forward + time.backward)
    embedding, head, message = seconds["embedding", "none"], seconds["head", "none"], costs.least_message(decisions)
    split = decisions.schedule in SPLIT_BACKWARD_SCHEDULES
    tail = max(tail_of(costs, decisions), key=lambda item: item.slope)
    tail_block, tail_head = (tail.slope * costs.parameters(decisions, kind) for kind in ("block", "head"))
    each = m * (block.forward + block.backward) + tail_block
    ends = [0.0] * p
    for rank, time, kind in ((0, embedding, "embedding"), (0 if decisions.schedule == "ZBVZeroBubble" else p - 1, head, "head")):
        ends[rank] += m * (time.forward + time.backward) + tail.slope * costs.parameters(decisions, kind)  # type: ignore[arg-type]
    ends = [value + max(tail.intercept, 0.0) + (embedding.forward + rank * message if rank else 0.0) for rank, value in enumerate(ends)]
    ups = [embedding.backward + rank * message - max(tail.intercept, 0.0) - tail_head for rank in range(p)]
    forward, backward = block.forward, block.backward
    found: list[tuple[float, tuple[tuple[int, ...], ...]]] = []
    best = math.inf
    for cut in regular_cuts(costs.inputs.model.num_layers, decisions.schedule, p, decisions.num_virtual_stages):
        slowest, by_rank = 0.0, list[float]()
        for held, before, end, up in zip(cut.held, cut.before, ends, ups, strict=True):
            taken = held * each + end + before * forward
            if not split and by_rank:
                up += before * backward - held * tail_block
                if up > 0.0:
                    taken += up
            by_rank.append(taken)
            if taken > slowest:
                slowest = taken
                if first_only and slowest >= best:
                    break
        best = min(best, slowest)
        if recomputed and slowest < enough:
            for sizes in cut.sizes:
                found.append((max(taken + m * more for taken, more in zip(by_rank, recomputed(sizes), strict=True)), (sizes,)))
        else:
            found.append((slowest, cut.sizes))
    return found


class RankRoom(NamedTuple):
    """What a rank can hold, as the lower hull of (blocks, seconds of one micro-batch) over the recompute levels."""

    hull: tuple[tuple[float, float], ...]
    """From no blocks to the most that fit, slopes increasing."""
    seconds: float
    """Of one micro-batch through the embedding or head, where the rank has them."""
    parameters: float
    """Of those."""


def rank_rooms(
    costs: Costs, decisions: Decisions, in_flight: Sequence[tuple[float, float, float]], levels: tuple[Recompute, ...]
) -> list[RankRoom] | None:
    """What each rank can hold, or None where one can't hold its embedding or head.

    `in_flight` holds for each rank the micro-batches that a block, the embedding and the head have in flight at the least.
    Blocks are taken as divisible, and of the transients only the least counts, so nothing that fits is left out.
    """
    needs, seconds, limit = costs.bytes(decisions), costs.seconds(decisions), float(costs.capacity)
    states = needs["block", "none"].states
    transient = min(needs["block", level].backward_transient for level in levels)
    if decisions.num_virtual_stages > 1:  # the mean is over moments of any stage in either direction
        transient = min(0.0, *(min(need.forward_transient, need.backward_transient) for need in needs.values()))
    last = 0 if decisions.schedule == "ZBVZeroBubble" else len(in_flight) - 1
    rooms = []
    for rank, (flight, embedding_flight, head_flight) in enumerate(in_flight):
        free, fixed, parameters = limit, 0.0, 0.0
        for kind, place, count in (("embedding", 0, embedding_flight), ("head", last, head_flight)):
            if rank == place:
                need, time = needs[kind, "none"], seconds[kind, "none"]  # type: ignore[index]
                free -= need.states + count * need.saved
                fixed += time.forward + time.backward
                parameters += costs.parameters(decisions, kind)  # type: ignore[arg-type]
        if free < 0:
            return None
        free -= min(transient, needs["head", "none"].backward_transient) if rank == last else transient  # the head runs back before its blocks
        points = []
        for level in levels:
            each = states + flight * needs["block", level].saved
            time = seconds["block", level]
            count = max(free, 0.0) / each if each > 0 else math.inf
            points.append((min(count, 1e6 * costs.inputs.model.num_layers), time.forward + time.backward))
        rooms.append(RankRoom(_hull(points), fixed, parameters))
    return rooms


def _hull(points: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The lower hull from (0, 0) through (count, count * seconds each)."""
    hull = [(0.0, 0.0)]
    left = [(count, count * each) for count, each in points if count > 0]
    while True:
        at, taken = hull[-1]
        further = [(count, total) for count, total in left if count > at]
        if not further:
            return tuple(hull)
        hull.append(min(further, key=lambda item: ((item[1] - taken) / (item[0] - at), -item[0])))


class Tail(NamedTuple):
    """Reduction and optimizer of a rank: seconds per parameter, and the part that doesn't depend on them."""

    slope: float
    intercept: float


def tail_of(costs: Costs, decisions: Decisions) -> tuple[Tail, ...]:
    """Lower bounds on the tail of a rank, the largest of which counts."""
    optimizer = costs.optimizer_piece(decisions)
    return tuple(
        Tail(piece.slope + optimizer.slope, piece.intercept * decisions.num_virtual_stages + optimizer.intercept)
        for piece in costs.reduce_pieces(decisions) or (Piece(0.0, 0.0),)
    )


def mean_tail(tails: Sequence[Tail], parameters: float) -> float:
    """Of a rank with the mean number of parameters: the mean over the ranks is at least that, since the tail is convex."""
    return max(tail.slope * parameters + tail.intercept for tail in tails)


def least_work(rooms: Sequence[RankRoom], num_blocks: int) -> float:
    """Least seconds of one micro-batch through all layers, recomputation that memory forces included; infinite if none fit."""
    segments = sorted(
        ((b[1] - a[1]) / (b[0] - a[0]), b[0] - a[0]) for room in rooms for a, b in itertools.pairwise(room.hull)
    )
    total, left = sum(room.seconds for room in rooms), float(num_blocks)
    for slope, length in segments:
        take = min(left, length)
        total, left = total + take * slope, left - take
        if left <= 0:
            return total
    return total if left <= 1e-9 * num_blocks else math.inf


def never_idle_bound(
    decisions: Decisions,
    rooms: Sequence[RankRoom],
    fills: Sequence[float],
    tail: Tail,
    block_parameters: float,
    num_blocks: int,
    at_least: float,
    goal: float,
    microbatches: int | None = None,
) -> float:
    """The least T for which the blocks find room: rank r does its work and its tail within T - fills[r].

    `microbatches` is how many of them a rank's path counts, all by default.

    Found by bisection from `at_least`; infinite where not even `goal` is enough. A rank takes whole blocks.
    """
    m = decisions.num_microbatches if microbatches is None else microbatches

    def blocks_within(seconds: float) -> float:
        total = 0.0
        for rank, room in enumerate(rooms):
            left = seconds - fills[rank] - m * room.seconds - tail.intercept - tail.slope * room.parameters
            if left < 0:
                return 0.0
            held = 0.0
            for (a, start), (b, end) in itertools.pairwise(room.hull):
                cost = m * (end - start) + tail.slope * block_parameters * (b - a)
                if cost >= left:
                    held += (b - a) * left / cost if cost > 0 else b - a
                    break
                held, left = held + b - a, left - cost
            total += math.floor(held * (1 + 1e-9) + 1e-9)
        return total

    enough = num_blocks
    if blocks_within(at_least) >= enough:
        return at_least
    high = goal
    if high == math.inf:
        high = 2 * at_least + 1e-9
        while blocks_within(high) < enough:
            high *= 2
            if high > 1e6 * (at_least + 1e-9):
                return math.inf
    elif blocks_within(high) < enough:
        return math.inf
    low = at_least
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if blocks_within(middle) >= enough else (middle, high)
    return low
