"""The search for a traced module: data and pipeline degrees, micro-batch size, schedule, ZeRO stage, cuts, recomputation.

Candidates are taken in the order of their lower bounds (`planner.chain_bounds`). Each is given a first plan by a shortest
path over its cuts, and then to the integer program of `planner.solver`, asked for something faster than the best known.
The first candidate whose bound is not below the best plan's time ends the search, so the result is optimal over all.

Tensor parallelism is 1: how to split a module's products is not known of an arbitrary one. Where ranks share cores no
path bounds their speed: plans are then compared by their walks, and only the work alone is a bound.
"""

from __future__ import annotations

import heapq
import math
import time
from typing import Any, NamedTuple

from planner.candidates import AXES, Constraints, Degrees, decisions_of, divisors
from planner.chain_bounds import ChainBound
from planner.chain_costs import LEVELS, ChainCosts, counts_of, predict, stages_of, step_seconds
from planner.chain_plan import CHAIN_SCHEDULES, CHAIN_ZERO_STAGES, ChainInputs, ChainPlan, check_chain
from planner.critical_path import Path, graph
from planner.errors import DoesNotFitError, InputError, SolverError
from planner.pipeline import Counts, Pipeline, excess_bytes, stage_seconds
from planner.plan import Axis, Decisions, RunnerUp, SolverReport, digest, replace
from planner.solver import TOLERANCE, solve_pipeline

GIB = 2**30
MAX_PATHS = 48
"""Critical paths of a schedule that are handed on from one program to the next."""


class Candidate(NamedTuple):
    """A choice of everything but the stages. The order is that of the search: bound first, then from plain to exotic."""

    bound: float
    plainness: tuple[Any, ...]
    decisions: Decisions


class Outcome(NamedTuple):
    """What was found and proved."""

    best: Decisions | None
    seconds: float
    bound: float
    proven: bool
    num_candidates: int
    num_solved: int
    solver: str
    others: dict[Decisions, tuple[Decisions, float]]
    """The best stages found of each candidate, with their step time."""


