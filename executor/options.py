"""The executor's command line: the options of a run, checked as far as they can be without the plan. Needs no torch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import NoReturn

from planner.errors import InputError
from planner.places import check_folder, check_output
from planner.run import actions_path
from planner.traced import is_reference

RUN = "Runs a plan. Start it with torchrun, one process per rank."


class _Parser(argparse.ArgumentParser):
    """Raises InputError, one line, where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        what, _, given = message.partition(": ")
        if what.endswith("are required"):
            raise InputError(given, "", f"it is missing; see {self.prog} --help")
        raise InputError(what, given, f"see {self.prog} --help")


def arguments(argv: list[str], prog: str = "python -m executor", about: str = RUN) -> argparse.Namespace:
    """The options in `argv`. Raises InputError for a wrong one."""
    parser = _Parser(prog=prog, description=about, allow_abbrev=False)

    def whole(option: str, default: int, text: str, low: int = 0) -> None:
        parser.add_argument(option, type=_whole(option, low), default=default, metavar="N", help=text)

    def number(option: str, default: float, text: str, below: float = 1e6) -> None:
        parser.add_argument(option, type=_number(option, below), default=default, metavar="X", help=text)

    parser.add_argument("plan", metavar="PLAN", help="a plan document")
    parser.add_argument("--model", metavar="PACKAGE.MODULE:CALLABLE", help="the plan's module, where it is of a traced one: its code runs")
    whole("--steps", 10, "optimizer steps, with --resume so many more (default 10)", low=1)
    parser.add_argument("-o", "--output", metavar="FILE", help="where rank 0 writes the run document")
    parser.add_argument("--data", metavar="FILE", help='text, a token .bin, or "synthetic" (default: a text that ships with the package)')
    whole("--seed", 0, "of the initial weights and of the data (default 0)")
    parser.add_argument("--rehearse", action="store_true", help="real processes and messages; compute takes its predicted time instead of computing")
    number("--learning-rate", 3e-4, "its peak (default 3e-4)")
    number("--min-learning-rate", 0.0, "where the cosine of --decay-steps ends (default 0)")
    whole("--warmup-steps", 0, "steps of linear warm-up (default 0)")
    whole("--decay-steps", 0, "length of the cosine; 0: constant rate (default)")
    number("--weight-decay", 0.1, "AdamW's (default 0.1)")
    number("--clip-norm", 1.0, "global gradient norm to clip to; 0: no clipping (default 1)", below=1e12)
    number("--dropout", 0.0, "probability (default 0)", below=1.0)
    whole("--checkpoint-every", 0, "save every N steps; 0: never (default)")
    parser.add_argument("--checkpoint-folder", default="checkpoints", metavar="FOLDER", help="where step-N go (default checkpoints)")
    whole("--keep-checkpoints", 0, "keep only the newest N of this run; 0: all (default)")
    parser.add_argument("--resume", metavar="FOLDER", help="a checkpoint step-N, or the folder with them: its newest")
    parser.add_argument("--load", metavar="FOLDER", help="start from the Hugging Face safetensors there (GPT-2 and Llama families)")
    parser.add_argument("--compile", action="store_true", help="compile norms and activation functions (slow to start; pays on GPUs)")
    parser.add_argument("--tensorboard", metavar="FOLDER", help="write scalars there (needs the extra `tensorboard`)")
    device = _one_of("--device", ("auto", "cpu", "cuda"))
    parser.add_argument("--device", type=device, default="auto", metavar="DEVICE", help="auto (default: a GPU where there is one), cpu or cuda")
    number("--timeout", 600.0, "seconds that a collective may take (default 600)")
    options = parser.parse_args(argv)
    if options.timeout <= 0:
        raise InputError("--timeout", options.timeout, "a positive number of seconds is expected")
    for name, value in vars(options).items():
        if value == "":
            raise InputError("PLAN" if name == "plan" else _option(name), "", "it is empty; a name is expected, or the option left out")
    if options.min_learning_rate > options.learning_rate:
        raise InputError("--min-learning-rate", options.min_learning_rate, f"at most --learning-rate, {options.learning_rate:g}, is expected")
    if options.min_learning_rate and not options.decay_steps:
        raise InputError("--min-learning-rate", options.min_learning_rate, "it needs --decay-steps: without those the rate does not fall")
    options.given = frozenset(name for name, value in vars(options).items() if value != parser.get_default(name))
    if options.rehearse:
        _refuse(options, REHEARSAL_HAS_NOT, "a rehearsal does not have it: nothing is trained")
    if not options.checkpoint_every:
        _refuse(options, ("checkpoint_folder", "keep_checkpoints"), "it needs --checkpoint-every: without that none are saved")
    if options.resume is not None:
        _refuse(options, ("load",), "it can't be given together with --resume, which has the weights")
    return options


REHEARSAL_HAS_NOT = (
    *("data", "load", "resume", "checkpoint_every", "tensorboard", "compile"),
    *("learning_rate", "min_learning_rate", "warmup_steps", "decay_steps", "weight_decay", "clip_norm", "dropout"),
)
"""Options that a rehearsal does not have."""


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _refuse(options: argparse.Namespace, names: Sequence[str], allowed: str) -> None:
    """Raises InputError for the first option of `names` that was given another value than its default."""
    for name in names:
        if name in options.given:
            raise InputError(_option(name), getattr(options, name), allowed)


def check_outputs(options: argparse.Namespace) -> None:
    """Raises InputError for a place where the run could not write in the end, or would replace what it reads. Leaves nothing there."""
    if options.output is not None:
        inputs = (options.plan, options.data)
        check_output(options.output, inputs)
        check_output(str(actions_path(options.output)), inputs)
    if options.checkpoint_every:
        check_folder("--checkpoint-folder", options.checkpoint_folder)
    if options.tensorboard is not None:
        check_folder("--tensorboard", options.tensorboard)


MODULE_HAS_NOT = ("data", "dropout", "load", "compile")
"""Options that a traced module's run does not have."""


def check_module_options(options: argparse.Namespace, traced: bool) -> None:
    """Raises InputError for an option that does not go with the kind of the plan."""
    if not traced:
        if options.model is not None:
            raise InputError("--model", options.model, "it is for plans of traced modules; this one is of a transformer, which it describes itself")
        return
    if options.model is None and not options.rehearse:
        raise InputError("--model", "", "the plan is of a traced module, whose code only the command line can name: package.module:callable")
    if options.model is not None and not is_reference(options.model):
        raise InputError("--model", options.model, "package.module:callable is expected")
    has_not = [name for name in MODULE_HAS_NOT if not (name == "data" and options.data == "synthetic")]
    _refuse(options, has_not, "the run of a traced module does not have it")


def _whole(option: str, low: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= 2**40:
            raise InputError(option, text, f"a whole number of at least {low} is expected")
        return value

    return read


def _number(option: str, below: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < below:
            raise InputError(option, text, f"a number from 0 to below {below:g} is expected")
        return value

    return read


def _one_of(option: str, values: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in values:
            raise InputError(option, text, f"one of {', '.join(values)} is expected")
        return text

    return read
