"""The exploration: which candidate is best, proven by bounds; the ILP decides the stages of those that bounds can't exclude.

Best first over a tree of candidates (`planner.candidates`): the node with the least lower bound is opened next.

    degrees    bound: the mean rank's work                                        (bounds.busy_bound)
    layout     + placement, sequence parallelism, ZeRO, HSDP; those that another one
               dominates are left out; + reduction and optimizer                  (layouts, bounds.mean_tail)
    candidate  + schedule: fill and drain                                         (bounds.schedule_bound)
    room       + the recomputation that memory forces, or that nothing fits       (bounds.never_idle_bound)
    cuts       regular cuts: what each rank must recompute in the mean            (regular.RegularCuts.rough)
    walked     regular cuts: the walk without recomputation                       (RegularCuts.walks)
    relaxed    regular cuts: what the fullest moments force; free cuts:
               the linear relaxation of the ILP                                   (RegularCuts.forced, solver.solve_pipeline)
    solved     the ILP, asked for something faster than the best known            (RegularCuts.chosen, solver.solve_pipeline)

A candidate goes back into the queue between these, so that a dearer bound is only asked for where the cheaper ones leave it among the
least.

Where ranks share the cores of a CPU node, how fast one computes depends on what the others do at the time, and no path
bounds that. There each candidate is given the stages of simple rules and walked with its cores shared; the bound is that
of the work alone, and the gap is what is not proven.

The first node whose bound is not below the best plan's time ends the search: all that is left in the queue is bounded by
it, and what was opened has been solved. So the result is optimal over the whole tree, with the bound as its proof.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import time
from typing import Any, NamedTuple

from planner import bounds, greedy
from planner.candidates import (
    Constraints,
    Degrees,
    all_degrees,
    decisions_of,
    degrees_of,
    plainness,
    rank_orders,
    recompute_levels,
    schedules,
    sequence_parallel_choices,
    shape_of,
    shardings,
)
from planner.chain import Costs, Profile, counts_of, dominates, stages_of
from planner.contention import shares_cores
from planner.critical_path import graph
from planner.dive import promising
from planner.errors import InputError
from planner.moments import least_in_flight
from planner.pipeline import Counts, Pipeline, excess_bytes, stage_seconds
from planner.plan import SPLIT_BACKWARD_SCHEDULES, Decisions, replace
from planner.regular import MAX_PATHS, RegularCuts
from planner.solver import TOLERANCE, Patience, Solution, solve_pipeline
from planner.timing import predict_time

RELAXED_ROUNDS, CUT_ROUNDS = 4, 8
"""Linear relaxations of a candidate before the next candidate has its turn."""
FIRST_PLANS = 2
"""Plans that are looked for before anything is proven."""
PATIENCE_SECONDS = 7.0
"""CPU-seconds of a search after which a plan within the accepted gap is enough."""
SETTLE_SECONDS = 0.1
"""CPU-seconds for the stages of one candidate that has lost already, as far as its programs keep to it."""


class Found(NamedTuple):
    """A candidate with stages."""

    decisions: Decisions
    seconds: float
    """Of the step, walked."""


class Node(NamedTuple):
    """An entry of the queue; it is ordered by bound, then from plain to exotic."""

    bound: float
    order: tuple[Any, ...]
    level: int
    item: Degrees | Decisions
    solved: Solution | None = None


DEGREES, LAYOUT, CANDIDATE, ROOM, CUTS, WALKED, RELAXED = range(7)


class Outcome(NamedTuple):
    """What a search found and proved."""

    best: Found | None
    bound: float
    proven: bool
    num_candidates: int
    num_solved: int
    solver: str
    others: tuple[Found, ...]
    """Other plans that were worked out on the way, the fastest of each candidate."""
    wall_seconds: float
    shared: bool
    """Whether ranks share cores, so that step times are walked and not proven."""
    late: bool
    """Whether the time limit has passed."""
    least: bool = False
    """Whether nothing was found, and the plan stands in that needs least memory."""


def explore(costs: Costs, constraints: Constraints, cutoff: float = math.inf) -> Outcome:
    """The best candidate with its stages, and the bound on all. With `cutoff` only faster ones are looked for."""
    if not constraints.free_cuts:
        return _Search(costs, constraints, cutoff).run()
    first = _Search(costs, dataclasses.replace(constraints, free_cuts=False), cutoff)
    regular = first.run()
    second = _Search(Costs(costs.inputs, free_cuts=True), constraints, cutoff)
    second.started, second.deadline = first.started, first.deadline
    second.best, second.others = regular.best, {replace(found.decisions, stages=()): found for found in regular.others}
    return second.run()


def settle(costs: Costs, constraints: Constraints, known: Found) -> tuple[Found, bool]:
    """The best stages of a known plan's candidate, as far as `SETTLE_SECONDS` go, and whether they are within the accepted gap of the best."""
    search = _Search(costs, constraints, math.inf)
    if search.shared:
        return known, True
    candidate = replace(known.decisions, stages=())
    search.patience = Patience(time.process_time() + SETTLE_SECONDS, 1.0)
    search.best = search.others[candidate] = known
    search.push(costs.step_seconds, CANDIDATE, candidate)
    bound, proven = search.drain()
    return search.best, proven or bound >= search.best.seconds * (1 - constraints.accepted_gap)


