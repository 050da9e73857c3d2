"""A run that loses a rank is restarted by torchrun and ends as if nothing had happened; two torchrun agents train like one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from plans import make_plan
from test_executor_run import launch

from planner.documents import dumps, write_text
from planner.run import load_run

pytest.importorskip("torch", reason="the executor needs torch")
psutil = pytest.importorskip("psutil", reason="finding the rank to kill needs psutil")

from executor.restart import begin, find_again  # noqa: E402

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
STEPS = 12


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    write_text(path, dumps(make_plan("tiny-gpt", "cpu:2", tp=1, dp=2, m=2, zero_stage=1, precision="fp32", sequence_length=16)))
    return path


@pytest.fixture(scope="module")
def losses(plan_file: Path) -> list[float]:
    """Of an undisturbed run of one torchrun."""
    output = plan_file.with_name("whole.json")
    done = launch(2, [str(plan_file), "--steps", str(STEPS), "-o", str(output)])
    assert done.returncode == 0, done.stderr[-2000:]
    return [step.loss for step in load_run(output).steps]


def rank_process(agent: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process of a rank under a torchrun agent."""
    for child in psutil.Process(agent.pid).children():
        if child.environ().get("RANK") == str(rank):
            return child
    raise AssertionError(f"rank {rank} is not running")


def test_a_killed_rank_costs_nothing_but_time(plan_file: Path, losses: list[float], tmp_path: Path) -> None:
    saved, output = tmp_path / "saved", tmp_path / "run.json"
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.1", "-m", "executor"]
    command += [str(plan_file), "--steps", str(STEPS), "-o", str(output), "--checkpoint-every", "2", "--checkpoint-folder", str(saved)]
    with (tmp_path / "log").open("w+") as log, subprocess.Popen(command, stderr=log, text=True, cwd=ROOT, env=ENVIRONMENT) as agent:
        try:
            deadline = time.monotonic() + 200
            while not any((saved / f"step-{step}").is_dir() for step in range(2, STEPS, 2)):
                assert agent.poll() is None and time.monotonic() < deadline, log.seek(0) or log.read()[-2000:]
                time.sleep(0.005)
            rank_process(agent, 1).send_signal(signal.SIGKILL)
            assert agent.wait(200) == 0, log.seek(0) or log.read()[-2000:]
        finally:
            agent.terminate()
        log.seek(0)
        said = log.read()
    assert "restarted (attempt 2): goes on after step" in said
    found = load_run(output).steps
    assert found[0].step > 0 and found[-1].step == STEPS - 1
    assert [step.loss for step in found] == losses[found[0].step :]


def test_only_the_runs_own_checkpoints_are_gone_back_to(tmp_path: Path) -> None:
    def checkpoint(step: int) -> None:
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / "training.json").write_text("{}")

    assert find_again(tmp_path, 10) is None
    checkpoint(7)
    os.utime(tmp_path / "step-7" / "training.json", (1, 1))
    begin(tmp_path, 2)
    nothing = find_again(tmp_path, 10)
    assert nothing is not None and (nothing.first_step, nothing.checkpoint) == (2, None)
    checkpoint(4)
    checkpoint(12)  # the run's last step
    found = find_again(tmp_path, 10)
    assert found is not None and found.checkpoint == str(tmp_path / "step-4")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def test_two_agents_train_like_one(plan_file: Path, losses: list[float], tmp_path: Path) -> None:
    output, port = tmp_path / "nodes.json", free_port()
    agents = []
    for node in range(2):
        command = [*TORCHRUN, "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "two-agents"]
        command += ["-m", "executor", str(plan_file), "--steps", str(STEPS), "-o", str(output)]
        agents.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT))
    try:
        for agent in agents:
            _, said = agent.communicate(timeout=200)
            assert agent.returncode == 0, said[-2000:]
    finally:
        for agent in agents:
            agent.terminate()
    assert [step.loss for step in load_run(output).steps] == losses
