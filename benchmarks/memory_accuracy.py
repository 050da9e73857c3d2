"""The predicted memory beside the dry run's, per rank and category, over plans drawn at random.

    python benchmarks/memory_accuracy.py [--plans 200] [-o FILE]      about seven minutes on one core

The plans are those of the slow test (`tests/drawn_plans.py`): block families, shapes, degrees, ZeRO, recomputation, attention,
schedules, precisions, optimizers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from drawn_plans import category_error, plans  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402

from executor.dry_run import dry_run_rank  # noqa: E402
from planner.memory import predict_memory  # noqa: E402
from planner.plan import Plan  # noqa: E402


def measure(number: int) -> list[dict[str, Any]]:
    """One row per rank of each plan."""
    rows: list[dict[str, Any]] = []

    @settings(
        max_examples=number, deadline=None, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(plan=plans())
    def draw(plan: Plan) -> None:
        for rank, predicted in enumerate(predict_memory(plan.inputs, plan.decisions)):
            traced = dry_run_rank(plan, rank)
            rows.append(
                {
                    "plan": describe(plan),
                    "pipeline_rank": rank,
                    "predicted_bytes": predicted.total_bytes,
                    "dry_run_bytes": traced.total_bytes,
                    "error": predicted.total_bytes / traced.total_bytes - 1,
                    "worst_category": category_error(predicted, plan, rank, traced),
                }
            )
        print(f"\r{sum(row['pipeline_rank'] == 0 for row in rows)} plans", end="", file=sys.stderr, flush=True)

    draw()
    print(file=sys.stderr)
    return rows


def describe(plan: Plan) -> dict[str, Any]:
    """What was drawn."""
    inputs, decisions = plan.inputs, plan.decisions
    level = decisions.stages[0].recompute
    return {
        "family": inputs.model.name,
        "attention": inputs.training.attention or "fused",
        "recompute": level if isinstance(level, str) else "mixed",
        "schedule": decisions.schedule,
        "ZeRO": decisions.zero_stage,
        "precision": inputs.training.precision,
        "degrees": f"tp{decisions.tensor_parallel} pp{decisions.pipeline_parallel} dp{decisions.data_parallel}",
        "sequence_parallel": decisions.sequence_parallel,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plans", type=int, default=200, help="how many are drawn (default 200)")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the rows there as JSON")
    options = parser.parse_args()
    rows = measure(options.plans)
    errors = [row["error"] for row in rows]
    sizes = [abs(error) for error in errors]
    firsts = [row for row in rows if row["pipeline_rank"] == 0]
    print(f"{len(rows)} ranks of {len(firsts)} plans, predicted against dry run:")
    print(f"  median {statistics.median(sizes):.4%}, worst {max(sizes):.3%}; most below {min(errors):+.3%}, most above {max(errors):+.3%}")
    print(f"  exact to the byte on {sum(error == 0 for error in errors)} ranks; worst category {max(row['worst_category'] for row in rows):.3%}")
    for name in ("family", "attention", "recompute", "schedule", "ZeRO", "precision"):
        counts = Counter(str(row["plan"][name]) for row in firsts)
        print(f"  {name}: " + ", ".join(f"{value} {count}" for value, count in sorted(counts.items())))
    if options.output:
        Path(options.output).write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    return 0 if max(sizes) <= 0.01 and max(row["worst_category"] for row in rows) <= 0.02 else 4


if __name__ == "__main__":
    sys.exit(main())