class _Search:
    """The queue, the best plan so far, and what is known of regular cuts."""

    def __init__(self, costs: Costs, constraints: Constraints, cutoff: float) -> None:
        self.costs, self.constraints, self.inputs = costs, constraints, costs.inputs
        self.levels = recompute_levels(constraints)
        if not self.levels:
            raise InputError("--forbid", "recompute", "at least one of none, selective, full must stay allowed")
        self.started = time.monotonic()
        limit = constraints.time_limit_seconds
        self.deadline = None if limit is None else self.started + limit
        self.patience = Patience(time.process_time() + (PATIENCE_SECONDS if constraints.accepted_gap else 1e9), constraints.accepted_gap)
        self.cutoff = cutoff
        self.best: Found | None = None
        self.others: dict[Decisions, Found] = {}
        self.queue: list[Node] = []
        self.num_candidates = self.num_relaxed = self.num_solved = 0
        self.solver = "HiGHS"
        self.shared = shares_cores(self.inputs.cluster, self.inputs.cluster.num_gpus)
        if self.shared:
            self.solver = "walks with shared cores"
        self.regular = RegularCuts(costs, self.levels, self.shared)

    @property
    def goal(self) -> float:
        """Seconds that a plan must beat."""
        return self.best.seconds if self.best else self.cutoff

    def run(self) -> Outcome:
        for degrees in all_degrees(self.inputs, self.constraints):
            self.push_degrees(degrees)
        if not self.shared:
            self.first_plans()
        bound, proven = self.drain()
        return Outcome(
            self.best, min(bound, self.goal), proven, self.num_candidates, self.num_solved, self.solver, tuple(self.others.values()),
            time.monotonic() - self.started, self.shared, self.deadline is not None and time.monotonic() > self.deadline,
        )  # fmt: skip

    def drain(self) -> tuple[float, bool]:
        """Opens nodes in the order of their bounds until none can hold a better plan; the bound on all, and whether it is proven."""
        bound, proven = math.inf, not self.shared
        while self.queue:
            node = heapq.heappop(self.queue)
            if node.bound >= self.goal * (1 - TOLERANCE):
                bound = min(bound, node.bound)
                break
            late = self.deadline is not None and time.monotonic() > self.deadline
            if late or (node.bound >= self.goal * (1 - self.patience.gap) and self.patience.left() <= 0):
                bound, proven = min(bound, node.bound), False
                break
            left = self.open(node)
            if left < self.goal * (1 - TOLERANCE):
                bound, proven = min(bound, left), False
        return bound, proven

    def first_plans(self) -> None:
        """Finds a good plan before anything is proven: simple rules on the candidates that look fastest."""
        known = [(node.bound, node.item) for node in self.queue if isinstance(node.item, Degrees)]
        found = 0
        for candidate in promising(self.costs, self.constraints, self.levels, known):
            found += self.try_simple(candidate) is not None
            if found == FIRST_PLANS:
                break

    def open(self, node: Node) -> float:
        """Opens a node; gives the bound of what it leaves unproven, which is infinite where all is proven or in the queue again."""
        if node.level == DEGREES:
            assert isinstance(node.item, Degrees)
            for layout in self.layouts(node.item):
                self.push_layout(layout, node.bound)
            return math.inf
        assert isinstance(node.item, Decisions)
        if node.level == LAYOUT:
            self.push_candidates(node.item, node.bound)
        elif self.shared:
            self.try_simple(node.item)
            return node.bound
        elif node.level == CANDIDATE:
            self.push(self.room_bound(node.item, node.bound), ROOM, node.item)
        elif node.level == RELAXED:
            return self.solve(node.item, node.bound)
        elif self.costs.are_regular(node.item):
            self.bound_cuts(node.item, node.bound, node.level)
        else:
            self.relax(node.item, node.bound)
        return math.inf

    def push(self, bound: float, level: int, item: Degrees | Decisions) -> None:
        if bound < self.goal * (1 - TOLERANCE):
            heapq.heappush(self.queue, Node(bound, plainness(item), level, item))

    def push_degrees(self, degrees: Degrees) -> None:
        variants = list(schedules(self.inputs, degrees, self.constraints))
        orders = sorted(rank_orders(degrees, self.constraints), key=lambda order: order.index("tp"))
        choices = sequence_parallel_choices(self.inputs, degrees, self.constraints)
        count = len(variants) * len(choices) * sum(len(shardings(self.inputs, degrees, order, self.constraints)) for order in orders)
        self.num_candidates += count
        if count:
            # a group whose ranks lie further apart is never faster, so the innermost place of tp is the fastest
            some = [decisions_of(degrees, sequence_parallel=choice, rank_order=orders[0]) for choice in choices if orders]
            if some:
                fastest = min(self.whole(decisions) for decisions in some)
                self.push(bounds.busy_bound(some[0], fastest), DEGREES, degrees)

    def whole(self, decisions: Decisions) -> float:
        whole = bounds.whole_seconds(self.costs.seconds(decisions), self.inputs.model.num_layers, self.levels)
        return whole - self.costs.communication(decisions) if self.shared else whole

    def layouts(self, degrees: Degrees) -> list[Decisions]:
        """Placement, sequence parallelism, ZeRO and its replicas, without those that are nowhere better than another one."""
        found: list[tuple[Decisions, Profile]] = []
        for choice in sequence_parallel_choices(self.inputs, degrees, self.constraints):
            for order in rank_orders(degrees, self.constraints):
                if order[0] != "tp" and self.too_slow(decisions_of(degrees, sequence_parallel=choice, rank_order=order)):
                    continue
                for zero, replicas in shardings(self.inputs, degrees, order, self.constraints):
                    layout = decisions_of(
                        degrees, sequence_parallel=choice, rank_order=order, zero_stage=zero, data_parallel_replicate=replicas
                    )
                    if self.layout_bound(layout) < self.goal:
                        found.append((layout, self.costs.profile(layout)))
        found.sort(key=lambda item: plainness(item[0]))
        kept: list[tuple[Decisions, Profile]] = []
        for layout, profile in found:
            if any(dominates(better, profile) for _, better in kept):
                continue
            kept = [(other, worse) for other, worse in kept if not dominates(profile, worse)]
            kept.append((layout, profile))
        return [layout for layout, _ in kept]

    def too_slow(self, layout: Decisions) -> bool:
        """Whether the blocks alone, at the layout's distance between tensor-parallel ranks, take too long for the mean rank."""
        block = self.costs.block_seconds(layout)
        work = self.inputs.model.num_layers * (block.forward + block.backward)
        return bounds.busy_bound(layout, work) >= self.goal

    def layout_bound(self, layout: Decisions) -> float:
        """The mean rank's work, reduction and optimizer."""
        p, bound = layout.pipeline_parallel, bounds.busy_bound(layout, self.whole(layout)) + self.costs.step_seconds
        if self.shared or bound >= self.goal:
            return bound
        return bound + bounds.mean_tail(bounds.tail_of(self.costs, layout), self.costs.total_parameters(layout) / p)

    def push_layout(self, layout: Decisions, above: float) -> None:
        self.push(max(self.layout_bound(layout), above), LAYOUT, layout)

    def push_candidates(self, layout: Decisions, above: float) -> None:
        whole, weight, least = self.whole(layout), self.weight(layout), bounds.least_stages(self.costs, layout, self.levels)
        for schedule, v in schedules(self.inputs, degrees_of(layout), self.constraints):
            candidate = replace(layout, schedule=schedule, num_virtual_stages=v)
            bound = above if self.shared else bounds.schedule_bound(candidate, whole, least, weight)
            self.push(max(bound + self.costs.step_seconds, above), CANDIDATE, candidate)

    def weight(self, decisions: Decisions) -> float:
        """Seconds of the weight gradients of one micro-batch through all layers."""
        seconds = self.costs.seconds(decisions)
        ends = seconds["embedding", "none"].backward_weight + seconds["head", "none"].backward_weight
        return ends + self.inputs.model.num_layers * seconds["block", "none"].backward_weight

    def room_bound(self, candidate: Decisions, above: float) -> float:
        """The bound with the recomputation that memory forces; infinite if the blocks don't fit within the goal."""
        costs, blocks = self.costs, self.inputs.model.num_layers
        if costs.are_regular(candidate):
            above = max(above, bounds.regular_bound(costs, candidate, self.levels) + costs.step_seconds)
            if above >= self.goal * (1 - TOLERANCE):
                return math.inf
        rooms = bounds.rank_rooms(costs, candidate, least_in_flight(*shape_of(candidate)), self.levels)
        whole = math.inf if rooms is None else bounds.least_work(rooms, blocks)
        if rooms is None or whole == math.inf:
            return math.inf
        least = bounds.least_stages(costs, candidate, self.levels)
        bound = max(bounds.schedule_bound(candidate, whole, least, self.weight(candidate)), above - costs.step_seconds)
        goal = self.goal - costs.step_seconds
        ranks, tails = range(candidate.pipeline_parallel), bounds.tail_of(costs, candidate)
        paths = [([least.fill(rank, False) for rank in ranks], tail) for tail in tails]
        if candidate.schedule not in SPLIT_BACKWARD_SCHEDULES:
            ends = min(tail.intercept for tail in tails)
            paths.append(([least.fill(rank, True) for rank in ranks], bounds.Tail(0.0, ends)))
        each, p, m = costs.parameters(candidate, "block"), candidate.pipeline_parallel, candidate.num_microbatches
        for fills, tail in paths:
            if bound < goal:
                bound = bounds.never_idle_bound(candidate, rooms, fills, tail, each, blocks, bound, goal)
        if candidate.schedule == "1F1B" and m > p + 1 > 2 and bound < goal:
            fills = [2 * (whole + (p - 1) * least.message)] * p
            bound = bounds.never_idle_bound(candidate, rooms, fills, bounds.Tail(0.0, 0.0), each, blocks, bound, goal, m - p - 1)
        return bound + costs.step_seconds

    def bound_cuts(self, candidate: Decisions, above: float, level: int) -> None:
        """Raises the bound of regular cuts a step: by what each rank must recompute, by walks, by what its fullest moments force.

        Each step costs more than the one before, so that a candidate comes back to the queue in between.
        """
        timed = self.costs.pipeline(candidate, self.levels, timed_only=True)
        if level == ROOM:
            found = [bound for bound, _ in self.regular.rough(candidate, timed, self.goal).values()]
        elif level == CUTS:
            self.num_relaxed += 1
            found = [bound for bound, _ in self.regular.walks(candidate, timed, self.goal)]
        else:
            found = [bound for bound, _ in self.regular.forced(candidate, self.costs.pipeline(candidate, self.levels), self.goal)]
        following = {ROOM: CUTS, CUTS: WALKED, WALKED: RELAXED}
        self.push(max(above, min(found)), following[level], candidate)

    def relax(self, candidate: Decisions, above: float) -> None:
        """Finds a first plan with free cuts by simple rules, and raises the bound by the linear relaxation."""
        self.num_relaxed += 1
        if candidate not in self.others:
            self.try_simple(candidate)
        if above >= self.goal * (1 - TOLERANCE):
            return
        solution = self.program(candidate, self.costs.pipeline(candidate, self.levels), above, RELAXED_ROUNDS)
        bound = max(solution.bound + self.costs.step_seconds, above)
        if not solution.proven:
            self.push(bound, ROOM if bound > above * (1 + 1e-3) else RELAXED, candidate)

    def try_simple(self, candidate: Decisions) -> Found | None:
        """The better of the plans that simple rules give, if they fit."""
        timed = self.costs.pipeline(candidate, self.levels, timed_only=True)
        if timed.patterns:
            bound, sizes = self.regular.walks(candidate, timed, self.goal)[0]
            choices = [list(sizes)] if bound < self.goal or self.shared else []
        else:
            choices = [greedy.balanced_sizes(timed), greedy.even_sizes(timed)]
        pipeline = self.costs.pipeline(candidate, self.levels) if choices else timed
        for choice in choices:
            counts = greedy.fit(pipeline, choice)
            if counts is not None:
                self.offer(candidate, pipeline, counts, fits=True)
        return self.others.get(candidate)

    def solve(self, candidate: Decisions, above: float) -> float:
        """Solves the ILP of a candidate, where cuts are regular one by one; gives the bound of what is not proven."""
        pipeline = self.costs.pipeline(candidate, self.levels)
        self.num_solved += 1
        if not pipeline.patterns:
            return self.solved(candidate, pipeline, above)
        if candidate not in self.others:
            self.try_simple(candidate)
        self.regular.walks(candidate, pipeline, self.goal, every=True)
        left = math.inf
        for bound, sizes in self.regular.forced(candidate, pipeline, self.goal, every=True):
            if bound >= self.goal * (1 - TOLERANCE):
                break
            one, bound = self.regular.chosen(candidate, self.regular.one(candidate, pipeline, sizes), bound, self.goal)
            if bound >= self.goal * (1 - TOLERANCE):
                continue
            start = self.starting(candidate, one, sizes)
            if start is not None:
                better, paths = greedy.improve(one, graph(*shape_of(candidate)), start)
                self.offer(candidate, one, better)
                self.regular.pool(candidate).update(dict.fromkeys(paths))
            if all(one.choices):  # the relaxation finds paths, by which choices fall out
                relaxed = self.program(candidate, one, bound, CUT_ROUNDS)
                if relaxed.proven:
                    continue
                one, bound = self.regular.chosen(candidate, one, max(bound, relaxed.bound + self.costs.step_seconds), self.goal)
                if bound >= self.goal * (1 - TOLERANCE):
                    continue
            left = min(left, self.solved(candidate, one, bound))
        return left

    def starting(self, candidate: Decisions, pipeline: Pipeline, sizes: tuple[int, ...]) -> Counts | None:
        """Stages of these sizes that fit, if any are known or found at once."""
        if candidate in self.others:
            known = self.others[candidate].decisions
            if tuple(stage.num_layers for stage in known.stages) == sizes:
                return counts_of(known, self.inputs.model, self.levels)
        return greedy.fit(pipeline, list(sizes))

    def solved(self, candidate: Decisions, pipeline: Pipeline, above: float) -> float:
        """Solves one ILP; gives its bound, or infinity where it is proven."""
        solution = self.program(candidate, pipeline, above)
        if solution.counts is not None:
            self.offer(candidate, pipeline, solution.counts)
        return math.inf if solution.proven else max(above, solution.bound + self.costs.step_seconds)

    def program(self, candidate: Decisions, pipeline: Pipeline, above: float, relaxed_rounds: int | None = None) -> Solution:
        pool = self.regular.pool(candidate)
        solution = solve_pipeline(
            pipeline,
            graph(*shape_of(candidate)),
            cutoff=self.goal - self.costs.step_seconds,
            paths=list(pool)[-MAX_PATHS:],
            lower_bound=above - self.costs.step_seconds,
            deadline=self.deadline,
            patience=self.patience,
            solver=self.constraints.solver,
            relaxed_rounds=relaxed_rounds,
            start=counts_of(self.others[candidate].decisions, self.inputs.model, self.levels) if candidate in self.others else None,
        )
        self.solver = solution.solver
        pool.update(dict.fromkeys(solution.paths))
        return solution

    def offer(self, candidate: Decisions, pipeline: Pipeline, counts: Counts, *, fits: bool = False) -> None:
        """Takes a plan that fits, if it is the best so far, and remembers it for comparison."""
        if not fits and excess_bytes(pipeline, counts)[0] > 1e-9 * abs(pipeline.limits[0]):
            return
        plan = replace(candidate, stages=stages_of(candidate, counts, self.levels))
        if self.shared:  # which the graph does not know
            seconds = predict_time(self.inputs, plan).time.step_seconds or math.inf
        else:
            seconds = graph(*shape_of(candidate)).longest(stage_seconds(pipeline, counts)) + self.costs.step_seconds
        found = Found(plan, seconds)
        if candidate not in self.others or seconds < self.others[candidate].seconds:
            self.others[candidate] = found
        if self.best is None:
            better = seconds < self.cutoff
        else:
            tie = abs(seconds - self.best.seconds) <= 1e-9 * seconds
            better = seconds < self.best.seconds if not tie else plainness(candidate) < plainness(self.best.decisions)
        if better:
            self.best = found
