"""Bytes that the executor sends in a step are those of the formula: tied tables above all, which ZeRO-2 and 3 send once for each of two layers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the executor needs torch")

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import parity
from plans import make_plan
from sent_bytes import work

from executor.processes import run_ranks
from planner.communication import communication_bytes
from planner.documents import dumps

PLANS: dict[int, tuple[dict[str, Any], ...]] = {
    2: (
        *({"model": model, "dp": 2, "m": 2, "zero_stage": zero} for model in ("tiny-gpt", "tiny-llama") for zero in range(4)),
        {"model": "tiny-gpt", "tp": 2, "m": 2},
        {"model": "tiny-gpt", "tp": 2, "m": 2, "sequence_parallel": True},
        *(
            {"model": parity.model_of(family), "tp": 2, "m": 2, "sequence_parallel": together, "recompute": recompute}
            for family in ("neox", "gptj", "falcon")
            for together in (False, True)
            for recompute in ("none", "full")
        ),
    ),
    4: (
        {"model": "tiny-gpt", "dp": 2, "pp": 2, "m": 4, "zero_stage": 3},
        {"model": "tiny-gpt", "dp": 2, "pp": 2, "m": 4, "zero_stage": 3, "schedule": "ZBVZeroBubble", "virtual": 2},
        {"model": "tiny-gpt", "dp": 2, "tp": 2, "m": 2, "zero_stage": 3},
    ),
}


@pytest.mark.parametrize("num_ranks", PLANS)
def test_bytes_sent_are_those_of_the_formula(num_ranks: int, tmp_path: Path) -> None:
    plans = [make_plan(precision="fp32", sequence_length=64, **choice) for choice in PLANS[num_ranks]]
    run_ranks(num_ranks, work, ([json.loads(dumps(plan)) for plan in plans], str(tmp_path / "rank")), "the test")
    for rank in range(num_ranks):
        for plan, choice, sent in zip(plans, PLANS[num_ranks], json.loads((tmp_path / f"rank{rank}").read_text()), strict=True):
            formula = communication_bytes(plan.inputs, plan.decisions, sent["pp"])
            for axis in ("tp", "dp"):
                assert sent[axis] == pytest.approx(formula[axis], rel=2e-3), (rank, axis, choice)  # units are padded to a multiple of the ranks
