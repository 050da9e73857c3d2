"""The parity matrix: the part for CI, and all of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the executor needs torch")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import parity

FAST = [row for row in parity.COMBINATIONS if row["fast"]]


def wrong(rows: list[dict[str, object]], steps: int) -> list[dict[str, object]]:
    results = parity.compare(rows, steps)
    assert len(results) == len(rows)
    return [row for row in results if not row["right"]]


def test_combinations_are_many_and_each_once() -> None:
    names = [parity.describe(row) for row in parity.COMBINATIONS]
    assert len(names) >= 40
    assert len(set(names)) == len(names)


def test_fast_combinations_train_like_one_process() -> None:
    assert wrong(FAST, 4) == []


@pytest.mark.slow
def test_all_combinations_train_like_one_process() -> None:
    assert wrong(parity.COMBINATIONS, parity.STEPS) == []
