"""Why a plan won, and why the others lost: in words, each with its figure."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator

from planner import bounds, greedy
from planner.candidates import (
    Constraints,
    Degrees,
    all_degrees,
    decisions_of,
    rank_orders,
    recompute_levels,
    schedules,
    sequence_parallel_choices,
    shardings,
)
from planner.chain import Costs, stages_of
from planner.contention import shares_cores
from planner.critical_path import graph
from planner.explore import Found, Outcome, settle
from planner.memory import predict_memory
from planner.moments import least_in_flight
from planner.network import axis_group
from planner.pipeline import stage_seconds
from planner.plan import SCHEDULES, Axis, Decisions, Inputs, Recompute, RunnerUp, block_levels, even_stages, replace
from planner.repairs import shortage
from planner.timing import TimePrediction, predict_time
from planner.words import duration, gib

PARTS = {
    "compute": "compute (recomputation included)",
    "tensor_parallel_communication": "tensor-parallel communication",
    "bubble_and_pipeline_communication": "bubble and pipeline messages",
    "data_parallel_communication": "data-parallel communication",
    "optimizer": "optimizer",
}
NEAR = 5
"""Other degrees that a plan is compared with."""
SETTLING_SECONDS = 0.3
"""CPU-seconds for the stages of all runners-up, the fastest first; those that it does not reach are said to be so much slower at most."""


def runners_up(costs: Costs, constraints: Constraints, outcome: Outcome) -> tuple[RunnerUp, ...]:
    """The best plans that differ from the winner in one decision or more, and the neighbours that don't fit, with reasons."""
    assert outcome.best is not None
    best = outcome.best
    known = {replace(found.decisions, stages=()): (found.seconds, found.decisions) for found in outcome.others}
    fitting: list[tuple[float, Decisions]] = []
    misfits: list[Decisions] = []
    candidates = dict.fromkeys([*_neighbours(costs, constraints, best.decisions), *known])
    own = replace(best.decisions, stages=())
    for candidate in candidates:
        if candidate == own:
            continue
        plan = known.get(candidate) or simple_plan(costs, candidate, recompute_levels(constraints))
        if plan is None:
            misfits.append(candidate)
        elif plan[0] >= best.seconds * (1 - 1e-9):
            fitting.append(plan)
    fitting.sort(key=lambda item: item[0])
    chosen: dict[tuple[str, object], tuple[float, Decisions]] = {}
    for found_seconds, other in fitting:
        for key in _differences(best.decisions, other):
            chosen.setdefault(key, (found_seconds, other))
    kept = list(dict.fromkeys([*fitting[:2], *sorted(chosen.values(), key=lambda item: item[0])]))[: constraints.num_runners_up]
    own_time = predict_time(costs.inputs, best.decisions)
    found = [
        RunnerUp(
            decisions=plan,
            step_seconds=seconds,
            peak_bytes=max(need.total_bytes for need in predict_memory(costs.inputs, plan)),
            why_not=_order_in_words(best.decisions, plan) + why_slower(costs.inputs, own_time, plan, at_most=not settled),
        )
        for seconds, plan, settled in _settled(costs, constraints, best, kept)
    ]
    return (*found, *(_misfit(costs.inputs, candidate, constraints) for candidate in misfits[:2]))


def _settled(costs: Costs, constraints: Constraints, best: Found, plans: Iterable[tuple[float, Decisions]]) -> list[tuple[float, Decisions, bool]]:
    """The plans with the best stages of the same candidates, the fastest first, and whether they are known to be that.

    After `SETTLING_SECONDS` the rest stays as it is; and none is better than the winner, whose gap may be open.
    """
    until, found = time.process_time() + SETTLING_SECONDS, []
    for seconds, plan in plans:
        settled = time.process_time() < until
        if settled:
            other, settled = settle(costs, constraints, Found(plan, seconds))
            if other.seconds >= best.seconds * (1 - 1e-9):
                plan, seconds = other.decisions, other.seconds
        found.append((seconds, plan, settled))
    return sorted(found, key=lambda item: item[0])


def simple_plan(costs: Costs, candidate: Decisions, levels: tuple[Recompute, ...]) -> tuple[float, Decisions] | None:
    """A candidate's step time and plan by simple rules, or None where it doesn't fit."""
    shape = (candidate.schedule, candidate.pipeline_parallel, candidate.num_virtual_stages, candidate.num_microbatches)
    rooms = bounds.rank_rooms(costs, candidate, least_in_flight(*shape), levels)
    if rooms is None or bounds.least_work(rooms, costs.inputs.model.num_layers) == math.inf:
        return None
    pipeline = costs.pipeline(candidate, levels)
    whole = graph(*shape)
    choices = [greedy.balanced_sizes(pipeline), greedy.even_sizes(pipeline)]
    if pipeline.patterns:
        choices = [list(min(pipeline.patterns, key=lambda sizes: (max(sizes), sizes)))]
    best: tuple[float, Decisions] | None = None
    for sizes in choices:
        counts = greedy.fit(pipeline, sizes)
        if counts is not None:
            plan = replace(candidate, stages=stages_of(candidate, counts, levels))
            if shares_cores(costs.inputs.cluster, costs.inputs.cluster.num_gpus):
                seconds = predict_time(costs.inputs, plan).time.step_seconds or math.inf
            else:
                seconds = whole.longest(stage_seconds(pipeline, counts)) + costs.step_seconds
            if best is None or seconds < best[0]:
                best = (seconds, plan)
    return best


