"""What timelines cost: `python benchmarks/timeline.py [-o NAME]`.

The size of one merged Perfetto trace for a step of 64 ranks (8 pipeline ranks x 8 copies), by schedule and micro-batches; and
the time that recording start and end takes per action, as a share of a step in which all actions are as short as the
shortest of a real run here, a tiny model's.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import processor, table, write_results
from executor.measure import Recorder
from planner.schedule import actions
from planner.timeline import Timeline, chrome_trace, simulate

SHORTEST_ACTION_SECONDS = 2e-4
"""One embedding or block of tiny-gpt on 64 tokens, forward."""


def merged(schedule: str, virtual: int, microbatches: int, copies: int = 8) -> Timeline:
    """A step of 8 pipeline ranks, each with its copies, as a run of 64 ranks would report it."""
    single = simulate(actions(schedule, 8, virtual, microbatches), lambda action: 0.0123456 + 1e-4 * action.stage, lambda action: 0.000789)
    events = tuple(event._replace(rank=event.rank * copies + copy) for event in single.events for copy in range(copies))
    return Timeline(source="measured", events=events)


def seconds_per_action(count: int = 20000) -> float:
    """Two readings of the clock and one row, the least of five goes."""
    recorder = Recorder(torch.device("cpu"))
    found = []
    for _ in range(5):
        recorder.begin_step()
        start = time.perf_counter()
        for index in range(count):
            before = recorder.now()
            recorder.add("F", 0, index, before, recorder.now())
        found.append((time.perf_counter() - start) / count)
    return min(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", help="name of the result files under benchmarks/results (default: DATE-timeline)")
    options = parser.parse_args()
    rows = []
    cases = (("1F1B", 1, 32), ("1F1B", 1, 64), ("Interleaved1F1B", 2, 32), ("ZBVZeroBubble", 2, 32), ("InterleavedZeroBubble", 2, 64))
    for schedule, virtual, m in cases:
        timeline = merged(schedule, virtual, m)
        size = len(chrome_trace([timeline]).encode())
        rows.append({"schedule": schedule, "num_microbatches": m, "num_events": len(timeline.events), "trace_bytes": size})
    cost = seconds_per_action()
    share = cost / SHORTEST_ACTION_SECONDS
    text = f"Timelines, {datetime.date.today()}, {processor()}\n\nmerged trace of a step of 64 ranks\n"
    text += table(
        ("schedule", "m", "events", "trace MB (10^6 bytes)"),
        [(row["schedule"], row["num_microbatches"], row["num_events"], f"{row['trace_bytes'] / 1e6:.2f}") for row in rows],
    )
    text += f"\nrecording an action takes {1e6 * cost:.2f} µs: {100 * share:.2f} % of a step of actions of {1e6 * SHORTEST_ACTION_SECONDS:.0f} µs\n"
    sys.stdout.write(text)
    write_results(
        options.output or f"{datetime.date.today()}-timeline", text, {"traces": rows, "seconds_per_action": cost, "share_of_shortest_action": share}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
