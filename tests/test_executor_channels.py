"""Messages without tags: each channel of a pipeline has a group of its own, as it must on NCCL. What NCCL does besides, test_schedule.py models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the executor needs torch")

from channel_ranks import work
from plans import make_plan

from executor.processes import run_ranks
from planner.documents import dumps

PLANS: dict[int, tuple[tuple[dict[str, Any], int], ...]] = {
    2: (
        ({"pp": 2, "m": 3}, 2),
        ({"pp": 2, "m": 4, "schedule": "Interleaved1F1B", "virtual": 2}, 4),
        ({"pp": 2, "m": 4, "schedule": "InterleavedZeroBubble", "virtual": 2}, 4),
        ({"pp": 2, "m": 4, "schedule": "ZBVZeroBubble", "virtual": 2}, 4),
    ),
    4: (
        ({"pp": 2, "tp": 2, "m": 2}, 2),
        ({"pp": 2, "dp": 2, "m": 2, "schedule": "ZBVZeroBubble", "virtual": 2}, 4),
    ),
}


@pytest.mark.parametrize("num_ranks", PLANS)
def test_plans_train_alike_with_tags_and_without(num_ranks: int, tmp_path: Path) -> None:
    plans = [make_plan(model="tiny-gpt", precision="fp32", sequence_length=32, **choice) for choice, _ in PLANS[num_ranks]]
    run_ranks(num_ranks, work, ([json.loads(dumps(plan)) for plan in plans], 2, str(tmp_path / "out")), "the test")
    for (choice, groups), found in zip(PLANS[num_ranks], json.loads((tmp_path / "out").read_text()), strict=True):
        with_tags, without = found["losses"]
        assert with_tags == without, choice
        assert found["groups"] == groups, choice
