"""The whole loop, from Python: solve a plan, run it on this machine's CPUs, compare, and draw the report.

    python examples/solve_and_compare.py [FOLDER]
"""

import subprocess
import sys
from pathlib import Path

from planner.candidates import Constraints
from planner.cluster import load_cluster
from planner.compare import compare
from planner.defaults import Fixed
from planner.documents import dumps, write_text
from planner.model import load_model
from planner.plan import Inputs, Training
from planner.report import report
from planner.run import load_actions, load_run
from planner.search import search
from planner.timing import predict_timeline


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plan_file, run_file, page = folder / "plan.json", folder / "run.json", folder / "report.html"

    inputs = Inputs(
        model=load_model("tiny-gpt"),
        cluster=load_cluster("cpu:2"),
        training=Training(global_batch_size=8, sequence_length=64, precision="fp32"),
    )
    plan = search(inputs, Constraints(fixed=Fixed(pipeline_parallel=2, micro_batch_size=1)))
    write_text(plan_file, dumps(plan))
    cuts = ", ".join(f"{stage.num_layers} layers" for stage in plan.decisions.stages)
    print(f"{plan.solver.status}: {plan.decisions.schedule} over stages of {cuts}")

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "executor"]
    subprocess.run([*torchrun, str(plan_file), "--steps", "3", "-o", str(run_file)], check=True)

    run = load_run(run_file)
    actions = load_actions(run_file, run)
    comparison = compare(plan, run, actions=actions)
    for row in comparison.rows:
        if row.rank is None and row.error_fraction is not None:
            print(f"{row.quantity}: predicted {row.predicted:,.4g}, measured {row.measured:,.4g} ({row.error_fraction:+.0%})")
    if comparison.causes:
        print(f"most of the difference: {comparison.causes[0].words}")
    write_text(page, report(plan, run, simulated=predict_timeline(plan.inputs, plan.decisions), measured=actions))
    print(f"wrote {page}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example"))
