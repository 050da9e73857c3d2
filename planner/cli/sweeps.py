"""`plan estimate --gpus`: the best plan for each of several numbers of GPUs."""

from __future__ import annotations

import click

from planner import documents
from planner.cli.options import Request, fixed_of, inputs_of
from planner.cli.output import print_json, with_run
from planner.errors import InputError
from planner.places import check_output
from planner.plan import Plan, check_tensor_parallel, replace
from planner.values import whole_number


def sweep(request: Request, gpus: str, time_limit: float, gap: float, output: str | None, as_json: bool) -> int:
    """The best plan for each number of GPUs, each found within `time_limit` seconds or until its `gap` is enough.

    Interrupted, it shows what it has. Raises InputError where the options are wrong for every number, DoesNotFitError where none fits,
    SolverError where no search has found a plan in its time.
    """
    from planner.candidates import Constraints
    from planner.cluster import with_num_gpus
    from planner.errors import DoesNotFitError, SolverError
    from planner.search import search
    from planner.tables import plans, text

    numbers = []
    for part in gpus.split(","):
        number = whole_number(part.strip())
        if number is None or not 1 <= number <= 10**6:
            raise InputError("--gpus", gpus, "numbers of GPUs are expected, each at most 1,000,000, such as 64,128,256")
        numbers.append(number)
    if output is not None:
        check_output(output, (request.model, request.cluster))
    inputs = inputs_of(request)
    if request.tensor_parallel:
        check_tensor_parallel(inputs.model, request.tensor_parallel, "--tensor-parallel")
    points: list[tuple[int, Plan | None, str]] = []
    short: DoesNotFitError | None = None
    wrong: InputError | None = None
    unsolved: SolverError | None = None
    stopped: KeyboardInterrupt | None = None
    constraints = Constraints(fixed=fixed_of(request), time_limit_seconds=time_limit, accepted_gap=gap)
    for number in numbers:
        click.echo(f"solving for {number:,} GPUs", err=True)
        try:
            plan = search(replace(inputs, cluster=with_num_gpus(inputs.cluster, number)), constraints)
            points.append((number, with_run(plan, request), ""))
        except DoesNotFitError as error:
            short = error
            points.append((number, None, str(error)))
        except InputError as error:
            wrong = error
            points.append((number, None, str(error)))
        except SolverError as error:
            unsolved = error
            points.append((number, None, str(error)))
        except KeyboardInterrupt as error:
            stopped = error
            points += [(left, None, "interrupted") for left in numbers[len(points) :]]
            break
    found = any(plan is not None for _, plan, _ in points)
    if stopped is not None and not found:
        raise stopped
    if wrong is not None and short is None and unsolved is None and not found:
        raise wrong
    if output is not None:
        _write_sweep(inputs.model.name, points, output)
    if as_json:
        rows = [
            {"num_gpus": number, "plan": None if plan is None else documents.builtins(plan), "why_not": why or None}
            for number, plan, why in points
        ]
        print_json({"schema": "meshwright.sweep/1", "model": inputs.model.name, "points": rows})
    else:
        warned = plans.sweep_warnings(points)
        click.echo(text.show(plans.sweep_table(inputs.model.name, points), *([text.notes("Warnings", warned)] if warned else [])), nl=False)
    if stopped is not None:
        raise stopped
    if unsolved is not None and not found:
        raise unsolved
    if short is not None and not found:
        raise short
    return 0


def _write_sweep(name: str, points: list[tuple[int, Plan | None, str]], output: str) -> None:
    from planner.report import sweep_report
    from planner.report.figures import SweepPoint
    from planner.tables.plans import unproven

    drawn = [
        SweepPoint(
            number,
            plan.predictions.time.step_seconds,
            plan.predictions.time.tokens_per_second,
            plan.predictions.time.model_flops_utilization,
            plan.predictions.memory.total_bytes,
        )
        for number, plan, _ in points
        if plan is not None
    ]
    notes = [f"{number:,} GPUs: {why or unproven(plan)}" for number, plan, why in points if why or unproven(plan)]
    documents.write_text(output, sweep_report(f"{name} on different numbers of GPUs", drawn, notes))
    click.echo(f"wrote {output}", err=True)
