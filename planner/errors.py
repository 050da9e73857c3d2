"""The errors that a user can meet, each with the exit status of the `plan` command.

    MeshwrightError            1   anything that went wrong and is not one of the below
    ├── InputError             2   an input is wrong: names the field, its value and what is allowed
    ├── DoesNotFitError        3   no plan fits: says what is short and the smallest change that would fit
    ├── ToleranceError         4   a measurement lies outside the asked tolerance
    └── SolverError            1   the solver failed, timed out with nothing found, or is missing
"""

from __future__ import annotations


class MeshwrightError(Exception):
    """Base of all errors that are reported as one line, without a traceback."""

    exit_status = 1


class InputError(MeshwrightError):
    """A wrong input.

    `field` is the name the user knows it by (an option, or a path in a document), `value` what was given and
    `allowed` what would have been right.
    """

    exit_status = 2

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        super().__init__(f"{field}: {_shown(value)} is not valid; {allowed}")

    def __reduce__(self) -> tuple[type[InputError], tuple[str, object, str]]:
        """Ranks send one another what they can't read."""
        return type(self), (self.field, self.value, self.allowed)


class DoesNotFitError(MeshwrightError):
    """No plan fits. `repairs` are the changes that would make one fit, cheapest first."""

    exit_status = 3

    def __init__(self, message: str, repairs: tuple[str, ...] = ()) -> None:
        self.repairs = repairs
        super().__init__(message)


class ToleranceError(MeshwrightError):
    """A measured quantity is further from its prediction than the user allows."""

    exit_status = 4


class SolverError(MeshwrightError):
    """The ILP solver failed, is missing, or ran out of time before it found any plan."""

    exit_status = 1


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
