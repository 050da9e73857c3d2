"""`python -m executor plan.json --steps N -o run.json`, as torchrun starts it on every rank."""

from __future__ import annotations

import signal
import sys

from planner.lifeline import end_with_parent

if __name__ == "__main__":
    end_with_parent(signal.SIGKILL)
    from executor.launch import main  # with torch, which takes a while

    sys.exit(main(sys.argv[1:]))
