"""Plan quality and search time: the ILP against full enumeration, a greedy planner and an even split, in one run.

    python benchmarks/search.py

All see the same memory and time models and the same degrees; what differs is who cuts the chain and who decides what is
recomputed. *Even* takes the most even cut and the least uniform recomputation that fits; *greedy* cuts by compute time and
recomputes layer by layer, most bytes per second first; *enumeration* tries all cuts and counts (small models only).
"""

from __future__ import annotations

import itertools
import math
import time

from planner import greedy
from planner.candidates import LEVELS, Constraints, Degrees, decisions_of
from planner.chain import Costs
from planner.cluster import load_cluster
from planner.critical_path import graph
from planner.explore import explore
from planner.model import load_model
from planner.plan import Decisions, Inputs, Training
from planner.solver import Pipeline, excess_bytes, solve_pipeline, stage_seconds

CASES = [
    # model, cluster, batch, sequence, memory fraction, tp, pp, micro-batch, schedule
    ("gpt3-125m", "a100-40gb:2", 8, 2048, 1.0, 1, 2, 1, "1F1B"),
    ("gpt3-125m", "a100-40gb:2", 8, 2048, 0.12, 1, 2, 1, "1F1B"),
    ("gpt3-350m", "a100-40gb:2", 16, 2048, 0.2, 1, 2, 1, "1F1B"),
    ("gpt3-1.3b", "a100-40gb:4", 32, 2048, 0.35, 1, 4, 1, "1F1B"),
    ("gpt3-6.7b", "a100-40gb:8", 64, 2048, 1.0, 1, 8, 1, "1F1B"),
    ("gpt3-6.7b", "a100-40gb:8", 64, 2048, 1.0, 1, 8, 2, "1F1B"),
    ("gpt3-13b", "a100-80gb:8", 64, 2048, 0.6, 2, 4, 1, "1F1B"),
    ("bloom-7b1", "a100-40gb:8", 64, 2048, 1.0, 1, 8, 1, "1F1B"),
    ("llama-3-8b", "h100-80gb:8", 64, 8192, 1.0, 1, 8, 1, "1F1B"),
    ("llama-2-70b", "a100-80gb:64", 128, 4096, 1.0, 8, 8, 1, "GPipe"),
    ("bloom-176b", "a100-80gb:96", 64, 2048, 1.0, 8, 12, 1, "1F1B"),
]
SEARCHES = [
    ("gpt3-13b", "a100-80gb:64", 256, 2048),
    ("llama-2-70b", "a100-80gb:128", 256, 2048),
    ("gpt3", "a100-80gb:1024", 1536, 2048),
    ("dense-1.8t", "a100-80gb:25000", 5000, 4096),
]
"""Searches over all decisions: model, cluster, batch, sequence."""
ENUMERATED = 4e5
"""Most combinations that are enumerated."""


def even(pipeline: Pipeline) -> float | None:
    """Step seconds of the most even cut with the least uniform recomputation that fits."""
    for option in range(len(LEVELS)):
        counts = greedy.frozen(greedy.place(pipeline, greedy.even_sizes(pipeline), option))
        if excess_bytes(pipeline, counts)[0] <= 0:
            return walked(pipeline, counts)
    return None


def walked(pipeline: Pipeline, counts: object) -> float:
    return WHOLE.longest(stage_seconds(pipeline, counts))  # type: ignore[arg-type]


def greedy_seconds(pipeline: Pipeline) -> float | None:
    counts = greedy.fit(pipeline, greedy.balanced_sizes(pipeline))
    return walked(pipeline, counts) if counts else None


