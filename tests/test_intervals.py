"""Every command that prints a predicted step time prints its interval, and flags what is implausible or risky."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from planner.accuracy import accuracy, step_interval
from planner.compare import compare
from planner.estimate import warnings
from planner.report import SweepPoint, report, sweep_report
from planner.tables import results, text
from tests.plans import make_plan, make_run
from tests.test_cli import plan

SMALL = ("--model", "tiny-gpt", "--cluster", "a100-80gb:4", "--global-batch-size", "16")


@pytest.fixture
def written(tmp_path: Path) -> str:
    path = tmp_path / "plan.json"
    assert plan("solve", *SMALL, "-o", str(path)).returncode == 0
    return str(path)


def test_the_interval_lies_around_the_time():
    low, high = accuracy().step_seconds_interval
    assert low < 1 < high
    assert step_interval(2.0) == (2 * low, 2 * high)
    assert step_interval(None) is None


@pytest.mark.parametrize("command", ["show", "simulate"])
def test_commands_on_a_plan(command, written):
    assert "80 % interval" in plan(command, written).stdout


def test_estimate_and_solve():
    assert "80 % interval" in plan("estimate", *SMALL, "--tp", "2").stdout
    assert "80 % interval" in plan("solve", *SMALL).stdout


def test_simulate_in_json(written):
    document = json.loads(plan("simulate", written, "--json").stdout)
    low, high = document["step_seconds_interval"]
    assert low < document["step_seconds"] < high


def test_a_sweep_shows_intervals_cost_and_what_is_risky():
    done = plan("estimate", "--model", "llama-2-7b", "--cluster", "a100-80gb", "--gpus", "64,256", "--global-batch-size", "1024",
                "--num-tokens", "2e12", "--price-per-gpu-hour", "2")  # fmt: skip
    assert done.returncode == 0
    assert "80 % interval" in done.stdout and "cost" in done.stdout
    assert "256 GPUs: risky" in done.stdout


def test_compare_and_paradigms():
    made = make_plan()
    run, _ = make_run(made)
    shown = text.show(*results.comparison_view(compare(made, run), run))
    step = next(line for line in shown.splitlines() if line.strip().startswith("step"))
    assert " to " in step
    assert "80 % interval" in plan("paradigms", "--model", "tiny-gpt", "--world-size", "4").stdout


def test_implausible_and_risky_are_flagged():
    made = make_plan()
    inputs, predictions = made.inputs, made.predictions
    time = msgspec.structs.replace(predictions.time, model_flops_utilization=0.66)
    assert any("implausible" in word for word in warnings(inputs, msgspec.structs.replace(predictions, time=time)))
    time = msgspec.structs.replace(predictions.time, model_flops_utilization=0.64)
    memory = msgspec.structs.replace(predictions.memory, total_bytes=round(0.96 * inputs.cluster.gpu.memory_bytes))
    assert ["risky" in word for word in warnings(inputs, msgspec.structs.replace(predictions, time=time, memory=memory))] == [True]
    memory = msgspec.structs.replace(predictions.memory, total_bytes=round(0.94 * inputs.cluster.gpu.memory_bytes))
    assert warnings(inputs, msgspec.structs.replace(predictions, time=time, memory=memory)) == ()


def test_a_plan_says_its_cost_and_energy():
    done = plan("estimate", "--model", "llama-2-7b", "--cluster", "a100-80gb:64", "--dp", "64", "--num-tokens", "1e12", "--price-per-gpu-hour", "2")
    assert "cost" in done.stdout and "MWh" in done.stdout and "GPU-hours" in done.stdout


def test_pages_of_sweeps_and_plans_have_intervals():
    page = sweep_report("A sweep", [SweepPoint(64, 1000.0, 1e6, 0.5, 2**35)])
    assert "80 % interval" in page and "1,150 s" in page
    assert "80 % interval" in report(make_plan("tiny-gpt", tp=2, pp=2, dp=2, m=4, sizes=(4, 2), precision="fp32", runners_up=True))
