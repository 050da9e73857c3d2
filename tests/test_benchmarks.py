"""What the benchmarks share."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import comparable_seconds, round_medians, spread


def test_a_rounds_own_speed_is_taken_out() -> None:
    true, factors = [0.1, 0.2, 0.25, 0.4], [0.8, 1.0, 1.5, 1.0, 2.0]
    rounds = [[factor * seconds for seconds in true] for factor in factors]
    assert comparable_seconds(rounds) == pytest.approx(true)
    left_out = [rounds[0], rounds[1], [None, *rounds[2][1:3], None], rounds[3], [rounds[4][0], None, rounds[4][2], None]]
    assert comparable_seconds(left_out) == pytest.approx(true)
    some = [0.2, *(0.1 * (index + 4) for index in range(20))]
    again = [[*(factor * seconds for seconds in some[:3]), *[None] * 18] for factor in (0.5, 0.6, 0.55, 0.5, 0.45, 0.6)]
    fewer = comparable_seconds([some, [1.1 * seconds for seconds in some], *again])
    assert [seconds / fewer[0] for seconds in fewer] == pytest.approx([seconds / 0.2 for seconds in some]), "rounds of a few, faster plans"
    assert comparable_seconds([[0.3, 0.4]]) == pytest.approx([0.3, 0.4])


def test_a_plan_disturbed_in_one_round_keeps_its_time() -> None:
    noise = random.Random(1)
    true = [0.1 * (1 + index / 10) for index in range(10)]
    rounds = [[factor * seconds * noise.uniform(0.99, 1.01) for seconds in true] for factor in (1.0, 1.2, 0.9, 1.1)]
    rounds[2][3] *= 3
    ratios = [seconds / 1.05 / expected for seconds, expected in zip(comparable_seconds(rounds), true, strict=True)]
    assert ratios == pytest.approx([1.0] * 10, abs=0.03)


def test_rounds_are_told_apart() -> None:
    assert round_medians([1.0, 2.0, 9.0, 4.0, 4.0, 5.0], 2) == [2.0, 4.0]
    assert spread([1.0, 2.0, 9.0, 4.0, 4.0, 5.0], 2) == pytest.approx(1 / 3)