def _neighbours(costs: Costs, constraints: Constraints, best: Decisions) -> Iterator[Decisions]:
    """Candidates that differ from a plan in one decision, and stay within the constraints; of other degrees those with the least work."""
    inputs = costs.inputs
    own = replace(best, stages=())
    degrees = Degrees(best.tensor_parallel, best.pipeline_parallel, best.data_parallel, best.micro_batch_size, best.num_microbatches)
    sharded = (best.zero_stage, best.data_parallel_replicate)
    for zero, replicas in shardings(inputs, degrees, best.rank_order, constraints):
        if zero in (0, best.zero_stage) or replicas == best.data_parallel_replicate:
            yield replace(own, zero_stage=zero, data_parallel_replicate=replicas)
    for order in rank_orders(degrees, constraints):
        if sharded in shardings(inputs, degrees, order, constraints):
            yield replace(own, rank_order=order)
    for choice in sequence_parallel_choices(inputs, degrees, constraints):
        yield replace(own, sequence_parallel=choice)
    for name in SCHEDULES:
        variants = [v for schedule, v in schedules(inputs, degrees, constraints) if schedule == name]
        if variants:
            wanted = min(variants, key=lambda v: (abs(v - max(best.num_virtual_stages, 2)), v))
            yield replace(own, schedule=name, num_virtual_stages=wanted)
    found: list[tuple[float, Decisions]] = []
    for other in all_degrees(inputs, constraints):
        changed = sum(a != b for a, b in zip(other[:3], degrees[:3], strict=True))
        near = all(max(a, b) <= 2 * min(a, b) for a, b in zip(other[:4], degrees[:4], strict=True))
        if near and ((changed == 2 and other.micro_batch_size == degrees.micro_batch_size) or (changed == 0 and other != degrees)):
            ways = shardings(inputs, other, best.rank_order, constraints)
            same = [replicas for zero, replicas in ways if zero == best.zero_stage]
            if not same:
                continue
            plain = decisions_of(
                other, zero_stage=best.zero_stage, sequence_parallel=best.sequence_parallel and other.tensor_parallel > 1,
                rank_order=best.rank_order, data_parallel_replicate=sharded[1] if sharded in ways else same[0],
            )  # fmt: skip
            options = dict.fromkeys(schedules(inputs, other, constraints))
            if (best.schedule, best.num_virtual_stages) in options:
                candidate = replace(plain, schedule=best.schedule, num_virtual_stages=best.num_virtual_stages)
            elif ("1F1B", 1) in options and best.schedule == "1F1B":
                candidate = plain
            else:
                continue
            whole = bounds.whole_seconds(costs.seconds(candidate), inputs.model.num_layers, recompute_levels(constraints))
            found.append((bounds.busy_bound(candidate, whole), candidate))
    yield from (candidate for _, candidate in sorted(found, key=lambda item: item[0])[:NEAR])


def _order_in_words(best: Decisions, other: Decisions) -> str:
    """The order of another plan's axes where it differs from the best plan's: "axes in the order tp-pp-dp: "."""
    used = [[axis for axis in plan.rank_order if _size(plan, axis) > 1] for plan in (best, other)]
    return "" if sorted(used[0]) != sorted(used[1]) or used[0] == used[1] else f"axes in the order {'-'.join(used[1])}: "


def _size(decisions: Decisions, axis: Axis) -> int:
    return {"tp": decisions.tensor_parallel, "dp": decisions.data_parallel, "pp": decisions.pipeline_parallel}[axis]


def _differences(best: Decisions, other: Decisions) -> list[tuple[str, object]]:
    names = ("tensor_parallel", "pipeline_parallel", "schedule", "zero_stage", "data_parallel_replicate", "rank_order", "sequence_parallel",
             "micro_batch_size")  # fmt: skip
    return [(name, getattr(other, name)) for name in names if getattr(best, name) != getattr(other, name)]


def why_slower(inputs: Inputs, best: TimePrediction, other: Decisions, *, at_most: bool = False) -> str:
    """What the slower plan loses, the largest parts first, and what it wins back; `at_most` where better stages of it may be there."""
    a, b = best, predict_time(inputs, other)
    total = (b.time.step_seconds or 0.0) - (a.time.step_seconds or 0.0)
    if total <= 1e-6 * (a.time.step_seconds or 1.0):
        return "as fast; the plan that was taken is the plainer one"
    changes = sorted(((b.breakdown.get(part, 0.0) - a.breakdown.get(part, 0.0), words) for part, words in PARTS.items()), reverse=True)
    lost = [f"{duration(change)} more {words}{_where(inputs, other, words)}" for change, words in changes if change > 0.1 * total]
    won = [f"{duration(-change)} of {words}" for change, words in reversed(changes) if -change > 0.1 * total]
    text = f"{'at most ' if at_most else ''}{duration(total)} slower: {', '.join(lost[:2]) or 'a little of everything'}"
    return text + (f"; it saves {won[0]}" if won else "")


