"""The longest path against the event-by-event walk, and every path as a lower bound."""

import random

import pytest

from planner.critical_path import RECEIVE, graph, path_seconds
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


def random_seconds(shape, rng, late=False):
    """With `late`, messages only begin to move when they are asked for."""
    schedule, p, v, _ = shape
    kinds = "FIW" if schedule in SPLIT_BACKWARD_SCHEDULES else "FB"
    found = {(kind, stage): rng.uniform(0.5, 2.0) for kind in (*kinds, "REDUCE", "SEND_F", "SEND_B") for stage in range(p * v)}
    found |= {("OPTIMIZER", rank): rng.uniform(0, 1) for rank in range(p)}
    return found | ({RECEIVE: rng.uniform(0.01, 1)} if late else {})


def walked(shape, seconds):
    def action_seconds(action: Action) -> float:
        return seconds[action.kind, action.stage] if action.kind != "OPTIMIZER" else 0.0

    timeline = simulate(actions(*shape), action_seconds, lambda action: seconds[action.kind, action.stage], receive_seconds=seconds.get(RECEIVE, 0.0))
    ends = {rank: max(event.end for event in timeline.events if event.rank == rank) for rank in timeline.ranks}
    return max(end + seconds["OPTIMIZER", rank] for rank, end in ends.items())


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_longest_path_is_the_walk(shape, late):
    rng = random.Random(str(shape))
    for _ in range(20):
        seconds = random_seconds(shape, rng, late)
        assert graph(*shape).longest(seconds) == pytest.approx(walked(shape, seconds), rel=1e-12)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_critical_paths_are_as_long_as_the_step_and_bound_every_other_step(shape, late):
    rng = random.Random(str(shape))
    whole = graph(*shape)
    for _ in range(10):
        seconds, others = random_seconds(shape, rng, late), random_seconds(shape, rng, late)
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
