"""Predicted memory against the executor's own code, traced on fake tensors."""

import pytest
from drawn_plans import category_error, plans
from hypothesis import HealthCheck, Phase, given, settings

from executor.dry_run import dry_run_rank
from planner.memory import layer_bytes, predict_memory
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
def test_the_linear_bound_is_never_below_the_prediction(plan: Plan) -> None:
    """What the ILP adds up per layer covers what `predict_memory` finds."""
    from planner.plan import block_levels, has_embedding, has_head
    from planner.schedule import compute_actions

    inputs, decisions = plan.inputs, plan.decisions
    lists = compute_actions(decisions.schedule, decisions.pipeline_parallel, decisions.num_virtual_stages, decisions.num_microbatches)
    for rank, predicted in enumerate(predict_memory(inputs, decisions)):
        needs = {}
        for index, stage in enumerate(decisions.stages):
            if stage.pipeline_rank == rank:
                levels = block_levels(stage, inputs.model)
                names = ["embedding"] * has_embedding(stage) + ["block"] * len(levels) + ["head"] * has_head(stage, inputs.model)
                level = levels[0] if levels else "none"
                needs[index] = [layer_bytes(inputs, decisions, name, level if name == "block" else "none") for name in names]
        states = sum(layer.states for layers in needs.values() for layer in layers)
        live, peak = 0.0, 0.0
        for kind, stage, _ in lists[rank]:
            saved = sum(layer.saved for layer in needs[stage])
            live += saved if kind == "F" else 0
            transients = [layer.forward_transient if kind == "F" else layer.backward_transient for layer in needs[stage]]
            peak = max(peak, live + max(transients))
            live -= saved if kind == ("W" if decisions.schedule in ("InterleavedZeroBubble", "ZBVZeroBubble") else "B") else 0
        if predicted.activations_bytes:
            assert states + peak + fixed(plan, rank) >= predicted.total_bytes


def fixed(plan: Plan, rank: int) -> float:
    from planner.memory import fixed_bytes

    return fixed_bytes(plan.inputs, plan.decisions)[rank]
