"""Going on after a failure: torchrun's `--max-restarts` starts all ranks anew, and they resume from the run's own last whole checkpoint.

The run's first start leaves `run.json` beside its checkpoints: the step it began at, and by its date which checkpoints are the run's own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from executor.checkpoint import RUN_FILE, own_steps
from planner.documents import Document, dumps, load, write_text

SCHEMA = "meshwright.checkpoint_run/1"


class RunStart(Document, frozen=True, kw_only=True):
    """What a run says of itself beside its checkpoints."""

    schema: str = SCHEMA
    first_step: int
    """Steps done when it began: 0, or those of the checkpoint it was told to resume."""


@dataclass(frozen=True, slots=True)
class Again:
    """From where a restarted run goes on."""

    first_step: int
    """Steps done when the run first began."""
    checkpoint: str | None
    """Its last whole checkpoint; None where it had made none."""


def attempt() -> int:
    """How often torchrun has restarted this process's group."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def own_store(store: dist.Store) -> dist.Store:
    """`store` without what earlier attempts have left in it: torchrun keeps one store for all attempts, with the addresses of dead ranks."""
    return dist.PrefixStore(f"attempt-{attempt()}", store)


def begin(folder: Path, first_step: int) -> None:
    """Says that a run has begun. Called by rank 0, in the run's first attempt."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RUN_FILE, dumps(RunStart(first_step=first_step)))


def find_again(folder: Path, num_steps: int) -> Again | None:
    """What an earlier attempt at `num_steps` steps has left in `folder`; None where there was none that came to its first step. The checkpoint after
    the last step does not count: the attempt failed after that, so the last steps are done again for the run document."""
    path = folder / RUN_FILE
    if not path.exists():
        return None
    start = load(path, RunStart, SCHEMA, "--checkpoint-folder")
    own = sorted(item for item in own_steps(folder) if item[0] < start.first_step + num_steps)
    return Again(start.first_step, str(own[-1][1]) if own else None)


def agree(found: Again | None) -> Again | None:
    """Rank 0's finding on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return found
    box = [found]
    dist.broadcast_object_list(box, src=0)
    return box[0]
