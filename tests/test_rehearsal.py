"""Rehearsals: real processes and messages, compute replaced by its predicted time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from planner.cluster import load_cluster
from planner.documents import dumps
from planner.estimate import predict
from planner.model import load_model
from planner.paradigms import as_plan
from planner.plan import Decisions, Inputs, Training, make_stages, replace, stage_ranks
from planner.run import load_actions, load_run
from planner.schedule import plan_actions
from planner.timeline import bubble_fraction, simulate

ROOT = Path(__file__).parent.parent
COMPUTE = ("F", "B", "I", "W")


def make(schedule: str, p: int, virtual: int, sizes: list[int]):
    model = replace(load_model("tiny-gpt"), num_layers=sum(sizes) - 2)
    inputs = Inputs(
        model=model, cluster=load_cluster(f"cpu:{p}"), training=Training(global_batch_size=4, sequence_length=64, precision="fp32")
    )
    stages = make_stages(sizes, ["none"] * len(sizes), stage_ranks(schedule, p, virtual))
    decisions = Decisions(
        data_parallel=1, tensor_parallel=1, pipeline_parallel=p, micro_batch_size=1, num_microbatches=4, schedule=schedule,
        num_virtual_stages=virtual, stages=stages,
    )  # fmt: skip
    return as_plan(inputs, decisions, predict(inputs, decisions))


CASES = pytest.mark.parametrize(
    ("schedule", "p", "virtual", "sizes"),
    [("1F1B", 2, 1, [3, 9]), ("ZBVZeroBubble", 2, 2, [3, 3, 3, 3]), ("GPipe", 4, 1, [3, 3, 3, 3]), ("Naive", 4, 1, [3, 3, 3, 3])],
)


def rehearse(tmp_path: Path, plan):
    """The run document and timeline of a rehearsal."""
    (tmp_path / "plan.json").write_text(dumps(plan))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(plan.decisions.world_size), "-m", "executor", str(tmp_path / "plan.json")]
    command += ["--steps", "2", "--rehearse", "-o", str(tmp_path / "run.json")]
    for _ in range(2):
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr[-2000:]
    run = load_run(tmp_path / "run.json")
    timeline = load_actions(tmp_path / "run.json", run)
    assert timeline is not None
    return run, timeline


@CASES
def test_a_rehearsal_runs_the_schedule_and_takes_its_time(tmp_path: Path, schedule: str, p: int, virtual: int, sizes: list[int]) -> None:
    from executor.rehearse import LEAST_ACTION_SECONDS, script

    plan = make(schedule, p, virtual, sizes)
    run, timeline = rehearse(tmp_path, plan)
    assert run.rehearsed and timeline.source == "rehearsed"
    lines = script(plan)
    assert run.environment["rehearsal_scale"] == lines.scale
    for rank, actions in enumerate(plan_actions(plan.decisions)):
        mine = sorted((event for event in timeline.events if event.rank == rank), key=lambda event: event.start)
        done = [(event.kind, event.stage, event.microbatch) for event in mine if event.kind in COMPUTE]
        assert done == [tuple(action) for action in actions if action.kind in COMPUTE]
    for event in timeline.events:
        if event.kind in COMPUTE:
            assert event.end - event.start >= lines.seconds[event.kind, event.stage] >= LEAST_ACTION_SECONDS * 0.999
    assert json.loads((tmp_path / "run.json").read_text())["ranks"][0]["memory"]["total_bytes"] == 0


@pytest.mark.slow
@CASES
def test_a_rehearsal_has_the_bubble_of_its_schedule(tmp_path: Path, schedule: str, p: int, virtual: int, sizes: list[int]) -> None:
    """The measured timeline, walked again with its own measured times, has the bubble that was measured: so what the actions wait for
    is what the simulator says. Time that a loaded machine takes between two actions is in neither, so this wants a quiet one."""
    plan = make(schedule, p, virtual, sizes)
    _, timeline = rehearse(tmp_path, plan)
    took = {(event.kind, event.stage, event.microbatch): event.end - event.start for event in timeline.events}
    starts = {(e.kind, e.stage, e.microbatch): e.start for e in timeline.events}
    ends = {(e.kind, e.stage, e.microbatch): e.end for e in timeline.events}

    def transit(action) -> float:
        receive = ("RECV_F", action.stage + 1) if action.kind == "SEND_F" else ("RECV_B", action.stage - 1)
        place = (*receive, action.microbatch)
        return max(0.0, ends[place] - max(starts[tuple(action)], starts[place]))

    again = simulate(
        plan_actions(plan.decisions), lambda action: took[tuple(action)], transit, blocking_send_seconds=lambda action: took[tuple(action)]
    )
    assert bubble_fraction(again) == pytest.approx(bubble_fraction(timeline), abs=0.04)
