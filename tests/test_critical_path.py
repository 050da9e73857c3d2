"""The longest path against the event-by-event walk, and every path as a lower bound."""

import random

import pytest

from planner.critical_path import graph, path_seconds
from planner.plan import SPLIT_BACKWARD_SCHEDULES
from planner.schedule import Action, actions
from planner.timeline import simulate

SHAPES = [
    ("Naive", 3, 1, 4),
    ("GPipe", 4, 1, 6),
    ("1F1B", 4, 1, 3),
    ("1F1B", 4, 1, 9),
    ("1F1B", 1, 1, 5),
    ("Interleaved1F1B", 3, 3, 6),
    ("InterleavedZeroBubble", 3, 2, 9),
    ("ZBVZeroBubble", 4, 2, 10),
]


def random_seconds(shape, rng):
    schedule, p, v, _ = shape
    kinds = "FIW" if schedule in SPLIT_BACKWARD_SCHEDULES else "FB"
    found = {(kind, stage): rng.uniform(0.5, 2.0) for kind in (*kinds, "REDUCE", "SEND_F", "SEND_B") for stage in range(p * v)}
    return found | {("OPTIMIZER", rank): rng.uniform(0, 1) for rank in range(p)}


def walked(shape, seconds):
    def action_seconds(action: Action) -> float:
        return seconds[action.kind, action.stage] if action.kind != "OPTIMIZER" else 0.0

    timeline = simulate(actions(*shape), action_seconds, lambda action: seconds[action.kind, action.stage])
    ends = {rank: max(event.end for event in timeline.events if event.rank == rank) for rank in timeline.ranks}
    return max(end + seconds["OPTIMIZER", rank] for rank, end in ends.items())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_longest_path_is_the_walk(shape):
    rng = random.Random(str(shape))
    for _ in range(20):
        seconds = random_seconds(shape, rng)
        assert graph(*shape).longest(seconds) == pytest.approx(walked(shape, seconds), rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_critical_paths_are_as_long_as_the_step_and_bound_every_other_step(shape):
    rng = random.Random(str(shape))
    whole = graph(*shape)
    for _ in range(10):
        seconds, others = random_seconds(shape, rng), random_seconds(shape, rng)
        length, paths = whole.critical_paths(seconds)
        for path in whole.rank_paths():
            assert path_seconds(path, seconds) <= length * (1 + 1e-9)
        for path in paths:
            assert path_seconds(path, seconds) == pytest.approx(length, rel=1e-6)
            assert path_seconds(path, others) <= whole.longest(others) * (1 + 1e-9)


def test_equal_stages_take_the_known_time():
    seconds = {(kind, stage): 1.0 for kind in "FB" for stage in range(4)}
    for schedule in ("GPipe", "1F1B"):
        assert graph(schedule, 4, 1, 8).longest(seconds) == 2 * (8 + 4 - 1)
