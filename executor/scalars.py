"""TensorBoard scalars of a run: an extra."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from executor.train import StepFigures
from planner.errors import InputError


def check_tensorboard(folder: str | None) -> None:
    """Raises InputError where scalars are wanted and TensorBoard is missing."""
    if folder is not None and find_spec("tensorboard") is None:
        raise InputError("--tensorboard", folder, "TensorBoard is not installed: pip install 'meshwright[tensorboard]'")


def scalar_writer(folder: str | None, first_step: int = 0) -> Callable[[StepFigures, int], None]:
    """Writes a step's figures to TensorBoard under torchtitan's names; does nothing without a folder. What an earlier attempt wrote of
    steps from `first_step` on is dropped."""
    if folder is None:
        return lambda figures, num_tokens: None
    from torch.utils.tensorboard import SummaryWriter

    try:
        writer = SummaryWriter(folder, purge_step=first_step or None)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise InputError("--tensorboard", folder, f"a folder that can be made is expected ({error.strerror})") from None

    def write(figures: StepFigures, num_tokens: int) -> None:
        values = {
            "loss_metrics/global_avg_loss": figures.loss,
            "grad_norm": figures.gradient_norm,
            "lr": figures.learning_rate,
            "throughput(tps)": num_tokens / figures.seconds,
            "time_metrics/end_to_end(s)": figures.seconds,
        }
        for name, value in values.items():
            writer.add_scalar(name, value, figures.step)  # type: ignore[no-untyped-call]
        writer.flush()  # type: ignore[no-untyped-call]

    return write
