"""`plan run` when a rank ends early: one line with the reason, and the exit status of what went wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

from executor.huggingface import to_huggingface
from planner.documents import dumps, write_text
from planner.plan import Plan
from tests.plans import make_plan


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Of two pipeline ranks, in plan.json."""
    found = make_plan(pp=2)
    write_text(tmp_path / "plan.json", dumps(found))
    return found


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "executor.start", str(folder / "plan.json"), "--output", str(folder / "run.json"), "--device", "cpu", *options]


def said(folder: Path, *options: str, **environment: str) -> list[str]:
    """The lines on stderr of a run which its ranks refuse."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"} | environment
    done = subprocess.run(command(folder, *options), capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 2, done.stderr
    assert not (folder / "run.json").exists()
    return done.stderr.strip().splitlines()


def refused(folder: Path, *options: str, **environment: str) -> str:
    """The one line that a run which its ranks refuse ends with."""
    lines = said(folder, *options, **environment)
    assert len(lines) == 1, lines
    return lines[0]


def test_a_run_that_nobody_listens_to_inside_of_another_job_of_torchrun(tmp_path: Path, plan: Plan) -> None:
    script = "from planner.cli import entry; entry()"
    words = [sys.executable, "-c", script, "run", str(tmp_path / "plan.json"), "--steps", "1", "-o", str(tmp_path / "run.json"), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PET_NNODES": "2", "PET_RDZV_CONF": "x"}
    done = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *words], timeout=120, check=False, env=environment)
    assert done.returncode == 0 and (tmp_path / "run.json").exists()


def test_what_every_rank_refuses_is_said_once(tmp_path: Path, plan: Plan) -> None:
    data = tmp_path / "short.txt"
    data.write_text("too short")
    (tmp_path / "tmp").mkdir()
    assert refused(tmp_path, "--data", str(data), TMPDIR=str(tmp_path / "tmp")).startswith("plan: --data: ")
    left = {path.name for path in (tmp_path / "tmp").iterdir()}
    assert not {name for name in left if not name.startswith("torchinductor_")}  # torch's own cache, one for all runs


def test_what_only_the_last_rank_refuses_is_said(tmp_path: Path, plan: Plan) -> None:
    model = plan.inputs.model
    weights = to_huggingface(model, lambda piece: torch.zeros(piece.shape))
    last = max(name for name in weights if f".{model.num_layers - 1}." in name)
    del weights[last]
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    line = refused(tmp_path, "--load", str(folder))
    assert line.startswith("plan: --load: ") and last in line


@pytest.mark.parametrize("degrees", [{"tp": 2, "m": 2}, {"dp": 2, "m": 1}], ids=str)
def test_a_token_outside_the_vocabulary_amid_a_file_ends_every_rank(tmp_path: Path, degrees: dict[str, int]) -> None:
    write_text(tmp_path / "plan.json", dumps(make_plan(**degrees)))  # type: ignore[arg-type]
    tokens = np.zeros(3 << 20, dtype=np.uint16)
    tokens[(1 << 20) + 100 : (2 << 20) - 100] = 60_000
    tokens.tofile(tmp_path / "tokens.bin")
    saved = ["--checkpoint-every", "1", "--checkpoint-folder", str(tmp_path / "saved")]
    lines = said(tmp_path, "--data", str(tmp_path / "tokens.bin"), "--seed", "3", *saved)
    assert re.fullmatch(r"plan: --data: '.*tokens\.bin' is not valid; in step 2, token 60000 is outside the model's vocabulary of \d+, .*", lines[-1])
    assert [line[:7] for line in lines[:-1]] == ["step 1/"]


def test_a_killed_rank_is_named(tmp_path: Path, plan: Plan) -> None:
    with subprocess.Popen(command(tmp_path, "--steps", "100000"), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if line.startswith("step 1/"):
                    break
            ranks = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"]
            assert len(ranks) == 1
            ranks[0].send_signal(signal.SIGKILL)
            rest = process.stderr.read()
        finally:
            process.terminate()
    assert process.returncode == 1 and rest.strip().splitlines()[-1].startswith("plan: rank 1 was ended by SIGKILL")


def heed_signals() -> None:
    """Whatever the tests were started with: nohup, or a shell's background, ignores some."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def ended(folder: Path, number: signal.Signals, arguments: list[str], until: str, *, group: bool = False) -> tuple[int, list[str]]:
    """Sends a signal to `plan` (or to its process group, as a terminal does) when a line of its stderr begins with `until`: its exit status, and
    the lines after that one. Nothing that it had started may be left."""
    launch = [sys.executable, "-c", "from planner.cli import entry; entry()", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"env": environment, "start_new_session": True, "preexec_fn": heed_signals}
    with (folder / "log").open("w") as log, subprocess.Popen(launch, stderr=log, **options) as process:  # type: ignore[call-overload]
        started: list[psutil.Process] = []
        try:
            deadline = time.monotonic() + 60
            while not (said := (folder / "log").read_text()).startswith(until) and f"\n{until}" not in said:
                assert process.poll() is None and time.monotonic() < deadline, said
                time.sleep(0.05)
            started = psutil.Process(process.pid).children(recursive=True)
            assert len(started) > 2
            (os.killpg if group else os.kill)(process.pid, number)
            status = process.wait(40)
            assert not psutil.wait_procs(started, 20)[1]
        finally:
            for left in (process, *started):
                with suppress(psutil.NoSuchProcess):
                    left.kill()
    return status, (folder / "log").read_text()[len(said) :].splitlines()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")
def test_no_rank_outlives_plan_run(tmp_path: Path, plan: Plan, number: signal.Signals) -> None:
    status, _ = ended(tmp_path, number, ["run", str(tmp_path / "plan.json"), "--device", "cpu", "--steps", "100000"], "step 1/")
    assert status == (-number if number == signal.SIGKILL else 128 + number)


@pytest.mark.parametrize(("name", "until"), [("run", "step 1/"), ("calibrate", "2 ranks of a node")])
def test_ctrl_c_is_answered_with_one_line(tmp_path: Path, plan: Plan, name: str, until: str) -> None:
    run = ["run", str(tmp_path / "plan.json"), "--device", "cpu", "--steps", "100000"]
    calibrate = ["calibrate", "--num-gpus", "2", "-o", str(tmp_path / "cluster.json")]
    status, lines = ended(tmp_path, signal.SIGINT, run if name == "run" else calibrate, until, group=True)
    assert status == 1 and [line for line in lines if line and not line.startswith("step ")] == ["plan: interrupted"]
