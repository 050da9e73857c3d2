"""What only some ranks can find wrong ends all of them, none by a failure of the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from planner.errors import InputError, MeshwrightError


class OtherRankError(MeshwrightError):
    """Another rank can't go on, and says why."""

    exit_status = InputError.exit_status


@contextmanager
def all_or_none(device: torch.device) -> Iterator[None]:
    """All ranks leave the block, or none does: where a MeshwrightError ends it on one, OtherRankError ends it on the others, which would else go on
    and fail with it."""
    failure: MeshwrightError | None = None
    try:
        yield
    except MeshwrightError as error:
        failure = error
    failures = torch.tensor([0 if failure is None else 1], device=device)
    dist.all_reduce(failures)
    if failure is not None:
        raise failure
    if int(failures):
        raise OtherRankError("another rank can't go on")
