"""Commands that show and hand on: compare, report, export, validate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from planner import documents
from planner.chain_plan import ChainPlan, load_any_plan
from planner.cli.options import NUMBER, json_option
from planner.cli.output import print_json
from planner.errors import InputError, ToleranceError
from planner.places import check_output
from planner.plan import load_plan


@click.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path())
@click.argument("run_file", metavar="RUN", type=click.Path())
@click.option("--dry-run", "dry_run_file", type=click.Path(), help="A dry-run document, to put beside the two.")
@click.option("--tolerance", type=NUMBER, help="Largest allowed error as a fraction (0.1); exit status 4 beyond it.")
@click.option("-o", "--output", type=click.Path(), help="Where to write the comparison document.")
@json_option
def compare(plan_file: str, run_file: str, dry_run_file: str | None, tolerance: float | None, output: str | None, as_json: bool) -> int:
    """Predicted beside measured: memory by category and rank, bubble, step time."""
    from planner.compare import compare, outside
    from planner.run import load_actions, load_dry_run, load_run
    from planner.tables import results, text

    plan, run = load_any_plan(plan_file, "PLAN"), load_run(run_file, "RUN")
    if output is not None:
        check_output(output, (plan_file, run_file, dry_run_file))
    dry_run = load_dry_run(dry_run_file) if dry_run_file is not None else None
    document = compare(plan, run, dry_run, tolerance, load_actions(run_file, run))
    if output is not None:
        documents.write_text(output, documents.dumps(document))
    if as_json:
        print_json(document)
    else:
        parts: list[Any] = results.comparison_view(document, run, with_interval=not isinstance(plan, ChainPlan))
        click.echo(text.show(*parts, text.notes("Where the difference lies", [cause.words for cause in document.causes])), nl=False)
    if document.within_tolerance is False:
        beyond = results.outside_words(document, outside(document.rows, tolerance or 0.0))
        raise ToleranceError(f"outside the tolerance of {100 * (tolerance or 0.0):g} %: {', '.join(beyond)}")
    return 0


@click.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path())
@click.argument("run_file", metavar="[RUN]", type=click.Path(), required=False)
@click.option("--dry-run", "dry_run_file", type=click.Path(), help="A dry-run document, to show beside the others.")
@click.option("-o", "--output", type=click.Path(), required=True, help="Where to write the page.")
def report(plan_file: str, run_file: str | None, dry_run_file: str | None, output: str) -> int:
    """One self-contained Plotly page: memory against capacity, the pipeline predicted and measured, losses."""
    plan = load_any_plan(plan_file, "PLAN")
    check_output(output, (plan_file, run_file, dry_run_file))
    write_report(plan_file, run_file, dry_run_file, output, plan)
    click.echo(f"wrote {output}", err=True)
    return 0


def write_report(plan_file: str, run_file: str | None, dry_run_file: str | None, output: str, plan: Any) -> None:
    """The report of a plan, and of its run and dry run where there are any."""
    from planner.either import predict_timeline
    from planner.report import report
    from planner.run import load_actions, load_dry_run, load_run

    run = load_run(run_file, "RUN") if run_file is not None else None
    dry_run = load_dry_run(dry_run_file) if dry_run_file is not None else None
    measured = load_actions(run_file, run) if run is not None and run_file is not None else None
    page = report(plan, run, dry_run, simulated=predict_timeline(plan.inputs, plan.decisions), measured=measured)
    documents.write_text(output, page)


@click.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path())
@click.option("--to", "target", required=True, help="megatron, torchtitan, deepspeed, nanotron, accelerate, torchrun, slurm or kubernetes.")
@click.option("-o", "--output", type=click.Path(), help="A folder for the files; no other file there is replaced. Default: print them.")
def export(plan_file: str, target: str, output: str | None) -> int:
    """The plan as another framework's configuration."""
    from planner.export import export

    plan = load_plan(plan_file, "PLAN")
    files = export(plan, target)
    if output is None:
        for name, text in files.items():
            if len(files) > 1:
                click.echo(f"==> {name} <==")
            click.echo(text, nl=False)
        return 0
    folder = _export_folder(output, files)
    for name, text in files.items():
        documents.write_text(folder / name, text)
        click.echo(f"wrote {folder / name}", err=True)
    return 0


def _export_folder(output: str, files: dict[str, str]) -> Path:
    """The folder for the files, made if it is missing. Raises InputError before anything is written where that is not possible, or a
    file of another content is there already."""
    documents.check_name(output)
    folder = Path(output)
    if not os.path.isdir(folder.absolute().parent):
        raise InputError("--output", output, "a folder in an existing folder is expected")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError("--output", output, f"a folder that can be made is expected ({error.strerror})") from None
    for name, text in files.items():
        if os.path.lexists(folder / name) and not _holds(folder / name, text):
            raise InputError("--output", output, f"another folder is expected: {name} is there already, with another content")
    return folder


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_bytes() == text.encode()
    except OSError:
        return False


@click.command()
@click.option("--rows", type=click.Path(), help="A file of rows as the published ones; one without `measured` gets a prediction only.")
@click.option("--report", "report_file", type=click.Path(), help="Where to write a page with the scatter of predicted and measured.")
@json_option
def validate(rows: str | None, report_file: str | None, as_json: bool) -> int:
    """Predictions against the published measurements that ship with the package, or against a file of such rows."""
    from planner.published import load_rows, validate
    from planner.tables import results, text

    if report_file is not None:
        check_output(report_file, (rows,), "--report")
    document = validate(load_rows(rows))
    if report_file is not None:
        from planner.report import validation_report

        documents.write_text(report_file, validation_report(document), "--report")
        click.echo(f"wrote {report_file}", err=True)
    if as_json:
        print_json(document)
    else:
        click.echo(text.show(*results.validation_view(document)), nl=False)
    return 0
