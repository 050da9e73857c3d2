"""torchrun in this process: starts a plan's ranks on this machine, waits for them, and says in one line why a rank ended early.

torchrun by itself exits with 1 whatever a rank's exit status was, behind a report of thirty lines.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, get_error_handler

from planner.errors import MeshwrightError
from planner.lifeline import child_environment

SPEAKS = "MESHWRIGHT_AGENT_SPEAKS"
"""Set for ranks whose agent says why they ended, so that they do not."""


def start_ranks(num_ranks: int, arguments: Sequence[str]) -> int:
    """Runs `python -m executor` with `arguments` on every rank. Returns 0, or the exit status of the rank that ended first with another one, of
    which a line on stderr has the reason; 1 where a signal ended it."""
    for name in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    for name in [name for name in os.environ if name.startswith("PET_")]:  # torchrun's own options, of another job around this one
        del os.environ[name]
    os.environ |= {SPEAKS: "1"} | child_environment()
    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:  # for what the ranks record of their end
        return _start(["--standalone", "--nproc-per-node", str(num_ranks), "--log-dir", folder, "-m", "executor", *arguments])


def _start(arguments: list[str]) -> int:
    """`start_ranks` by torchrun's own arguments."""
    options = torchrun.parse_args(arguments)  # type: ignore[no-untyped-call]
    handled = [name for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if signal.getsignal(signal.Signals[name]) is not signal.SIG_IGN]
    options.signals_to_handle = ",".join(handled)  # else it would handle what this process was started to ignore
    try:
        torchrun.run(options)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = _cause(error)
        sys.stderr.write(f"plan: {_reason(rank, failure)}\n")
        return _status(failure)
    except SignalException as error:
        return 128 + int(error.sigval)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _cause(error: ChildFailedError) -> tuple[int, ProcessFailure]:
    """The rank that failed first; of those that say why, where some do."""
    spoken = {rank: failure for rank, failure in error.failures.items() if isinstance(failure.error_file_data.get("message"), dict)}
    failures = spoken or error.failures
    rank = min(failures, key=lambda rank: failures[rank].timestamp)
    return rank, failures[rank]


def _reason(rank: int, failure: ProcessFailure) -> str:
    """What the rank recorded of its end; else what the operating system says of it."""
    recorded = failure.error_file_data.get("message")
    if isinstance(recorded, dict):
        return str(recorded["message"]).partition(": ")[2]
    if failure.exitcode < 0:
        return f"rank {rank} was ended by {failure.signal_name()}" + (" (out of memory?)" if failure.exitcode == -signal.SIGKILL else "")
    return f"rank {rank} ended with exit status {failure.exitcode}; its own words are above"


def _status(failure: ProcessFailure) -> int:
    """That of what the rank recorded, since the agent may have ended it on its way out; else its own, and 1 where a signal ended it."""
    recorded = failure.error_file_data.get("message")
    name = str(recorded["message"]).partition(": ")[0] if isinstance(recorded, dict) else ""
    for kind in MeshwrightError.__subclasses__():
        if kind.__name__ == name:
            return kind.exit_status
    return failure.exitcode if failure.exitcode > 0 else 1


def record(error: MeshwrightError) -> None:
    """Writes down why this rank ends, for its agent, where it has one."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)
