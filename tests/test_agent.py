"""`plan run` when a rank ends early: one line with the reason, and the exit status of what went wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

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


def refused(folder: Path, *options: str) -> str:
    """The one line that a run which its ranks refuse ends with."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(command(folder, *options), capture_output=True, text=True, timeout=240, check=False, env=environment)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert not (folder / "run.json").exists()
    return lines[0]


def test_what_every_rank_refuses_is_said_once(tmp_path: Path, plan: Plan) -> None:
    data = tmp_path / "short.txt"
    data.write_text("too short")
    assert refused(tmp_path, "--data", str(data)).startswith("plan: --data: ")


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
