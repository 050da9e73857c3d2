"""planner.walk: short walks that have settled say when the ranks of long ones end, and both are the timeline's walk."""

from __future__ import annotations

import random

import pytest

from planner import walk
from planner.schedule import plan_actions
from planner.timeline import simulate
from tests.test_timing import SCHEDULES, case


def times_of(p, v, rng, uneven=0.1, message=0.02, receive=0.0):
    stages = p * v
    forward = [rng.uniform(1.0 - uneven, 1.0) for _ in range(stages)]
    half = [time * rng.uniform(1.0 - uneven, 1.0) for time in forward]
    messages = [rng.uniform(0.0, message)] * stages
    return walk.StageTimes(forward, [2 * time for time in half], half, half, [0.3] * stages, [0.2] * p, messages, receive)


@pytest.mark.parametrize(("schedule", "v"), SCHEDULES)
def test_settled_rounds_extrapolate_to_the_full_walk_of_uneven_stages(schedule, v, monkeypatch):
    """With random stage times and messages, and the full walk forbidden, the error stays below 0.5 %."""
    monkeypatch.setattr(walk, "FULL_WALK", 0)
    monkeypatch.setattr(walk, "MAX_WALKED", 0)
    rng = random.Random(5)
    for _ in range(25):
        p = rng.choice((2, 3, 4, 8))
        m = p * rng.choice((5, 9, 16)) + (rng.randrange(p) if v == 1 else 0)
        times = times_of(p, v, rng)
        full = walk.walk(schedule, p, v, m, times)
        assert max(walk.rank_ends(schedule, p, v, m, times)) == pytest.approx(max(full), rel=5e-3)


@pytest.mark.parametrize("message", [0.0, 0.01, 0.1])
@pytest.mark.parametrize(("schedule", "v", "p", "m"), [("1F1B", 1, 8, 200), ("1F1B", 1, 16, 131), ("Interleaved1F1B", 2, 8, 96),
                                                       ("Interleaved1F1B", 3, 4, 96)])  # fmt: skip
def test_a_settled_walk_is_exact(schedule, v, p, m, message, monkeypatch):
    """Equal stages but for a slower last one, as a head makes it: short walks give every rank's end."""
    n = p * v
    times = walk.StageTimes([1.0] * (n - 1) + [1.1], [2.0] * n, [1.0] * n, [1.0] * n, [0.3] * n, [0.2] * p, [message] * n)
    full = walk.walk(schedule, p, v, m, times)
    walked = []
    one = walk._walk

    def counted(schedule, p, v, m, times):
        walked.append(m)
        return one(schedule, p, v, m, times)

    monkeypatch.setattr(walk, "FULL_WALK", 0)
    monkeypatch.setattr(walk, "_walk", counted)
    assert walk.rank_ends(schedule, p, v, m, times) == pytest.approx(full, rel=1e-9)
    assert sum(walked) < m


@pytest.mark.parametrize("receive", [0.0, 0.05])
@pytest.mark.parametrize(("schedule", "v"), SCHEDULES)
def test_the_walk_is_that_of_the_timeline(schedule, v, receive):
    rng = random.Random(7)
    _, decisions = case("gpt3", tp=8, pp=4, m=12, schedule=schedule, v=v)
    times = times_of(4, v, rng, receive=receive)
    kinds = {"F": times.forward, "B": times.backward, "I": times.backward_input, "W": times.backward_weight, "REDUCE": times.reduce}

    def seconds(action):
        return 0.2 if action.kind == "OPTIMIZER" else kinds[action.kind][action.stage]

    timeline = simulate(plan_actions(decisions), seconds, lambda action: times.transfer[0], receive_seconds=receive)
    assert max(walk.walk(schedule, 4, v, 12, times)) == pytest.approx(timeline.end, rel=1e-9)


def test_equal_stages_without_messages_follow_the_closed_forms():
    """1F1B and GPipe: (m + p - 1)·(F + B); naive model parallelism: m·p·(F + B) (Narayanan et al. 2021, section 2.2)."""
    for schedule, expected in (("1F1B", (24 + 3) * 3.0), ("GPipe", (24 + 3) * 3.0), ("Naive", 24 * 4 * 3.0)):
        times = walk.StageTimes([1.0] * 4, [2.0] * 4, [0.0] * 4, [0.0] * 4, [0.0] * 4, [0.0] * 4, [0.0] * 4)
        assert max(walk.walk(schedule, 4, 1, 24, times)) == pytest.approx(expected)
    interleaved = walk.StageTimes([0.5] * 8, [1.0] * 8, [0.0] * 8, [0.0] * 8, [0.0] * 8, [0.0] * 4, [0.0] * 8)
    assert max(walk.walk("Interleaved1F1B", 4, 2, 24, interleaved)) == pytest.approx((24 + 3 / 2) * 3.0)


def test_lists_that_do_not_repeat_are_told_apart():
    assert walk._windows("GPipe", 4, 1, 10, 1) is None
    assert walk._windows("1F1B", 4, 1, 6, 1) is not None
    assert walk._windows("1F1B", 4, 1, 4, 1) is None
