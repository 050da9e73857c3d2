"""The command `plan`. The only room that prints or exits; everything heavy is imported by the command that needs it."""

from __future__ import annotations

import atexit
import errno
import gc
import io
import os
import sys

import click

from planner import __version__
from planner.errors import MeshwrightError

_COMMANDS = {
    "models": "planner.cli.planning",
    "clusters": "planner.cli.planning",
    "estimate": "planner.cli.planning",
    "solve": "planner.cli.planning",
    "show": "planner.cli.planning",
    "simulate": "planner.cli.planning",
    "dry-run": "planner.cli.running",
    "run": "planner.cli.running",
    "calibrate": "planner.cli.running",
    "paradigms": "planner.cli.running",
    "demo": "planner.cli.running",
    "compare": "planner.cli.reporting",
    "report": "planner.cli.reporting",
    "export": "planner.cli.reporting",
    "validate": "planner.cli.reporting",
}


class _Commands(click.Group):
    """Finds a command in its module when it is asked for, so that `plan estimate` does not load a solver."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        import importlib

        if name not in _COMMANDS:
            return None
        module = importlib.import_module(_COMMANDS[name])
        command: click.Command = getattr(module, name.replace("-", "_"))
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            close = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            if close and "mean" not in error.message:
                raise click.UsageError(f"{error.message} Did you mean '{close[0]}'?", ctx) from None
            raise


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="meshwright")
def plan() -> None:
    """Plans how to split the training of a large model over GPUs, runs the plan, and compares it with what happened."""


def entry() -> None:
    """What the console script calls: turns every error that a user can cause into one line and an exit status."""
    atexit.register(gc.freeze)  # a process that ends need not look for cycles in all that it still holds
    if sys.stderr is None:  # nobody listens: neither to this process, nor to those that it starts
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.set_inheritable(2, True)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    try:
        if sys.stdout is None:  # a file that is opened would take its number, and get what is printed
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        status = plan.main(standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        message = error.format_message().replace("\n", " ")
        click.echo(f"plan: {message}", err=True)
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        click.echo("plan: interrupted", err=True)
        sys.exit(1)
    except MeshwrightError as error:
        click.echo(f"plan: {error}", err=True)
        for repair in getattr(error, "repairs", ()):
            click.echo(f"  would fit: {repair}", err=True)
        sys.exit(error.exit_status)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            click.echo(f"plan: {error.filename or 'standard output'}: {error.strerror}", err=True)
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be written must not fail once more
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)
