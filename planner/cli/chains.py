"""What commands do with `--model package.module:callable`: the module is traced, and planned as a chain of layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from planner import documents
from planner.cli.options import Request, cluster_of, cluster_to_fill, fixed_of
from planner.errors import InputError
from planner.plan import Training

if TYPE_CHECKING:
    from planner.candidates import Constraints
    from planner.chain_plan import ChainPlan
    from planner.traced import TracedModel


def _traced(request: Request) -> TracedModel:
    from planner.trace import trace_model

    if request.profile != "meshwright":
        raise InputError("--profile", request.profile, "meshwright is the only profile for a traced module")
    if request.program is not None:
        raise InputError("--program", request.program, "a traced module is timed for the executor only")
    if request.precision not in ("fp32", "bf16", "mixed-bf16"):
        raise InputError("--precision", request.precision, "fp32, bf16 or mixed-bf16 is expected")
    return trace_model(request.model, request.precision, request.sequence_length)


def _training(request: Request, batch: int) -> Training:
    return Training(
        global_batch_size=batch,
        sequence_length=request.sequence_length or 1,
        precision=request.precision,  # type: ignore[arg-type]
        optimizer=request.optimizer,  # type: ignore[arg-type]
        memory_fraction=request.memory_fraction,
    )


def _refuse(request: Request, options: dict[str, object]) -> None:
    """Raises InputError for the first option that was given and means nothing for a traced module."""
    for name, value in {"--num-tokens": request.num_tokens, **options}.items():
        if value not in (None, False):
            raise InputError(name, value, f"it is for transformers only, and {request.model} is a traced module")


def estimate_traced(request: Request, options: dict[str, object], as_json: bool) -> int:
    """The memory wall of a traced module; with degrees `plan solve` is the command, which chooses what is left open.

    `options` are those of the command that a traced module does not have, with their values.
    """
    from planner.chain_estimate import estimate_chain
    from planner.tables import chains, text

    _refuse(request, options)
    if request.has_degrees:
        raise InputError("--model", request.model, "with degrees, use plan solve, which fixes those given and chooses the rest")
    document = estimate_chain(_traced(request), cluster_of(request), _training(request, request.global_batch_size or 1))
    if as_json:
        click.echo(documents.dumps(document), nl=False)
    else:
        click.echo(text.show(*chains.wall_view(document), text.notes("Assumptions", document.assumptions)), nl=False)
    return 0


def solve_traced(request: Request, constraints: Constraints, options: dict[str, object], output: str | None, as_json: bool) -> int:
    """The ILP for a traced module; `options` as in `estimate_traced`."""
    from planner.chain_plan import ChainInputs
    from planner.chain_search import search_chain

    _refuse(request, options)
    if request.global_batch_size is None:
        raise InputError("--global-batch-size", None, "it is required here: the samples of one optimizer step")
    cluster = cluster_to_fill(request)
    training = _training(request, request.global_batch_size)
    assert constraints.fixed == fixed_of(request)
    plan = search_chain(ChainInputs(model=_traced(request), cluster=cluster, training=training), constraints)
    if output is not None:
        documents.write_text(output, documents.dumps(plan))
    if as_json:
        click.echo(documents.dumps(plan), nl=False)
    else:
        show_traced(plan, short=True)
        if output is not None:
            click.echo(f"wrote {output}; next: plan show {output}, or plan run {output} --model {request.model}", err=True)
    return 0


def show_traced(plan: ChainPlan, *, short: bool) -> None:
    from planner.tables import chains, text

    click.echo(text.show(*chains.plan_view(plan, short=short)), nl=False)
