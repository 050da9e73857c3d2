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


@pytest.mark.parametrize(
    ("schedule", "p", "virtual", "sizes"),
    [("1F1B", 2, 1, [3, 9]), ("ZBVZeroBubble", 2, 2, [3, 3, 3, 3]), ("GPipe", 4, 1, [3, 3, 3, 3]), ("Naive", 4, 1, [3, 3, 3, 3])],
)
def test_a_rehearsal_has_the_bubble_of_its_schedule(tmp_path: Path, schedule: str, p: int, virtual: int, sizes: list[int]) -> None:
    """The measured timeline, walked again with its own measured times, has the bubble that was measured: so the order of the
    actions and what they wait for are those of the simulator, however slow the machine is."""
    from executor.rehearse import LEAST_ACTION_SECONDS, script

    plan = make(schedule, p, virtual, sizes)
    (tmp_path / "plan.json").write_text(dumps(plan))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(p), "-m", "executor"]
    command += [str(tmp_path / "plan.json"), "--steps", "2", "--rehearse", "-o", str(tmp_path / "run.json")]
    for _ in range(2):
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr[-2000:]
    run = load_run(tmp_path / "run.json")
    timeline = load_actions(tmp_path / "run.json", run)
    assert run.rehearsed and timeline is not None and timeline.source == "rehearsed"
    lines = script(plan)
    assert run.environment["rehearsal_scale"] == lines.scale
    took = {(event.kind, event.stage, event.microbatch): event.end - event.start for event in timeline.events}
    for (kind, stage, _), seconds in took.items():
        if kind in COMPUTE:
            assert seconds >= lines.seconds[kind, stage] >= LEAST_ACTION_SECONDS * 0.999
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
    assert json.loads((tmp_path / "run.json").read_text())["ranks"][0]["memory"]["total_bytes"] == 0