def candidates(costs: ChainCosts, constraints: Constraints) -> list[Decisions]:
    """Every choice that the rules and the constraints allow, without stages. Raises InputError where there is none."""
    inputs, fixed = costs.inputs, constraints.fixed
    gpus, batch, n = inputs.cluster.num_gpus, inputs.training.global_batch_size, costs.model.num_layers
    for name, only in (("tensor_parallel", 1), ("num_virtual_stages", 1), ("data_parallel_replicate", 1), ("sequence_parallel", False)):
        if getattr(fixed, name) not in (None, only):
            allowed = f"a traced module is not split that way: {'off' if only is False else only} is the only value"
            raise InputError(f"--{name.replace('_', '-')}", getattr(fixed, name), allowed)
    if fixed.schedule not in (None, *CHAIN_SCHEDULES):
        raise InputError("--schedule", fixed.schedule, f"one of {', '.join(CHAIN_SCHEDULES)} is expected for a traced module")
    if fixed.zero_stage not in (None, *CHAIN_ZERO_STAGES):
        raise InputError("--zero-stage", fixed.zero_stage, "0 or 1 is expected for a traced module")
    found = []
    for p in divisors(gpus):
        dp = gpus // p
        if p > n or batch % dp or not (constraints.allows("pipeline_parallel", p) and constraints.allows("data_parallel", dp)):
            continue
        for micro in divisors(batch // dp):
            if not constraints.allows("micro_batch_size", micro):
                continue
            degrees = Degrees(1, p, dp, micro, batch // dp // micro)
            found += [
                decisions_of(degrees, schedule=schedule, zero_stage=zero, rank_order=order)
                for schedule in _schedules(p, constraints)
                for zero in (_zero_stages(dp, constraints))
                for order in _orders(p, dp, constraints)
            ]
    if not found:
        allowed = (
            f"no division of {gpus} GPUs into data x pipeline parallel fits {costs.model.name}, the batch and what was given: the "
            f"data-parallel degree must divide the batch, and pipeline parallel is at most {n}, the layers that it can be cut into"
        )
        raise InputError("--global-batch-size", batch, allowed)
    return found


def _schedules(p: int, constraints: Constraints) -> list[str]:
    asked = constraints.fixed.schedule
    if p == 1:
        return [asked or "1F1B"] if constraints.allows("schedule", asked or "1F1B") else []
    return [name for name in CHAIN_SCHEDULES if constraints.allows("schedule", name) and (name != "Naive" or asked == "Naive")]


def _zero_stages(dp: int, constraints: Constraints) -> list[int]:
    allowed = [stage for stage in CHAIN_ZERO_STAGES if constraints.allows("zero_stage", stage)]
    return allowed[:1] if dp == 1 else allowed


def _orders(p: int, dp: int, constraints: Constraints) -> list[tuple[Axis, ...]]:
    orders: tuple[tuple[Axis, ...], ...] = (AXES, ("tp", "pp", "dp")) if p > 1 and dp > 1 else (AXES,)
    if constraints.rank_order is not None:
        orders = (constraints.rank_order,)
    return [order for order in orders if constraints.allows("rank_order", order)]


class _Search:
    def __init__(self, costs: ChainCosts, constraints: Constraints) -> None:
        self.costs, self.constraints = costs, constraints
        fixed = constraints.fixed.recompute
        if fixed == "selective":
            raise InputError("--recompute", fixed, "none or full is expected for a traced module")
        self.levels = tuple(level for level in LEVELS if constraints.allows("recompute", level) and fixed in (None, level))
        if not self.levels:
            raise InputError("forbidden", "recompute", "none or full must stay allowed")
        limit = constraints.time_limit_seconds
        self.deadline = None if limit is None else time.monotonic() + limit
        self.best: Decisions | None = None
        self.seconds = math.inf
        self.others: dict[Decisions, tuple[Decisions, float]] = {}
        self.solver = "HiGHS"
        self.paths: dict[tuple[str, int, int, int], dict[Path, None]] = {}
        """Critical paths that programs of a schedule have found, which bound all others of it."""
        self.fixed = costs.inputs.cluster.efficiency.step_seconds

    def run(self) -> Outcome:
        every = candidates(self.costs, self.constraints)
        queue = [Candidate(self.work(decisions), _plainness(decisions), decisions) for decisions in self.undominated(every)]
        heapq.heapify(queue)
        opened: set[Decisions] = set()
        bound, proven, solved = math.inf, not self.costs.shared, 0
        while queue:
            at, plainness, decisions = heapq.heappop(queue)
            if at >= self.seconds * (1 - TOLERANCE):
                bound = min(bound, at)
                break
            if self.deadline is not None and time.monotonic() > self.deadline:
                bound, proven = min(bound, at), False
                break
            pipeline = self.costs.pipeline(decisions, self.levels)
            if decisions not in opened:  # the cheap bound was first; now a better one, and a first plan
                opened.add(decisions)
                walks = ChainBound(pipeline, decisions.schedule, decisions.num_microbatches)
                goal = math.inf if self.costs.shared or self.best is None else self.seconds - self.fixed
                better = walks.bound(goal)
                if better < math.inf:
                    self.offer(decisions, pipeline, walks.balanced())
                    if not self.costs.shared:
                        heapq.heappush(queue, Candidate(max(at, better + self.fixed), plainness, decisions))
                    else:
                        self.improve(decisions, pipeline)
                        bound = min(bound, at)
                continue
            solved += 1
            reached, certain = self.solve(decisions, pipeline, at)
            bound, proven = min(bound, reached), proven and certain
        bound = min(bound, self.seconds)
        return Outcome(self.best, self.seconds, bound, proven, len(every), solved, self.solver, self.others)

    def undominated(self, every: list[Decisions]) -> list[Decisions]:
        """Without those that another placement or ZeRO stage is at least as good as in every figure."""
        kept: dict[tuple[Any, ...], list[tuple[Decisions, tuple[float, ...]]]] = {}
        for decisions in sorted(every, key=_plainness):
            figures = _figures(self.costs.pipeline(decisions, self.levels))
            group = kept.setdefault((decisions.pipeline_parallel, decisions.micro_batch_size, decisions.schedule), [])
            if not any(_no_worse(other, figures) for _, other in group):
                group[:] = [(one, other) for one, other in group if not _no_worse(figures, other)]
                group.append((decisions, figures))
        return [decisions for group in kept.values() for decisions, _ in group]

    def work(self, decisions: Decisions) -> float:
        """The mean rank's work and the fill of the pipeline: a bound for any stages."""
        p, m, b = decisions.pipeline_parallel, decisions.num_microbatches, decisions.micro_batch_size
        whole = sum(sum(self.costs.times(layer, b)) for layer in range(self.costs.model.num_layers))
        if self.costs.shared:
            return m * whole / p
        return (m * whole if decisions.schedule == "Naive" else max(m * whole / p, whole)) + self.fixed

    def solve(self, decisions: Decisions, pipeline: Pipeline, at: float) -> tuple[float, bool]:
        """Gives the candidate to the integer program; the bound that it reaches, and whether that settles it."""
        known = self.others.get(decisions)
        shape = (decisions.schedule, decisions.pipeline_parallel, 1, decisions.num_microbatches)
        pool = self.paths.setdefault(shape, {})
        solution = solve_pipeline(
            pipeline,
            graph(*shape),
            paths=list(pool)[-MAX_PATHS:],
            cutoff=self.seconds - self.fixed,
            start=counts_of(known[0].stages, self.costs.model.num_layers, self.levels) if known else None,
            lower_bound=at - self.fixed,
            deadline=self.deadline,
            solver=self.constraints.solver,
        )
        self.solver = solution.solver
        pool.update(dict.fromkeys(solution.paths))
        self.offer(decisions, pipeline, solution.counts)
        return solution.bound + self.fixed, solution.proven

    def improve(self, decisions: Decisions, pipeline: Pipeline) -> None:
        """Where cores are shared: the best stages as if every rank always had its share, compared by the walk."""
        left = None if self.deadline is None else min(self.deadline, time.monotonic() + 1.0)
        if decisions.pipeline_parallel > 1:
            whole = graph(decisions.schedule, decisions.pipeline_parallel, 1, decisions.num_microbatches)
            solution = solve_pipeline(pipeline, whole, deadline=left, solver=self.constraints.solver)
            self.offer(decisions, pipeline, solution.counts)

    def offer(self, decisions: Decisions, pipeline: Pipeline, counts: Counts | None) -> None:
        """Takes a plan that fits, if it is the fastest so far."""
        if counts is None or excess_bytes(pipeline, counts)[0] > 1e-9 * abs(pipeline.limits[0]):
            return
        plan = replace(decisions, stages=stages_of(decisions, counts, self.levels))
        if self.costs.shared:
            seconds = step_seconds(self.costs, plan) + self.fixed
        else:
            whole = graph(decisions.schedule, decisions.pipeline_parallel, 1, decisions.num_microbatches)
            seconds = whole.longest(stage_seconds(pipeline, counts)) + self.fixed
        if decisions not in self.others or seconds < self.others[decisions][1]:
            self.others[decisions] = (plan, seconds)
        close = abs(seconds - self.seconds) <= TOLERANCE * seconds
        if self.best is None or (seconds < self.seconds and not close) or (close and _plainness(plan) < _plainness(self.best)):
            self.best, self.seconds = plan, min(seconds, self.seconds) if close else seconds


def _figures(pipeline: Pipeline) -> tuple[float, ...]:
    """All in which candidates with the same degrees, micro-batch and schedule differ; less is better in each."""
    fixed = [pipeline.fixed_seconds[key] for key in sorted(pipeline.fixed_seconds)]
    messages = [edge.message * pipeline.slow(stage) for edge in pipeline.edges for stage in range(pipeline.num_stages - 1)]
    pieces = [value for piece in (*pipeline.reduce_pieces, pipeline.optimizer_piece) for value in piece]
    return (*(run.states for run in pipeline.runs), *fixed, *messages, *pieces)


def _no_worse(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(a <= b + 1e-12 * abs(b) for a, b in zip(one, other, strict=True))


def _plainness(decisions: Decisions) -> tuple[Any, ...]:
    """Orders equally fast plans from plain to exotic."""
    return (
        CHAIN_SCHEDULES.index(decisions.schedule), decisions.zero_stage, decisions.pipeline_parallel, decisions.rank_order != AXES,
        -decisions.micro_batch_size,
    )  # fmt: skip


def search_chain(inputs: ChainInputs, constraints: Constraints | None = None) -> ChainPlan:
    """The fastest plan of a traced module, with the proof that none is faster.

    Raises DoesNotFitError when no plan fits, InputError when the constraints exclude each other, SolverError when the
    solver fails or the time limit passes before any plan is found.
    """
    asked = constraints or Constraints()
    started = time.monotonic()
    costs = ChainCosts(inputs)
    outcome = _Search(costs, asked).run()
    if outcome.best is None:
        if not outcome.proven and not costs.shared:
            raise SolverError(f"no plan was found within the time limit of {asked.time_limit_seconds:g} s; none is proven impossible either")
        raise _does_not_fit(costs, asked)
    decisions = outcome.best
    check_chain(inputs, decisions)
    predictions = predict(costs, decisions)
    objective = predictions.time.step_seconds or outcome.seconds
    gap = max(0.0, 1.0 - outcome.bound / objective)
    gap = 0.0 if gap <= 2 * TOLERANCE else gap
    return ChainPlan(
        inputs=inputs,
        inputs_hash=digest(inputs),
        decisions=decisions,
        predictions=predictions,
        solver=SolverReport(
            name="walks with shared cores" if costs.shared else outcome.solver,
            status="optimal" if outcome.proven else "not proven: cores are shared" if costs.shared else "time limit",
            objective_seconds=objective,
            bound_seconds=objective if gap == 0.0 else outcome.bound,
            gap_fraction=gap,
            num_candidates=outcome.num_candidates,
            num_pruned=outcome.num_candidates - (len(outcome.others) if costs.shared else outcome.num_solved),
            wall_seconds=time.monotonic() - started,
            runners_up=_runners_up(costs, asked, outcome),
            reasons=_reasons(costs, decisions, asked),
        ),
    )


def _runners_up(costs: ChainCosts, constraints: Constraints, outcome: Outcome) -> tuple[RunnerUp, ...]:
    """The fastest other candidates that were worked out, one for each pair of degrees and schedule, and why each lost."""
    best = outcome.best
    assert best is not None
    won = predict(costs, best)
    found: dict[tuple[Any, ...], tuple[Decisions, float]] = {}
    for plan, seconds in sorted(outcome.others.values(), key=lambda item: item[1]):
        if replace(plan, stages=()) != replace(best, stages=()):
            found.setdefault((plan.pipeline_parallel, plan.schedule, plan.zero_stage), (plan, seconds))
    rows = []
    for plan, seconds in list(found.values())[: constraints.num_runners_up]:
        predictions = predict(costs, plan)
        lost = {
            name: value - won.time.breakdown_seconds.get(name, 0.0) for name, value in predictions.time.breakdown_seconds.items()
        }  # fmt: skip
        part = max(lost, key=lambda name: lost[name])
        why = f"{(seconds - outcome.seconds) * 1e3:.3g} ms slower: {lost[part] * 1e3:.3g} ms more {part.replace('_', ' ')}"
        rows.append(RunnerUp(decisions=plan, step_seconds=seconds, peak_bytes=predictions.memory.total_bytes, why_not=why))
    return tuple(rows)


def _reasons(costs: ChainCosts, decisions: Decisions, constraints: Constraints) -> tuple[str, ...]:
    """What the cuts balance, against stages with equal numbers of layers."""
    lines = ["a traced module is not split inside its layers: tensor parallel 1"]
    if decisions.pipeline_parallel == 1:
        return tuple(lines)
    times = [costs.times(layer, decisions.micro_batch_size) for layer in range(costs.model.num_layers)]

    def slowest(stages: Any) -> float:
        return max(sum(sum(times[layer]) for layer in range(s.first_layer, s.first_layer + s.num_layers)) for s in stages)

    share = sum(map(sum, times)) / decisions.pipeline_parallel / slowest(decisions.stages)
    lines.append(f"cuts by time: the mean stage takes {share:.0%} of the slowest one's seconds (recomputation left out)")
    even = even_split(costs, decisions)
    if even is None:
        lines.append("stages with equal numbers of layers do not fit")
    else:
        mine, other = step_seconds(costs, decisions), step_seconds(costs, even)
        lines.append(f"stages with equal numbers of layers would take {other / mine:.2f} times as long")
    return tuple(lines)


def even_split(costs: ChainCosts, decisions: Decisions) -> Decisions | None:
    """The same decisions with equal numbers of layers per stage and the recomputation that this needs; None if none fits."""
    pipeline = costs.pipeline(decisions)
    n, p = costs.model.num_layers, decisions.pipeline_parallel
    edges = tuple(index * n // p for index in range(p + 1))
    counts = ChainBound(pipeline, decisions.schedule, decisions.num_microbatches).counts(edges)
    return None if counts is None else replace(decisions, stages=stages_of(decisions, counts, LEVELS))


def _does_not_fit(costs: ChainCosts, constraints: Constraints) -> DoesNotFitError:
    """The candidate that is nearest to fitting, and how many bytes it is short of at the least, whatever the cuts."""
    every = candidates(costs, constraints)
    smallest = {p: min(d.micro_batch_size for d in every if d.pipeline_parallel == p) for p in {d.pipeline_parallel for d in every}}
    nearest: tuple[float, Decisions, int] | None = None
    for decisions in every:
        if decisions.micro_batch_size == smallest[decisions.pipeline_parallel]:
            over, stage = _least_excess(costs.pipeline(decisions, tuple(level for level in LEVELS if constraints.allows("recompute", level))))
            if nearest is None or over < nearest[0]:
                nearest = (over, decisions, stage)
    assert nearest is not None
    over, decisions, stage = nearest
    again = "everything recomputed" if constraints.allows("recompute", "full") else "nothing recomputed"
    message = (
        f"no plan of {costs.model.name} fits on {costs.inputs.cluster.num_gpus} x {costs.inputs.cluster.gpu.name}: with pipeline parallel "
        f"{decisions.pipeline_parallel}, micro-batches of {decisions.micro_batch_size} and {again}, rank {stage} is {over / GIB:,.2f} GiB short "
        "of memory under the best cuts"
    )
    repairs = [f"GPUs with {(costs.capacity + over) / GIB:,.2f} GiB each"]
    if decisions.pipeline_parallel < costs.model.num_layers:
        repairs.append(f"more pipeline stages: up to {costs.model.num_layers}, on more GPUs where these are used up")
    return DoesNotFitError(message, tuple(repairs))


def _least_excess(pipeline: Pipeline) -> tuple[float, int]:
    """Bytes by which the worst rank lies above its limit under the cuts that make that least, and the rank."""
    n, p = len(pipeline.runs), pipeline.num_stages
    least = [min(run.options, key=lambda option: option.saved) for run in pipeline.runs]
    kept = {edge.source: edge.kept for edge in pipeline.edges}
    flight = [max(saved for moment in pipeline.moments for stage, saved, _ in moment.in_flight if stage == s) for s in range(p)]
    best: list[tuple[float, int]] = [(-math.inf, 0)] + [(math.inf, 0)] * n  # by the layers that are placed
    for stage in range(p):
        row: list[tuple[float, int]] = [(math.inf, stage)] * (n + 1)
        for first in range(stage, n):
            need = transient = 0.0
            for end in range(first + 1, n + 1):
                option = least[end - 1]
                need += pipeline.runs[end - 1].states + flight[stage] * option.saved
                transient = max(transient, option.forward_transient, option.backward_transient)
                held = need + transient + flight[stage] * (kept.get(end - 1, 0.0) if end < n else 0.0)
                row[end] = min(row[end], max(best[first], (held - pipeline.limits[stage], stage)))
        best = row
    return best[n]
