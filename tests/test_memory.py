"""Predicted memory against the executor's own code, traced on fake tensors."""

import pytest
from drawn_plans import category_error, plans
from hypothesis import HealthCheck, Phase, given, settings

from executor.dry_run import dry_run_rank
from planner.candidates import LEVELS
from planner.chain import Costs, counts_of
from planner.memory import predict_memory
from planner.pipeline import moment_bytes, stage_loads
from planner.plan import Plan


def compare(plan: Plan) -> None:
    for rank, predicted in enumerate(predict_memory(plan.inputs, plan.decisions)):
        traced = dry_run_rank(plan, rank)
        assert predicted.total_bytes == pytest.approx(traced.total_bytes, rel=0.01)
        assert category_error(predicted, plan, rank, traced) <= 0.02


UNSHRUNK = (Phase.explicit, Phase.generate)
"""A failing plan is shown as drawn: each try takes a second."""
SUPPRESSED = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@settings(max_examples=25, deadline=None, derandomize=True, phases=UNSHRUNK, suppress_health_check=SUPPRESSED)
@given(plan=plans())
def test_prediction_is_the_traced_peak(plan: Plan) -> None:
    compare(plan)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, phases=UNSHRUNK, suppress_health_check=SUPPRESSED)
@given(plan=plans())
def test_prediction_is_the_traced_peak_on_many(plan: Plan) -> None:
    compare(plan)


@settings(max_examples=200, deadline=None, derandomize=True, phases=UNSHRUNK, suppress_health_check=SUPPRESSED)
@given(plan=plans())
def test_the_ilps_memory_is_never_below_the_prediction(plan: Plan) -> None:
    """And without a pipeline the same, but for the optimizer's chunk of mixed precision where layers need less than that."""
    inputs, decisions = plan.inputs, plan.decisions
    costs = Costs(inputs)
    pipeline = costs.pipeline(decisions, LEVELS)
    loads = stage_loads(pipeline, counts_of(decisions, inputs.model, LEVELS))
    for rank, predicted in enumerate(predict_memory(inputs, decisions)):
        peak = max(moment_bytes(moment, loads) for moment in pipeline.moments if moment.rank == rank)
        known = peak - pipeline.limits[rank] + costs.capacity
        assert known >= predicted.total_bytes
        if decisions.pipeline_parallel == 1 and inputs.training.precision != "mixed-bf16":
            assert known == predicted.total_bytes
