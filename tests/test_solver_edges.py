"""Cuts whose cost depends on where they lie: the integer program against full enumeration and against the event walk."""

import itertools
import math
import random

import pytest

from planner.critical_path import graph
from planner.moments import memory_moments
from planner.pipeline import Edge, Option, Piece, Pipeline, Run, excess_bytes, stage_seconds
from planner.schedule import actions
from planner.solver import solve_pipeline
from planner.timeline import simulate

SHAPES = [("1F1B", 1, 3), ("1F1B", 2, 4), ("1F1B", 3, 5), ("GPipe", 2, 4), ("GPipe", 3, 3), ("1F1B", 4, 4), ("1F1B", 2, 1), ("Naive", 2, 2)]


def random_chain(rng, schedule, p, m, long_edges):
    """Layers that all differ, with messages, outputs that are kept, and edges that jump over layers."""
    count = rng.randint(p, p + 3)
    runs = []
    for index in range(count):
        forward, saved = rng.uniform(0.1, 2), rng.uniform(1, 6)
        options = [Option("none", forward, 2 * forward, forward, forward, saved, rng.uniform(0, 1), rng.uniform(0, 2))]
        if rng.random() < 0.7:
            options.append(Option("full", forward, 3 * forward, 2 * forward, forward, saved / 4, rng.uniform(0, 1), rng.uniform(1, 3)))
        runs.append(Run(f"layer{index}", 1, tuple(options), rng.uniform(0, 5), rng.uniform(0, 2)))
    edges = [Edge(r, r + 1, rng.uniform(0, 1), rng.choice([0.0, 0.3]), rng.choice([0.0, 0.4]), rng.uniform(0, 1)) for r in range(count - 1)]
    if long_edges:
        for a, b in itertools.combinations(range(count), 2):
            if b > a + 1 and rng.random() < 0.3:
                edges.append(Edge(a, b, rng.uniform(0, 0.5), rng.uniform(0, 0.5), rng.uniform(0, 0.5), rng.uniform(0, 1)))
    total = sum(run.states + 2 * run.options[0].saved for run in runs)
    return Pipeline(
        runs=tuple(runs),
        ranks=tuple(range(p)),
        limits=tuple(rng.uniform(0.8, 2.5) * total / p for _ in range(p)),
        moments=memory_moments(schedule, p, 1, m),
        kinds="FB",
        fixed_seconds={key: 0.05 for stage in range(p - 1) for key in (("SEND_F", stage), ("SEND_B", stage + 1))},
        reduce_pieces=(Piece(0.1, 0.2),) if rng.random() < 0.5 else (),
        optimizer_piece=Piece(0.05, 0.1),
        edges=tuple(edges),
        slowness=tuple(rng.choice([1.0, 3.0]) for _ in range(p - 1)),
    )


def all_stages(pipeline):
    """Every cut with every choice of options."""
    count, p = len(pipeline.runs), pipeline.num_stages
    for cuts in itertools.combinations(range(1, count), p - 1):
        edges = (0, *cuts, count)
        for chosen in itertools.product(*(range(len(run.options)) for run in pipeline.runs)):
            yield tuple(
                tuple(
                    tuple(int(a <= r < b and chosen[r] == o) for o in range(len(run.options))) for r, run in enumerate(pipeline.runs)
                )
                for a, b in itertools.pairwise(edges)
            )  # fmt: skip


@pytest.mark.parametrize("long_edges", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_optimum_equals_enumeration(shape, long_edges):
    rng = random.Random(f"{shape}{long_edges}")
    whole, fitted = graph(shape[0], shape[1], 1, shape[2]), 0
    for _ in range(8):
        pipeline = random_chain(rng, *shape, long_edges)
        best = min(
            (whole.longest(stage_seconds(pipeline, counts)) for counts in all_stages(pipeline) if excess_bytes(pipeline, counts)[0] <= 0),
            default=math.inf,
        )
        found = solve_pipeline(pipeline, whole)
        assert found.proven
        assert found.seconds == pytest.approx(best, rel=2e-6)
        if found.counts is not None:
            fitted += 1
            assert found.bound <= found.seconds * (1 + 2e-6)
            assert excess_bytes(pipeline, found.counts)[0] <= 1e-6
    assert fitted


def test_seconds_are_those_of_an_event_walk():
    rng = random.Random(5)
    for schedule, p, m in SHAPES:
        pipeline = random_chain(rng, schedule, p, m, True)
        counts = next(all_stages(pipeline))
        stage_of = {r: s for s, rows in enumerate(counts) for r, row in enumerate(rows) if sum(row)}

        def seconds(action, pipeline=pipeline, counts=counts, stage_of=stage_of):
            kind, stage, _ = action
            mine = [r for r, s in stage_of.items() if s == stage]
            parameters = sum(pipeline.runs[r].parameters for r in mine)
            if kind == "OPTIMIZER":
                return 0.0
            if kind == "REDUCE":
                return max((piece(parameters) for piece in pipeline.reduce_pieces), default=0.0)
            options = [option for r in mine for option, used in zip(pipeline.runs[r].options, counts[stage][r], strict=True) if used]
            if kind == "B":
                return sum(option.backward for option in options)
            apart = [edge for edge in pipeline.edges if stage_of[edge.source] != stage_of[edge.target]]
            leaving = sum(edge.leaving for edge in apart if stage_of[edge.source] == stage)
            return sum(option.forward for option in options) + leaving + sum(edge.entering for edge in apart if stage_of[edge.target] == stage)

        def message(action, pipeline=pipeline, stage_of=stage_of):
            after = action.stage if action.kind == "SEND_F" else action.stage - 1
            crossing = [edge for edge in pipeline.edges if stage_of[edge.source] <= after < stage_of[edge.target]]
            return 0.05 + pipeline.slow(after) * sum(edge.message for edge in crossing)

        timeline = simulate(actions(schedule, p, 1, m), seconds, message)
        tails = [0.05 * sum(pipeline.runs[r].parameters for r, s in stage_of.items() if s == rank) + 0.1 for rank in range(p)]
        ends = {event.rank: event.end for event in timeline.events if event.kind == "OPTIMIZER"}
        walked = graph(schedule, p, 1, m).longest(stage_seconds(pipeline, counts))
        assert walked == pytest.approx(max(ends[rank] + tails[rank] for rank in range(p)))
