"""Chains of unequal layers: how much faster cuts by the integer program are than equal numbers of layers.

    python benchmarks/chains.py [--time-limit SECONDS]

Each row fixes the pipeline's degree, so that cuts matter (left free, these models fit without a pipeline), and solves for
everything else. "even" is the same plan with equal numbers of layers per stage and the least recomputation that fits.
"""

from __future__ import annotations

import argparse
import time

from planner.candidates import Constraints
from planner.chain_costs import ChainCosts, step_seconds
from planner.chain_plan import ChainInputs
from planner.chain_search import even_split, search_chain
from planner.cluster import load_cluster
from planner.defaults import Fixed
from planner.plan import Training
from planner.tables.plans import degrees
from planner.trace import trace_model

CASES = (
    ("examples.alternating:build", 8192, "a100-80gb:8", 64),
    ("examples.multimodal:build", None, "v100-16gb:8", 64),
    ("examples.cnn:large", None, "v100-16gb:8", 256),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--time-limit", type=float, default=120.0)
    limit = parser.parse_args().time_limit
    print("| model | layers | cluster | plan | step, ms | gap | even, ms | even / plan | CPU s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for reference, length, cluster, batch in CASES:
        model = trace_model(reference, "mixed-bf16", length)
        training = Training(global_batch_size=batch, sequence_length=length or 1)
        inputs = ChainInputs(model=model, cluster=load_cluster(cluster), training=training)
        for stages in (2, 4, 8):
            start = time.process_time()
            plan = search_chain(inputs, Constraints(fixed=Fixed(pipeline_parallel=stages), time_limit_seconds=limit))
            took = time.process_time() - start
            costs, mine = ChainCosts(inputs), plan.solver.objective_seconds or 0.0
            even = even_split(costs, plan.decisions)
            other = step_seconds(costs, even) if even else None
            text = "does not fit | –" if other is None else f"{other * 1e3:.1f} | {other / mine:.2f}"
            print(
                f"| {reference} | {model.num_layers} | {cluster} | {degrees(plan.decisions)} | {mine * 1e3:.1f} | {plan.solver.gap_fraction:.2%} | "
                f"{text} | {took:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
