"""What is asked of a plan of either kind, a transformer's or a traced module's."""

from __future__ import annotations

from planner import timing
from planner.chain_costs import ChainCosts
from planner.chain_costs import predict_timeline as chain_timeline
from planner.chain_plan import ChainInputs, ChainPlan
from planner.plan import Decisions, Inputs, Plan
from planner.timeline import Timeline

AnyPlan = Plan | ChainPlan


def predict_timeline(inputs: Inputs | ChainInputs, decisions: Decisions) -> Timeline:
    """The predicted events of one step."""
    if isinstance(inputs, ChainInputs):
        return chain_timeline(ChainCosts(inputs), decisions)
    return timing.predict_timeline(inputs, decisions)
