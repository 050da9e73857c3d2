"""The search: which candidate is best, proven by bounds; the ILP decides the stages of those that bounds can't exclude.

Best first over a tree of candidates (`planner.candidates`): the node with the least lower bound is opened next.

    degrees    bound: the mean rank's work                                    (bounds.busy_bound)
    variant    + placement, sequence parallelism, schedule: fill and drain    (bounds.schedule_bound)
    candidate  + ZeRO: reduction and optimizer; excluded if it can't fit      (bounds.tail_bound, bounds.can_hold)
    relaxed    the linear relaxation of the ILP                               (solver.solve_pipeline)
    solved     the ILP, asked for something faster than the best known

The first node whose bound is not below the best plan's time ends the search: all that is left in the queue is bounded by
it, and what was opened has been solved. So the result is optimal over the whole tree, with the bound as its proof.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

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
    zero_stages,
)
from planner.chain import Costs, fullest_in_flight, stages_of
from planner.critical_path import Path, graph
from planner.errors import DoesNotFitError, InputError, SolverError
from planner.estimate import predict
from planner.plan import Decisions, Inputs, Plan, SolverReport, check, digest, replace
from planner.solver import TOLERANCE, Counts, Pipeline, Solution, excess_bytes, solve_pipeline, stage_seconds

SCHEDULE_ORDER = ("1F1B", "GPipe", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "Naive")
"""From plain to exotic: which of equally fast plans is taken."""
MAX_PATHS = 48
"""Critical paths of a schedule's graph that are handed on from one program to the next."""


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


DEGREES, VARIANT, CANDIDATE, RELAXED = range(4)


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


def search(inputs: Inputs, constraints: Constraints | None = None) -> Plan:
    """The fastest plan under the constraints, with the proof that none is faster.

    Raises DoesNotFitError when no plan fits, InputError when the constraints exclude each other, SolverError when the
    solver fails or the time limit passes before any plan is found.
    """
    from planner import reasons

    asked = constraints or Constraints()
    costs = Costs(inputs)
    outcome = explore(costs, asked)
    if outcome.best is None:
        if not outcome.proven:
            raise SolverError(f"no plan was found within the time limit of {asked.time_limit_seconds:g} s; none is proven impossible either")
        raise reasons.does_not_fit(costs, asked)
    decisions = outcome.best.decisions
    check(inputs, decisions, "plan")
    gap = max(0.0, 1.0 - outcome.bound / outcome.best.seconds)
    return Plan(
        inputs=inputs,
        inputs_hash=digest(inputs),
        decisions=decisions,
        predictions=predict(inputs, decisions),
        solver=SolverReport(
            name=outcome.solver,
            status="optimal" if outcome.proven else "time limit",
            objective_seconds=outcome.best.seconds,
            bound_seconds=outcome.best.seconds if gap <= TOLERANCE else outcome.bound,
            gap_fraction=0.0 if gap <= TOLERANCE else gap,
            num_candidates=outcome.num_candidates,
            num_pruned=outcome.num_candidates - outcome.num_solved,
            wall_seconds=outcome.wall_seconds,
            runners_up=reasons.runners_up(costs, asked, outcome),
            reasons=reasons.why(costs, outcome),
        ),
    )


def explore(costs: Costs, constraints: Constraints, cutoff: float = math.inf) -> Outcome:
    """The best candidate with its stages, and the bound on all. With `cutoff` only faster ones are looked for."""
    return _Search(costs, constraints, cutoff).run()


