"""What several commands do with their results."""

from __future__ import annotations

from typing import Any

import click

from planner import documents
from planner.cli.options import Request
from planner.plan import Plan, replace


def with_run(plan: Plan, request: Request) -> Plan:
    """The plan with days, cost and energy of the whole run, where the number of tokens is known."""
    from planner.estimate import with_training_run

    tokens = request.num_tokens or plan.inputs.model.num_training_tokens
    time = with_training_run(plan.predictions.time, plan.inputs, plan.decisions, tokens)
    return replace(plan, predictions=replace(plan.predictions, time=time))


def print_json(document: Any) -> None:
    click.echo(documents.dumps(document), nl=False)