def enumerated(pipeline: Pipeline) -> tuple[float, int] | None:
    """The best of all cuts and recompute counts, and how many there were; None where there are too many."""
    blocks, stages = pipeline.runs[1].length, pipeline.num_stages
    if math.comb(blocks + 1, stages - 1) > ENUMERATED:
        return None
    cuts = [edges for edges in itertools.combinations(range(1, blocks + 2), stages - 1)]
    splits = [[(a, b, n - a - b) for a in range(n + 1) for b in range(n + 1 - a)] for n in range(blocks + 1)]
    numbers = []
    for edges in cuts:
        borders = (0, *edges, blocks + 2)
        numbers.append([b - a - (i == 0) - (i == stages - 1) for i, (a, b) in enumerate(itertools.pairwise(borders))])
    total = sum(math.prod(len(splits[n]) for n in row) for row in numbers)
    if total > ENUMERATED:
        return None
    best = math.inf
    for row in numbers:
        for choice in itertools.product(*(splits[n] for n in row)):
            counts = tuple(((int(i == 0),), part, (int(i == stages - 1),)) for i, part in enumerate(choice))
            if excess_bytes(pipeline, counts)[0] <= 0:
                best = min(best, walked(pipeline, counts))
    return best, total


def shown(value: float | None, best: float) -> str:
    return "does not fit" if value is None else f"{value:.4f} ({value / best - 1:+.2%})"


def main() -> None:
    global WHOLE
    print("| model, GPUs, memory | tp, pp, micro-batch, schedule | ILP s | gap | CPU s | enumeration | greedy | even split |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, cluster, batch, sequence, fraction, tp, pp, micro, schedule in CASES:
        training = Training(global_batch_size=batch, sequence_length=sequence, memory_fraction=fraction)
        inputs = Inputs(model=load_model(name), cluster=load_cluster(cluster), training=training)
        dp = inputs.cluster.num_gpus // tp // pp
        degrees = Degrees(tp, pp, dp, micro, batch // dp // micro)
        candidate: Decisions = decisions_of(degrees, schedule=schedule, zero_stage=1 if dp > 1 else 0, sequence_parallel=tp > 1)
        pipeline = Costs(inputs).pipeline(candidate, LEVELS)
        WHOLE = graph(schedule, pp, 1, degrees.num_microbatches)
        start = time.process_time()
        solution = solve_pipeline(pipeline, WHOLE, deadline=time.monotonic() + 120)
        took = time.process_time() - start
        if solution.counts is None:
            print(f"| {name}, {cluster}, {fraction:.0%} | {tp}, {pp}, {micro}, {schedule} | nothing fits | | {took:.2f} | | | |", flush=True)
            continue
        best = solution.seconds
        start = time.process_time()
        every = enumerated(pipeline)
        spent = time.process_time() - start
        text = f"{shown(every[0], best)}, {every[1]} tried, {spent:.1f} CPU s" if every else "too many"
        cells = [
            f"{name}, {cluster}, {fraction:.0%}",
            f"{tp}, {pp}, {micro}, {schedule}",
            f"{best:.4f}",
            f"{max(0.0, 1 - solution.bound / best):.1e}",
            f"{took:.2f}",
            text,
            shown(greedy_seconds(pipeline), best),
            shown(even(pipeline), best),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    print("\n| whole search | candidates | solved as ILPs | step s | gap | CPU s |\n| --- | --- | --- | --- | --- | --- |")
    for name, cluster, batch, sequence in SEARCHES:
        training = Training(global_batch_size=batch, sequence_length=sequence)
        inputs = Inputs(model=load_model(name), cluster=load_cluster(cluster), training=training)
        start = time.process_time()
        outcome = explore(Costs(inputs), Constraints(time_limit_seconds=300.0))
        took = time.process_time() - start
        seconds = outcome.best.seconds if outcome.best else math.nan
        gap = max(0.0, 1 - outcome.bound / seconds)
        counts = f"{outcome.num_candidates} | {outcome.num_solved}"
        print(f"| {name} on {cluster}, batch {batch} | {counts} | {seconds:.3f} | {gap:.1e} | {took:.1f} |", flush=True)


if __name__ == "__main__":
    main()
