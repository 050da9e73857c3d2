"""The dry run's peak beside the tracked peak of a real run, per rank, for the plans of the parity matrix.

    python benchmarks/dry_run_accuracy.py [-o FILE]      about five minutes

The shapes are small (hidden size 128, sequence 64), so that what differs by timing (messages that arrive early or late) shows as much as it can.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import parity

from executor.dry_run import dry_run_rank

TOLERANCE = 0.03
"""Of every rank; exit status 4 beyond it."""


def measure(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each plan's ranks: the real peak (the highest of the ranks of a pipeline rank) and the dry run's."""
    found = []
    for count in sorted({parity.ranks_of(row) for row in rows}):
        part = [row for row in rows if parity.ranks_of(row) == count]
        for row, real in zip(part, parity.launch(part, count, 1), strict=True):
            plan = parity.plan_of(row)
            for pipeline_rank in range(plan.decisions.pipeline_parallel):
                peers = [item for item in real["memory"] if item["pp"] == pipeline_rank and item["dp"] == 0 and item["tp"] == 0]
                dry = dry_run_rank(plan, pipeline_rank)
                measured = peers[0]["total_bytes"]
                error = dry.total_bytes / measured - 1
                found.append({"name": parity.describe(row), "pp": pipeline_rank, "measured": measured, "dry_run": dry.total_bytes, "error": error})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", metavar="FILE", help="write the rows there as JSON")
    parser.add_argument("--fast", action="store_true", help="only the combinations that run in CI")
    options = parser.parse_args()
    parity.SIZES.update(hidden_size=128, head_dim=32, ffn_hidden_size=256)
    parity.SEQUENCE = 64
    rows = measure([row for row in parity.COMBINATIONS if row["fast"] or not options.fast])
    for row in rows:
        print(f"{row['error']:+8.2%}  {row['measured']:>10,}  {row['dry_run']:>10,}  pp{row['pp']}  {row['name']}")
    errors = [abs(row["error"]) for row in rows]
    print(f"{len(rows)} ranks of {len({row['name'] for row in rows})} plans: median {statistics.median(errors):.2%}, worst {max(errors):.2%}")
    heaviest = []
    for name in {row["name"] for row in rows}:
        ranks = [row for row in rows if row["name"] == name]
        heaviest.append(abs(max(row["dry_run"] for row in ranks) / max(row["measured"] for row in ranks) - 1))
    print(f"the heaviest rank of each plan: median {statistics.median(heaviest):.2%}, worst {max(heaviest):.2%}")
    if options.output:
        Path(options.output).write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    return 0 if max(errors) <= TOLERANCE else 4


if __name__ == "__main__":
    sys.exit(main())
