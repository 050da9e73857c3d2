"""The search: inputs and constraints to the best plan, with its proof, its reasons and its runners-up.

`planner.explore` finds the decisions; `planner.reasons` says why they won and why the others lost, `planner.repairs` what would make something
fit.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from planner import reasons, repairs
from planner.candidates import Constraints
from planner.chain import Costs
from planner.errors import SolverError
from planner.estimate import predict
from planner.explore import Found, Outcome, explore
from planner.plan import Inputs, Plan, SolverReport, check, digest
from planner.solver import TOLERANCE


def search(inputs: Inputs, constraints: Constraints | None = None) -> Plan:
    """The fastest plan under the constraints, with the proof that none is faster.

    Raises DoesNotFitError when no plan fits, InputError when the constraints exclude each other, SolverError when the
    solver fails or the time limit passes before any plan is found.
    """
    with _little_garbage():
        return _search(inputs, constraints or Constraints())


def _search(inputs: Inputs, asked: Constraints) -> Plan:
    costs = Costs(inputs)
    outcome = explore(costs, asked)
    if outcome.best is None:
        outcome = _least(costs, asked, outcome)
    assert outcome.best is not None
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
            status=_status(outcome),
            objective_seconds=outcome.best.seconds,
            bound_seconds=outcome.best.seconds if gap <= TOLERANCE else outcome.bound,
            gap_fraction=0.0 if gap <= TOLERANCE else gap,
            num_candidates=outcome.num_candidates,
            num_pruned=outcome.num_candidates - max(outcome.num_solved, 1),
            wall_seconds=outcome.wall_seconds,
            runners_up=reasons.runners_up(costs, asked, outcome),
            reasons=(*reasons.why(costs, asked, outcome), *repairs.fewer_gpus(inputs, asked, outcome.best.seconds)),
        ),
    )


def _least(costs: Costs, asked: Constraints, outcome: Outcome) -> Outcome:
    """The plan that needs least memory, where the search has found none and that one fits: the ILP's bound on memory lies a little above
    `predict_memory`. Raises DoesNotFitError or, where the time limit has passed, SolverError."""
    least = repairs.closest(costs.inputs, asked)
    plan, _, over, _ = least
    if over > 0:
        if not outcome.proven and not outcome.shared:
            raise SolverError(f"no plan was found within the time limit of {asked.time_limit_seconds:g} s; none is proven impossible either")
        raise repairs.does_not_fit(costs, asked, least)
    seconds = predict(costs.inputs, plan).time.step_seconds
    assert seconds is not None
    return outcome._replace(best=Found(plan, seconds), bound=costs.step_seconds, proven=False, least=True)


@contextlib.contextmanager
def _little_garbage() -> Iterator[None]:
    """Looks for garbage in cycles less often: a search makes millions of tuples and hardly a cycle, and looking takes a tenth of its time."""
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], 200_000), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _status(outcome: Outcome) -> str:
    if outcome.proven:
        return "optimal"
    if outcome.least:
        return "not proven: the plan that needs least memory"
    if outcome.shared:
        return "not proven: cores are shared"
    return "time limit" if outcome.late else "gap accepted"
