"""Commands that plan: models, clusters, estimate, solve, show, simulate. None of them needs torch."""

from __future__ import annotations

from typing import Any

import click

from planner import documents
from planner.cli.options import (
    Request,
    cluster_of,
    fixed_of,
    inputs_of,
    json_option,
    model_of,
    request_of,
    request_options,
    training_of,
)
from planner.errors import InputError


def print_json(document: Any) -> None:
    click.echo(documents.dumps(document), nl=False)


@click.command()
@click.argument("name", required=False)
@json_option
def models(name: str | None, as_json: bool) -> None:
    """The model presets with shape and exact parameter count; one of them in full with NAME."""
    from planner import tables
    from planner.estimate import model_summary
    from planner.model import load_model, presets

    if name is not None:
        model = load_model(name, "NAME")
        summary = model_summary(model)
        if as_json:
            print_json(summary)
        else:
            click.echo(tables.show(tables.fields_table(model.name, summary)), nl=False)
        return
    if as_json:
        print_json([model_summary(model) for model in presets().values()])
    else:
        click.echo(tables.show(tables.models_table(presets().values())), nl=False)


@click.command()
@click.argument("name", required=False)
@json_option
def clusters(name: str | None, as_json: bool) -> None:
    """The hardware presets: GPU, memory, FLOP/s, links; one of them in full with NAME."""
    from planner import tables
    from planner.cluster import load_cluster, presets

    if name is not None:
        cluster = load_cluster(name, "NAME")
        if as_json:
            print_json(cluster)
        else:
            click.echo(tables.show(tables.fields_table(cluster.name, _flat(documents.builtins(cluster)))), nl=False)
        return
    if as_json:
        print_json(list(presets().values()))
    else:
        click.echo(tables.show(tables.clusters_table(presets().values())), nl=False)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, object]:
    out: dict[str, object] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            out |= _flat(item, f"{prefix}{key}.")
        else:
            out[prefix + key] = item
    return out


@click.command()
@request_options
@click.option("--gpus", help="A sweep: numbers of GPUs such as 64,128,256, each with its best plan.")
@click.option("--explain", is_flag=True, help="Every term of the memory model: bytes, and why.")
@json_option
def estimate(gpus: str | None, explain: bool, as_json: bool, **options: Any) -> int:
    """Memory, time and cost. Without degrees: the whole model, and what a single GPU would need.

    With degrees: a row per pipeline rank; the heaviest GPU governs. Exit status 3 where the plan does not fit.
    """
    from planner import tables
    from planner.estimate import memory_wall

    request = request_of(options)
    if gpus is not None:
        return _sweep(request, gpus, as_json)
    model = model_of(request)
    cluster = cluster_of(request)
    alone = request.cluster is not None and cluster.num_gpus == 1
    if not request.has_degrees and not alone:
        training = training_of(request, model, 1)
        wall = memory_wall(model, cluster, training, request.num_tokens or model.num_training_tokens)
        if as_json:
            print_json(wall)
        else:
            click.echo(tables.show(*tables.wall_view(wall), "", tables.notes("Assumptions", wall.assumptions)), nl=False)
        return 0
    return _estimate_plan(request, explain, as_json)


def _estimate_plan(request: Request, explain: bool, as_json: bool) -> int:
    from planner import tables
    from planner.defaults import complete, repairs, shortage
    from planner.errors import DoesNotFitError
    from planner.estimate import plan_estimate, predict

    model = model_of(request)
    training = training_of(request, model, 1)
    completed = complete(model, cluster_of(request), training, fixed_of(request), batch_given=request.global_batch_size is not None)
    predictions = predict(completed.inputs, completed.decisions)
    document = plan_estimate(completed.inputs, completed.decisions, predictions, completed.assumptions)
    if as_json:
        print_json(document)
    else:
        assert document.pipeline_ranks is not None
        parts: list[Any] = [
            tables.verdict(completed.inputs, completed.decisions, document.memory, document.time, document.fits, document.pipeline_ranks),
            "",
            tables.stage_table(completed.inputs, completed.decisions, document.pipeline_ranks),
        ]
        if document.zero_offload_rows:
            parts.append(tables.offload_view(document))
        if explain:
            from planner.explain import explain_memory

            parts.append(tables.explain_table(explain_memory(completed.inputs, completed.decisions)))
        parts.extend(part for part in (tables.notes("Warnings", document.warnings), tables.notes("Assumptions", document.assumptions)) if part)
        click.echo(tables.show(*parts), nl=False)
    if document.fits:
        return 0
    raise DoesNotFitError(shortage(completed.inputs, completed.decisions), repairs(completed.inputs, completed.decisions))


def _sweep(request: Request, gpus: str, as_json: bool) -> int:
    raise InputError("--gpus", gpus, "not available")


@click.command()
@request_options
@click.option("-o", "--output", type=click.Path(), help="Where to write the plan.")
@click.option("--time-limit", type=float, default=60.0, show_default=True, help="Seconds; then the best plan found, with its gap.")
@json_option
def solve(output: str | None, time_limit: float, as_json: bool, **options: Any) -> int:
    """The ILP: degrees, micro-batch, ZeRO, recompute, schedule and pipeline cuts; what is given is fixed."""
    from planner.search import search

    request = request_of(options)
    inputs_of(request)
    raise NotImplementedError(search)
