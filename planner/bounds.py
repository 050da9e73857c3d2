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
- *Naive* has one path: m (W + 2 (p - 1) c).

`can_hold` asks how many blocks the memory of the ranks can hold, each at its smallest level.
"""

from __future__ import annotations

import math

from planner.chain import Costs, Layer
from planner.layer_time import LayerSeconds
from planner.plan import SPLIT_BACKWARD_SCHEDULES, Decisions, Recompute


def whole_seconds(seconds: dict[Layer, LayerSeconds], num_blocks: int, levels: tuple[Recompute, ...]) -> float:
    """W: one micro-batch through all layers, each at its fastest level."""
    ends = sum(seconds[kind, "none"].forward + seconds[kind, "none"].backward for kind in ("embedding", "head"))
    return ends + num_blocks * min(seconds["block", level].forward + seconds["block", level].backward for level in levels)


def busy_bound(decisions: Decisions, whole: float) -> float:
    """No schedule can be faster than the mean rank's work."""
    return decisions.num_microbatches * whole / decisions.pipeline_parallel


def schedule_bound(
    decisions: Decisions, whole: float, least_forward: float, least_stage: float, message: float
) -> float:
    """A lower bound without reduction and optimizer. `least_forward` and `least_stage` are the least f_s and w_s."""
    p, m = decisions.pipeline_parallel, decisions.num_microbatches
    if p == 1:
        return m * whole
    if decisions.schedule == "Naive":
        return m * (whole + 2 * (p - 1) * message)
    filled = whole * (m + p - 1) / p
    if decisions.schedule == "GPipe":
        return filled + 2 * (p - 1) * message
    if decisions.schedule == "1F1B":
        trips = math.ceil(m / p) * (whole + 2 * (p - 1) * message)
        return max(trips, filled + 2 * (p - 1) * message) if m > p else max(trips, whole * (1 + (m - 1) / (2 * p)))
    each = least_forward + message if decisions.schedule in SPLIT_BACKWARD_SCHEDULES else least_stage + 2 * message
    return m * whole / p + each * (p - 1) / 2


def tail_bound(pipeline_rank_parameters: float, stages_per_rank: int, pieces: tuple[tuple[float, float], ...], optimizer: tuple[float, float]) -> float:
    """Reduction and optimizer of a rank that holds the mean number of parameters: a mean over ranks is at least that."""
    reduction = max((slope * pipeline_rank_parameters + stages_per_rank * intercept for slope, intercept in pieces), default=0.0)
    return reduction + optimizer[0] * pipeline_rank_parameters + optimizer[1]


def can_hold(costs: Costs, decisions: Decisions, in_flight: tuple[tuple[int, ...], ...], levels: tuple[Recompute, ...]) -> bool:
    """False where the memory of all ranks together can't hold the blocks: a proof that nothing fits.

    `in_flight` holds for each rank the micro-batches of each of its stages at its fullest moment.
    """
    needs = costs.bytes(decisions)
    least = min(needs["block", level].saved for level in levels)
    transient = min(needs["block", level].backward_transient for level in levels)
    states, limit = needs["block", "none"].states, costs.limit(decisions)
    embedding, head = needs["embedding", "none"], needs["head", "none"]
    room = 0.0
    for rank, counts in enumerate(in_flight):
        free = limit - transient
        if rank == 0:
            free -= embedding.states + embedding.saved
        if rank == (0 if decisions.schedule == "ZBVZeroBubble" else len(in_flight) - 1):
            free -= head.states + head.saved
        each = states + min(counts) * least
        if free > 0:
            room += math.floor(free / each + 1e-9) if each > 0 else math.inf
    return room >= costs.inputs.model.num_layers