def _where(inputs: Inputs, decisions: Decisions, words: str) -> str:
    axes: dict[str, Axis] = {"data-parallel communication": "dp", "tensor-parallel communication": "tp"}
    if words not in axes:
        return ""
    nodes = axis_group(inputs.cluster, decisions, axes[words]).nodes
    return (" inside a node" if nodes == 1 else f" over {nodes} nodes") + (replicas_in_words(decisions) if axes[words] == "dp" else "")


def replicas_in_words(decisions: Decisions) -> str:
    """Over how many ranks states are sharded, where that is not all data-parallel ones: " (states sharded over 8 ranks, 2 replicas)"."""
    replicas = decisions.data_parallel_replicate
    if replicas == 1 or not decisions.zero_stage:
        return ""
    return f" (states sharded over {decisions.data_parallel // replicas} ranks, {replicas} replicas)"


def _misfit(inputs: Inputs, candidate: Decisions, constraints: Constraints) -> RunnerUp:
    """A candidate that fits with no cut of the simple rules, at its least memory among them."""
    level = recompute_levels(constraints)[-1]
    plan = replace(candidate, stages=even_stages(inputs.model, candidate.schedule, candidate.pipeline_parallel, candidate.num_virtual_stages, level))
    rank, over, need = shortage(inputs, plan)
    return RunnerUp(
        decisions=plan,
        step_seconds=None,
        peak_bytes=need,
        why_not=f"{gib(over)} over on pipeline rank {rank}, even with {level} recomputation" if over > 0 else "memory: no cut tried fits with room",
    )


def _recomputation(inputs: Inputs, best: Decisions, constraints: Constraints) -> str:
    """What decides how much is recomputed: memory or the user; memory does not where less, of what is allowed, would fit too."""

    def fits_with(level: Recompute) -> bool:
        return shortage(inputs, replace(best, stages=tuple(replace(stage, recompute=level) for stage in best.stages)))[1] <= 0

    least, asked = recompute_levels(constraints)[0], constraints.fixed.recompute
    used = {level for stage in best.stages for level in block_levels(stage, inputs.model)}
    if used - {least}:
        return "memory does not bind" if fits_with(least) else "memory decides how much is recomputed"
    if asked == "none":
        return "that nothing is recomputed was given by --recompute none"
    if least == "none":
        return "memory does not bind"
    option = f"--recompute {asked}" if asked else " ".join(f"--forbid {name}={value}" for name, value in constraints.forbidden if name == "recompute")
    return f"recomputation was given by {option}; {'memory does not bind' if fits_with('none') else 'without any the plan would not fit'}"


def why(costs: Costs, constraints: Constraints, outcome: Outcome) -> tuple[str, ...]:
    """The placement of the axes and its price elsewhere, and what binds."""
    assert outcome.best is not None
    inputs, best = costs.inputs, outcome.best.decisions
    lines = []
    if inputs.cluster.num_nodes > 1:
        parts = []
        for axis in best.rank_order:
            if _size(best, axis) > 1:
                nodes = axis_group(inputs.cluster, best, axis).nodes
                words = replicas_in_words(best) if axis == "dp" else ""
                parts.append(f"{axis} {_size(best, axis)} {'stays inside a node' if nodes == 1 else f'crosses {nodes} nodes'}{words}")
        lines.append("placement: " + ", ".join(parts) + _other_orders(costs, best, outcome.best.seconds))
    rank, over, _ = shortage(inputs, best)
    lines.append(f"memory: pipeline rank {rank} is fullest, with {gib(-over)} to spare; {_recomputation(inputs, best, constraints)}")
    breakdown = predict_time(inputs, best).breakdown
    total = sum(breakdown.values()) or 1.0
    shares = sorted(((breakdown.get(part, 0.0) / total, words) for part, words in PARTS.items()), reverse=True)
    lines.append("time: " + ", ".join(f"{share:.0%} {words}" for share, words in shares if share >= 0.005))
    return tuple(lines)


def _other_orders(costs: Costs, best: Decisions, seconds: float) -> str:
    degrees = Degrees(best.tensor_parallel, best.pipeline_parallel, best.data_parallel, best.micro_batch_size, best.num_microbatches)
    prices = []
    for order in rank_orders(degrees, Constraints()):
        if order != best.rank_order:
            other = predict_time(costs.inputs, replace(best, rank_order=order)).time.step_seconds or math.inf
            prices.append((other - seconds, "-".join(order)))
    if not prices:
        return ""
    price, order_name = min(prices)
    return f"; the next best order, {order_name}, takes {duration(price)} more" if price > 0 else f"; the order {order_name} is as fast"
