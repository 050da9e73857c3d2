"""Commands that plan: models, clusters, estimate, solve, show, simulate. None of them needs torch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from planner import documents
from planner.chain_plan import ChainPlan, load_any_plan
from planner.cli.options import (
    DEFAULT_GAP,
    DEFAULT_TIME_LIMIT,
    GAP,
    NUMBER,
    Request,
    cluster_of,
    cluster_to_fill,
    constraints_of,
    fixed_of,
    inputs_of,
    json_option,
    model_of,
    request_of,
    request_options,
    solver_options,
    training_of,
)
from planner.cli.output import print_json, with_run
from planner.errors import InputError
from planner.places import check_output
from planner.plan import Inputs, Plan, replace
from planner.traced import is_reference

if TYPE_CHECKING:
    from planner.candidates import Constraints
    from planner.cluster import ClusterSpec
    from planner.defaults import Completed, Fixed
    from planner.model import ModelSpec
    from planner.plan import Decisions, Training


@click.command()
@click.argument("name", required=False)
@json_option
def models(name: str | None, as_json: bool) -> None:
    """The model presets with shape and exact parameter count; one of them in full with NAME."""
    from planner.estimate import model_summary
    from planner.model import load_model, presets
    from planner.tables import plans, text

    if name is not None:
        model = load_model(name, "NAME")
        summary = model_summary(model)
        if as_json:
            print_json(summary)
        else:
            click.echo(text.show(plans.fields_table(model.name, summary)), nl=False)
        return
    if as_json:
        print_json([model_summary(model) for model in presets().values()])
    else:
        click.echo(text.show(plans.models_table(presets().values())), nl=False)


@click.command()
@click.argument("name", required=False)
@json_option
def clusters(name: str | None, as_json: bool) -> None:
    """The hardware presets: GPU, memory, FLOP/s, links; one of them in full with NAME."""
    from planner.cluster import load_cluster, presets
    from planner.tables import plans, text

    if name is not None:
        cluster = load_cluster(name, "NAME")
        if as_json:
            print_json(cluster)
        else:
            click.echo(text.show(plans.fields_table(cluster.name, _flat(documents.builtins(cluster)))), nl=False)
        return
    if as_json:
        print_json(list(presets().values()))
    else:
        click.echo(text.show(plans.clusters_table(presets().values())), nl=False)


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
@click.option("--time-limit", type=NUMBER, help=f"With --gpus: seconds for each number; then its best plan found. Default: {DEFAULT_TIME_LIMIT:g}.")
@click.option("--gap", type=GAP, help=f"With --gpus: enough after 7 CPU-seconds of each number; 0: prove it. Default: {DEFAULT_GAP:g}.")
@click.option("--explain", is_flag=True, help="Every term of the memory model of the fullest GPU: bytes, per what, and why.")
@click.option("-o", "--output", type=click.Path(), help="With --gpus: where to write a page with the sweep.")
@json_option
def estimate(
    gpus: str | None, time_limit: float | None, gap: float | None, explain: bool, output: str | None, as_json: bool, **options: Any
) -> int:
    """Memory, time and cost. Without degrees: the whole model, and what a single GPU would need.

    With degrees: a row per pipeline rank; the heaviest GPU governs. Exit status 3 where the plan does not fit.
    """
    from planner.estimate import memory_wall
    from planner.tables import plans, text

    request = request_of(options)
    if gpus is None:
        for name, value in (("--time-limit", time_limit), ("--gap", gap)):
            if value is not None:
                raise InputError(name, value, "it limits the searches of a sweep, which --gpus asks for: --gpus 64,128,256")
    if is_reference(request.model):
        from planner.cli.chains import estimate_traced

        return estimate_traced(request, {"--gpus": gpus, "--explain": explain, "--output": output}, as_json)
    if gpus is not None:
        from planner.cli.sweeps import sweep

        if explain:
            raise InputError("--explain", True, "it is about one plan, and can't be given together with --gpus")
        return sweep(
            request, gpus, DEFAULT_TIME_LIMIT if time_limit is None else time_limit, DEFAULT_GAP if gap is None else gap, output, as_json
        )
    if output is not None:
        raise InputError("--output", output, "it is the page of a sweep, which --gpus asks for: --gpus 64,128,256")
    model = model_of(request)
    cluster = cluster_of(request)
    alone = request.cluster is not None and cluster.num_gpus == 1
    if not request.has_degrees and not alone:
        training = training_of(request, model, 1)
        wall = memory_wall(model, cluster, training, request.num_tokens or model.num_training_tokens)
        one = _on_one_gpu(model, cluster, training, fixed_of(request)) if explain else None
        if as_json:
            print_json(replace(wall, explanation=_explanation(one.inputs, one.decisions)) if one else wall)
        else:
            terms = _explained(one.inputs, one.decisions) if one else []
            click.echo(text.show(*plans.wall_view(wall), *terms, "", text.notes("Assumptions", wall.assumptions)), nl=False)
        return 0
    return _estimate_plan(request, explain, as_json)


def _explained(inputs: Inputs, decisions: Decisions) -> list[Any]:
    """The memory of the fullest GPU, term by term, and what the letters mean."""
    from planner.explain import explain_memory, symbols
    from planner.tables import plans

    return ["", plans.explain_table(explain_memory(inputs, decisions)), symbols(inputs, decisions)]


def _explanation(inputs: Inputs, decisions: Decisions) -> tuple[dict[str, Any], ...]:
    """The same as data. `part` says that a term is counted in the one above it."""
    from planner.explain import explain_memory

    return tuple(
        {
            "term": term.name.strip(),
            "part": term.name.startswith("  "),
            "formula": term.formula,
            "size_bytes": term.size,
            "counted_per": term.unit,
            "why": term.why,
        }
        for term in explain_memory(inputs, decisions)
    )


def _on_one_gpu(model: ModelSpec, cluster: ClusterSpec, training: Training, fixed: Fixed) -> Completed:
    """The whole model on one GPU, with one sample, and without recomputation unless that is given."""
    from planner.cluster import with_num_gpus
    from planner.defaults import complete

    fixed = dataclasses.replace(fixed, recompute=fixed.recompute or "none")
    return complete(model, with_num_gpus(cluster, 1), training, fixed, batch_given=False)


def _estimate_plan(request: Request, explain: bool, as_json: bool) -> int:
    from planner.defaults import complete, repairs, shortage
    from planner.errors import DoesNotFitError
    from planner.estimate import plan_estimate, predict, with_training_run
    from planner.tables import plans, text

    model = model_of(request)
    training = training_of(request, model, 1)
    completed = complete(model, cluster_to_fill(request), training, fixed_of(request), batch_given=request.global_batch_size is not None)
    predictions = predict(completed.inputs, completed.decisions)
    time = with_training_run(predictions.time, completed.inputs, completed.decisions, request.num_tokens or model.num_training_tokens)
    predictions = replace(predictions, time=time)
    document = plan_estimate(completed.inputs, completed.decisions, predictions, completed.assumptions)
    if as_json:
        print_json(replace(document, explanation=_explanation(completed.inputs, completed.decisions)) if explain else document)
    else:
        assert document.pipeline_ranks is not None
        parts: list[Any] = [
            plans.verdict(completed.inputs, completed.decisions, document.memory, document.time, document.fits, document.pipeline_ranks),
            "",
            plans.stage_table(completed.inputs, completed.decisions, document.pipeline_ranks),
        ]
        if document.zero_offload_rows:
            parts.append(plans.offload_view(document))
        if explain:
            parts.extend([*_explained(completed.inputs, completed.decisions), ""])
        parts.extend(part for part in (text.notes("Warnings", document.warnings), text.notes("Assumptions", document.assumptions)) if part)
        click.echo(text.show(*parts), nl=False)
    if document.fits:
        return 0
    found = repairs(completed.inputs, completed.decisions, batch_given=request.global_batch_size is not None)
    none = "" if found else "; no change of degrees, ZeRO stage, recomputation or number of GPUs was found that would fit"
    raise DoesNotFitError(shortage(completed.inputs, completed.decisions) + none, found)


@click.command()
@request_options
@click.option("-o", "--output", type=click.Path(), help="Where to write the plan.")
@click.option("--within-days", type=NUMBER, help="The fewest GPUs, in a node or in whole nodes, that train --num-tokens in so many days.")
@click.option("--within-gpu-hours", type=NUMBER, help="The fastest plan that trains --num-tokens for so many, on 2^n or 3 x 2^n GPUs or all.")
@solver_options
@json_option
def solve(output: str | None, within_days: float | None, within_gpu_hours: float | None, as_json: bool, **options: Any) -> int:
    """The ILP: degrees, micro-batch, ZeRO, recompute, schedule and pipeline cuts; what is given is fixed."""
    constraints = constraints_of(options)
    request = request_of(options)
    constraints = dataclasses.replace(constraints, fixed=fixed_of(request))
    if output is not None:
        check_output(output, (request.model, request.cluster))
    if is_reference(request.model):
        from planner.cli.chains import solve_traced

        return solve_traced(request, constraints, {"--within-days": within_days, "--within-gpu-hours": within_gpu_hours}, output, as_json)
    inputs = inputs_of(request)
    plan = with_run(_solved(inputs, constraints, request, within_days, within_gpu_hours), request)
    if output is not None:
        documents.write_text(output, documents.dumps(plan))
    if as_json:
        print_json(plan)
    else:
        _show_plan(plan, short=True)
        if output is not None:
            click.echo(f"wrote {output}; next: plan show, plan simulate, plan dry-run, plan run or plan report {output}", err=True)
    return 0


def _solved(inputs: Inputs, constraints: Constraints, request: Request, within_days: float | None, within_gpu_hours: float | None) -> Plan:
    """The best plan on all GPUs, or by the goal that was given."""
    from planner.goals import fastest_within, fewest_gpus, num_steps
    from planner.search import search

    if within_days is None and within_gpu_hours is None:
        return search(inputs, constraints)
    if within_days is not None and within_gpu_hours is not None:
        raise InputError("--within-gpu-hours", within_gpu_hours, "it can't be given together with --within-days")
    tokens = request.num_tokens or inputs.model.num_training_tokens
    if tokens is None:
        raise InputError("--num-tokens", None, "it is required here: the tokens of the whole training run")
    steps = num_steps(inputs, tokens)
    if within_days is not None:
        return fewest_gpus(inputs, constraints, within_days * 86400 / steps, tokens)
    assert within_gpu_hours is not None
    return fastest_within(inputs, constraints, within_gpu_hours * 3600 / steps, tokens)


def _show_plan(plan: Plan, *, short: bool) -> None:
    from planner.estimate import fits, warnings
    from planner.tables import plans, text

    inputs, decisions, predictions, solver = plan.inputs, plan.decisions, plan.predictions, plan.solver
    ranks = predictions.pipeline_ranks
    parts: list[Any] = [plans.verdict(inputs, decisions, predictions.memory, predictions.time, fits(predictions), ranks)]
    parts.append(plans.solver_line(solver))
    if ranks:
        parts += ["", plans.stage_table(inputs, decisions, ranks)]
    if solver.reasons:
        parts.append(text.notes("Why this plan", solver.reasons))
    parts += [text.notes("Warnings", found) for found in [warnings(inputs, predictions)] if found]
    if solver.runners_up and not short:
        parts += ["", plans.runners_up_table(plan)]
    elif solver.runners_up:
        parts.append(f"{len(solver.runners_up)} runners-up, and why they lost: plan show")
    click.echo(text.show(*parts), nl=False)


def _warn_of_edits(plan: Plan | ChainPlan, path: str) -> None:
    """Says where the stored predictions are not those of the stored decisions: the plan was edited, or made by another version."""
    from planner.estimate import predict
    from planner.tables.text import seconds, size

    if isinstance(plan, ChainPlan):
        return
    stored, now = plan.predictions, predict(plan.inputs, plan.decisions)
    before, after = stored.time.step_seconds or 0.0, now.time.step_seconds or 0.0
    if stored.memory.total_bytes == now.memory.total_bytes and abs(before - after) <= 1e-6 * after:
        return
    click.echo(
        f"warning: {path} predicts {size(stored.memory.total_bytes)} and {seconds(stored.time.step_seconds)} a step, but its decisions give"
        f" {size(now.memory.total_bytes)} and {seconds(now.time.step_seconds)}: it was edited, or made by another version",
        err=True,
    )


@click.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path())
@json_option
def show(plan_file: str, as_json: bool) -> int:
    """A plan as tables; the runners-up and why they lost."""
    plan = load_any_plan(plan_file, "PLAN")
    _warn_of_edits(plan, plan_file)
    if as_json:
        print_json(plan)
    elif isinstance(plan, ChainPlan):
        from planner.cli.chains import show_traced

        show_traced(plan, short=False)
    else:
        _show_plan(plan, short=False)
    return 0


@click.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path())
@click.option("--trace", type=click.Path(), help="Where to write the Chrome/Perfetto trace.")
@json_option
def simulate(plan_file: str, trace: str | None, as_json: bool) -> int:
    """The schedule's timeline: bubble, busy and idle time per pipeline rank."""
    from planner.accuracy import step_interval
    from planner.either import predict_timeline
    from planner.tables import plans, text
    from planner.timeline import bubble_fraction, bubble_fractions, busy_seconds, chrome_trace, exposed_communication_seconds, window

    plan = load_any_plan(plan_file, "PLAN")
    if trace is not None:
        check_output(trace, (plan_file,), "--trace")
    _warn_of_edits(plan, plan_file)
    timeline = predict_timeline(plan.inputs, plan.decisions)
    interval = None if isinstance(plan, ChainPlan) else step_interval(timeline.end)  # errors were measured for transformers only
    fractions, busy, exposed = bubble_fractions(timeline), busy_seconds(timeline), exposed_communication_seconds(timeline)
    first, last = window(timeline)
    if trace is not None:
        documents.write_text(trace, chrome_trace([timeline]), "--trace")
    if as_json:
        print_json(
            {
                "schema": "meshwright.simulation/1",
                "schedule": plan.decisions.schedule,
                "step_seconds": timeline.end,
                "step_seconds_interval": interval,
                "bubble_fraction": bubble_fraction(timeline),
                "pipeline_ranks": [
                    {
                        "pipeline_rank": rank,
                        "busy_seconds": busy[rank],
                        "idle_seconds": last - first - busy[rank],
                        "exposed_communication_seconds": exposed[rank],
                        "bubble_fraction": fractions[rank],
                    }
                    for rank in timeline.ranks
                ],
            }
        )
        return 0
    rows = [
        (rank, text.seconds(busy[rank]), text.seconds(last - first - busy[rank]), text.seconds(exposed[rank]), text.percent(fractions[rank]))
        for rank in timeline.ranks
    ]
    head = (
        f"{plan.decisions.schedule}: {plan.decisions.num_microbatches} micro-batches on {plan.decisions.pipeline_parallel} pipeline ranks; "
        f"step {text.seconds(timeline.end)}{plans.in_brackets(interval)}, bubble {text.percent(bubble_fraction(timeline))}"
    )
    columns = ("pipeline rank", "busy", "idle in the pipeline", "sends, receives, reductions", "bubble")
    parts: list[Any] = [head, "", text.table("The simulated step", columns, rows)]
    if plan.decisions.num_microbatches <= 16 and plan.decisions.pipeline_parallel <= 16:
        parts.append(plans.timeline_view(timeline))
    click.echo(text.show(*parts), nl=False)
    if trace is not None:
        click.echo(f"wrote {trace}: open it at ui.perfetto.dev or in chrome://tracing", err=True)
    return 0