class _Search:
    """The queue, the best plan so far, and the critical paths seen of each schedule's graph."""

    def __init__(self, costs: Costs, constraints: Constraints, cutoff: float) -> None:
        self.costs, self.constraints, self.inputs = costs, constraints, costs.inputs
        self.levels = recompute_levels(constraints)
        if not self.levels:
            raise InputError("forbidden", "recompute", "at least one of none, selective, full must stay allowed")
        self.started = time.monotonic()
        limit = constraints.time_limit_seconds
        self.deadline = None if limit is None else self.started + limit
        self.cutoff = cutoff
        self.best: Found | None = None
        self.others: dict[Decisions, Found] = {}
        self.paths: dict[tuple[Any, ...], dict[Path, None]] = {}
        self.queue: list[Node] = []
        self.num_candidates = self.num_solved = 0
        self.solver = "HiGHS"

    @property
    def goal(self) -> float:
        """Seconds that a plan must beat."""
        return self.best.seconds if self.best else self.cutoff

    def run(self) -> Outcome:
        for degrees in all_degrees(self.inputs, self.constraints):
            self.push_degrees(degrees)
        bound, proven = math.inf, True
        while self.queue:
            node = heapq.heappop(self.queue)
            if node.bound >= self.goal * (1 - TOLERANCE):
                bound = node.bound
                break
            if self.deadline is not None and time.monotonic() > self.deadline:
                bound, proven = node.bound, False
                break
            if not self.open(node):
                bound, proven = min(bound, node.bound), False
        return Outcome(
            self.best, min(bound, self.goal), proven, self.num_candidates, self.num_solved, self.solver, tuple(self.others.values()),
            time.monotonic() - self.started,
        )  # fmt: skip

    def open(self, node: Node) -> bool:
        """Opens a node; False when the time limit cut its program short."""
        if node.level == DEGREES:
            assert isinstance(node.item, Degrees)
            for variant in self.variants(node.item):
                self.push_variant(variant, node.bound)
            return True
        assert isinstance(node.item, Decisions)
        if node.level == VARIANT:
            self.push_candidates(node.item, node.bound)
            return True
        if node.level == CANDIDATE:
            return self.relax(node.item, node.bound)
        return self.solve(node.item, node.bound)

    def push(self, bound: float, level: int, item: Degrees | Decisions) -> None:
        if bound < self.goal * (1 - TOLERANCE):
            heapq.heappush(self.queue, Node(bound, _plainness(item), level, item))

    def push_degrees(self, degrees: Degrees) -> None:
        variants = list(schedules(self.inputs, degrees, self.constraints))
        orders = rank_orders(degrees, self.constraints)
        choices = sequence_parallel_choices(self.inputs, degrees, self.constraints)
        stages = sum(len(zero_stages(degrees, schedule, self.constraints)) for schedule, _ in variants)
        self.num_candidates += stages * len(orders) * len(choices)
        if stages:
            some = [decisions_of(degrees, sequence_parallel=choice, rank_order=order) for choice in choices for order in orders]
            if some:
                fastest = min(self.whole(decisions) for decisions in some)
                self.push(bounds.busy_bound(some[0], fastest), DEGREES, degrees)

    def whole(self, decisions: Decisions) -> float:
        return bounds.whole_seconds(self.costs.seconds(decisions), self.inputs.model.num_layers, self.levels)

    def variants(self, degrees: Degrees) -> Iterator[Decisions]:
        for choice in sequence_parallel_choices(self.inputs, degrees, self.constraints):
            for order in rank_orders(degrees, self.constraints):
                for schedule, v in schedules(self.inputs, degrees, self.constraints):
                    yield decisions_of(degrees, schedule=schedule, num_virtual_stages=v, sequence_parallel=choice, rank_order=order)

    def push_variant(self, decisions: Decisions, above: float) -> None:
        forward, both = self.least_stage(decisions)
        bound = bounds.schedule_bound(decisions, self.whole(decisions), forward, both, self.costs.least_message(decisions))
        self.push(max(bound + self.costs.step_seconds, above), VARIANT, decisions)

    def least_stage(self, decisions: Decisions) -> tuple[float, float]:
        """The least forward, and the least forward and backward seconds of a stage: a stage has at least one layer."""
        times = [time for (_, level), time in self.costs.seconds(decisions).items() if level in (*self.levels, "none")]
        return min(time.forward for time in times), min(time.forward + time.backward for time in times)

    def push_candidates(self, decisions: Decisions, above: float) -> None:
        degrees = Degrees(
            decisions.tensor_parallel, decisions.pipeline_parallel, decisions.data_parallel, decisions.micro_batch_size, decisions.num_microbatches
        )  # fmt: skip
        p = decisions.pipeline_parallel
        for zero in zero_stages(degrees, decisions.schedule, self.constraints):
            candidate = replace(decisions, zero_stage=zero)
            forward, _ = self.least_stage(candidate)
            tail = bounds.tail_bound(
                self.costs.total_parameters(candidate) / p,
                candidate.num_virtual_stages,
                self.costs.reduce_pieces(candidate),
                self.costs.optimizer_piece(candidate),
            )
            fill = (forward + self.costs.least_message(candidate)) * (p - 1) / 2
            bound = bounds.busy_bound(candidate, self.whole(candidate)) + fill + tail + self.costs.step_seconds
            self.push(max(bound, above), CANDIDATE, candidate)

    def relax(self, candidate: Decisions, above: float) -> bool:
        """Excludes the candidate if it can't fit, finds a first plan by simple rules, and raises its bound by the relaxation."""
        if not bounds.can_hold(self.costs, candidate, fullest_in_flight(candidate), self.levels):
            return True
        pipeline = self.costs.pipeline(candidate, self.levels)
        for sizes in (greedy.balanced_sizes(pipeline), greedy.even_sizes(pipeline)):
            counts = greedy.fit(pipeline, sizes)
            if counts is not None:
                self.offer(candidate, pipeline, counts)
        solution = self.program(candidate, pipeline, above, relaxed_only=True)
        if solution.proven and not math.isfinite(solution.bound):
            return True
        self.push(max(solution.bound + self.costs.step_seconds, above), RELAXED, candidate)
        return solution.proven or solution.bound > 0

    def solve(self, candidate: Decisions, above: float) -> bool:
        pipeline = self.costs.pipeline(candidate, self.levels)
        solution = self.program(candidate, pipeline, above)
        self.num_solved += 1
        if solution.counts is not None:
            self.offer(candidate, pipeline, solution.counts)
        return solution.proven

    def program(self, candidate: Decisions, pipeline: Pipeline, above: float, relaxed_only: bool = False) -> Solution:
        shape = _shape(candidate)
        pool = self.paths.setdefault(shape, {})
        solution = solve_pipeline(
            pipeline,
            graph(*shape),
            cutoff=self.goal - self.costs.step_seconds,
            paths=list(pool)[-MAX_PATHS:],
            lower_bound=above - self.costs.step_seconds,
            deadline=self.deadline,
            solver=self.constraints.solver,
            relaxed_only=relaxed_only,
        )
        self.solver = solution.solver
        pool.update(dict.fromkeys(solution.paths))
        return solution

    def offer(self, candidate: Decisions, pipeline: Pipeline, counts: Counts) -> None:
        """Takes a plan that fits, if it is the best so far, and remembers it for comparison."""
        if excess_bytes(pipeline, counts)[0] > 1e-9 * abs(pipeline.limits[0]):
            return
        seconds = graph(*_shape(candidate)).longest(stage_seconds(pipeline, counts)) + self.costs.step_seconds
        found = Found(replace(candidate, stages=stages_of(candidate, counts, self.levels)), seconds)
        if candidate not in self.others or seconds < self.others[candidate].seconds:
            self.others[candidate] = found
        if seconds < self.goal:
            self.best = found


def _shape(decisions: Decisions) -> tuple[str, int, int, int]:
    return decisions.schedule, decisions.pipeline_parallel, decisions.num_virtual_stages, decisions.num_microbatches


def _plainness(item: Degrees | Decisions) -> tuple[Any, ...]:
    """Orders candidates with equal bounds from plain to exotic, and makes the search deterministic."""
    if isinstance(item, Degrees):
        return (0, *item)
    return (
        1,
        SCHEDULE_ORDER.index(item.schedule),
        item.num_virtual_stages,
        item.zero_stage,
        item.rank_order != ("tp", "dp", "pp"),
        item.pipeline_parallel,
        item.tensor_parallel,
        item.micro_batch_size,
        item.sequence_parallel,
        item.rank_order,
    )
