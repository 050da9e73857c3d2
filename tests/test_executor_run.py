"""Plans run on real process groups: losses against one process, and what the run document says."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from planner.cluster import load_cluster
from planner.documents import dumps, write_text
from planner.model import load_model
from planner.model import replace as with_changes
from planner.plan import (
    Decisions,
    Inputs,
    Memory,
    Plan,
    Predictions,
    SolverReport,
    Time,
    Training,
    check,
    digest,
    even_stages,
    plan_hash,
)
from planner.run import Run, load_actions, load_run

pytest.importorskip("torch", reason="the executor needs torch")


def make_plan(model: str = "tiny-gpt", *, layers: int | None = None, dp: int = 1, tp: int = 1, pp: int = 1, batch: int = 8) -> Plan:
    """A plan without predictions: even stages, micro-batches of one sample."""
    spec = load_model(model)
    if layers is not None:
        spec = with_changes(spec, num_layers=layers)
    inputs = Inputs(
        model=spec,
        cluster=load_cluster(f"cpu:{dp * tp * pp}"),
        training=Training(global_batch_size=batch, sequence_length=16, precision="fp32"),
    )
    decisions = Decisions(
        data_parallel=dp,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        micro_batch_size=1,
        num_microbatches=batch // dp,
        stages=even_stages(spec, "1F1B", pp, 1, "none"),
    )
    check(inputs, decisions)
    solver = SolverReport(
        name="none", status="given", objective_seconds=None, bound_seconds=None, gap_fraction=None, num_candidates=1, num_pruned=0, wall_seconds=0.0
    )
    predictions = Predictions(memory=Memory.of(0, 0, 0), pipeline_ranks=(), time=Time())
    return Plan(inputs=inputs, inputs_hash=digest(inputs), decisions=decisions, predictions=predictions, solver=solver)


def launch(num_ranks: int, arguments: list[str], *, attempts: int = 2) -> subprocess.CompletedProcess[str]:
    """torchrun with `num_ranks` processes; started again once when it dies of a signal (a launch, not a result)."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "-m", "executor"]
    if num_ranks == 1:
        command = [sys.executable, "-m", "executor"]
    folder = Path(__file__).parent.parent
    for _ in range(attempts):
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=240, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        if done.returncode == 0 or "SIGABRT" not in done.stderr:
            break
    return done


def run_plan(plan: Plan, folder: Path, name: str, steps: int) -> Run:
    """The run document of `plan`."""
    write_text(folder / f"{name}.json", dumps(plan))
    output = folder / f"{name}-run.json"
    done = launch(plan.decisions.world_size, [str(folder / f"{name}.json"), "--steps", str(steps), "-o", str(output)])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("step ") == steps
    return load_run(output)


@pytest.fixture(scope="module")
def three_axes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run, Run, Plan]:
    """Ten steps on one process and on dp2 x tp2 x pp2."""
    folder = tmp_path_factory.mktemp("runs")
    plan = make_plan(dp=2, tp=2, pp=2)
    return folder, run_plan(make_plan(), folder, "one", 10), run_plan(plan, folder, "eight", 10), plan


def test_three_axes_give_the_losses_of_one_process(three_axes: tuple[Path, Run, Run, Plan]) -> None:
    _, one, eight, _ = three_axes
    assert one.steps[-1].loss < one.steps[0].loss - 0.3
    for left, right in zip(one.steps, eight.steps, strict=True):
        assert abs(left.loss - right.loss) < 1e-5
        assert left.gradient_norm is not None and right.gradient_norm is not None
        assert math.isclose(left.gradient_norm, right.gradient_norm, rel_tol=1e-4)


def test_run_document_says_where_each_rank_stands(three_axes: tuple[Path, Run, Run, Plan]) -> None:
    folder, _, eight, plan = three_axes
    assert eight.plan_hash == plan_hash(plan)
    assert not eight.rehearsed
    assert [(rank.coordinates.pp, rank.coordinates.dp, rank.coordinates.tp) for rank in eight.ranks] == [
        (pp, dp, tp) for pp in range(2) for dp in range(2) for tp in range(2)
    ]
    timeline = load_actions(folder / "eight-run.json", eight)
    assert timeline is not None
    forwards = [event for event in timeline.events if event.kind == "F"]
    assert len(forwards) == 8 * plan.decisions.num_microbatches
    assert all(event.end >= event.start >= 0 for event in timeline.events)
    assert all(0 < rank.bubble_fraction < 1 for rank in eight.ranks)


def test_states_take_sixteen_bytes_a_parameter(three_axes: tuple[Path, Run, Run, Plan]) -> None:
    _, one, eight, plan = three_axes
    count = plan.inputs.model.num_parameters
    memory = one.ranks[0].memory
    assert memory.weights_bytes == memory.gradients_bytes == 4 * count
    assert memory.optimizer_bytes == pytest.approx(8 * count, rel=1e-3)
    assert memory.total_bytes > 16 * count
    first = [rank for rank in eight.ranks if rank.coordinates.pp == 0]
    assert {rank.memory.weights_bytes for rank in first} == {first[0].memory.weights_bytes}
    assert first[0].memory.weights_bytes < 4 * count / 3


def test_sent_bytes_follow_the_ring_formulas(three_axes: tuple[Path, Run, Run, Plan]) -> None:
    _, one, eight, plan = three_axes
    assert one.ranks[0].communication_bytes == {}
    row = 16 * plan.inputs.model.hidden_size * 4
    for rank in eight.ranks:
        assert rank.communication_bytes["dp"] == rank.memory.gradients_bytes  # 2 (n - 1) / n of it with n = 2
        assert rank.communication_bytes["pp"] >= plan.decisions.num_microbatches * row


def test_thirty_layers_on_four_stages_run_thirty_layers(tmp_path: Path) -> None:
    one = run_plan(make_plan(layers=30, batch=4), tmp_path, "one", 1)
    four = run_plan(make_plan(layers=30, pp=4, batch=4), tmp_path, "four", 1)
    assert abs(one.steps[0].loss - four.steps[0].loss) < 1e-5
    tied_copy = 4 * one_model_table()
    assert sum(rank.memory.weights_bytes for rank in four.ranks) == one.ranks[0].memory.weights_bytes + tied_copy


def one_model_table() -> int:
    return load_model("tiny-gpt").token_embedding_parameters


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--steps", "0"], "--steps: '0' is not valid"),
        (["--data", "/nowhere/tokens.bin"], "--data"),
        (["--dropout", "1.5"], "--dropout"),
        (["--output", "/nowhere/run.json"], "--output"),
    ],
)
def test_wrong_options_are_one_line_and_exit_status_2(tmp_path: Path, arguments: list[str], expected: str) -> None:
    write_text(tmp_path / "plan.json", dumps(make_plan()))
    done = launch(1, [str(tmp_path / "plan.json"), *arguments])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr


def test_wrong_world_size_and_wrong_plan_are_refused(tmp_path: Path) -> None:
    write_text(tmp_path / "plan.json", dumps(make_plan(dp=2)))
    done = launch(1, [str(tmp_path / "plan.json")])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the plan needs 2 processes" in done.stderr
    broken = json.loads(dumps(make_plan()))
    broken["decisions"]["tensor_parallel"] = "two"
    write_text(tmp_path / "broken.json", json.dumps(broken))
    done = launch(1, [str(tmp_path / "broken.json")])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "decisions.tensor_parallel" in done.stderr
